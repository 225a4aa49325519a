import numpy as np
import pytest
import torch
from hone_core.runs import Run
from hone_knockout.data import generated_items
from hone_knockout.evaluate import SweepConfig, sweep
from hone_knockout.plots import clip_sheet, sweep_chart
from PIL import Image


@pytest.mark.parametrize("settings", [("global1",), ("global2",), ("window",), ("global1", "global2", "window")])
def test_charts(host, tmp_path, settings):
    cfg = SweepConfig(settings=settings, width=2, stride=1, batch=8, style="text")
    with Run.start(package="hone-knockout", verb="eval", config=cfg, out=tmp_path / "run") as run:
        sweep(host.model, host.processor, generated_items(8, host.config.clip), cfg, run, quiet=True)
    picture = Image.open(sweep_chart(run.results(), tmp_path / "chart.png", title="t"))
    assert picture.width > 400
    assert len(picture.convert("L").histogram()) == 256
    assert sweep_chart(run.results(), tmp_path / "chart.svg").read_text().startswith("<?xml")


def test_results_without_a_sweep(tmp_path):
    with pytest.raises(ValueError, match="expected rows of a sweep"):
        sweep_chart({"rows": []}, tmp_path / "x.png")


def test_sheet_shows_the_frames(tmp_path):
    clip = torch.zeros(3, 3, 20, 20, dtype=torch.uint8)
    clip[1, 0] = 255
    path = clip_sheet([clip, clip], [["a", "!b"], ["c"]], tmp_path / "sheet.png", scale=2)
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).flatten(0, 1)
    red = (pixels == torch.tensor([255, 0, 0])).all(1).sum()
    # Two middle frames of 40 x 40 screen pixels, but for their edges.
    assert 2 * 36 * 36 <= int(red) <= 2 * 42 * 42
