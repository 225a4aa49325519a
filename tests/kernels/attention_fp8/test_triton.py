"""The FP8 kernels against the emulation: interpreted on a CPU, compiled on a GPU, over one table of cases."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hone_core.testing import assert_close, nan_poison, no_host_sync, requires_gpu
from hone_kernels.attention import BlockLayout, block_sparse_attention
from hone_kernels.attention_fp8 import SUPPORT, quantize_qkv, quantized_attention, reference, straight_through_attention
from hone_kernels.attention_fp8.api import (
    _forward_into_op,
    _forward_op,
    _straight_through_backward_op,
    _straight_through_op,
)
from hone_kernels.attention_fp8.quantize import _quantize_op
from hone_kernels.attention_fp8.reference import attention_fp8_reference, quantize_reference

pytest.importorskip("triton", reason="Triton is for Linux only")

E4M3 = torch.float8_e4m3fn
MIN_SM = 89  # E4M3 matrix products

pytestmark = [
    # Triton's interpreter turns run-time loop bounds into Python integers in a way that NumPy 2.3 frowns on.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
    # What is not finite is part of the tests.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    # opcheck of torch 2.11 itself.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _casts_of_torch(monkeypatch):
    """E4M3 casts of Triton's interpreter by torch: its own lose carries, truncate subnormals and know no NaN."""
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter._convert_float
    dtypes = {tl.float8e4nv: E4M3, tl.float16: torch.float16, tl.float32: torch.float32}

    def convert(x, source, target, rounding):
        if tl.float8e4nv not in (source, target):
            return own(x, source, target, rounding)
        given = torch.from_numpy(np.ascontiguousarray(x))
        given = given.view(E4M3) if source == tl.float8e4nv else given
        bits = getattr(np, f"uint{target.primitive_bitwidth}")
        return given.float().to(dtypes[target]).view(torch.uint8).numpy().view(bits)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@dataclass(frozen=True)
class Case:
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    queries: int = 130
    keys: int = 150
    dim: int = 64
    block_q: int = 64
    block_k: int = 64
    keep: float = 0.6
    shared_lists: bool = False
    padded: bool = False
    group: int = 1
    smooth_k: bool = False

    def __str__(self):
        return "-".join(f"{k}{v}" for k, v in vars(self).items() if v != getattr(Case, k)) or "plain"


CASES = [
    Case(),
    Case(batch=2, heads=4, kv_heads=2, padded=True, smooth_k=True),
    Case(queries=1, keys=1, keep=1.0, dim=32),
    Case(queries=200, keys=256, dim=128, block_q=128, block_k=128),
    Case(queries=130, keys=400, dim=128, block_q=128, block_k=128, padded=True),
    Case(queries=63, keys=257, dim=128, block_q=64, block_k=128, group=2, smooth_k=True),
    Case(batch=2, queries=129, keys=300, block_q=128, block_k=64, shared_lists=True, padded=True, group=3),
    Case(queries=128, keys=128, keep=1.0, kv_heads=2, group=2),
    Case(queries=70, keys=100, keep=0.0),
]


def build(case, dtype, device):
    def make(heads, tokens):
        x = torch.randn(case.batch, tokens, heads, case.dim, device=device) + torch.randn(case.dim, device=device)
        return x.to(dtype).transpose(1, 2)

    rows, cols = -(-case.queries // case.block_q), -(-case.keys // case.block_k)
    lead = (1, 1) if case.shared_lists else (case.batch, case.heads)
    mask = torch.rand(*lead, rows, cols) < case.keep
    if case.keep < 1 and rows > 1:
        mask[..., 0, :] = False  # a row without a key
    valid = torch.randint(0, case.block_k + 1, (case.batch, cols), dtype=torch.int32) if case.padded else None
    if valid is not None:
        valid[:, 0] = case.block_k  # a full one among them
    sizes = dict(block_q=case.block_q, block_k=case.block_k, k_valid=None if valid is None else valid.to(device))
    layout = BlockLayout.from_mask(mask.to(device), case.queries, case.keys, **sizes)
    return (make(case.heads, case.queries), make(case.kv_heads, case.keys), make(case.kv_heads, case.keys)), layout


def tile_of(case):
    """Keys that the kernel reads at a time."""
    from hone_kernels.attention.triton import _sm
    from hone_kernels.attention_fp8.triton import tiles_for

    return tiles_for(case.dim, case.block_q, case.block_k, case.block_k, _sm(torch.empty(0))).k


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def compare_forward(case, dtype, device, limit):
    inputs, layout = build(case, dtype, device)
    options = dict(block=case.block_k, group=case.group, smooth_k=case.smooth_k, k_valid=layout.k_valid)
    x = quantize_qkv(*inputs, **options, backend="triton")
    out, lse = quantized_attention(x, layout, return_lse=True, out_dtype=torch.float32, backend="triton")
    scale = case.dim**-0.5
    want, want_lse = attention_fp8_reference(*x.dequantize(torch.float64), layout, scale, tile=tile_of(case))
    assert relative(out, want) <= limit
    assert (out[want == 0] == 0).all()
    if case.smooth_k:
        want_lse = want_lse + scale * x.q_dot_mean
    # Matrix units add E4M3 products with 14 bits or so.
    assert_close(lse, want_lse, dtype=torch.float32, atol=max(2e-5, limit / 2))


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float16) for case in CASES]
    + [pytest.param(case, torch.float32, marks=[pytest.mark.slow] * (case.batch > 1)) for case in CASES],
    ids=str,
)
def test_forward_interpreted(case, dtype):
    # One P that rounds the other way, for being half an ulp off, already weighs 1e-4 where keys are few.
    compare_forward(case, dtype, "cpu", 1e-3)


@requires_gpu(min_sm=MIN_SM)
@pytest.mark.parametrize("dtype", SUPPORT["triton"].dtypes, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype):
    # An error of 1e-3 in a logit, from sums of 14 bits, turns one in a hundred roundings of P, by a tenth each.
    compare_forward(case, dtype, "cuda", 3e-2)


@requires_gpu(min_sm=MIN_SM)
@pytest.mark.parametrize("dim", SUPPORT["triton"].head_dims)
@pytest.mark.parametrize("block_q", SUPPORT["triton"].blocks)
@pytest.mark.parametrize("block_k", SUPPORT["triton"].blocks)
@pytest.mark.parametrize("padded", [False, True])
def test_support_matrix(dim, block_q, block_k, padded):
    case = Case(queries=300, keys=523, dim=dim, block_q=block_q, block_k=block_k, padded=padded)
    compare_forward(case, torch.bfloat16, "cuda", 3e-2)


FIELDS = ("q8", "k8", "v8", "q_scale", "k_scale", "v_scale", "k_mean", "q_dot_mean")


def compare_prologue(device, dtype, block, group, smooth_k, rope, order, padded, dim=64, longest=0, for_lse=True):
    from hone_kernels.attention_fp8.triton_quantize import quantize_triton

    q, k, v = build(Case(batch=2, heads=6, kv_heads=3, queries=140, keys=140, dim=dim), dtype, device)[0]
    q[0, 0, 0, 0], k[1, 0, 3, 3], q[0, 1] = torch.inf, torch.nan, 0
    angle = torch.rand(140, dim // 2, device=device) * 6
    tables = (angle.cos(), angle.sin()) if rope else (None, None)
    slots = 190 if order else 140
    index = torch.cat([torch.randperm(140), torch.zeros(50, dtype=torch.long)]).to(device) if order else None
    valid = None
    if padded:
        valid = torch.randint(0, block + 1, (2, -(-slots // block)), dtype=torch.int32).to(device)
    # Of a list of numbers the groups have blocks here and there.
    groups = None if group == 1 else (torch.arange(-(-slots // block)) * group % 3).to(device)
    if longest:
        groups = (torch.arange(-(-slots // block), device=device) // longest).int()
    args = (q, k, v, *tables, index, valid, block, groups, smooth_k)
    with nan_poison():
        got = quantize_triton(*args, longest=longest, for_lse=for_lse)
    for name, mine, theirs in zip(FIELDS, got, quantize_reference(*args, for_lse), strict=True):
        if theirs is None:
            assert mine is None, name
            continue
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), name
        mine, theirs = mine.float(), theirs.float()
        assert torch.equal(mine.isnan(), theirs.isnan()), name
        mine, theirs = mine.nan_to_num(), theirs.nan_to_num()
        if name.endswith("8"):
            # A mean or a rotation may differ in its last bit, and so round the other way.
            differ = mine != theirs
            assert differ.float().mean() < (1e-3 if rope or smooth_k else 1e-9), name
            # A rotated key that differs by its last bit keeps that difference while the mean takes the rest away.
            last_bit = torch.finfo(dtype).eps * 448 if name == "k8" and rope and smooth_k else 2**-9
            assert_close(mine, theirs, atol=last_bit, rtol=0.13, what=name)
        else:
            assert_close(mine, theirs, dtype=torch.float32, atol=2e-4 if name == "q_dot_mean" else 2e-5, what=name)


PROLOGUES = [  # block, group, smooth_k, rope, order, padded
    (64, 1, False, False, False, False),
    (128, 1, True, False, False, True),
    (128, 1, False, True, True, True),
    (64, 2, True, True, True, True),
    (128, 3, True, True, False, False),
]


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("options", "dtype"),
    [(options, torch.float16) for options in PROLOGUES]
    + [pytest.param(x, torch.float32, marks=[pytest.mark.slow] * (x != PROLOGUES[-2])) for x in PROLOGUES],
    ids=str,
)
def test_prologue_interpreted(options, dtype):
    compare_prologue("cpu", dtype, *options)


RUNS = [  # block, smooth_k, rope, order, padded, longest, for_lse
    (64, True, True, True, True, 2, False),
    (64, False, False, False, False, 3, True),
    (128, True, False, True, False, 2, True),
]


def compare_runs(device, dtype, block, smooth_k, rope, order, padded, longest, for_lse, dim=64):
    compare_prologue(device, dtype, block, 2, smooth_k, rope, order, padded, dim, longest, for_lse)


@pytest.mark.interpret
@pytest.mark.parametrize("options", RUNS, ids=str)
def test_groups_in_a_row_interpreted(options):
    compare_runs("cpu", torch.float16, *options)


@requires_gpu(min_sm=MIN_SM)
@pytest.mark.parametrize("options", RUNS, ids=str)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 32)], ids=str)
def test_groups_in_a_row(options, dtype, dim):
    compare_runs("cuda", dtype, *options, dim)


@pytest.mark.interpret
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_mean_of_a_sample_interpreted(padded, monkeypatch):
    # Of 190 slots the first 128, as of a long sequence 64 runs of 128.
    monkeypatch.setattr(reference, "MEAN_RUNS", 1)
    compare_prologue("cpu", torch.float16, 64, 1, True, False, True, padded)


def compare_places(device, dtype, limit):
    """Output written to the tokens that the slots were taken from, in the memory of the queries."""
    q, k, v = (torch.randn(2, 150, 2, 64, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    order = torch.zeros(256, dtype=torch.int32, device=device)
    valid = torch.tensor([[64, 30, 0, 56]], dtype=torch.int32, device=device)
    slot = torch.arange(256, device=device)
    present = slot % 64 < valid[0, slot // 64]
    order[present] = torch.randperm(150).int().to(device)
    mask = torch.rand(1, 1, 4, 4, device=device) < 0.6
    mask[..., 0] = mask[..., 2, 2] = True  # the third block, without a token, reads itself too
    layout = BlockLayout.from_mask(mask, 256, 256, block_q=64, block_k=64, k_valid=valid)
    x = quantize_qkv(q, k, v, block=64, order=order, k_valid=valid, backend="triton")
    rows, row_lse = quantized_attention(x, layout, return_lse=True, out_dtype=dtype, backend="triton")
    out = q.clone()  # its memory order
    with nan_poison():
        given, lse = quantized_attention(x, layout, return_lse=True, out=out, order=order, backend="triton")
    assert given is out
    assert lse.isfinite().all()
    assert torch.equal(lse, row_lse)
    assert torch.equal(out[:, :, order[present].long()], rows[:, :, present])
    emulated = torch.empty_like(out)
    quantized_attention(x, layout, out=emulated, order=order, backend="reference")
    assert relative(out, emulated) < limit


@pytest.mark.interpret
def test_places_interpreted():
    compare_places("cpu", torch.float16, 1e-2)


@requires_gpu(min_sm=MIN_SM)
def test_places():
    compare_places("cuda", torch.bfloat16, 3e-2)


def check_zeros(device, dtype):
    """Scales of zeros are so small that their product is none."""
    q, k = torch.zeros(2, 1, 2, 100, 64, device=device, dtype=dtype)
    v = torch.randn(1, 2, 100, 64, device=device).to(dtype)
    layout = BlockLayout.dense(100, 100, block_q=64, block_k=64, device=device)
    x = quantize_qkv(q, k, v, block=64, backend="triton")
    out, lse = quantized_attention(x, layout, return_lse=True, out_dtype=torch.float32, backend="triton")
    assert_close(lse, torch.full_like(lse, math.log(100)), dtype=torch.float32)
    assert relative(out, x.dequantize()[2].mean(2, keepdim=True).expand_as(out)) < 1e-3


@pytest.mark.interpret
def test_zeros_interpreted():
    check_zeros("cpu", torch.float16)


@requires_gpu(min_sm=MIN_SM)
def test_zeros():
    check_zeros("cuda", torch.bfloat16)


def check_odd_strides(device, dtype):
    """Two channels are read as a word, where they are one."""
    from hone_kernels.attention_fp8.triton_quantize import quantize_triton

    wide = torch.randn(1, 2, 100, 65, device=device).to(dtype)
    args = (wide[..., 1:], wide[..., :64], wide[..., 1:], None, None, None, None, 64, None, False)
    for mine, theirs in zip(quantize_triton(*args)[:6], quantize_reference(*args), strict=False):
        assert torch.equal(mine.float(), theirs.float())


def check_lists_with_gaps(device, dtype):
    """An order, counts and lists that are columns of wider tensors."""
    q, k, v = (torch.randn(2, 1, 200, 64, device=device).to(dtype) for _ in range(3))
    order = torch.stack([torch.randperm(200), torch.zeros(200, dtype=torch.long)], 1).to(device)[:, 0]
    valid = torch.tensor([[64, 9, 50, 33, 8, 9, 64, 9], [50, 9, 64, 9, 1, 9, 8, 9]], device=device, dtype=torch.int32)
    valid = valid[:, ::2]
    assert order.stride(0) == valid.stride(1) == 2
    mask = torch.rand(2, 1, 4, 4, device=device) < 0.6
    layout = BlockLayout.from_mask(mask, 200, 200, block_q=64, block_k=64, k_valid=valid)
    results = []
    for copy in (False, True):
        of = torch.Tensor.contiguous if copy else (lambda x: x)
        x = quantize_qkv(q, k, v, block=64, order=of(order), k_valid=of(valid), backend="triton")
        gaps = replace(layout, k_valid=of(layout.k_valid))
        fields = [getattr(x, name).float() for name in ("q8", "k8", "v8", "q_scale", "k_scale", "v_scale")]
        results.append([*fields, *quantized_attention(x, gaps, return_lse=True, backend="triton")])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.interpret
def test_lists_with_gaps_interpreted():
    check_lists_with_gaps("cpu", torch.float16)


@requires_gpu(min_sm=MIN_SM)
def test_lists_with_gaps():
    check_lists_with_gaps("cuda", torch.bfloat16)


def check_dequantize(device, dtype, dim, block, tokens):
    from hone_kernels.attention_fp8.reference import dequantize
    from hone_kernels.attention_fp8.triton_quantize import dequantize_triton

    q, k, v = torch.randn(2, 4, tokens, dim, device=device), *torch.randn(2, 2, 2, tokens, dim, device=device)
    fields = quantize_reference(q, k, v, None, None, None, None, block, None, False)[:6]
    for mine, theirs in zip(dequantize_triton(*fields, block, dtype), dequantize(*fields, block, dtype), strict=True):
        assert mine.is_contiguous()
        assert torch.equal(mine, theirs)


@pytest.mark.interpret
@pytest.mark.parametrize(("dim", "block", "tokens"), [(32, 64, 1), (64, 128, 200), (128, 64, 130)])
def test_dequantize_interpreted(dim, block, tokens):
    check_dequantize("cpu", torch.float16, dim, block, tokens)


@requires_gpu(min_sm=MIN_SM)
@pytest.mark.parametrize("dtype", SUPPORT["triton"].dtypes, ids=str)
@pytest.mark.parametrize(("dim", "block", "tokens"), [(32, 64, 1), (64, 128, 200), (128, 64, 130), (128, 128, 5000)])
def test_dequantize(dim, block, tokens, dtype):
    check_dequantize("cuda", dtype, dim, block, tokens)


def check_nan_in_padding(device, dtype):
    """What stands where no key exists is rounded to zero, and reaches nothing; in the reference neither."""
    leaves = [torch.randn(1, 2, 128, 64, device=device).to(dtype) for _ in range(3)]
    valid = torch.tensor([[64, 40]], device=device, dtype=torch.int32)
    layout = replace(BlockLayout.dense(128, 128, block_q=64, block_k=64, device=device), k_valid=valid)
    for x in leaves[1:]:
        x[:, :, 104:] = torch.nan
    for backend in ("triton", "reference"):
        inputs = [x.clone().requires_grad_() for x in leaves]
        out = straight_through_attention(*inputs, layout, backend=backend)
        dq, dk, dv = torch.autograd.grad(out.float().square().sum(), inputs)
        assert all(x.isfinite().all() for x in (out, dq, dk, dv))
        assert not dk[:, :, 104:].any()
        assert not dv[:, :, 104:].any()


@pytest.mark.interpret
def test_nan_in_padding_interpreted():
    check_nan_in_padding("cpu", torch.float16)


@requires_gpu(min_sm=MIN_SM)
def test_nan_in_padding():
    check_nan_in_padding("cuda", torch.bfloat16)


@requires_gpu(min_sm=MIN_SM)
def test_tensors_on_another_device():
    """The current device is the first, the tensors are on the last; with one GPU they are the same."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    assert torch.cuda.current_device() == 0
    leaves = [torch.randn(1, 2, 300, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    layout = BlockLayout.dense(300, 300, device=device)
    results = []
    for backend in ("triton", "reference"):
        out = straight_through_attention(*leaves, layout, smooth_k=True, backend=backend)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    torch.cuda.synchronize(device)
    for got, want in zip(*results, strict=True):
        assert got.device == device
        assert ((got - want).norm() / want.norm()).item() < 0.06


@pytest.mark.interpret
def test_odd_strides_interpreted():
    check_odd_strides("cpu", torch.float16)


@requires_gpu(min_sm=MIN_SM)
def test_odd_strides():
    check_odd_strides("cuda", torch.bfloat16)


@requires_gpu(min_sm=MIN_SM)
@pytest.mark.parametrize("heads", [3, 40])
def test_values_wait_for_their_scales(heads):
    """Both readings of V in one launch, many times: of several heads at a time, of one, and of all."""
    from hone_kernels.attention_fp8.triton_quantize import Prologue, quantize_triton

    q, k, v = (torch.randn(2, heads, 5000, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    options = (None, None, None, None, 128, None, False)
    want = quantize_reference(q, k, v, *options)
    for reuse in (1, 8 << 20, 1 << 40):
        for _ in range(20):
            got = quantize_triton(q, k, v, *options, Prologue(reuse=reuse))
            assert torch.equal(got[5], want[5])
            assert torch.equal(got[2].view(torch.uint8), want[2].view(torch.uint8))


@requires_gpu(min_sm=MIN_SM)
@pytest.mark.parametrize("options", PROLOGUES, ids=str)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 32)], ids=str)
def test_prologue(options, dtype, dim):
    compare_prologue("cuda", dtype, *options, dim)


def compare_training(case, dtype, device, delta):
    """Values and gradients of both backends, through output and log-sum-exp."""
    inputs, layout = build(case, dtype, device)
    dout = torch.randn(inputs[0].shape, device=device).to(dtype)
    dlse = torch.randn(inputs[0].shape[:3], device=device)
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        options = dict(smooth_k=case.smooth_k, group=case.group, delta=delta, return_lse=True, backend=backend)
        out, lse = straight_through_attention(*leaves, layout, **options)
        scalar = (out * dout).float().sum() + (lse.masked_fill(lse == -math.inf, 0) * dlse).sum()
        results.append((out, lse, *torch.autograd.grad(scalar, leaves)))
        assert out.dtype == dtype
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        finite = want.isfinite()
        assert torch.equal(finite, got.isfinite()), name
        # The reference reads whole blocks at a time, so P is not rounded alike: that is in the output, and with
        # delta="forward" in dq and dk.
        rough = name == "out" or (delta == "forward" and name in ("dq", "dk"))
        limit = 0.05 if rough else 2e-2 if dtype == torch.bfloat16 else 5e-3
        assert relative(got[finite], want[finite]) <= limit, name


TRAINING = [
    Case(queries=130, keys=200, block_q=64, block_k=128, kv_heads=2),
    Case(batch=2, heads=4, kv_heads=2, queries=70, keys=100, padded=True, smooth_k=True, group=2),
]


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "delta"),
    [
        (TRAINING[0], "forward"),
        (TRAINING[1], "exact"),
        pytest.param(TRAINING[0], "exact", marks=pytest.mark.slow),
        pytest.param(TRAINING[1], "forward", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_interpreted(case, delta):
    compare_training(case, torch.float32, "cpu", delta)


@requires_gpu(min_sm=MIN_SM)
@pytest.mark.parametrize("delta", ["exact", "forward"])
@pytest.mark.parametrize("case", [*TRAINING, Case(queries=700, keys=900, dim=128, block_q=128, block_k=128)], ids=str)
def test_training(case, delta):
    compare_training(case, torch.bfloat16, "cuda", delta)


def check_ops(device, dtype):
    (q, k, v), layout = build(Case(queries=40, keys=40), dtype, device)
    angle = torch.rand(40, 32, device=device)
    order = torch.randperm(40).to(device)
    # The schema test multiplies its tensors, which torch cannot where they are E4M3.
    tests = ("test_faketensor", "test_autograd_registration")
    for smooth_k in (False, True):
        groups = torch.tensor([0], device=device) if smooth_k else None  # 40 tokens are one block
        args = (q, k, v, angle.cos(), angle.sin(), order, None, 64, groups, smooth_k)
        args = (*args, 1, smooth_k)
        torch.library.opcheck(_quantize_op, args, test_utils=tests)
        lists = (layout.kv_num, layout.kv_idx, None)
        fields = _quantize_op(*args)
        torch.library.opcheck(_forward_op, (*fields[:6], *lists, 64, 64, 64, 0.1, torch.bfloat16), test_utils=tests)
        into = (torch.zeros_like(q), order, *fields[:6], *lists, 64, 64, 64, 0.1)
        torch.library.opcheck(_forward_into_op, into, test_utils=tests)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        args = (*leaves, *lists, 64, 64, 64, 0.1, groups, smooth_k, "exact")
        torch.library.opcheck(_straight_through_op, args, test_utils=tests)
        out, lse, *fields = (x.detach() for x in _straight_through_op(*args))
        args = (out, lse, out, lse, *fields[:6], *lists, 64, 64, 64, 0.1, "exact")
        torch.library.opcheck(_straight_through_backward_op, args, test_utils=tests)


@pytest.mark.interpret
def test_registration_interpreted():
    check_ops("cpu", torch.float32)


@requires_gpu(min_sm=MIN_SM)
def test_registration():
    check_ops("cuda", torch.bfloat16)


@pytest.mark.interpret
def test_compiles_without_a_graph_break_interpreted():
    leaves, layout = build(Case(heads=1, queries=40, keys=40, keep=1.0), torch.float32, "cpu")
    leaves = [x.detach().requires_grad_() for x in leaves]

    def call(q, k, v):
        out, lse = straight_through_attention(q, k, v, layout, smooth_k=True, return_lse=True, backend="triton")
        return out * 2 + lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)

    got, want = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), call(*leaves)
    assert torch.equal(got, want)
    for mine, theirs in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (got, want)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.interpret
def test_inference_compiles_without_a_graph_break_interpreted():
    inputs, layout = build(Case(heads=1, queries=40, keys=40, keep=1.0), torch.float32, "cpu")
    angle, order = torch.rand(40, 32), torch.randperm(40)

    def call(q, k, v):
        rope = (angle.cos(), angle.sin())
        x = quantize_qkv(q, k, v, smooth_k=True, group=2, rope=rope, order=order, backend="triton")
        out = quantized_attention(x, layout, out_dtype=torch.float32, backend="triton") * 2
        quantized_attention(x, layout, out=out, order=order, backend="triton")
        return out * 2

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs))


def check_poison(device):
    """Every element of every output is written, and what is not finite reaches the queries that read it only."""
    from hone_kernels.attention_fp8.triton import attention_fp8_forward

    (q, k, v), layout = build(Case(queries=200, keys=300), torch.float16, device)
    k[:, :, 70] = torch.nan
    x = quantize_qkv(q, k, v, block=64, backend="triton")
    with nan_poison():
        out, lse = attention_fp8_forward(
            x.q8, x.k8, x.v8, x.q_scale, x.k_scale, x.v_scale, layout.kv_num, layout.kv_idx, None, 64, 64, 64, 0.1,
            torch.float16,
        )  # fmt: skip
    reads = layout.to_mask()[..., 1].repeat_interleave(64, dim=-1)[..., :200]
    assert reads.any()
    assert torch.equal(out.isnan().any(-1), reads)
    assert torch.equal(lse.isnan(), reads)


@pytest.mark.interpret
def test_everything_is_written_interpreted():
    check_poison("cpu")


@requires_gpu(min_sm=MIN_SM)
def test_everything_is_written():
    check_poison("cuda")


@requires_gpu(min_sm=MIN_SM)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("keep", [1.0, 0.2])
def test_error_is_that_of_the_format(dim, keep):
    """Against attention of the unrounded inputs in float64, no further off than the emulation."""
    heads, tokens = 3, 4000
    q, k, v = (torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    blocks = -(-tokens // 128)
    layout = BlockLayout.from_topk(
        torch.rand(1, heads, blocks, blocks, device="cuda"), max(1, round(keep * blocks)), tokens, tokens
    )
    exact = block_sparse_attention(q.double(), k.double(), v.double(), layout, backend="reference")
    x = quantize_qkv(q, k, v)
    emulated = quantized_attention(x, layout, backend="reference")
    got = quantized_attention(x, layout, backend="triton")
    assert relative(got, exact) <= 1.3 * relative(emulated, exact)
    assert relative(emulated, exact) < 0.06


@requires_gpu(min_sm=MIN_SM)
@pytest.mark.parametrize("dim", [64, 128])
def test_long_rows_lose_nothing(dim):
    """Equal weights of values of one sign: sums left in the matrix unit's own 14 bits would fall short."""
    tokens = 65_536
    q, k = (torch.zeros(1, 1, n, dim, device="cuda", dtype=torch.bfloat16) for n in (128, tokens))
    v = torch.rand(1, 1, tokens, dim, device="cuda").to(torch.bfloat16)
    x = quantize_qkv(q, k, v)
    layout = BlockLayout.dense(128, tokens, device="cuda")
    out = quantized_attention(x, layout, out_dtype=torch.float32, backend="triton")
    # 128 products in 14 bits may fall short by a thousandth; 65,536 would by a good part of the whole.
    assert_close(out, x.dequantize(torch.float64)[2].mean(2, keepdim=True).expand_as(out), atol=0, rtol=5e-3)


@requires_gpu(min_sm=MIN_SM)
@pytest.mark.parametrize("dim", [64, 128])
def test_runs_are_identical(dim):
    case = Case(heads=6, kv_heads=2, queries=2000, keys=2000, dim=dim, block_q=128, block_k=128)
    inputs, layout = build(case, torch.bfloat16, "cuda")
    leaves = [x.detach().requires_grad_() for x in inputs]
    dout = torch.randn_like(leaves[0])

    def run():
        out, lse = straight_through_attention(*leaves, layout, smooth_k=True, return_lse=True)
        return out, lse, *torch.autograd.grad(out, leaves, dout)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@requires_gpu(min_sm=MIN_SM)
def test_no_wait_graph_and_compile():
    """No host synchronisation, capturable in a CUDA graph, and compilable without a graph break."""
    inputs, layout = build(Case(queries=512, keys=512, dim=128, block_q=128, block_k=128), torch.bfloat16, "cuda")
    angle = torch.rand(512, 64, device="cuda")
    order = torch.randperm(512, device="cuda")
    tables = (angle.cos(), angle.sin())

    def call(q, k, v):
        x = quantize_qkv(q, k, v, smooth_k=True, group=2, rope=tables, order=order)
        return quantized_attention(x, layout)

    expected = call(*inputs)  # compiles the kernels
    with no_host_sync():
        call(*inputs)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = call(*inputs)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
    assert torch.equal(torch.compile(call, fullgraph=True)(*inputs), expected)
    leaves = [x.detach().requires_grad_() for x in inputs]
    train = torch.compile(lambda q, k, v: straight_through_attention(q, k, v, layout) * 2, fullgraph=True)
    out = train(*leaves)
    want = straight_through_attention(*leaves, layout) * 2
    assert torch.equal(out, want)
    for mine, theirs in zip(*(torch.autograd.grad(x.float().sum(), leaves) for x in (out, want)), strict=True):
        assert torch.equal(mine, theirs)


@requires_gpu(min_sm=MIN_SM, min_gb=60)
def test_offsets_beyond_32_bits():
    """The last head of tensors of 3.1e9 elements: 75,600 tokens of 40 heads, eight of them in a batch, strided."""
    tokens, heads, dim = 75_600, 40, 128
    q = torch.empty(8, tokens, heads, dim, device="cuda", dtype=torch.bfloat16).normal_().transpose(1, 2)
    assert q.numel() > 2**31
    mask = torch.zeros(1, 1, 591, 591, dtype=torch.bool, device="cuda")
    mask[..., :, 588:] = True
    layout = BlockLayout.from_mask(mask, tokens, tokens, width=3)
    x = quantize_qkv(q, q, q)
    out = quantized_attention(x, layout)
    last = q[-1:, -1:, 588 * 128 :]
    small = quantize_qkv(last, last, last)
    assert torch.equal(x.q8[-1:, -1:, 588 * 128 :].float(), small.q8.float())
    want = torch.nn.functional.scaled_dot_product_attention(*[last.float()] * 3)
    assert relative(out[-1:, -1:, 588 * 128 :], want) < 0.07
