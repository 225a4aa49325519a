import numpy as np
import pytest
from hone_video.layer_maps import draw_layer_maps

METRICS = {"density": "density of pairs", "clamped": "clamped rows", "recall": "recall"}


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, as matplotlib's figures."""
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        drawn.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def cells(axes):
    return axes.images[0].get_array().tolist()


def test_places_and_colours(figures, tmp_path):
    rows = [
        {"step": 0, "model": 0, "layer": 0, "density": 0.0, "clamped": 1.0, "recall": None},
        {"step": 1, "model": 0, "layer": 1, "density": 1.0, "clamped": 0.0, "recall": None},
    ]
    assert draw_layer_maps(rows, METRICS, tmp_path / "x.svg", title="two layers") == tmp_path / "x.svg"
    density, clamped, _ = figures[0].axes
    # Layers down, steps across; a layer that ran dense in a step is blank, a metric that no row has has no panel.
    assert cells(density) == [[0.0, None], [None, 1.0]]
    assert cells(clamped) == [[1.0, None], [None, 0.0]]
    assert density.get_title() == "density of pairs"
    assert density.get_xlabel() == "denoising step"
    assert density.images[0].get_clim() == clamped.images[0].get_clim() == (0, 1)
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="no rows"):
        draw_layer_maps([], METRICS, tmp_path / "y.png")


def test_calls_are_averaged_and_a_second_model_stands_below(figures, tmp_path):
    values = {(0, 0): (0.2, 0.4), (0, 1): (0.5, 0.5), (1, 0): (0.6, 0.8), (1, 1): (0.9, 0.9)}
    rows = [
        {"step": 0, "model": model, "layer": layer, "density": value}
        for (model, layer), calls in values.items()
        for value in calls
    ]
    draw_layer_maps(rows, {"density": ""}, tmp_path / "x.png")
    np.testing.assert_allclose(np.array(cells(figures[0].axes[0])), [[0.3], [0.5], [0.7], [0.9]])


def test_errors_share_a_logarithmic_scale(figures, tmp_path):
    row = {"step": 0, "model": 0, "layer": 0, "density": 0.5, "small": 1e-3, "large": 1e-1}
    metrics = {"density": "density", "small": "small", "large": "large"}
    draw_layer_maps([row], metrics, tmp_path / "x.png", errors=("small", "large"))
    density, small, large, *bars = figures[0].axes
    assert density.images[0].get_clim() == (0, 1)
    assert small.images[0].norm is large.images[0].norm
    assert small.images[0].get_clim() == (1e-3, 1e-1)
    assert small.images[0].norm(1e-2) == pytest.approx(0.5)
    assert len(bars) == 2
    # no error at all has no logarithm
    draw_layer_maps([row | {"small": 0.0, "large": 0.0}], metrics, tmp_path / "z.png", errors=("small", "large"))
    assert figures[1].axes[1].images[0].get_clim() == (0, 1)


@pytest.mark.parametrize(("steps", "layers"), [(1, 1), (2, 1), (8, 6), (50, 30)])
def test_ticks_are_steps_and_layers(steps, layers, figures, tmp_path):
    row = {"step": steps - 1, "model": 0, "layer": layers - 1, "density": 0.5, "clamped": 0.5, "recall": None}
    draw_layer_maps([row], METRICS, tmp_path / "x.png")
    for axes in figures[0].axes[:2]:
        for ticks, count in ((axes.get_xticks(), steps), (axes.get_yticks(), layers)):
            assert ticks[0] == 0
            assert all(tick == int(tick) and tick < count for tick in ticks)
            assert len(ticks) == count if count <= 8 else 4 < len(ticks) <= 8
