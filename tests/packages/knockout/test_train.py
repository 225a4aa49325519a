import dataclasses

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_knockout.data import draw_scenes
from hone_knockout.host import build_host, load_host
from hone_knockout.train import TrainConfig, TrainReport, Turns, _check_batches, grade_host, train_host


@pytest.fixture
def cfg(small):
    return TrainConfig(host=small, steps=4, batch=4, warmup_steps=1, eval_every=2, eval_clips=8, log_every=1)


def start(cfg, out):
    return Run.start(package="hone-knockout", verb="train-host", config=cfg, out=out, seed=cfg.seed)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_makes_a_host(cfg, tmp_path, optimizer):
    cfg = dataclasses.replace(cfg, optimizer=optimizer)
    with start(cfg, tmp_path / "run") as run:
        report = train_host(cfg, run, device="cpu", command="train", quiet=True)
    assert set(report.accuracies) == {"shape", "place", "order", "direction"}
    assert not report.passed
    assert load_host(path=report.checkpoint).config == cfg.host
    with start(cfg, tmp_path / "run") as run:
        assert run.done
        assert TrainReport.of(run) == report


def test_a_stopped_run_goes_on(cfg, tmp_path, monkeypatch):
    whole = dataclasses.replace(cfg, steps=6, eval_every=100)
    with start(whole, tmp_path / "a") as run:
        expected = train_host(whole, run, device="cpu", quiet=True)
    calls = []
    original = grade_host

    def stop(*args, **kwargs):
        calls.append(1)
        raise KeyboardInterrupt

    # The first part is cut off after its last step, before the export is graded.
    monkeypatch.setattr("hone_knockout.train.grade_host", stop)
    with pytest.raises(KeyboardInterrupt), start(whole, tmp_path / "b") as run:
        train_host(whole, run, device="cpu", quiet=True)
    monkeypatch.setattr("hone_knockout.train.grade_host", original)
    with start(whole, tmp_path / "b") as run:
        assert run.resumed
        again = train_host(whole, run, device="cpu", quiet=True)
    assert again.steps == expected.steps
    a, b = (load_host(path=report.checkpoint).model.state_dict() for report in (expected, again))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoint_of_another_config(cfg, tmp_path):
    with start(cfg, tmp_path / "a") as run:
        train_host(cfg, run, device="cpu", checkpoint=tmp_path / "state.pt", quiet=True)
    other = dataclasses.replace(cfg, batch=2)
    with pytest.raises(CheckpointError, match="another config"), start(other, tmp_path / "b") as run:
        train_host(other, run, device="cpu", checkpoint=tmp_path / "state.pt", quiet=True)


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


def test_batches_that_differ_from_the_processor_s_are_refused(host, monkeypatch):
    _check_batches(host, torch.device("cpu"))
    monkeypatch.setattr("hone_knockout.train.pixel_values", lambda video: video / 255)
    with pytest.raises(RuntimeError, match="pixels of a clip differ"):
        _check_batches(host, torch.device("cpu"))


def test_grades_of_chance(host):
    grades = grade_host(host, clips=32, seed=0)
    assert all(0 <= value < 0.6 for value in grades.values())


def test_rate_falls_to_zero_at_the_budget(small, tmp_path):
    from hone_knockout.train import _TrainState

    cfg = TrainConfig(host=small, steps=100, warmup_steps=10, decay=0.25)
    state = _TrainState(cfg, build_host(small), tmp_path / "x.pt", torch.device("cpu"))
    assert state.rate() == pytest.approx(0.1)
    state.step = 80
    assert state.rate() == 1.0
    state.falling = (80, 0.8)
    state.step = 90
    assert state.rate() == pytest.approx(0.5)
    state.step = 100
    assert state.rate() == pytest.approx(0.0)


def test_second_loss_fades_to_nothing(small, tmp_path):
    from hone_knockout.train import _TrainState

    cfg = TrainConfig(host=small, steps=100, aux_fade=0.5)
    state = _TrainState(cfg, build_host(small), tmp_path / "x.pt", torch.device("cpu"))
    assert state.aux_weight() == 1.0
    state.fading, state.step = 40, 50
    assert state.aux_weight() == pytest.approx(0.5)
    state.step = 60
    assert state.aux_weight() == 0.0


def test_bad_settings():
    for values, message in (
        ({"minutes": 0}, "minutes must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"decay": 1.5}, "are shares"),
        ({"aux_layer": 12}, "aux_layer must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**values)
