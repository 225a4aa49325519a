import math

import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.column_mass import column_mass


def test_by_hand():
    # Two keys, logits ln 3 and 0 for the last row; the first row sees the first key alone.
    q = torch.tensor([[1.0], [1.0]], dtype=torch.float64).view(1, 1, 2, 1)
    k = torch.tensor([[math.log(3)], [0.0]], dtype=torch.float64).view(1, 1, 2, 1)
    got = column_mass(q, k, torch.tensor([[0, 1]]))
    assert_close(got.mass, torch.tensor([[1.75, 0.25]], dtype=torch.float64))
    assert got.seen.tolist() == [[2, 1]]
    last = column_mass(q, k, torch.tensor([[-1, 1]]), scale=2.0)
    assert_close(last.mass, torch.tensor([[0.9, 0.1]], dtype=torch.float64))
    assert last.seen.tolist() == [[1, 1]]


@pytest.mark.parametrize("earlier", [0, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_brute_force(padded, earlier):
    q, k = torch.randn(2, 4, 9 - earlier, 3, dtype=torch.float64), torch.randn(2, 2, 9, 3, dtype=torch.float64)
    rows = torch.tensor([[0, 4, 8], [3, 8, -1]]).clamp(max=8 - earlier)
    real = torch.rand(2, 9) < 0.7 if padded else None
    got = column_mass(q, k, rows, real=real)
    for b in range(2):
        mass, seen = [0.0] * 9, [0] * 9
        for row in [r for r in rows[b].tolist() if r >= 0]:
            columns = [j for j in range(row + earlier + 1) if real is None or real[b, j]]
            for j in columns:
                seen[j] += 1
            for h in range(4):
                weights = [math.exp(float(q[b, h, row] @ k[b, h // 2, j]) / math.sqrt(3)) for j in columns]
                for j, weight in zip(columns, weights, strict=True):
                    mass[j] += weight / sum(weights) / 4
        assert_close(got.mass[b], torch.tensor(mass, dtype=torch.float64))
        assert got.seen[b].tolist() == seen


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_opcheck():
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 1, 5, 16)
    real = torch.tensor([[False, True, True, True, True]])
    for mask in (None, real):
        arguments = (q, k, torch.tensor([[2, 4]]), mask, 0.25, "reference")
        torch.library.opcheck(torch.ops.hone_kernels.column_mass.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(1, 3, 5, 16)}, ValueError, "query heads must be a multiple of key heads"),
        ({"k": torch.zeros(1, 2, 5, 16).double()}, TypeError, "must share a dtype"),
        ({"q": torch.zeros(1, 4, 6, 16)}, ValueError, "q must not have more tokens than k; got 6 and 5"),
        ({"rows": torch.zeros(1, 0).long()}, ValueError, r"rows must be integers \[1, R\], R at least 1"),
        ({"rows": torch.zeros(1, 2)}, ValueError, "got torch.float32"),
        ({"real": torch.ones(1, 4).bool()}, ValueError, r"real must be bool \[1, 5\]"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
        ({"backend": "triton"}, ValueError, "needs a CUDA device"),
    ],
)
def test_bad_arguments(change, error, message):
    call = {"q": torch.zeros(1, 4, 5, 16), "k": torch.zeros(1, 2, 5, 16), "rows": torch.zeros(1, 1).long()} | change
    with pytest.raises(error, match=message):
        column_mass(call.pop("q"), call.pop("k"), call.pop("rows"), **call)
