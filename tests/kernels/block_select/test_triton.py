import itertools

import pytest
import torch
from hone_core.testing import nan_poison, requires_gpu
from hone_kernels.block_select import select_blocks

# Triton's interpreter turns run-time loop bounds into Python integers in a way that NumPy 2.3 frowns on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def rough_scores(*shape, device="cpu"):
    """Multiples of 1/64: every sum is exact, so both backends must cut at the same block; and there are many ties."""
    return torch.randint(0, 64, shape, device=device).float() / 64


def compare(scores, **rule):
    from hone_kernels.block_select.triton import select_blocks_triton

    rule = {"min_keep": 1} | rule
    # Below the registered op, whose dispatch the poison does not reach through.
    with nan_poison():
        got = select_blocks_triton(scores, **rule)
    want = select_blocks(scores, backend="reference", **rule)
    for name, mine in zip(want._fields, got, strict=True):
        assert torch.equal(mine, getattr(want, name)), (name, rule)


# Half of the grid, in which each mass meets every pair of the other settings; the other half is slow.
RULES = [
    pytest.param(mass, inclusive, keep_diagonal, forced, marks=[pytest.mark.slow] * ((one + two + three) % 2))
    for mass in (None, 0.5, 0.9, 1.0)
    for one, inclusive in enumerate((True, False))
    for two, keep_diagonal in enumerate((True, False))
    for three, forced in enumerate((0, 2))
]


@pytest.mark.interpret
@pytest.mark.parametrize(("mass", "inclusive", "keep_diagonal", "forced"), RULES)
def test_interpreted(mass, inclusive, keep_diagonal, forced):
    rule = {"mass": mass, "inclusive": inclusive, "keep_diagonal": keep_diagonal, "forced": forced}
    scores = rough_scores(1, 1, 3, 7)
    scores[0, 0, 0] = 0
    compare(scores, min_keep=2, max_keep=4, **rule)
    compare(scores, min_keep=2, max_keep=4, spread_ties=True, **rule)
    compare(rough_scores(1, 1, 4, 3), max_keep=3, **rule)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("blocks", "mass"),
    [(591, None), (591, 0.95), *(pytest.param(139, x, marks=pytest.mark.slow) for x in (None, 0.95))],
)
def test_machine_code(blocks, mass):
    from hone_kernels.block_select import triton
    from hone_kernels.compile import compile_launch, record_launches

    with record_launches(triton, "_select_kernel") as launches:
        triton.select_blocks_triton(torch.zeros(1, 1, 4, blocks), 1, 10, mass, True, True, 2, True)
    assert compile_launch(launches[0]).spills == 0


@requires_gpu(min_sm=80)
def test_gpu():
    rules = itertools.product([None, 0.5, 0.95, 1.0], [True, False], [True, False], [0, 2])
    for mass, inclusive, keep_diagonal, forced in rules:
        rule = {"mass": mass, "inclusive": inclusive, "keep_diagonal": keep_diagonal, "forced": forced}
        for num_q, num_k in ((256, 256), (139, 139), (5, 1200), (40, 7)):
            scores = rough_scores(2, 3, num_q, num_k, device="cuda")
            for spread_ties in (False, True):
                rule["spread_ties"] = spread_ties
                compare(scores, min_keep=min(3, num_k), max_keep=max(3, num_k // 6), **rule)


@requires_gpu(min_sm=80)
def test_gpu_real_scores():
    # Sums round differently in the two backends, so a row may be cut one block apart, where it is a close call.
    scores = torch.rand(1, 12, 256, 256, device="cuda") ** 8
    got = select_blocks(scores, min_keep=12, max_keep=128, mass=0.9, backend="triton")
    want = select_blocks(scores, min_keep=12, max_keep=128, mass=0.9, backend="reference")
    apart = (got.kv_num - want.kv_num).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 0.01
    exact = select_blocks(scores, max_keep=43, backend="triton")
    assert torch.equal(exact.kv_idx, select_blocks(scores, max_keep=43, backend="reference").kv_idx)


@requires_gpu(min_sm=80)
def test_gpu_capturable():
    scores = torch.rand(1, 4, 64, 64, device="cuda")
    want = select_blocks(scores, max_keep=9, mass=0.9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = select_blocks(scores, max_keep=9, mass=0.9)
    got.kv_idx.zero_()
    graph.replay()
    assert torch.equal(got.kv_idx, want.kv_idx)
    assert torch.equal(got.kv_num, want.kv_num)
