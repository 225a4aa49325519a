"""The ladder from many guided dense steps to few sparse ones, on a tiny untrained host."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hone_blade import decomposition
from hone_blade.config import BladeConfig, Comparison, DistillConfig, ReproduceConfig, StudentsConfig, TDMConfig
from hone_blade.distill import Distillation, host_task, rollout_clips
from hone_blade.inputs import find_student
from hone_blade.models import attach
from hone_blade.reproduce import reproduce
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_video.clips import random_labels
from hone_video.host import Host, load_host, save_host
from hone_video.host_config import HostConfig

TINY = HostConfig(
    frames=4, height=16, width=16, layers=1, heads=1, head_dim=32, ffn_dim=32, text_dim=16, steps=2, solver="euler",
    guidance=2.0, guidance_interval=(0.6, 1.0),
)  # fmt: skip
TDM = TDMConfig(student_steps=3, teacher_guidance=2.0)
STUDENTS = StudentsConfig(tdm=TDM, comparison=Comparison(block=16, density=0.75, pool=4, samples=4))
SPARSE = BladeConfig(block=16, max_density=0.5, samples=4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A host and a student of it; weights by which it listens to text and time, and draws, begin as zeros."""
    folder = tmp_path_factory.mktemp("hosts")
    made, generator = Host.untrained(TINY), torch.Generator().manual_seed(0)
    for weight in made.transformer.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    host = save_host(made, folder / "host.safetensors")
    cfg = DistillConfig(attention=SPARSE, tdm=TDM, lora_rank=2, steps=1, batch=2, lr=1e-2)
    student = Distillation(cfg, host_task(load_host(path=host), TDM), folder / "c.pt")
    student.update()
    return host, student.export(folder / "lora.safetensors")


@pytest.fixture
def start(files, tmp_path, monkeypatch):
    monkeypatch.setattr(decomposition, "TEACHER_STEPS", 4)

    def start(lora=True, name="run"):
        host, student = files
        cfg = ReproduceConfig(
            claim="decomposition", students=STUDENTS, prompts=3, seeds=2, batch=2, host=host,
            lora=student if lora else None,
        )  # fmt: skip
        with Run.start(package="hone-blade", verb="reproduce", config=cfg, out=tmp_path / name) as run:
            run.device, run.quiet = "cpu", True
            return reproduce(cfg, run)

    return start


def test_every_rung_changes_one_thing(files, start):
    report = start()
    values = {(row.variant, row.metric): row for row in report.rows}
    names = list(dict.fromkeys(row.variant for row in report.rows))
    assert names == [
        "4 guided steps", "4 steps", "3 steps", "3 steps of the rollout", "3 sparse steps", "student, 3 sparse steps",
        "student, 3 dense steps",
    ]  # fmt: skip
    # Steps at noise levels 1, .9, .75 are guided, that at .5 is not.
    assert [values[name, "nfe"].value for name in names] == [7, 4, 3, 3, 3, 3, 3]
    densities = [values[name, "density"].value for name in names]
    assert [density == 1 for density in densities] == [True] * 4 + [False, False, True]
    dense, sparse = (values[name, "attention_gflop"].value for name in ("3 steps", "student, 3 sparse steps"))
    pairs = 4 * 64**2 * 32 * 3 / 1e9
    assert dense == pytest.approx(pairs)
    assert sparse == pytest.approx(pairs * densities[5] + 2 * 16**2 * 32 * 3 / 1e9)
    for before, name in pairwise(names):
        change = values[name, "accuracy"].value - values[before, "accuracy"].value
        assert values[name, "accuracy_change"].value == pytest.approx(change)
        assert values[name, "accuracy"].n == 6
    text = str(report)
    assert "sparse attention: " in text
    assert "no student" not in text
    assert (report.path / "figures" / "decomposition.svg").stat().st_size > 5000


def test_a_rung_draws_with_its_weights_and_attention(files, monkeypatch):
    monkeypatch.setattr(decomposition, "TEACHER_STEPS", 4)
    host, student = files
    cfg = ReproduceConfig(claim="decomposition", students=STUDENTS, host=host, lora=student)
    teacher, pupil = load_host(path=host), load_host(path=host)
    attention = decomposition.student_host(pupil, student)
    assert attention == SPARSE
    labels = random_labels(2, torch.Generator().manual_seed(0))
    ladder = {rung.change: rung for rung in decomposition.rungs(cfg, teacher, attention)}
    plain = rollout_clips(load_host(path=host), labels, TDM, seed=5)
    assert torch.equal(ladder["the rollout as sampler"].draw(teacher, labels, 5), plain)
    text, noise = teacher.encode_labels(labels), teacher.noise(2, 5)
    guided = {change: teacher.sample(text, noise, steps=4 if change == "no guidance" else 3, guidance=1.0)
              for change in ("no guidance", "fewer steps")}  # fmt: skip
    for change, clips in guided.items():
        assert torch.equal(ladder[change].draw(teacher, labels, 5), clips)
    assert (ladder[""].draw(teacher, labels, 5) - guided["no guidance"]).abs().max() > 1e-3
    assert (ladder["dense attention"].draw(pupil, labels, 5) - plain).abs().max() > 1e-3
    fresh = load_host(path=host)
    with attach(fresh.transformer, SPARSE):
        sparse = rollout_clips(fresh, labels, TDM, seed=5)
    with attach(teacher.transformer, ladder["sparse attention"].attention):
        assert torch.equal(ladder["sparse attention"].draw(teacher, labels, 5), sparse)


def test_without_a_student_the_ladder_ends_before_it_and_a_stopped_run_goes_on(start, monkeypatch):
    real, calls = decomposition._draw, []

    def draw(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(decomposition, "_draw", draw)
    with pytest.raises(KeyboardInterrupt):
        start(lora=False)
    report = start(lora=False)
    assert len(calls) == 5 * 2 + 1
    assert "no student: pass" in str(report)


def test_a_student_is_looked_for_and_only_where_it_is_read(tmp_path):
    cfg = ReproduceConfig(claim="decomposition", lora=tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="does not exist; expected a"):
        find_student(cfg)
    with pytest.raises(ValueError, match="lora is for claim decomposition; claim masks reads none"):
        replace(cfg, claim="masks")
