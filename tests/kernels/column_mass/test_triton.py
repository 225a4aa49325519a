import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.column_mass import column_mass

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def case(batch, heads, heads_k, tokens, dim, num_rows, dtype=torch.float32, device="cpu", padded=True):
    """Apart in memory; the last sample has fewer rows, and padding at the left."""
    q, k = (torch.randn(batch, h, tokens, dim + 3, device=device).to(dtype)[..., :dim] for h in (heads, heads_k))
    rows = torch.stack([torch.randperm(tokens, device=device)[:num_rows].sort().values for _ in range(batch)])
    real = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if padded:
        real[-1, : tokens // 4] = False
        rows[-1, 0] = -1
        rows[-1, 1:].clamp_(min=tokens // 4)
    rows[0, -1] = tokens - 1
    return q, k, rows, real if padded else None


def compare(q, k, rows, real):
    from hone_kernels.column_mass.triton import column_mass_triton

    scale = q.shape[-1] ** -0.5
    with nan_poison():
        mass, seen, rank = column_mass_triton(q, k, rows, real, scale)
    want = column_mass(q.double(), k.double(), rows, real=real, backend="reference")
    assert torch.equal(seen, want.seen)
    assert_close(mass.double(), want.mass, atol=2e-5 * rows.shape[1], rtol=1e-4)
    assert_close(rank, mass / seen.clamp(min=1), atol=0, rtol=1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("dtype", "padded"),
    [
        (torch.float32, True),
        (torch.float16, False),
        pytest.param(torch.float32, False, marks=pytest.mark.slow),
        pytest.param(torch.float16, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_interpreted(dtype, padded):
    compare(*case(2, 4, 2, 77, 16, 5, dtype, padded=padded))
    # A later turn, of which q holds the last tokens alone.
    q, k, rows, real = case(2, 4, 2, 77, 16, 5, dtype, padded=padded)
    compare(q[:, :, 70:], k, (rows - 70).clamp(min=-1), real)
    # More rows than a tile, more keys than a piece.
    compare(*case(1, 2, 1, 530, 16, 70, dtype, padded=padded))


@pytest.mark.interpret
def test_interpreted_row_that_sees_nothing():
    q, k, rows, _ = case(1, 2, 1, 40, 16, 3, padded=False)
    real = torch.ones(1, 40, dtype=torch.bool)
    real[0, : rows[0, 0] + 1] = False
    compare(q, k, rows, real)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("dtype", "dim", "num_rows"), [(torch.bfloat16, 128, 128), (torch.bfloat16, 64, 1), (torch.float32, 128, 128)]
)
def test_machine_code(dtype, dim, num_rows, monkeypatch):
    from hone_kernels.column_mass import triton
    from hone_kernels.compile import compile_launch, record_launches

    monkeypatch.setattr(triton, "launches_overlap", lambda device: True)

    q, k = torch.zeros(1, 8, 2000, dim, dtype=dtype), torch.zeros(1, 2, 2000, dim, dtype=dtype)
    rows, real = torch.zeros(1, num_rows, dtype=torch.int32), torch.ones(1, 2000, dtype=torch.bool)
    with record_launches(triton, "_lse_kernel", "_mass_kernel") as launches:
        triton.column_mass_triton(q, k, rows, real, 0.1)
    found = [compile_launch(launch) for launch in launches]
    assert [one.spills for one in found] == [0, 0]
    if dtype == torch.bfloat16 and num_rows >= 64:
        assert all(one.count("HGMMA") for one in found)
    # The second pass is on its way when the first ends, and then waits for it.
    assert ["griddepcontrol.wait" in one.ptx for one in found] == [False, True]


@requires_gpu(min_sm=80)
def test_gpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for batch, heads, heads_k, tokens, dim, num_rows in (
            (1, 28, 4, 4096, 128, 128), (3, 16, 2, 1001, 128, 100), (2, 6, 3, 333, 64, 333), (2, 4, 4, 50, 32, 2),
        ):  # fmt: skip
            for padded in (False, True):
                q, k, rows, real = case(batch, heads, heads_k, tokens, dim, num_rows, dtype, "cuda", padded)
                compare(q, k, rows, real)
                compare(q[:, :, tokens // 2 :], k, (rows - tokens // 2).clamp(min=-1), real)
                first, second = (column_mass(q, k, rows, real=real, backend="triton") for _ in range(2))
                assert torch.equal(first.mass, second.mass)


@requires_gpu(min_sm=80)
def test_gpu_capturable():
    q, k, rows, real = case(2, 8, 2, 700, 64, 64, torch.bfloat16, "cuda")
    want = column_mass(q, k, rows, real=real)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = column_mass(q, k, rows, real=real)
    got.mass.zero_()
    graph.replay()
    assert torch.equal(got.mass, want.mass)
