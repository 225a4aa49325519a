from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hone_core.runs import Run
from hone_knockout import sample
from hone_knockout.config import GenerateConfig, Knockout, KnockoutConfig
from hone_knockout.data import generated_items
from hone_knockout.sample import GenerateReport, ask, look
from hone_lm.tiny import tiny


@pytest.fixture
def case(host, tmp_path):
    item = generated_items(1, host.config.clip)[0]
    np.save(tmp_path / "clip.npy", item.clip.frames.permute(0, 2, 3, 1).numpy())
    return item, {"model": "host", "video": tmp_path / "clip.npy", "ask": item.question, "style": "text"}


@pytest.fixture
def answer(host, tmp_path):
    """Ask in a run folder of its own, and see that the folder tells the same again."""

    def once(cfg, config):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        with Run.start(package="hone-knockout", verb="generate", config=cfg, out=folder) as run:
            report = ask(host.model, host.processor, cfg, config, run)
        with Run.start(package="hone-knockout", verb="generate", config=cfg, out=folder) as run:
            assert run.done
            assert str(GenerateReport.of(run)) == str(report)
        return report

    return once


def test_options_beside_the_baseline(answer, case):
    item, where = case
    knockout = Knockout(kind="LV", layers=tuple(range(5)))
    report = answer(GenerateConfig(options=item.options, **where), KnockoutConfig(knockouts=(knockout,)))
    assert set(report.answers) == {"baseline", "LV 0-4"}
    before, after = report.answers.values()
    assert sum(before) == pytest.approx(1)
    assert before != pytest.approx(after, abs=1e-3)
    assert "square" in str(report)
    assert report.options == item.options


def test_written_answer_with_exit(answer, case):
    report = answer(GenerateConfig(max_new_tokens=3, **case[1]), KnockoutConfig(exit=3))
    assert list(report.answers) == ["baseline", "exit 3"]
    assert all(isinstance(text, str) for text in report.answers.values())
    assert all(value > 0 for value in report.milliseconds.values())


def test_gap_between_exit_and_knockout(answer, case, monkeypatch):
    window = Knockout(kind="VT", layers=(0, 1))
    cfg, both = GenerateConfig(max_new_tokens=1, rounds=1, **case[1]), KnockoutConfig(knockouts=(window,), exit=3)
    report = answer(cfg, both)
    assert report.exit_gap < 1e-3
    assert "exit and LV-K in the same layers differ by at most" in str(report)
    # An exit that also took something else from the text would show.
    attach = sample.attach
    monkeypatch.setattr(
        sample, "attach", lambda model, config, **_: attach(model, KnockoutConfig(exit=1) if config.exit else config)
    )
    assert answer(cfg, both).exit_gap > 0.01
    monkeypatch.undo()
    assert answer(cfg, KnockoutConfig(knockouts=(window,))).exit_gap is None


def test_times_are_medians_of_warm_turns_that_alternate(host, answer, case, monkeypatch):
    """By this clock the first turn of each is slow, as on a cold machine, and the exit saves time in decoding."""
    clock, turns, attach = [0.0], [], sample.attach

    def noted(model, config, **more):
        turns.append(config.label)
        return attach(model, config, **more)

    def tick(module, args, kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            clock[0] += 1.0 if len(turns) <= 2 else 0.020
        else:
            clock[0] += 0.005 if turns[-1] == "baseline" else 0.003

    monkeypatch.setattr(sample, "attach", noted)
    monkeypatch.setattr("hone_core.timing.time.perf_counter", lambda: clock[0])
    hook = host.model.register_forward_pre_hook(tick, with_kwargs=True)
    try:
        cfg = GenerateConfig(max_new_tokens=2, **case[1])
        report = answer(cfg, KnockoutConfig(exit=3))
    finally:
        hook.remove()
    # What follows is the gap to LV-K, which is not timed.
    assert turns[: 2 * (1 + cfg.rounds)] == ["baseline", "exit 3"] * (1 + cfg.rounds)
    assert report.prefill_milliseconds == pytest.approx({"baseline": 20, "exit 3": 20})
    assert report.decode_milliseconds == pytest.approx({"baseline": 5, "exit 3": 3})
    assert report.milliseconds == pytest.approx({"baseline": 25, "exit 3": 23})
    assert "25 ms: prefill 20, decode 5" in str(report)


def test_look(host, answer, case):
    layout = look(host.model, host.processor, GenerateConfig(**case[1]))
    assert layout.num_frames == 4
    cut = GenerateConfig(tokens_per_frame=3, **case[1])
    assert look(host.model, host.processor, cut).num_frames == 12
    knockout = KnockoutConfig(knockouts=(Knockout(kind="VT", layers=(0,)),), exit=3)
    report = answer(replace(cut, max_new_tokens=1, rounds=1), knockout)
    assert report.layout.num_frames == 12
    with pytest.raises(ValueError, match="tokens_per_frame=5 does not divide a run of 36"):
        look(host.model, host.processor, replace(cut, tokens_per_frame=5))


def test_sampled_frames_are_told_from_those_of_the_layout(host, case, tmp_path):
    layout = look(host.model, host.processor, GenerateConfig(**case[1], frames=32))
    # The clip has only four.
    assert layout.sampled == 4
    assert "4 frames sampled" in str(layout)
    assert "fused" not in str(layout)
    model, processor = tiny("qwen2_5_vl", layers=1)
    np.save(tmp_path / "long.npy", np.random.default_rng(0).integers(0, 255, (20, 56, 56, 3), dtype=np.uint8))
    for frames, left in ((8, 4), (7, 4)):
        cfg = GenerateConfig(model="m", video=tmp_path / "long.npy", ask="What?", frames=frames)
        layout = look(model, processor, cfg)
        assert (layout.sampled, layout.num_frames) == (frames, left)
        assert f"{frames} frames sampled, 2 fused into each of the 4" in str(layout)
        assert "expected" not in str(layout)


def test_bad_questions():
    where = {"model": "m", "video": Path("v")}
    for values, message in (
        ({"ask": " "}, "question is empty"),
        ({"ask": "?", "options": ("a",)}, "one option is no choice"),
        ({"ask": "?", "frames": 0}, "must be positive"),
        ({"ask": "?", "rounds": 0}, "rounds must be positive"),
        ({"ask": "?", "tokens_per_frame": 0}, "tokens_per_frame must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerateConfig(**where, **values)
