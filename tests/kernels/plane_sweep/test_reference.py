import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.plane_sweep import sweep_planes


def shifted(half):
    """Two views side by side: at inverse depth s a pixel of the first falls 2 s to the right in the second."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(4.0) + half, torch.arange(6.0) + half, indexing="ij")
    ray = torch.stack([columns, rows, torch.ones_like(rows)]).flatten(1).double().expand(2, 1, 3, 24)
    shift = torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]], dtype=torch.float64).view(2, 1, 3, 1)
    return features, torch.tensor([[1], [0]]), ray, shift


@pytest.mark.parametrize("half", [0.0, 0.5])
def test_a_shift_by_hand(half):
    features, others, ray, shift = shifted(half)
    inverse = torch.tensor([0.5, 0.25, 4.0], dtype=torch.float64).view(1, 3, 1, 1).expand(2, 3, 1, 1)
    cost = sweep_planes(features, others, ray, shift, inverse, half=half)
    whole = torch.zeros(4, 6, dtype=torch.float64)
    whole[:, :5] = (features[0, :, :, :5] * features[1, :, :, 1:]).sum(0) / 3**0.5
    assert_close(cost[0, 0], whole, atol=1e-12, rtol=0)
    # Half a pixel: the mean of two, of which outside the picture one is zero.
    beside = torch.nn.functional.pad(features[1], (0, 1))
    between = (features[0] * (beside[..., :-1] + beside[..., 1:]) / 2).sum(0) / 3**0.5
    assert_close(cost[0, 1], between, atol=1e-12, rtol=0)
    assert not cost[:, 2].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ray": torch.zeros(2, 1, 3, 5)}, r"ray must be \[2, 1, 3, 24\]"),
        ({"inverse_depth": torch.ones(2, 3, 4, 1)}, r"inverse_depth must be \[2, D, 4, 6\] or \[2, D, 1, 1\]"),
        ({"half": 0.25}, "expected half 0 or 0.5"),
        ({"backend": "gluon"}, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    features, others, ray, shift = shifted(0.0)
    arguments = {"features": features, "others": others, "ray": ray, "shift": shift, "half": 0.0}
    arguments["inverse_depth"] = torch.ones(2, 3, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        sweep_planes(**arguments | change)
