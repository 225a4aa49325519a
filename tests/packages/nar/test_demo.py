import pytest
import torch
from hone_nar.config import DemoConfig
from hone_nar.data import to_image
from hone_nar.demo import demo
from hone_nar.plots import unfinished
from PIL import Image


def test_a_sheet_a_gif_and_a_row_for_each(untrained, start, tmp_path):
    cfg = DemoConfig(host=untrained, limit=2)
    with start(cfg, "demo", tmp_path / "run") as run:
        report = demo(cfg, run)
    assert report.sheet.stat().st_size > 1000
    with Image.open(report.growth) as gif:
        # A frame of each pass of the slower.
        assert gif.n_frames > 50
    passes = {row.variant: row.value for row in report.rows if row.metric == "passes"}
    assert passes == {"nar": 15, "raster": 64, "right-only": 15, "below-only": 15}
    # Of two digits a distance of sets says nothing: the demo measures none, and shows no empty column.
    title, *lines = str(report).splitlines()
    assert title.split() == ["bits/token", "accuracy", "passes", "ms/image"]
    assert [line.split()[0] for line in lines[:4]] == list(passes)
    assert all(len(line.split()) == 5 for line in lines[:4])


@pytest.mark.slow
def test_clips_of_the_packaged_host(start, tmp_path):
    cfg = DemoConfig(data="shapes", limit=2)
    with start(cfg, "demo", tmp_path / "run") as run:
        report = demo(cfg, run)
    found = {(row.variant, row.metric): row.value for row in report.rows}
    assert (found["nar", "passes"], found["raster", "passes"]) == (18, 256)
    # Of held-out clips; chance is 4 bits.
    assert found["raster", "bits_per_token"] < found["nar", "bits_per_token"] < 0.4
    assert report.growth.stat().st_size > 1000


def test_places_that_are_not_drawn_yet_are_blue():
    drawn = torch.zeros(8, 8, dtype=torch.bool)
    drawn[0, 1] = True
    picture = unfinished(to_image(torch.full((1, 64), 8))[0], drawn)
    assert picture[:, 0, 1].tolist() == [0.5, 0.5, 0.5]
    assert picture[2, 5, 5] > picture[0, 5, 5]
