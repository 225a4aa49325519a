import numpy as np
import pytest
from hone_blade.plots import accuracy_chart
from matplotlib.image import imread


def results(accuracies):
    rows = []
    for variant, value in accuracies.items():
        accuracy = {"metric": "accuracy", "value": value, "interval": [value - 0.1, value + 0.1]}
        rows.append({**accuracy, "variant": variant, "n": 8})
        rows.append({"metric": "psnr", "variant": variant, "value": 20.0, "n": 8})
        rows.append({"metric": "density", "variant": variant, "value": 0.25, "n": 1})
    return {"rows": rows}


def test_chart_is_drawn_from_results(tmp_path):
    path = accuracy_chart(results({"dense": 0.9, "asa": 0.8}), tmp_path / "chart.png")
    picture = imread(path)[..., :3]
    dense = np.isclose(picture, [0x4C / 255, 0x56 / 255, 0x6A / 255], atol=0.01).all(-1)
    asa = np.isclose(picture, [0, 0x72 / 255, 0xB2 / 255], atol=0.01).all(-1)
    assert dense.sum() > 1000
    # ASA has a bar in both panels, dense in the first only
    columns = np.nonzero(asa)[1]
    assert columns.min() < picture.shape[1] / 2 < columns.max()
    assert np.nonzero(dense)[1].max() < picture.shape[1] / 2
    with pytest.raises(ValueError, match="rows named accuracy"):
        accuracy_chart({"rows": []}, tmp_path / "none.png")
