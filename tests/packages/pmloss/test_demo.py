import pytest
from hone_pmloss.config import DemoConfig, EvalConfig
from hone_pmloss.demo import ARMS, HOSTS, demo
from hone_pmloss.evaluate import evaluate, prepare
from hone_splat.files import read_ply


def test_the_demo_leaves_clouds_that_the_report_reads(start):
    cfg = DemoConfig(size=16, views=2, targets=14, steps=12, rooms=1)
    with start(cfg) as run:
        report = demo(cfg, run)
    values = {(row.variant, row.metric): row.value for row in report.rows}
    assert {variant for variant, _ in values} == {*ARMS, *(f"host_{arm}" for arm in HOSTS)}
    assert all(values[f"host_{arm}", "psnr_between"] > 17 for arm in HOSTS)
    assert values["pm_normalised", "band_error"] < values["photometric", "band_error"]
    assert report.picture.is_file()
    assert report.hosts.is_file()
    assert "with PM-Loss" in str(report)
    assert len(read_ply(report.splats["pm"])) == 2 * 16 * 16
    assert len(read_ply(report.splats["host_pm"])) == 2 * 64 * 64
    cfg = prepare(EvalConfig(ply=report.splats["pm"], truth=report.truth, flying=0.1))
    with start(cfg, "eval") as run:
        rows = {(row.metric, row.split): row.value for row in evaluate(cfg, run).rows}
    assert rows["flying", ""] == pytest.approx(values["pm", "flying"], abs=0.01)
