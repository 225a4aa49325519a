import itertools

import pytest
import torch
from hone_core.plots import finish
from hone_pmloss import plots
from hone_pmloss.config import DemoConfig, EvalConfig
from hone_pmloss.demo import ARMS, HOSTS, METRICS, _places, compared, demo
from hone_pmloss.evaluate import evaluate
from hone_pmloss.inputs import find_evaluated
from hone_splat.files import read_ply
from matplotlib.backends.backend_agg import FigureCanvasAgg


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
    for arm in ("pm", "pm_normalised"):
        assert f"\n{compared(values, arm)}\n" in str(report)
    assert len(read_ply(report.splats["pm"])) == 2 * 16 * 16
    assert len(read_ply(report.splats["host_pm"])) == 2 * 64 * 64
    cfg = find_evaluated(EvalConfig(ply=report.splats["pm"], truth=report.truth, flying=0.1))
    with start(cfg, "eval") as run:
        rows = {(row.metric, row.split): row.value for row in evaluate(cfg, run).rows}
    assert rows["flying", ""] == pytest.approx(values["pm", "flying"], abs=0.01)


def test_what_is_worse_than_pictures_alone_is_said_first():
    alone = dict(zip(METRICS, (0.2, 0.2, 0.2, 20.0, 15.0), strict=True))
    arm = dict(zip(METRICS, (0.4, 0.3, 0.1, 19.0, 15.0), strict=True))
    found = {("photometric", name): value for name, value in alone.items()}
    worse = found | {("pm", name): value for name, value in arm.items()}
    wanted = "with PM-Loss, against pictures alone: worse flying, error, PSNR between; better at edges"
    assert compared(worse, "pm") == wanted
    same = found | {("pm", name): value for name, value in alone.items()}
    assert compared(same, "pm").endswith(": the same")


def test_the_columns_of_clouds_are_named(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "finish", lambda figure, **words: (finish(figure, **words), figures.append(figure)))
    names = _places(torch.tensor([8, 14, 17, 33, 40]))
    assert names[1:4] == ["4 frames before", "1 frame before", "1 frame after"]
    arm = (torch.rand(6, 3), torch.rand(5, 3, 4, 4))
    plots.clouds({"true": arm, "found": arm}, torch.rand(6, 3), tmp_path / "clouds.png", views=names, title="a room")
    axes = figures[0].axes
    # Of five views four are drawn.
    drawn = ["points from above", *(names[at] for at in (0, 1, 3, 4))]
    assert [axis.get_title() for axis in axes] == [*drawn, *[""] * 5]
    FigureCanvasAgg(figures[0]).draw()
    boxes = [axis.title.get_window_extent() for axis in axes[:5]]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
