import pytest
from hone_core.runs import Run
from hone_knockout.demo import DemoConfig, DemoReport, demo


def test_demo(host, tmp_path):
    cfg = DemoConfig(items=16, batch=8, max_drop=100.0)

    def start():
        return Run.start(package="hone-knockout", verb="demo", config=cfg, out=tmp_path / "run")

    with start() as run:
        report = demo(cfg, run, host, quiet=True)
    assert report.chart.stat().st_size > 10_000
    assert report.sheet.stat().st_size > 5_000
    assert "exit" in report.recipe
    assert "logits of exit and LV-K differ by at most" in report.timing
    rows = {row["metric"]: row["value"] for row in report.sweep.rows}
    assert rows["exit_gap"] < 1e-4
    assert {row["variant"] for row in report.sweep.rows} >= {"baseline", "global2 LV 0-4", "global2 VT random 0-4"}
    with start() as run:
        assert str(DemoReport.of(run)) == str(report)


def test_bad_settings():
    with pytest.raises(ValueError, match="at least 8 questions"):
        DemoConfig(items=4)
