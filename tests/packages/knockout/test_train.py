import dataclasses
import shutil

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_knockout.config import TrainConfig, TrainHostConfig
from hone_knockout.data import draw_scenes
from hone_knockout.host import load_host
from hone_knockout.train import Schedule, TrainReport, Turns, grade_host, train


@pytest.fixture
def cfg(small):
    return TrainConfig(host=small, steps=4, batch=4, warmup_steps=1, eval_every=2, eval_clips=8, log_every=1)


def start(cfg, out):
    return Run.start(
        package="hone-knockout",
        verb="train-host",
        config=cfg,
        out=out,
        seed=cfg.seed,
        device="cpu",
        quiet=True,
        command="train",
    )


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_makes_a_host(cfg, tmp_path, optimizer):
    cfg = dataclasses.replace(cfg, optimizer=optimizer)
    with start(cfg, tmp_path / "run") as run:
        report = train(cfg, run)
    assert set(report.result) == {"shape", "place", "order", "direction"}
    assert not report.passed
    assert load_host(path=report.checkpoint).config == cfg.host
    with start(cfg, tmp_path / "run") as run:
        assert run.done
        assert TrainReport.of(run) == report


def test_a_stopped_run_goes_on(cfg, tmp_path, monkeypatch):
    whole = dataclasses.replace(cfg, steps=6, eval_every=100)
    with start(whole, tmp_path / "a") as run:
        expected = train(whole, run)
    calls = []
    original = grade_host

    def stop(*args, **kwargs):
        calls.append(1)
        raise KeyboardInterrupt

    # The first part is cut off after its last step, before the export is graded.
    monkeypatch.setattr("hone_knockout.train.grade_host", stop)
    with pytest.raises(KeyboardInterrupt), start(whole, tmp_path / "b") as run:
        train(whole, run)
    monkeypatch.setattr("hone_knockout.train.grade_host", original)
    with start(whole, tmp_path / "b") as run:
        assert run.resumed
        again = train(whole, run)
    assert again.steps == expected.steps
    a, b = (load_host(path=report.checkpoint).model.state_dict() for report in (expected, again))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoint_of_another_config(cfg, tmp_path):
    with start(cfg, tmp_path / "a") as run:
        train(cfg, run)
    state = run.artifacts / "checkpoint.pt"
    other = dataclasses.replace(cfg, batch=2)
    with start(other, tmp_path / "b") as run:
        shutil.copy(state, run.artifacts)
        with pytest.raises(CheckpointError, match="another configuration: it differs in batch"):
            train(other, run)


def test_packed_questions_are_whole_and_answers_follow_them(host):
    generator = torch.Generator().manual_seed(0)
    scenes = draw_scenes(16, host.config.clip, generator)
    turns = Turns(host, torch.device("cpu"))
    ids, marks, answers = turns.pack(scenes, generator)
    lines = turns.lines(scenes, torch.zeros(16, dtype=torch.bool))
    swapped = turns.lines(scenes, torch.ones(16, dtype=torch.bool))
    for row in range(16):
        tail = ids[row, len(turns.head) :].tolist()
        expected = {(*q[row].tolist(), int(a[row])) for _, q, a in lines + swapped}
        found, begin = [], 0
        for mark in (marks[row] - len(turns.head)).tolist():
            found.append(tuple(tail[begin : mark + 2]))
            begin = mark + 2
        assert begin == len(tail)
        assert len(set(found)) == 6
        assert set(found) <= expected
        assert [turn[-1] for turn in found] == answers[row].tolist()


def test_batches_that_differ_from_the_processor_s_are_refused(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr("hone_knockout.train.pixel_values", lambda video: video / 255)
    with start(cfg, tmp_path / "run") as run, pytest.raises(RuntimeError, match="pixels of a clip differ"):
        train(cfg, run)
    assert not (run.path / "artifacts").exists()


def test_grades_of_chance(host):
    grades = grade_host(host, clips=32, seed=0)
    assert all(0 <= value < 0.6 for value in grades.values())


def test_rate_falls_to_zero_at_the_budget(small):
    schedule = Schedule(TrainConfig(host=small, steps=100, warmup_steps=10, decay=0.25))
    assert schedule.rate(0, 0) == pytest.approx(0.1)
    assert schedule.rate(80, 0.8) == 1.0
    schedule.advance(80, 0.8)
    assert schedule.rate(90, 0.9) == pytest.approx(0.5)
    assert schedule.rate(100, 1.0) == pytest.approx(0.0)


def test_second_loss_fades_to_nothing_and_then_the_rate_falls(small):
    schedule = Schedule(TrainConfig(host=small, steps=1000, warmup_steps=1, aux_fade=0.5, decay=0.25))
    assert schedule.aux_weight(40) == 1.0
    schedule.learned(40, 0.04)
    assert schedule.aux_weight(50) == pytest.approx(0.5)
    schedule.learned(50, 0.05)
    assert schedule.rate(59, 0.059) == 1.0
    assert schedule.aux_weight(60) == 0.0
    schedule.learned(60, 0.06)
    # It falls over a quarter of the steps before.
    assert schedule.rate(67.5, 0.0675) == pytest.approx(0.5, abs=0.01)
    assert schedule.rate(75, 0.075) == pytest.approx(0.0)
    again = Schedule(schedule.cfg)
    again.load_state_dict(schedule.state_dict())
    assert (again.rate(70, 0.07), again.aux_weight(50)) == (schedule.rate(70, 0.07), schedule.aux_weight(50))


def test_sizes():
    small = TrainHostConfig(size="small", steps=3, seed=2).training
    assert (small.batch, small.warmup_steps, small.host.width) == (48, 50, 64)
    assert (small.steps, small.seed) == (3, 2)
    assert TrainHostConfig().training == TrainConfig()
    with pytest.raises(ValueError, match="minutes, a time budget, or steps"):
        TrainHostConfig(minutes=1, steps=1)
    with pytest.raises(ValueError, match="minutes must be positive"):
        TrainHostConfig(minutes=0)


def test_bad_settings():
    for values, message in (
        ({"minutes": 0}, "minutes must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"decay": 1.5}, "are shares"),
        ({"aux_layer": 12}, "aux_layer must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**values)
