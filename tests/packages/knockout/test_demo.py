from contextlib import contextmanager

import pytest
from hone_core.runs import Run
from hone_core.statistics import Paired
from hone_core.timing import Timing
from hone_knockout.config import DemoConfig
from hone_knockout.data import generated_items
from hone_knockout.demo import DemoReport, demo, time_recipe
from hone_knockout.recommend import Recipe


def test_demo(host_file, tmp_path):
    cfg = DemoConfig(items=16, batch=8, max_drop=100.0, host=host_file)

    def start():
        return Run.start(
            package="hone-knockout", verb="demo", config=cfg, out=tmp_path / "run", device="cpu", quiet=True
        )

    with start() as run:
        report = demo(cfg, run)
    assert report.chart.stat().st_size > 10_000
    assert report.sheet.stat().st_size > 5_000
    assert "exit" in report.recipe
    assert "logits of exit and LV-K differ by at most" in report.timing
    assert "prefill of 16 prompts" in report.timing
    assert "20th and 80th percentiles" in report.timing
    rows = {row.metric: row.value for row in report.rows}
    assert rows["exit_gap"] < 1e-4
    timed = {row.variant: row for row in report.rows if row.metric == "prefill"}
    assert list(timed) == ["baseline", "VT 0-1 + exit 2"]
    assert all((row.n, row.spread > 0) == (20, True) for row in timed.values())
    # Two of five layers see the video, and all of them the text.
    assert 1 < rows["flop_bound"] < 5 / 2
    assert {row.variant for row in report.rows} >= {"baseline", "global2 LV 0-4", "global2 VT random 0-4"}
    with start() as run:
        assert str(DemoReport.of(run)) == str(report)


def test_timed_turns_alternate(host, tmp_path, monkeypatch):
    """By this clock the machine is three times as slow in the second half of the turns, for whoever runs then."""
    attached, calls = [], []

    @contextmanager
    def attach(model, config):
        attached.append(config)
        yield
        attached.pop()

    def measure(fn, **_):
        calls.append(bool(attached))
        return Timing(ms_p20=0, ms_p50=(1 + bool(not attached)) * (1 if len(calls) <= 22 else 3), ms_p80=0, n=1)

    monkeypatch.setattr("hone_knockout.demo.attach", attach)
    monkeypatch.setattr("hone_knockout.demo.measure", measure)
    pair = Paired(change=0.0, interval=(0.0, 0.0), to_wrong=0, to_right=0, p=1.0)
    recipe = Recipe(
        exit=2, window=0, max_drop=1.0, baseline=1.0, interval=(1.0, 1.0), exit_change=pair, window_change=None,
        chosen_on=4, reported_on=4,
    )  # fmt: skip
    with Run.start(package="hone-knockout", verb="demo", out=tmp_path / "run") as run:
        time_recipe(host, generated_items(4, host.config.clip), recipe, run)
        before, after = [row.value for row in run.rows if row.metric == "prefill"]
    assert calls == [False, True] * 22
    assert before == 2 * after


def test_bad_settings():
    with pytest.raises(ValueError, match="at least 8 questions"):
        DemoConfig(items=4)
