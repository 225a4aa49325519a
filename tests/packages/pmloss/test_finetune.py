import dataclasses
from pathlib import Path

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from hone_pmloss import finetune
from hone_pmloss.config import HostConfig, PMLossConfig, TrainConfig
from hone_pmloss.models import tiny
from hone_splat.cameras import unproject
from hone_splat.chunks import ChunkScene, write_chunks
from hone_splat.rooms import Rooms
from safetensors.torch import load_file

FRAMES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two rooms as chunks, and files of their points in a frame of their own."""
    folder = tmp_path_factory.mktemp("rooms")
    rooms = Rooms.draw([0, 1])
    views, distance = rooms.views(torch.arange(FRAMES).expand(2, -1), 32)
    points = 0.5 * unproject(distance, views.cam_to_world, views.intrinsics_norm, "distance") + 3
    scenes = []
    for row in range(2):
        parts = (part[row] for part in (views.image_01, views.cam_to_world, views.intrinsics_norm))
        scenes.append(ChunkScene.of(f"room{row}", *parts))
        save_safetensors({"points": points[row], "frames": torch.arange(FRAMES)}, folder / f"room{row}.safetensors")
    write_chunks(scenes, folder / "chunks")
    return folder


@pytest.fixture
def cfg(folder, monkeypatch):
    small = HostConfig(channels=(8, 8, 32), layers=1, candidates=8, size=32)
    monkeypatch.setattr(finetune, "tiny", lambda *, seed: tiny(small, seed=seed))
    return TrainConfig(
        chunks=folder / "chunks", lpips=0.0, size=(32, 32), context=(2, 3), targets=2, gap=(6, 9), flip=0.0, draws=1,
        steps=4, log_every=1, checkpoint_seconds=-1.0, model="tiny", teacher="precomputed", points=str(folder),
    )  # fmt: skip


def run_to_the_end(cfg, start, name):
    cfg = finetune.prepare(cfg)
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


def test_without_the_term_no_teacher_is_asked(cfg, start, monkeypatch):
    monkeypatch.setattr(finetune, "PMLoss", None)
    cfg = dataclasses.replace(cfg, pm=PMLossConfig(weight=0.0), points="", steps=1)
    run, _ = run_to_the_end(cfg, start, "alone")
    assert '"pm"' not in (run.path / "metrics.jsonl").read_text()


def test_what_is_missing_is_named(cfg, tmp_path):
    for changes, message in (
        ({"model": "other"}, "model must be one of"),
        ({"points": ""}, "--points, or --weight 0"),
        ({"flip": 0.5}, "give --flip 0"),
        ({"start": Path("x")}, "leave --start out"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(cfg, **changes)
    with pytest.raises(CheckpointError, match="no weights at"):
        finetune.prepare(dataclasses.replace(cfg, points=str(tmp_path / "absent")))
    with pytest.raises(CheckpointError, match="no weights at"):
        finetune.prepare(dataclasses.replace(cfg, model="mvsplat", start=tmp_path / "absent"))
    with pytest.raises(FileNotFoundError):
        finetune.prepare(dataclasses.replace(cfg, chunks=tmp_path))
