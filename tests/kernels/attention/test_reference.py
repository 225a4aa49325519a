"""The reference against loops over single queries in float64, its limits, its gradients, and the op's messages."""

import math

import pytest
import torch
from hone_core.testing import assert_close, gradcheck
from hone_kernels.attention import BlockLayout, PooledKV, block_sparse_attention
from hone_kernels.backends import choose
from torch.nn.functional import scaled_dot_product_attention


def tensors(*shape, n=3, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype) for _ in range(n)]


def brute_force(q, k, v, layout, pooled=None, scale=None):
    """One query at a time, one key at a time, in Python floats' precision."""
    batch, heads, tokens, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    mask, counts = layout.to_mask(), layout.key_counts()
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            hk = h // (heads // k.shape[1])
            for t in range(tokens):
                logits, values = [], []
                for s in range(k.shape[2]):
                    block = s // layout.block_k
                    kept = mask[b % mask.shape[0], h % mask.shape[1], t // layout.block_q, block]
                    if kept and s % layout.block_k < counts[b % counts.shape[0], block]:
                        logits.append(scale * (q[b, h, t] @ k[b, hk, s]))
                        values.append(v[b, hk, s])
                if pooled is not None:
                    bias = torch.zeros(()) if pooled.bias is None else pooled.bias
                    bias = bias.expand(pooled.k.shape[:3])
                    for g in range(pooled.k.shape[2]):
                        logits.append(scale * (q[b, h, t] @ pooled.k[b, hk, g]) + bias[b, hk, g])
                        values.append(pooled.v[b, hk, g])
                if logits:
                    total = sum(x.exp() for x in logits)
                    lse[b, h, t] = total.log()
                    out[b, h, t] = sum(x.exp() / total * value for x, value in zip(logits, values, strict=True))
    return out, lse


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_pooled", [False, True])
def test_matches_single_queries(padded, with_pooled):
    q, k, v = tensors(2, 4, 11, 4, n=1)[0], *tensors(2, 2, 14, 4, n=2)
    mask = torch.rand(2, 4, 3, 4) < 0.5
    mask[:, 1, 1] = False  # a block of queries without a key
    keys = torch.tensor([[4, 0, 2, 1], [3, 4, 4, 2]], dtype=torch.int32) if padded else None
    layout = BlockLayout.from_mask(mask, 11, 14, block_q=4, block_k=4, k_valid=keys)
    pooled = PooledKV(*tensors(2, 2, 3, 4, n=2), torch.randn(2, 3, dtype=torch.float64)) if with_pooled else None
    out, lse = block_sparse_attention(q, k, v, layout, pooled=pooled, return_lse=True, scale=0.7)
    expected_out, expected_lse = brute_force(q, k, v, layout, pooled, 0.7)
    assert_close(out, expected_out)
    assert_close(lse, expected_lse)
    if not with_pooled:
        assert (out[:, 1, 4:8] == 0).all()
        assert (lse[:, 1, 4:8] == -math.inf).all()


def test_dense_layout_is_plain_attention():
    q, k, v = tensors(2, 4, 70, 16)
    layout = BlockLayout.dense(70, 70, block_q=32, block_k=32)
    assert_close(block_sparse_attention(q, k, v, layout), scaled_dot_product_attention(q, k, v))


def test_pooled_keys_are_a_concatenation():
    """Adding log n to a pooled key's logit is the same as repeating that key n times."""
    q, k, v = tensors(1, 2, 24, 8)
    pooled_k, pooled_v = tensors(1, 2, 5, 8, n=2)
    layout = BlockLayout.dense(24, 24, block_q=8, block_k=8)
    got, lse = block_sparse_attention(
        q, k, v, layout, pooled=PooledKV(pooled_k, pooled_v, torch.full((5,), math.log(3.0))), return_lse=True
    )
    keys, values = (torch.cat([a, b.repeat_interleave(3, dim=2)], dim=2) for a, b in ((k, pooled_k), (v, pooled_v)))
    # math.log(3) enters in float32.
    assert_close(got, scaled_dot_product_attention(q, keys, values), atol=1e-7)
    assert_close(lse, (q @ keys.transpose(-1, -2) * 8**-0.5).logsumexp(-1), atol=1e-7)


def test_what_no_list_names_is_not_read():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 12, 4))
    mask = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    mask[:, 0, :, 1] = False  # of the first head no query reads the second block
    layout = BlockLayout.from_mask(mask, 12, 12, block_q=4, block_k=4)
    want = block_sparse_attention(q, k, v, layout)
    expected = torch.autograd.grad(want.sum(), (q, k, v))
    broken = [x.detach().clone().requires_grad_() for x in (k, v)]
    for x in broken:
        x.data[:, 0, 4:8] = torch.nan
    got = block_sparse_attention(q, *broken, layout)
    assert torch.equal(got, want)
    for mine, theirs in zip(torch.autograd.grad(got.sum(), (q, *broken)), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype):
    q, k, v = tensors(1, 2, 40, 8, dtype=dtype)
    layout = BlockLayout.from_topk(torch.rand(1, 2, 5, 5), 2, 40, 40, block_q=8, block_k=8)
    pooled = PooledKV(*tensors(1, 2, 3, 8, n=2, dtype=dtype), torch.randn(2, 3))

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, layout, pooled=pooled, return_lse=True)

    want = attend(q, k, v)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, traced = attend(q, k, v), compiled(q, k, v)
    for mine, graph, theirs in zip(got, traced, want, strict=True):
        assert mine.dtype == graph.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
        assert_close(graph, theirs)


def test_chunks_make_no_difference(monkeypatch):
    q, k, v = tensors(1, 2, 50, 8)
    layout = BlockLayout.from_mask(torch.rand(1, 2, 7, 7) < 0.5, 50, 50, block_q=8, block_k=8)
    whole = block_sparse_attention(q, k, v, layout)
    monkeypatch.setattr("hone_kernels.attention.reference._CHUNK_ELEMENTS", 1)
    assert_close(block_sparse_attention(q, k, v, layout), whole)


def test_gradients_through_output_and_lse():
    q, k, v = tensors(1, 2, 7, 4)
    k, v = k[:, :1], v[:, :1]
    pooled_k, pooled_v = tensors(1, 1, 2, 4, n=2)
    bias = torch.randn(1, 1, 2, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    layout = BlockLayout.from_mask(mask[None, None], 7, 9, block_q=3, block_k=3)
    k, v = (torch.cat([x, x[:, :, :2]], dim=2) for x in (k, v))

    def both(*x):
        return block_sparse_attention(*x[:3], layout, pooled=PooledKV(*x[3:]), return_lse=True)

    gradcheck(both, q, k, v, pooled_k, pooled_v, bias)

    def empty_rows_have_no_gradient(q, k, v):
        return block_sparse_attention(q, k, v, layout)

    gradcheck(empty_rows_have_no_gradient, q, k, v)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q[0], k, v), ValueError, "q must be"),
        (lambda q, k, v: (q, k.float(), v), TypeError, "share a dtype"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), ValueError, "same shape"),
        (lambda q, k, v: (q[..., :2], k, v), ValueError, "share head_dim; got 2 and 4"),
        (lambda q, k, v: (q[:, :3], k, v), ValueError, "multiple of key heads; got 3 and 2"),
        (lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]), ValueError, "build the layout for these lengths"),
        (lambda q, k, v: (q[:1], k[:1], v[:1]), ValueError, "batch axis must be 1 or 1"),
        (lambda q, k, v: (q[:1], k, v), ValueError, "share the batch size"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), ValueError, "q must have an entry along every axis"),
    ],
)
def test_bad_tensors(change, error, message):
    q, k, v = tensors(2, 4, 8, 4, n=1)[0], *tensors(2, 2, 8, 4, n=2)
    layout = BlockLayout.from_mask(torch.ones(2, 1, 2, 2, dtype=torch.bool), 8, 8, block_q=4, block_k=4)
    with pytest.raises(error, match=message):
        block_sparse_attention(*change(q, k, v), layout)


def test_bad_options():
    q, k, v = tensors(1, 2, 8, 4)
    layout = BlockLayout.dense(8, 8, block_q=4, block_k=4)
    with pytest.raises(ValueError, match="backend must be one of"):
        block_sparse_attention(q, k, v, layout, backend="cuda")
    with pytest.raises(ValueError, match=r"cannot run this call: it takes torch\.float32"):
        block_sparse_attention(q, k, v, layout, backend="triton")
    with pytest.raises(ValueError, match="head_dim in"):
        block_sparse_attention(q.float(), k.float(), v.float(), layout, backend="triton")
    with pytest.raises(TypeError, match="layout must be a BlockLayout"):
        block_sparse_attention(q, k, v, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"pooled\.k must be"):
        block_sparse_attention(q, k, v, layout, pooled=PooledKV(k[..., :2], v))
    with pytest.raises(TypeError, match="scale must be a number"):
        block_sparse_attention(q, k, v, layout, scale=torch.tensor(0.5))
    for scale in (0.0, -0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            block_sparse_attention(q, k, v, layout, scale=scale)
    with pytest.raises(ValueError, match=r"pooled\.bias must broadcast"):
        block_sparse_attention(q, k, v, layout, pooled=PooledKV(k, v, torch.zeros(3)))


@pytest.mark.parametrize(
    ("works", "want"),
    [(("gluon", "triton"), "gluon"), (("gluon",), "gluon"), (("triton",), "triton"), ((), "reference")],
)
def test_auto_asks_the_kernels_in_turn(works, want):
    class Stub:
        """A backend that works or says that it is absent."""

        def __init__(self, name):
            self.name = name

        def reason(self, device, dtype, **sizes):
            return None if self.name in (*works, "reference") else f"{self.name} is not here"

    support = {name: Stub(name) for name in ("reference", "triton", "gluon")}
    call = (support, torch.device("cuda"), torch.bfloat16)
    kernels = ("gluon", "triton")
    assert choose("test", "auto", *call, kernels=kernels) == want
    if works:
        assert choose("test", works[0], *call, kernels=kernels) == works[0]
