import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from hone_pmloss import finetune, inputs
from hone_pmloss.config import PMLossConfig, TrainConfig
from hone_pmloss.models import tiny
from hone_splat import training
from hone_splat.cameras import unproject
from hone_splat.chunks import ChunkScene, ChunkSet, write_chunks
from hone_splat.depthsplat import DEPTHSPLATS, DepthSplat
from hone_splat.ranges import HostRange
from hone_splat.rendering import render
from hone_splat.rooms import Rooms
from hone_splat.vit import ViTConfig
from safetensors.torch import load_file

from .train_worker import SMALL

FRAMES = 12
SHORT = {
    "lpips": 0.0, "size": (32, 32), "context": (2, 3), "targets": 2, "gap": (6, 9), "flip": 0.0, "draws": 1,
    "log_every": 1, "checkpoint_seconds": 0.0, "model": "tiny", "teacher": "precomputed",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two rooms as chunks, and files of their points in a frame of their own."""
    folder = tmp_path_factory.mktemp("rooms")
    write_rooms(folder, range(2))
    return folder


def write_rooms(folder, seeds):
    rooms = Rooms.draw(seeds)
    views, distance = rooms.views(torch.arange(FRAMES).expand(len(seeds), -1), 32)
    points = 0.5 * unproject(distance, views.cam_to_world, views.intrinsics_norm, "distance") + 3
    scenes = []
    for row in range(len(seeds)):
        parts = (part[row] for part in (views.image_01, views.cam_to_world, views.intrinsics_norm))
        scenes.append(ChunkScene.of(f"room{row}", *parts))
        save_safetensors({"points": points[row], "frames": torch.arange(FRAMES)}, folder / f"room{row}.safetensors")
    write_chunks(scenes, folder / "chunks")


@pytest.fixture
def cfg(folder, monkeypatch):
    monkeypatch.setattr(finetune, "tiny", lambda *, seed: tiny(SMALL, seed=seed))
    return TrainConfig(chunks=folder / "chunks", points=str(folder), steps=4, **SHORT)


def run_to_the_end(cfg, start, name):
    cfg = inputs.find_trained(cfg)
    with start(cfg, name) as run:
        return run, finetune.train(cfg, run)


def test_a_stopped_run_goes_on_exactly_and_the_term_changes_what_is_learned(cfg, folder, start, monkeypatch):
    cfg = dataclasses.replace(cfg, cache=folder / "cache", pm=PMLossConfig(weight=0.5))
    run, report = run_to_the_end(cfg, start, "whole")
    assert str(report).startswith(f"weights  {report.weights}")
    assert (run.path / "metrics.jsonl").read_text().count('"pm"') == 4
    # With one draw a scene, each is asked for once.
    assert len(list((folder / "cache").iterdir())) == 2

    class Stopping(finetune.PMLoss):
        def __call__(self, *args, **kwargs):
            seen.append(1)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return super().__call__(*args, **kwargs)

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "PMLoss", Stopping)
        with pytest.raises(KeyboardInterrupt), start(cfg, "cut") as cut:
            finetune.train(cfg, cut)
    _, again = run_to_the_end(cfg, start, "cut")
    first, second = (load_file(one.weights) for one in (report, again))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    other = load_file(
        run_to_the_end(dataclasses.replace(cfg, pm=PMLossConfig(weight=0.0)), start, "control")[1].weights
    )
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
    tiny_host = finetune.tiny(seed=0)
    tiny_host.load_state_dict(first)


def test_depthsplat_compares_all_views_in_training_as_released(cfg, monkeypatch):
    thin = {"vit": ViTConfig(width=96, heads=6), "depth_channels": (16, 24, 32, 40), "depth_width": 16}
    built = lambda kind: DepthSplat(dataclasses.replace(DEPTHSPLATS[kind], **thin))  # noqa: E731
    monkeypatch.setattr(finetune, "build_published", built)
    monkeypatch.setattr(finetune, "load_published", lambda path, kind: (built(kind), None))
    names = ("depthsplat-oct-pmloss-256x448", "depthsplat-oct-base-256x448", "depthsplat-head-small-256x256")
    for name, nearest in zip(names, (None, None, 3), strict=True):
        assert DEPTHSPLATS[name].nearest == 3
        for begun in (None, Path("x.ckpt")):
            host = finetune._host(dataclasses.replace(cfg, model=name, start=begun))
            assert host.config.nearest == nearest


def test_without_the_term_no_teacher_is_asked(cfg, start, monkeypatch):
    monkeypatch.setattr(finetune, "PMLoss", None)
    cfg = dataclasses.replace(cfg, pm=PMLossConfig(weight=0.0), points="", steps=1)
    run, _ = run_to_the_end(cfg, start, "alone")
    assert '"pm"' not in (run.path / "metrics.jsonl").read_text()


def test_what_is_missing_is_named(cfg, tmp_path):
    for changes, message in (
        ({"model": "other"}, "no host 'other'"),
        ({"points": ""}, "--points, or --weight 0"),
        ({"flip": 0.5}, "give --flip 0"),
        ({"start": Path("x")}, "leave --start out"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(cfg, **changes)
    with pytest.raises(CheckpointError, match="no weights at"):
        inputs.find_trained(dataclasses.replace(cfg, points=str(tmp_path / "absent")))
    with pytest.raises(CheckpointError, match="no weights at"):
        inputs.find_trained(dataclasses.replace(cfg, model="mvsplat", start=tmp_path / "absent"))
    with pytest.raises(FileNotFoundError):
        inputs.find_trained(dataclasses.replace(cfg, chunks=tmp_path))


@pytest.mark.slow
def test_two_processes_step_by_the_mean_of_their_scenes_and_go_on_after_one_fails(tmp_path):
    write_rooms(tmp_path, range(4))
    chunks = ChunkSet(tmp_path / "chunks")
    cfg = TrainConfig(chunks=tmp_path / "chunks", points=str(tmp_path), steps=2, pm=PMLossConfig(weight=0.5), **SHORT)
    worker = Path(__file__).with_name("train_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    command += ["train", "--chunks", tmp_path / "chunks", "--points", tmp_path, "--steps", "2", "--weight", "0.5"]
    command += ["--lpips", "0", "--size", "32", "32", "--context", "2", "3", "--targets", "2", "--gap", "6", "9"]
    command += ["--flip", "0", "--draws", "1", "--log-every", "1", "--checkpoint-seconds", "0", "--model", "tiny"]
    command += ["--teacher", "precomputed", "--out", tmp_path / "run", "--device", "cpu", "--quiet"]

    def launch(command=command):
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240)

    # The second step's scene of one process has no points at first.
    lost = tmp_path / f"{training.scene_of(chunks, 3, 0)}.safetensors"
    lost.rename(tmp_path / "away")
    done = launch()
    assert done.returncode != 0
    assert "there are no points of scene" in done.stderr
    done = launch([sys.executable, *command[command.index(str(worker)) :]])
    assert done.returncode != 0
    assert "begun by 2 processes, of which each draws a scene for a step; got 1" in done.stderr
    (tmp_path / "away").rename(lost)
    done = launch()
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
    ]

    host = tiny(SMALL, seed=0).train()
    optimizer = torch.optim.AdamW(host.parameters(), cfg.lr, weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, cfg.lr, total_steps=12, pct_start=cfg.rise, cycle_momentum=False
    )
    limits = HostRange(0.4, 12.0, (32, 32), None, "")
    teacher = finetune.PMLoss(finetune.PrecomputedTeacher(tmp_path), cfg.pm)
    for step in range(2):
        losses = []
        for sample in (2 * step, 2 * step + 1):
            drawn = training._draw(chunks, cfg, limits, sample)
            output, asked = host(drawn.context), drawn.targets
            picture = render(output.gaussians, asked.cam_to_world, asked.intrinsics_norm, (32, 32), near=0.08)
            error, _ = training.picture_loss(picture.image_01[0], asked.image_01[0], cfg, None)
            named = finetune.name_views(drawn.context, [finetune.Shots(drawn.name, drawn.frames)])
            losses.append(error + 0.5 * teacher(output.gaussians.means, named).loss.mean())
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        torch.nn.utils.clip_grad_norm_(host.parameters(), cfg.clip)
        optimizer.step()
        schedule.step()
    begun, found = tiny(SMALL, seed=0).state_dict(), load_file(tmp_path / "run" / "artifacts" / "host.safetensors")
    for name, value in host.state_dict().items():
        moved = (value - begun[name]).norm()
        assert (found[name] - value).norm() <= 0.02 * moved, name
    assert any(not torch.equal(found[name], value) for name, value in begun.items())
