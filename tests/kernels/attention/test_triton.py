"""The Triton kernels against the reference: interpreted on a CPU, compiled on a GPU, over one table of cases."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hone_core.testing import assert_close, nan_poison, no_host_sync, requires_gpu
from hone_kernels.attention import SUPPORT, BlockLayout, PooledKV, block_sparse_attention
from hone_kernels.attention.api import _attention_backward_op, _attention_op

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
    queries: int = 130
    keys: int = 100
    dim: int = 64
    block_q: int = 64
    block_k: int = 64
    keep: float = 0.5
    shared_lists: bool = False
    padded: bool = False
    pooled: int = 0
    bias: bool = False
    transposed: bool = False  # [B, S, H, D] in memory, as diffusers lays its tensors out

    def __str__(self):
        return "-".join(f"{k}{v}" for k, v in vars(self).items() if v != getattr(Case, k))


CASES = [
    Case(),
    Case(batch=2, heads=4, kv_heads=2, transposed=True, padded=True),
    Case(queries=1, keys=1, keep=1.0),
    Case(queries=63, keys=65, dim=32, block_q=32, block_k=32, pooled=1),
    Case(queries=128, keys=256, dim=128, block_q=128, block_k=128, pooled=70, bias=True),
    Case(queries=129, keys=129, dim=96, block_q=128, block_k=64, pooled=33, transposed=True),
    Case(batch=2, queries=100, keys=300, block_q=64, block_k=128, shared_lists=True, pooled=64, bias=True, padded=True),
    Case(queries=128, keys=128, keep=1.0),
    Case(queries=260, keys=200, keep=0.0, pooled=5),
]


def build(case, dtype, device):
    def make(heads, tokens):
        shape = (case.batch, tokens, heads, case.dim) if case.transposed else (case.batch, heads, tokens, case.dim)
        x = torch.randn(*shape, device=device, dtype=dtype)
        return (x.transpose(1, 2) if case.transposed else x).requires_grad_()

    rows, cols = -(-case.queries // case.block_q), -(-case.keys // case.block_k)
    lead = (1, 1) if case.shared_lists else (case.batch, case.heads)
    mask = torch.rand(*lead, rows, cols) < case.keep
    if case.keep < 1 and rows > 1:
        mask[..., 0, :] = False  # a row without a key
    valid = torch.randint(0, case.block_k + 1, (case.batch, cols), dtype=torch.int32) if case.padded else None
    layout = BlockLayout.from_mask(
        mask.to(device),
        case.queries,
        case.keys,
        block_q=case.block_q,
        block_k=case.block_k,
        k_valid=None if valid is None else valid.to(device),
    )
    leaves = [make(case.heads, case.queries), make(case.kv_heads, case.keys), make(case.kv_heads, case.keys)]
    pooled = None
    if case.pooled:
        leaves += [make(case.kv_heads, case.pooled), make(case.kv_heads, case.pooled)]
        if case.bias:
            leaves.append(torch.randn(case.kv_heads, case.pooled, device=device).requires_grad_())
        pooled = PooledKV(*leaves[3:])
    return leaves, layout, pooled


def evaluate(leaves, layout, pooled, backend, dout, dlse):
    """Output, log-sum-exp and all gradients."""
    q, k, v, *rest = leaves
    pooled = PooledKV(*rest) if pooled is not None else None
    out, lse = block_sparse_attention(q, k, v, layout, pooled=pooled, return_lse=True, backend=backend)
    scalar = (out.float() * dout).sum() + (lse.masked_fill(lse == -math.inf, 0) * dlse).sum()
    return out, lse, *torch.autograd.grad(scalar, leaves)


def compare(case, dtype, device):
    leaves, layout, pooled = build(case, dtype, device)
    dout = torch.randn(leaves[0].shape, device=device)
    dlse = torch.randn(leaves[0].shape[:3], device=device)
    got = evaluate(leaves, layout, pooled, "triton", dout, dlse)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = evaluate(exact, layout, pooled, "reference", dout.double(), dlse.double())
    names = ["out", "lse", "dq", "dk", "dv", "dpooled_k", "dpooled_v", "dbias"]
    for name, g, w in zip(names, got, want, strict=False):
        # Gradients sum over hundreds of half-precision products: the error follows the size of the whole, not of the
        # element.
        scale = max(1.0, w[w.isfinite()].abs().max().item()) if w.isfinite().any() else 1.0
        assert_close(g.double() / scale, w / scale, dtype=dtype, what=name)
    assert got[0].stride() == leaves[0].stride()


# In float32 a tile is smaller, and the interpreter's time goes by tiles.
SLOW = [case for case in CASES if case.dim > 64 or case.batch > 1]


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float16) for case in CASES]
    + [pytest.param(case, torch.float32, marks=[pytest.mark.slow] * (case in SLOW[1:])) for case in CASES],
    ids=str,
)
def test_interpreted(case, dtype):
    # Triton's interpreter multiplies bfloat16 wrongly, so that dtype is left to the GPU.
    compare(case, dtype, "cpu")


@requires_gpu(min_sm=SUPPORT["triton"].min_sm)
@pytest.mark.parametrize("dtype", SUPPORT["triton"].dtypes, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled(case, dtype):
    compare(case, dtype, "cuda")


@requires_gpu(min_sm=SUPPORT["triton"].min_sm)
@pytest.mark.parametrize("dim", SUPPORT["triton"].head_dims)
@pytest.mark.parametrize("block_q", SUPPORT["triton"].blocks)
@pytest.mark.parametrize("block_k", SUPPORT["triton"].blocks)
def test_support_matrix(dim, block_q, block_k):
    compare(
        Case(queries=300, keys=523, dim=dim, block_q=block_q, block_k=block_k, pooled=40, bias=True),
        torch.bfloat16,
        "cuda",
    )


def check_nan(device, dtype):
    """NaN in one query and in one key reach exactly the rows that read them, as in the reference."""
    q, k, v = (torch.randn(1, 1, 256, 64, device=device, dtype=dtype) for _ in range(3))
    q[0, 0, 5, 3] = torch.nan  # in a block of queries that read both blocks of keys, with and without a mask
    k[0, 0, 140, 1] = torch.nan  # in the second block of keys
    for mask, keys in (([[1, 1], [1, 0]], 256), ([[1, 0], [0, 1]], 250), ([[0, 1], [1, 0]], 250)):
        listed = torch.tensor(mask, dtype=torch.bool, device=device)[None, None]
        layout = BlockLayout.from_mask(listed, 256, keys)
        inputs = (q, k[:, :, :keys].contiguous(), v[:, :, :keys].contiguous())
        got = block_sparse_attention(*inputs, layout, return_lse=True, backend="triton")
        want = block_sparse_attention(*inputs, layout, return_lse=True, backend="reference")
        rows = want[1].isnan()
        assert rows[0, 0, 5]
        assert not rows.all()
        assert torch.equal(got[1].isnan(), rows)
        assert torch.equal(got[0].isnan().any(-1), rows)
        assert_close(got[0][~rows].double(), want[0][~rows].double(), dtype=dtype)
        assert_close(got[1][~rows].double(), want[1][~rows].double(), dtype=dtype)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_stays_nan_interpreted(dtype):
    check_nan("cpu", dtype)


@requires_gpu(min_sm=SUPPORT["triton"].min_sm)
@pytest.mark.parametrize("dtype", SUPPORT["triton"].dtypes, ids=str)
def test_nan_stays_nan(dtype):
    check_nan("cuda", dtype)


def strewn(x):
    """The same values, neighbours along the last axis two apart."""
    return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]


def check_lists_with_gaps(device, dtype, backend):
    """Lists that are views of wider tensors; every builder's are not, a caller's may be."""
    leaves, layout, pooled = build(Case(batch=2, queries=100, keys=150, padded=True), dtype, device)
    lists = {name: strewn(getattr(layout, name)) for name in ("kv_num", "kv_idx", "k_valid")}
    assert all(x.stride(-1) == 2 for x in lists.values())
    dout, dlse = torch.randn_like(leaves[0]), torch.randn(leaves[0].shape[:3], device=device)
    want = evaluate(leaves, layout, pooled, backend, dout, dlse)
    for name in lists:
        got = evaluate(leaves, replace(layout, **{name: lists[name]}), pooled, backend, dout, dlse)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.interpret
def test_lists_with_gaps_interpreted():
    check_lists_with_gaps("cpu", torch.float32, "triton")


@requires_gpu(min_sm=SUPPORT["triton"].min_sm)
def test_lists_with_gaps():
    check_lists_with_gaps("cuda", torch.bfloat16, "triton")


@requires_gpu(min_sm=SUPPORT["gluon"].min_sm)
def test_lists_with_gaps_in_gluon():
    check_lists_with_gaps("cuda", torch.bfloat16, "gluon")


@requires_gpu(min_sm=SUPPORT["triton"].min_sm)
@pytest.mark.parametrize("dim", [64, 128])
def test_axes_that_repeat_themselves(dim):
    """Heads and batches that share keys by ``expand``, and the gradient of a mean over queries."""
    q = torch.randn(2, 4, 300, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, 1, 300, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    layout = BlockLayout.dense(300, 300, device="cuda")
    results = []
    for backend in ("triton", "reference"):
        out = block_sparse_attention(q, *(x.expand(2, 4, 300, dim) for x in (k, v)), layout, backend=backend)
        results.append((out, *torch.autograd.grad(out.mean(2).square().sum(), (q, k, v))))
    for name, got, want in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close(got / want.abs().max(), want / want.abs().max(), dtype=torch.bfloat16, what=name)


@requires_gpu(min_sm=SUPPORT["triton"].min_sm)
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_tensors_on_another_device(backend):
    """The current device is the first, the tensors are on the last; with one GPU they are the same."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    assert torch.cuda.current_device() == 0
    leaves, layout, pooled = build(Case(queries=300, keys=300, dim=128, block_q=128, block_k=128, pooled=20, bias=True),
                                   torch.bfloat16, device)  # fmt: skip
    dout, dlse = torch.randn_like(leaves[0]), torch.randn(leaves[0].shape[:3], device=device)
    got = evaluate(leaves, layout, pooled, backend, dout, dlse)
    want = evaluate(leaves, layout, pooled, "reference", dout, dlse)
    torch.cuda.synchronize(device)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.device == device
        assert_close(mine / theirs.abs().max(), theirs / theirs.abs().max(), dtype=torch.bfloat16)
    assert torch.cuda.current_device() == 0


def check_op(device, dtype):
    leaves, layout, _ = build(Case(queries=20, keys=20, pooled=8, bias=True), dtype, device)
    q, k, v, pooled_k, pooled_v, bias = leaves
    bias = bias.expand(pooled_k.shape[:3]).detach().requires_grad_()
    args = (q, k, v, layout.kv_num, layout.kv_idx, None, pooled_k, pooled_v, bias, 64, 64, 0.2, "triton")
    torch.library.opcheck(_attention_op, args)
    out, lse = _attention_op(*args)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(
        _attention_backward_op, (out.detach(), lse.detach(), *detached[:3], out.detach(), lse.detach(), *detached[3:-1])
    )


@pytest.mark.interpret
def test_registration_interpreted():
    check_op("cpu", torch.float32)


@requires_gpu(min_sm=SUPPORT["triton"].min_sm)
def test_registration():
    check_op("cuda", torch.bfloat16)


@pytest.mark.interpret
def test_compiles_without_a_graph_break_interpreted():
    leaves, layout, _ = build(Case(queries=20, keys=20, keep=1.0, pooled=8, bias=True), torch.float32, "cpu")

    def call(q, k, v, *rest):
        return block_sparse_attention(q, k, v, layout, pooled=PooledKV(*rest), backend="triton") * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), call(*leaves)
    assert torch.equal(got, want)
    for mine, theirs in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (got, want)), strict=True):
        assert torch.equal(mine, theirs)


def check_poison(device):
    """Every element of every output is written: the memory starts as NaN."""
    from hone_kernels.attention.triton import attention_backward, attention_forward

    leaves, layout, _ = build(Case(queries=70, keys=100, pooled=9, bias=True), torch.float16, device)
    q, k, v, pooled_k, pooled_v, bias = (x.detach() for x in leaves)
    bias = bias.expand(pooled_k.shape[:3])
    columns = layout.transpose()
    lists = (layout.kv_num, layout.kv_idx)
    with nan_poison():
        out, lse = attention_forward(q, k, v, *lists, None, pooled_k, pooled_v, bias, 64, 64, 0.1)
        grads = attention_backward(
            q, torch.ones_like(lse), q, k, v, out, lse, *lists, columns.kv_num, columns.kv_idx, None, pooled_k,
            pooled_v, bias, 64, 64, 0.1,
        )  # fmt: skip
    for x in (out, *grads):
        assert x.isfinite().all()
    assert not lse.isnan().any()


@pytest.mark.interpret
def test_everything_is_written_interpreted():
    check_poison("cpu")


@requires_gpu(min_sm=SUPPORT["triton"].min_sm)
def test_everything_is_written():
    check_poison("cuda")


@requires_gpu(min_sm=SUPPORT["triton"].min_sm)
@pytest.mark.parametrize("dim", [64, 128])
def test_runs_are_identical(dim):
    case = Case(heads=6, kv_heads=2, queries=2000, keys=2000, dim=dim, block_q=128, block_k=128, pooled=60, bias=True)
    leaves, layout, pooled = build(case, torch.bfloat16, "cuda")
    dout, dlse = torch.randn_like(leaves[0]), torch.randn(1, 6, 2000, device="cuda")
    first = evaluate(leaves, layout, pooled, "triton", dout, dlse)
    for _ in range(3):
        again = evaluate(leaves, layout, pooled, "triton", dout, dlse)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@requires_gpu(min_sm=SUPPORT["triton"].min_sm)
def test_no_wait_graph_and_compile():
    """No host synchronisation, capturable in a CUDA graph, and compilable without a graph break."""
    leaves, layout, pooled = build(Case(queries=512, keys=512, pooled=16, bias=True), torch.bfloat16, "cuda")
    leaves = [x.detach() for x in leaves]
    q, k, v, *rest = leaves
    pooled = PooledKV(*rest)
    expected = block_sparse_attention(q, k, v, layout, pooled=pooled)  # compiles the kernel
    with no_host_sync():
        mask = layout.to_mask()
        BlockLayout.from_mask(mask, 512, 512, block_q=64, block_k=64).transpose()
        block_sparse_attention(q, k, v, layout, pooled=pooled)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = block_sparse_attention(q, k, v, layout, pooled=pooled)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
    compiled = torch.compile(lambda q, k, v: block_sparse_attention(q, k, v, layout, pooled=pooled) * 2, fullgraph=True)
    assert torch.equal(compiled(q, k, v), expected * 2)


@requires_gpu(min_sm=SUPPORT["triton"].min_sm, min_gb=60)
def test_offsets_beyond_32_bits():
    """The last head of a tensor of 3.1e9 elements: 75,600 tokens of 40 heads, eight of them in a batch, strided."""
    tokens, heads, dim = 75_600, 40, 128
    q = torch.empty(8, tokens, heads, dim, device="cuda", dtype=torch.bfloat16).normal_().transpose(1, 2)
    assert q.numel() > 2**31
    mask = torch.zeros(1, 1, 591, 591, dtype=torch.bool, device="cuda")
    mask[..., :, 588:] = True
    layout = BlockLayout.from_mask(mask, tokens, tokens, width=3)
    out = block_sparse_attention(q, q, q, layout, backend="triton")
    last = q[-1:, -1:, -500:]
    start = 588 * 128
    keys = q[-1:, -1:, start:]
    want = torch.nn.functional.scaled_dot_product_attention(last.float(), keys.float(), keys.float())
    assert_close(out[-1:, -1:, -500:], want, dtype=torch.bfloat16)


@requires_gpu(min_sm=SUPPORT["triton"].min_sm)
@pytest.mark.parametrize("dim", [64, 128])
def test_agrees_with_flex_attention(dim):
    from torch.nn.attention.flex_attention import flex_attention

    leaves, layout, _ = build(
        Case(heads=4, kv_heads=4, queries=1024, keys=1024, dim=dim, block_q=128, block_k=128), torch.bfloat16, "cuda"
    )
    q, k, v = (x.detach() for x in leaves)
    want = torch.compile(flex_attention)(q, k, v, block_mask=layout.to_block_mask())
    assert_close(block_sparse_attention(q, k, v, layout, backend="triton"), want)
