import numpy as np
import pytest
import torch
from hone_core.plots import FAULT, INK, PAPER, Sheet, drawing, enlargement, error_bars, finish, to_pixels, wrap

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.image import imread


def color(name):
    return tuple(round(255 * value) for value in to_rgb(name))


def has_color(picture, name):
    return bool((np.abs(picture.astype(int) - color(name)).max(-1) <= 2).any())


def chart(path):
    with drawing(path, 3, 2) as figure:
        axes = figure.subplots()
        (line,) = axes.plot([0, 1], [0, 1])
        axes.bar(0, 0.5, yerr=error_bars(0.5, (0.25, 1.0)))
        finish(figure, title="a title", note="10 clips")
    return axes, line


def test_charts_have_one_look_whatever_the_user_s_settings(tmp_path):
    chart(tmp_path / "plain.png")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 20, "lines.linewidth": 9}):
        axes, _ = chart(tmp_path / "own.png")
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "own.png").read_bytes()
    assert not axes.spines["top"].get_visible()
    picture = (imread(tmp_path / "plain.png")[..., :3] * 255).round().astype(int)
    assert picture.shape == (300, 450, 3)
    assert tuple(picture[0, 0]) == color(PAPER)
    assert has_color(picture, INK)


def test_an_svg_is_the_same_each_time(tmp_path):
    chart(tmp_path / "a.svg")
    chart(tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()


def test_a_chart_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), drawing(tmp_path / "a.png", 3, 2):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_error_bars():
    assert error_bars(0.5, (0.25, 1.0)) == [[0.25], [0.5]]
    assert error_bars(0.5, (0.25, 1.0), scale=100) == [[25.0], [50.0]]
    assert error_bars(0.5, None) == [[0.0], [0.0]]
    # rounding may leave the value outside its interval: a length is not negative
    assert error_bars(0.5, (0.6, 0.7))[0] == [0.0]


def test_pixels_of_floats_and_bytes():
    image = torch.tensor([0.0, 0.5, 2.0]).view(3, 1, 1).expand(3, 4, 5)
    assert to_pixels(image).shape == (4, 5, 3)
    assert to_pixels(image)[0, 0].tolist() == [0, 128, 255]
    assert to_pixels(torch.full((3, 2, 2), 7, dtype=torch.uint8))[0, 0].tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match=r"must be \[3, height, width\]; got \[1, 4, 5\]"):
        to_pixels(image[:1])


def test_images_are_enlarged_to_what_a_person_sees():
    assert [enlargement(side) for side in (20, 32, 96, 480)] == [5, 3, 1, 1]
    assert enlargement(30, least=61) == 3


def test_lines_fit_their_width():
    words = "which appears first , the red circle or the blue square ?"
    lines = wrap(words, 160)
    assert " ".join(lines) == words
    assert len(lines) > 1
    assert len(wrap(words, 160, size=26)) > len(lines)
    assert len(wrap(words, 160, bold=True)[0]) < len(lines[0])
    assert wrap("", 100) == []
    assert wrap("unbreakable", 1) == ["unbreakable"]
    sheet = Sheet(160, 20 * len(lines))
    for row, line in enumerate(lines):
        sheet.text(0, 20 * row + 10, line)
    # nothing reaches the right edge, where a line that is too long would be cut
    assert (sheet.draw()[:, -1] == 255).all()


def test_a_sheet_keeps_the_pixels_of_its_images(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    sheet = Sheet(61, 40)
    sheet.text(2, 10, "price $5 and $6")
    sheet.text(2, 28, "!wrong")
    sheet.image(40, 20, image, scale=3)
    picture = sheet.draw()
    assert picture.shape == (40, 62, 3)
    assert np.array_equal(picture[20:35:3, 40:61:3], image)
    assert np.array_equal(picture[22:35:3, 42:61:3], image)
    assert has_color(picture[:20], INK)
    assert not has_color(picture[:20], FAULT)
    assert has_color(picture[20:, :40], FAULT)
    path = sheet.save(tmp_path / "sheet.png")
    assert np.array_equal((imread(path)[..., :3] * 255).round().astype(np.uint8), picture)
    with pytest.raises(ValueError, match=r"21 x 15 pixels at \(50, 20\) does not fit on a sheet of 62 x 40"):
        sheet.image(50, 20, image, scale=3)
