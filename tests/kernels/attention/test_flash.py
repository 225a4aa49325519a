"""FlashAttention 4 as a backend: by a stand-in on a CPU, since lists and choice are ours; itself on a GPU."""

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from hone_core.testing import assert_close, requires_gpu
from hone_kernels import backends
from hone_kernels.attention import SUPPORT, BlockLayout, PooledKV, block_sparse_attention
from hone_kernels.attention import flash as module

SUPPORTED = SUPPORT["flash"]

INSTALLED = importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")


def make(heads=4, heads_k=2, queries=300, keys=523, dim=64, device="cpu", dtype=torch.bfloat16):
    q = torch.randn(2, queries, heads, dim, device=device, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(2, heads_k, keys, dim, device=device, dtype=dtype) for _ in range(2))
    mask = torch.rand(2, heads, -(-queries // 128), -(-keys // 128), device=device) < 0.5
    mask[..., 0, :] = False  # rows without a key
    mask[..., 1, :] = False
    mask[..., 1, -1] = True  # a row of one block, the ragged one
    return [x.requires_grad_() for x in (q.detach(), k, v)], BlockLayout.from_mask(mask, queries, keys)


def evaluate(leaves, layout, backend, dout, dlse):
    out, lse = block_sparse_attention(*leaves, layout, return_lse=True, backend=backend, scale=0.2)
    scalar = (out.float() * dout).sum() + (lse.masked_fill(lse == -math.inf, 0) * dlse).sum()
    return out, lse, *torch.autograd.grad(scalar, leaves)


def compare(device, dtype, **sizes):
    leaves, layout = make(device=device, dtype=dtype, **sizes)
    dout, dlse = torch.randn(leaves[0].shape, device=device), torch.randn(leaves[0].shape[:3], device=device)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = evaluate(exact, layout, "reference", dout.double(), dlse.double())
    for _ in range(2):  # the second finds its lists
        got = evaluate(leaves, layout, "flash", dout, dlse)
        for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
            size = max(1.0, w[w.isfinite()].abs().max().item())
            assert_close(g.double() / size, w / size, dtype=dtype, what=name)


@pytest.fixture
def stand_in(monkeypatch):
    """The reference behind the interface of FlashAttention 4, and a CPU that passes for a GPU."""

    def attend(q, k, v, *, softmax_scale, return_lse, block_sparse_tensors, block_sparse_tensors_bwd=None):
        lists = block_sparse_tensors
        assert lists.full_block_idx.shape[-1] == -(-k.shape[1] // 128)
        if block_sparse_tensors_bwd is not None:
            seen.append(block_sparse_tensors_bwd)
        layout = BlockLayout(lists.full_block_cnt, lists.full_block_idx, q.shape[1], k.shape[1], *lists.block_size)
        qkv = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = block_sparse_attention(*qkv, layout, scale=softmax_scale, return_lse=return_lse, backend="reference")
        return out.transpose(1, 2), lse

    seen = []
    monkeypatch.setattr(module, "_modules", lambda: (attend, SimpleNamespace))
    monkeypatch.setattr(backends, "flash_reason", lambda *args: None)
    return seen


def test_lists_and_gradients_by_a_stand_in(stand_in):
    compare("cpu", torch.bfloat16)
    columns = stand_in[0]
    assert columns.full_block_cnt.shape == (2, 4, 5)
    assert columns.full_block_idx.shape == (2, 4, 5, 3)
    assert len({id(x) for x in stand_in}) == 1


def test_what_it_does_not_take_is_said(stand_in):
    (q, k, v), layout = make()
    pooled = PooledKV(k[:, :, :5], v[:, :, :5])
    valid = torch.full((1, 5), 128, dtype=torch.int32)
    padded = BlockLayout(layout.kv_num, layout.kv_idx, 300, 523, 128, 128, valid)
    for options in (dict(layout=layout, pooled=pooled), dict(layout=padded)):
        with pytest.raises(ValueError, match="'flash' cannot run this call: it takes no pooled keys and no k_valid"):
            block_sparse_attention(q, k, v, **options, backend="flash")
    with pytest.raises(ValueError, match=r"block_q in \(128,\); got 64"):
        block_sparse_attention(q, k, v, BlockLayout.dense(300, 523, block_q=64), backend="flash")
    with pytest.raises(ValueError, match=r"it takes torch\.bfloat16, torch\.float16; got torch\.float32"):
        block_sparse_attention(q.float(), k.float(), v.float(), layout, backend="flash")


def test_it_says_why_it_cannot_run_and_auto_never_takes_it(monkeypatch):
    (q, k, v), layout = make()
    with pytest.raises(ValueError, match="'flash' cannot run this call: it needs a CUDA device"):
        block_sparse_attention(q, k, v, layout, backend="flash")
    monkeypatch.setattr(backends, "_capability", lambda device: 90)
    monkeypatch.setattr(
        backends.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("no " + name))
    )
    reason = SUPPORTED.reason(torch.device("cuda"), torch.bfloat16, head_dim=64, block_q=128, block_k=128)
    assert reason == "FlashAttention 4 is not there (no flash_attn.cute.interface); pip install --pre flash-attn-4"
    sizes = dict(head_dim=64, block_q=128, block_k=128)
    device = torch.device("cuda")
    monkeypatch.setattr(
        backends.Support, "reason", lambda self, *args, **sizes: None if self.language == "flash" else "no"
    )
    kernels = ("gluon", "triton")
    with pytest.raises(ValueError, match="'reference' cannot run"):
        backends.choose("x", "auto", SUPPORT, device, torch.bfloat16, kernels=kernels, named=("flash",), **sizes)
    named = backends.choose("x", "flash", SUPPORT, device, torch.bfloat16, kernels=kernels, named=("flash",), **sizes)
    assert named == "flash"
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.choose("x", "flash", SUPPORT, device, torch.bfloat16, kernels=kernels, **sizes)


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # the library's
@pytest.mark.parametrize("dtype", SUPPORTED.dtypes, ids=str)
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
@pytest.mark.parametrize("heads_k", [4, 2])
def test_values_and_gradients(dim, dtype, heads_k):
    if INSTALLED:
        compare("cuda", dtype, dim=dim, heads_k=heads_k)
        return
    (q, k, v), layout = make(device="cuda", dtype=dtype, dim=dim)
    with pytest.raises(ValueError, match=r"FlashAttention 4 is not there .*; pip install --pre flash-attn-4"):
        block_sparse_attention(q, k, v, layout, backend="flash")
