"""Attention over a pyramid of keys: the reference by its definition, the kernels interpreted and on a GPU."""

import math
from dataclasses import dataclass

import pytest
import torch
from hone_core.testing import assert_close, gradcheck, nan_poison, no_host_sync, requires_gpu
from hone_kernels.attention import BlockLayout, block_sparse_attention
from hone_kernels.pyramid_attention import FACTORS, pyramid_attention
from hone_kernels.pyramid_attention.api import _pyramid_backward_op, _pyramid_op

pytestmark = [
    # Triton's interpreter turns run-time loop bounds into Python integers in a way that NumPy 2.3 frowns on.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
    # opcheck of torch 2.11 itself.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]


@dataclass(frozen=True)
class Case:
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    queries: int = 140
    keys: int = 300
    dim: int = 64
    block: int = 64
    transposed: bool = False  # [B, S, H, D] in memory, as diffusers lays its tensors out

    def __str__(self):
        return "-".join(f"{k}{v}" for k, v in vars(self).items() if v != getattr(Case, k)) or "plain"


CASES = [
    Case(),
    Case(batch=2, heads=2, queries=70, keys=140, dim=32, block=32, transposed=True),
    Case(queries=64, keys=256),
    Case(queries=70, keys=40),
    Case(queries=1, keys=1),
    Case(queries=150, keys=640, dim=96, block=128),
]
GPU_CASES = [
    Case(queries=1111, keys=1111, dim=128, block=128),
    Case(batch=2, heads=4, kv_heads=2, queries=1024, keys=2048, block=128, transposed=True),
    Case(queries=100, keys=100, dim=128, block=128),
    Case(heads=4, kv_heads=2, queries=129, keys=4224, dim=128, block=128),
    Case(queries=700, keys=1301, block=128),
    # More rows than programs, each of which reads the next row's entries ahead.
    Case(heads=16, kv_heads=4, queries=2500, keys=1500, block=128),
    Case(heads=16, kv_heads=4, queries=2500, keys=1500, dim=128, block=128),
]


def random_factors(batch, heads, queries, keys, block, device="cpu"):
    rows, cols = -(-queries // block), -(-keys // block)
    factors = torch.tensor([0, *FACTORS], dtype=torch.int32)[torch.randint(5, (batch, heads, rows, cols))]
    if rows > 1:
        factors[:, :, 0] = 0  # a row without a key
    if rows > 2:
        factors[:, :, 1] = 8  # a row of one level
    if rows > 4:
        factors[:, :, 2::3, 1:] = 0  # rows of one step, or of none
    if keys % block:
        factors[..., -1].clamp_(max=1)
    return factors.to(device)


def build(case, dtype, device):
    def make(heads, tokens):
        shape = (case.batch, tokens, heads, case.dim) if case.transposed else (case.batch, heads, tokens, case.dim)
        x = torch.randn(*shape, device=device, dtype=dtype)
        return (x.transpose(1, 2) if case.transposed else x).requires_grad_()

    leaves = [make(case.heads, case.queries), make(case.kv_heads, case.keys), make(case.kv_heads, case.keys)]
    return leaves, random_factors(case.batch, case.heads, case.queries, case.keys, case.block, device)


def evaluate(leaves, factors, block, backend, dout, dlse):
    """Output, log-sum-exp and all gradients."""
    out, lse = pyramid_attention(*leaves, factors, block=block, return_lse=True, backend=backend)
    scalar = (out.to(dout.dtype) * dout).sum() + (lse.masked_fill(lse == -math.inf, 0) * dlse).sum()
    return out, lse, *torch.autograd.grad(scalar, leaves)


def compare(case, dtype, device, backend="triton"):
    leaves, factors = build(case, dtype, device)
    dout = torch.randn(leaves[0].shape, device=device)
    dlse = torch.randn(leaves[0].shape[:3], device=device)
    with nan_poison():
        got = evaluate(leaves, factors, case.block, backend, dout, dlse)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = evaluate(exact, factors, case.block, "reference", dout.double(), dlse.double())
    for name, g, w in zip(["out", "lse", "dq", "dk", "dv"], got, want, strict=True):
        # Gradients sum over hundreds of half-precision products: the error follows the size of the whole, not of the
        # element.
        scale = max(1.0, w[w.isfinite()].abs().max().item()) if w.isfinite().any() else 1.0
        assert_close(g.double() / scale, w / scale, dtype=dtype, what=name)
    assert got[0].stride() == leaves[0].stride()


def by_levels(q, k, v, factors, block, scale=None):
    """One attention per level over means made with torch, merged by their log-sum-exps."""
    whole, outs, lses = k.shape[2] // block, [], []
    for factor in FACTORS if whole else FACTORS[:1]:
        keys, values, wanted = k, v, factors == factor
        if factor > 1:
            keys, values = (x[:, :, : whole * block].unflatten(2, (-1, factor)).mean(3) for x in (k, v))
            wanted = wanted[..., :whole]
        layout = BlockLayout.from_mask(wanted, q.shape[2], keys.shape[2], block_q=block, block_k=block // factor)
        out, lse = block_sparse_attention(q, keys, values, layout, scale=scale, return_lse=True, backend="reference")
        outs.append(out)
        lses.append(lse + math.log(factor))
    lse = torch.stack(lses).logsumexp(0)
    safe = lse.masked_fill(lse == -math.inf, 0)
    out = sum((part - safe).exp().unsqueeze(-1) * x for part, x in zip(lses, outs, strict=True))
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_call_is_the_calls_of_all_levels(case):
    leaves, factors = build(case, torch.float64, "cpu")
    dout, dlse = torch.randn_like(leaves[0]), torch.randn(leaves[0].shape[:3], dtype=torch.float64)
    got = evaluate(leaves, factors, case.block, "reference", dout, dlse)
    want_out, want_lse = by_levels(*leaves, factors, case.block)
    some = want_lse.isfinite()
    scalar = (want_out * dout).sum() + (want_lse.where(some, 0) * dlse).sum()
    for g, w in zip(got, (want_out, want_lse, *torch.autograd.grad(scalar, leaves)), strict=True):
        assert_close(g, w.nan_to_num(nan=0.0, neginf=-math.inf))


def test_gradients_of_the_reference():
    leaves, factors = build(Case(queries=20, keys=43, heads=2, dim=4, block=16), torch.float64, "cpu")

    def attend(*x):
        out, lse = pyramid_attention(*x, factors, block=16, return_lse=True)
        return out, lse.where(lse.isfinite(), 0)

    gradcheck(attend, *leaves)


def test_blocks_that_nobody_reads_may_hold_anything():
    (q, k, v), factors = build(Case(), torch.float32, "cpu")
    q, k, v = (x.detach() for x in (q, k, v))
    factors[..., 2] = 0
    want = pyramid_attention(q, k, v, factors, block=64)
    k[:, :, 128:192], v[:, :, 128:192] = torch.nan, torch.inf
    assert torch.equal(pyramid_attention(q, k, v, factors, block=64), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(factors=torch.zeros(1, 2, 3, 4, dtype=torch.int32)), ValueError, "factors must be int32"),
        (dict(factors=torch.zeros(1, 2, 3, 5)), ValueError, "factors must be int32"),
        (dict(factors=torch.full((1, 2, 3, 5), 3, dtype=torch.int32)), ValueError, "0, 1, 2, 4 or 8; got 3"),
        (dict(factors=torch.full((1, 2, 3, 5), 2, dtype=torch.int32)), ValueError, "must be 0 or 1; got 2"),
        (dict(block=20), ValueError, "multiple of 8"),
        (dict(backend="flash"), ValueError, "backend must be one of"),
        (dict(backend="gluon"), ValueError, "cannot run this call"),
    ],
)
def test_wrong_calls_are_refused(change, error, message):
    (q, k, v), factors = build(Case(), torch.float32, "cpu")
    with pytest.raises(error, match=message):
        pyramid_attention(q, k, v, **(dict(factors=factors, block=64) | change))


@pytest.mark.interpret
@pytest.mark.parametrize("columns", [False, True])
def test_lists(columns):
    from hone_kernels.pyramid_attention.triton import lists

    factors = random_factors(2, 3, 300, 523, 64)
    num, tiles, idx = lists(factors, 523 // 64, columns=columns)
    for (b, h, i), count in zip(
        torch.cartesian_prod(*map(torch.arange, tiles.shape[1:])).tolist(), num.flatten(0, 2), strict=True
    ):
        row = factors[b, h, :, i] if columns else factors[b, h, i]
        want = [(row == factor).nonzero().flatten() for factor in FACTORS]
        assert count.tolist() == [len(x) for x in want]
        assert torch.equal(idx[b, h, i, : count.sum()].long(), torch.cat(want))
        filled = [-(-len(x) // factor) for x, factor in zip(want, FACTORS, strict=True)]
        assert tiles[:, b, h, i].tolist() == [filled[0], sum(filled)]


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pooling(dtype):
    from hone_kernels.pyramid_attention.triton import pool

    pair = torch.randn(2, 75, 3, 24, dtype=dtype).transpose(1, 2), torch.randn(2, 3, 75, 24, dtype=dtype)
    for x, got in zip(pair, pool(*pair, 32), strict=True):
        want = [x[:, :, :64].double().unflatten(2, (-1, factor)).mean(3).to(dtype) for factor in FACTORS[1:]]
        assert_close(got, torch.cat(want, 2))


SLOW = [case for case in CASES if case.dim > 64 or case.batch > 1]


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float16) for case in CASES]
    + [pytest.param(case, torch.float32, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES],
    ids=str,
)
def test_interpreted(case, dtype):
    compare(case, dtype, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_levels_above_0_are_added_to_what_is_there(dtype):
    """Where another kernel has made the gradients of level 0, as on Hopper."""
    from hone_kernels.pyramid_attention.triton import attention_backward, lists, pool

    case = Case()
    (q, k, v), factors = build(case, dtype, "cpu")
    q, k, v = (x.detach() for x in (q, k, v))
    whole = case.keys // case.block
    out, lse = pyramid_attention(q, k, v, factors, block=case.block, return_lse=True, backend="reference")
    num, _, idx = lists(factors, whole)
    q_num, _, q_idx = lists(factors, whole, columns=True)
    args = (torch.randn_like(out), torch.randn_like(lse), q, k, v, *pool(k, v, case.block), out, lse, num, idx, q_num,
            q_idx, case.block, 0.125)  # fmt: skip
    there = tuple(torch.randn_like(x) for x in (q, k, v))
    of_all = attention_backward(*args)
    # Of level 0 alone: the same weights, and no entry of another level.
    listed_num, listed_q_num = num.clone(), q_num.clone()
    listed_num[..., 1:] = listed_q_num[..., 1:] = 0
    listed = attention_backward(*args[:9], listed_num, idx, listed_q_num, *args[12:])
    got = attention_backward(*args, tuple(x.clone() for x in there))
    for g, every, level_0, before in zip(got, of_all, listed, there, strict=True):
        want = before.double() + (every.double() - level_0.double())
        assert_close(g, want.to(dtype))


@pytest.mark.interpret
@pytest.mark.slow
def test_operators_are_registered_as_torch_asks():
    (q, k, v), factors = build(Case(queries=40, keys=70, dim=32, block=32), torch.float32, "cpu")
    torch.library.opcheck(_pyramid_op, (q, k, v, factors, 32, 0.2, "triton"))
    out, lse = _pyramid_op(q.detach(), k.detach(), v.detach(), factors, 32, 0.2, "triton")
    args = [x.detach() for x in (out, lse.nan_to_num(neginf=0), q, k, v)]
    torch.library.opcheck(_pyramid_backward_op, (*args, factors, out, lse, 32, 0.2, "triton"))


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES + GPU_CASES, ids=str)
def test_triton_on_gpu(case, dtype):
    compare(case, dtype, "cuda")


@requires_gpu(min_sm=90)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gluon_on_gpu(case, dtype):
    compare(case, dtype, "cuda", "gluon")


@requires_gpu(min_sm=90)
def test_same_bits_run_to_run_and_no_wait():
    (q, k, v), factors = build(GPU_CASES[0], torch.bfloat16, "cuda")
    dout = torch.randn_like(q)

    def attend():
        out, lse = pyramid_attention(q, k, v, factors, return_lse=True, check=False)
        return out, lse, *torch.autograd.grad(out, (q, k, v), dout)

    want = attend()
    with no_host_sync():
        got = attend()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
