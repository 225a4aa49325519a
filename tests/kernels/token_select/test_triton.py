import pytest
import torch
from hone_core.testing import nan_poison, requires_gpu
from hone_kernels.token_select import SelectedTokens, select_tokens

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def rough(batch, tokens, device="cpu"):
    """Multiples of 1/64: sums are exact, so that both backends cut at the same token; and there are many ties."""
    return torch.randint(0, 64, (batch, tokens), device=device).float() / 64


def compare(rank, real, protected, *, mass=None, p=None, budget=None):
    from hone_kernels.token_select.triton import select_tokens_triton

    with nan_poison():
        got = SelectedTokens(*select_tokens_triton(rank, mass, p, budget, real, protected))
    want = select_tokens(rank, real=real, protected=protected, mass=mass, p=p, budget=budget, backend="reference")
    for name in want._fields:
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def all_cases(batch, tokens, device="cpu"):
    rank, mass = rough(batch, tokens, device), rough(batch, tokens, device)
    mass[0, : tokens // 2] = 0
    real = torch.rand(batch, tokens, device=device) < 0.9
    real[:, -1] = True
    whole, none = torch.ones_like(real), torch.zeros_like(real)
    some = torch.rand(batch, tokens, device=device) < 0.1
    p = torch.linspace(0.2, 1.0, batch, device=device)
    for mask, protected in ((whole, none), (real, some), (real, whole)):
        compare(rank, mask, protected, mass=mass, p=p)
        compare(rank, mask, protected, budget=torch.randint(1, tokens + 2, (batch,), device=device))
    compare(rank, whole, none, mass=torch.zeros_like(mass), p=p)


@pytest.mark.interpret
def test_interpreted(monkeypatch):
    all_cases(3, 40)
    # More than are held in registers, and more than a tile.
    from hone_kernels.token_select import triton

    monkeypatch.setattr(triton, "_WHOLE", 256)
    monkeypatch.setattr(triton, "_TILE", 256)
    all_cases(2, 300)


@pytest.mark.compile
@pytest.mark.parametrize("tokens", [69, 4096, 8192, 32768])
def test_machine_code(tokens, monkeypatch):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.token_select import triton

    monkeypatch.setattr(triton, "launches_overlap", lambda device: True)

    rank, flags = torch.zeros(2, tokens), torch.ones(2, tokens, dtype=torch.bool)
    with record_launches(triton, "_select_kernel") as launches:
        triton.select_tokens_triton(rank, rank, torch.ones(2), None, flags, flags)
        triton.select_tokens_triton(rank, None, None, torch.ones(2, dtype=torch.int64), flags, flags)
    found = [compile_launch(launch) for launch in launches]
    assert [one.spills for one in found] == [0, 0]
    assert all("griddepcontrol.wait" in one.ptx for one in found)


@requires_gpu(min_sm=80)
def test_gpu():
    for batch, tokens in (
        (1, 1),
        (4, 69),
        (3, 1000),
        (64, 4096),
        (5, 4097),
        (3, 8192),
        (2, 8193),
        (2, 32768),
        (2, 100_001),
    ):
        all_cases(batch, tokens, "cuda")


@requires_gpu(min_sm=80)
def test_gpu_real_masses():
    # Sums round differently, within what counts as reached: the budget may be a token apart, seldom.
    mass = torch.rand(64, 16384, device="cuda") ** 8
    real, p = torch.ones_like(mass, dtype=torch.bool), torch.full((64,), 0.975, device="cuda")
    got, want = (
        select_tokens(mass, real=real, protected=~real, mass=mass, p=p, backend=b) for b in ("triton", "reference")
    )
    assert int((got.num - want.num).abs().max()) <= 1
    exact = select_tokens(mass, real=real, protected=~real, budget=want.num, backend="triton")
    assert torch.equal(exact.idx, want.idx)


@requires_gpu(min_sm=80)
def test_gpu_capturable():
    mass, p = torch.rand(4, 5000, device="cuda"), torch.full((4,), 0.9, device="cuda")
    real = torch.ones_like(mass, dtype=torch.bool)
    want = select_tokens(mass, real=real, protected=~real, mass=mass, p=p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = select_tokens(mass, real=real, protected=~real, mass=mass, p=p)
    got.idx.zero_()
    graph.replay()
    assert torch.equal(got.idx, want.idx)
