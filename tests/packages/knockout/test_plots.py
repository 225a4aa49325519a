import math

import numpy as np
import pytest
import torch
from hone_core.plots import FRAME_PX
from hone_knockout.plots import clip_sheet, plot, sweep_chart
from PIL import Image

SETTINGS = ("global1", "global2", "window")


def rows(*settings):
    """Rows of a sweep of four layers, as results.json holds them."""
    made = []
    for setting in settings:
        for kind in ("LV",) if setting == "global1" else ("LV", "VT"):
            for first in range(0, 4, 4 if setting == "global2" else 1):
                labels = {"setting": setting, "kind": kind, "first": first, "last": 3, "layer_ratio": first / 4}
                labels["last"] = first if setting == "window" else 3
                for split in ("all", "order"):
                    common = {"labels": labels, "split": split, "n": 8}
                    made.append({"metric": "performance_ratio", "value": 0.5 + first / 8, **common})
                    value = {"value": first / 8 - 0.5, "interval": [first / 8 - 0.6, first / 8 - 0.4]}
                    made.append({"metric": "accuracy_change", **value, **common})
    return made


def drawn(path):
    """Text of an SVG: matplotlib notes each one beside its outlines."""
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("global1",), ["LV-K after layer i"]),
        (("global2",), ["in all layers"]),
        (("window",), ["in a window of layers", "by kind of question, points"]),
        (SETTINGS, ["LV-K after layer i", "in all layers", "in a window of layers", "by kind of question, points"]),
    ],
    ids=["global1", "global2", "window", "all"],
)
def test_a_panel_per_setting(tmp_path, settings, said):
    chart = drawn(sweep_chart(rows(*settings), tmp_path / "chart.svg", title="a title"))
    assert "a title" in chart
    assert "8 questions, bars and bands: 95 %" in chart
    for title in ("LV-K after layer i", "in all layers", "in a window of layers", "by kind of question, points"):
        assert (f"<!-- {title} -->" in chart) == (title in said)


def test_the_chart_is_as_wide_as_a_page_and_shows_the_data(tmp_path):
    picture = Image.open(sweep_chart(rows(*SETTINGS), tmp_path / "a.png"))
    assert 1200 <= picture.width <= 1600
    changed = [row | {"value": row["value"] - 0.1} for row in rows(*SETTINGS)]
    other = Image.open(sweep_chart(changed, tmp_path / "b.png"))
    assert picture.tobytes() != other.tobytes()
    again = Image.open(sweep_chart(rows(*SETTINGS), tmp_path / "c.png"))
    assert picture.tobytes() == again.tobytes()


def test_results_without_a_sweep(tmp_path):
    with pytest.raises(ValueError, match="expected rows of a sweep"):
        sweep_chart([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="which run"):
        plot()


@pytest.mark.parametrize("frames", [3, 8])
def test_sheet_shows_the_frames_as_they_are(tmp_path, frames):
    clip = torch.zeros(frames, 3, 20, 20, dtype=torch.uint8)
    clip[1, 0] = 255
    picture = Image.open(clip_sheet([clip, clip], [["a", "!b"], ["c"]], tmp_path / "sheet.png")).convert("RGB")
    assert 1200 <= picture.width <= 1500
    pixels = torch.from_numpy(np.array(picture)).flatten(0, 1)
    red = int((pixels == torch.tensor([255, 0, 0])).all(1).sum())
    # Two whole frames, enlarged alike.
    side = math.isqrt(red // 2)
    assert red == 2 * side**2
    assert side % 20 == 0
    assert side >= FRAME_PX
