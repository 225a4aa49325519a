"""FP8 attention's definition: hand-computed roundings, loops in float64, published errors, limits and gradients."""

import math
from dataclasses import replace

import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.attention import BlockLayout, block_sparse_attention
from hone_kernels.attention_fp8 import FP8Operands, quantize_qkv, quantized_attention, straight_through_attention
from hone_kernels.attention_fp8.reference import attention_fp8_reference
from torch.nn.functional import scaled_dot_product_attention

E4M3 = torch.float8_e4m3fn


def tensors(*shape, n=3, dtype=torch.float32):
    return [torch.randn(*shape, dtype=dtype) for _ in range(n)]


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def test_scales_by_hand():
    q = torch.zeros(1, 1, 200, 64)
    q[0, 0, 3, 5], q[0, 0, 4, 0], q[0, 0, 130, 1] = -896.0, 1.1, 14.0
    k = torch.zeros(1, 1, 70, 64)
    k[0, 0, 69, 2] = 7.0
    v = torch.zeros(1, 1, 70, 64)
    v[0, 0, :, 9] = 3.5
    v[0, 0, 20, 9] = 0.01
    x = quantize_qkv(q, k, v)
    assert x.q_scale.flatten().tolist() == [2.0, 14 / 448]
    assert x.q8[0, 0, 3, 5] == -448
    assert x.q8[0, 0, 4, 0].float() == 0.5625  # 0.55 to four bits
    assert x.q8[0, 0, 130, 1] == 448
    assert x.k_scale.flatten().tolist() == [7 / 448]
    assert x.v_scale[0, 0, 9].item() == 3.5 / 448
    # Channels of zeros have a scale that divides and scales back to zero.
    assert 0 < x.v_scale[0, 0, 8] < 1e-37
    assert x.v8.shape == (1, 1, 64, 128)
    assert x.v8[0, 0, 9].float().sum() == 69 * 448 + 1.25  # 0.01 / 3.5 * 448 = 1.28
    assert x.dequantize()[2][0, 0, 20, 9].item() == pytest.approx(1.25 * 3.5 / 448)


def test_values_stand_where_the_matrix_unit_reads_them():
    v = torch.arange(256.0).clamp(max=200)[None, None, :, None].expand(1, 1, 256, 64)
    q = torch.zeros(1, 1, 256, 64)
    x = quantize_qkv(q, q, v)
    want = (v[0, 0, :, 0] * (448 / 200)).to(E4M3).float()
    for key in range(256):
        j, t, e = key % 16 // 8, key % 8 // 2, key % 2
        assert x.v8[0, 0, 7, key // 16 * 16 + 4 * t + 2 * j + e].float() == want[key]
    assert torch.equal(x.dequantize()[2][0, 0, :, 7], want * x.v_scale[0, 0, 7])


def test_group_shares_a_scale():
    q = torch.ones(1, 2, 300, 64)
    q[:, :, 64:128] = 4
    q[:, 1, 256:] = 2
    x = quantize_qkv(q, q, q, block=64, group=2)
    assert (x.q_scale[0, 0] * 448).tolist() == [4, 4, 1, 1, 1]
    assert (x.q_scale[0, 1] * 448).tolist() == [4, 4, 1, 1, 2]
    assert_close(x.dequantize()[0], q, rtol=1e-6)
    # By name: the first and the last block, the second and the fourth, and the third alone.
    x = quantize_qkv(q, q, q, block=64, group=torch.tensor([4, 0, 2, 0, 4]))
    assert (x.q_scale[0, 0] * 448).tolist() == [1, 4, 1, 4, 1]
    assert (x.k_scale[0, 1] * 448).tolist() == [2, 4, 1, 4, 2]
    assert_close(x.dequantize()[0], q, rtol=1e-6)


def test_groups_by_number_and_by_name_are_the_same():
    q, k, v = tensors(2, 4, 300, 64)
    k, v = k[:, ::2], v[:, ::2]
    names = torch.arange(5) // 2
    for name, one, other in zip(
        "qkv", *(quantize_qkv(q, k, v, block=64, group=g).dequantize() for g in (2, names)), strict=True
    ):
        assert torch.equal(one, other), name
    layout = BlockLayout.dense(300, 300, block_q=64, block_k=64)
    layout = replace(layout, k_valid=layout.key_counts())
    one, other = (straight_through_attention(q, k, v, layout, group=g) for g in (2, names))
    assert torch.equal(one, other)


def test_keys_that_do_not_exist_count_nowhere():
    q, k, v = tensors(2, 2, 200, 64)
    valid = torch.tensor([[50, 30], [0, 1]], dtype=torch.int32)
    at = torch.arange(200)
    absent = at % 128 >= valid[:, at // 128]
    k, v = (x.masked_fill(absent[:, None, :, None], torch.inf) for x in (k, v))
    x = quantize_qkv(q, k, v, smooth_k=True, k_valid=valid)
    kept = [x[0, 0, [*range(50), *range(128, 158)]] for x in (k, v)]
    assert_close(x.k_mean[0, 0], kept[0].mean(0))
    assert_close(x.v_scale[0, 0], kept[1].abs().amax(0) / 448)
    for name, y in zip("qkv", x.dequantize(), strict=True):
        assert y.isfinite().all(), name
        if name != "q":
            assert (y.masked_select(absent[:, None, :, None].expand_as(y)) == 0).all()


def test_what_is_not_finite_becomes_nan_and_stays_alone():
    q, k, v = tensors(1, 1, 130, 64)
    clean = quantize_qkv(q, k, v, smooth_k=True)
    q[0, 0, 5, 3], k[0, 0, 6, 0], v[0, 0, 7, 1] = torch.inf, torch.nan, -torch.inf
    x = quantize_qkv(q, k, v, smooth_k=True)
    for y, place in zip(x.dequantize(), ([5, 3], [6, 0], [7, 1]), strict=True):
        assert y.isnan().nonzero().tolist() == [[0, 0, *place]]
    assert_close(x.q_scale, clean.q_scale)


@pytest.mark.parametrize("doubled", [False, True])
def test_rope_is_that_of_wan(doubled):
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    cos, sin = wan.WanRotaryPosEmbed(64, (1, 2, 2), 32)(torch.zeros(1, 16, 3, 8, 14))
    tokens = cos.shape[1]
    q, k, v = (x.to(torch.bfloat16) for x in tensors(2, tokens, 2, 64))

    class Attention:
        add_k_proj, heads, to_out = None, 2, [torch.nn.Identity()] * 2
        norm_q = norm_k = torch.nn.Identity()

    # What the processor hands to attention is what it rotated.
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "_get_qkv_projections", lambda *_: [x.flatten(2) for x in (q, k, v)])
        patch.setattr(wan, "dispatch_attention_fn", lambda q, k, v, **_: seen.update(q=q, k=k) or q)
        wan.WanAttnProcessor()(Attention(), q.flatten(2), rotary_emb=(cos, sin))
    tables = (cos, sin) if doubled else (cos[0, :, 0, ::2], sin[0, :, 0, 1::2])
    got = quantize_qkv(*(x.transpose(1, 2) for x in (q, k, v)), rope=tables)
    want = quantize_qkv(*(x.transpose(1, 2) for x in (seen["q"], seen["k"], v)))
    assert torch.equal(got.q8.float(), want.q8.float())
    assert torch.equal(got.k8.float(), want.k8.float())


def test_order_takes_tokens_and_their_rotation_along():
    q, k, v = tensors(1, 2, 100, 64)
    angle = torch.rand(100, 32)
    order = torch.randperm(100)[:90]
    got = quantize_qkv(q, k, v, rope=(angle.cos(), angle.sin()), order=order)
    want = quantize_qkv(*(x[:, :, order] for x in (q, k, v)), rope=tuple(x[order] for x in (angle.cos(), angle.sin())))
    for name in ("q8", "k8", "v8", "q_scale", "k_scale", "v_scale"):
        assert torch.equal(getattr(got, name).float(), getattr(want, name).float()), name


def brute_force(x, layout, scale, tile):
    """One query after another, one tile of keys after another, in float64."""
    q, k, v = x.dequantize(torch.float64)
    mask, counts = layout.to_mask(), layout.key_counts()
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        hk = h // (q.shape[1] // k.shape[1])
        acc, total, top = torch.zeros(q.shape[3], dtype=q.dtype), 0.0, -math.inf
        for start in range(0, k.shape[2], tile):
            block = start // layout.block_k
            kept = mask[b % mask.shape[0], h % mask.shape[1], i // layout.block_q, block]
            there = counts[b % counts.shape[0], block].item() - start % layout.block_k
            if not kept or there <= 0:
                continue
            stop = min(start + min(tile, there), k.shape[2])
            s = scale * (k[b, hk, start:stop] @ q[b, h, i])
            new = max(top, s.max().item())
            p = (s - new).exp()
            fade = math.exp(top - new)
            acc = acc * fade + ((448 * p).to(E4M3).double() / 448) @ v[b, hk, start:stop]
            total, top = total * fade + p.sum().item(), new
        if total:
            out[b, h, i], lse[b, h, i] = acc / total, top + math.log(total)
    return out, lse


@pytest.mark.parametrize("padded", [False, True])
def test_matches_loops(padded):
    q, (k, v) = tensors(2, 2, 140, 16, n=1)[0] * 3, tensors(2, 1, 150, 16, n=2)
    mask = torch.rand(2, 2, 3, 3) < 0.6
    mask[:, 1, 1] = False
    valid = torch.tensor([[64, 0, 20], [3, 64, 22]], dtype=torch.int32) if padded else None
    layout = BlockLayout.from_mask(mask, 140, 150, block_q=64, block_k=64, k_valid=valid)
    x = quantize_qkv(q, k, v, block=64, k_valid=valid)
    for tile in (64, 32):
        got = attention_fp8_reference(*x.dequantize(torch.float64), layout, 0.3, tile=tile)
        for name, mine, theirs in zip(("out", "lse"), got, brute_force(x, layout, 0.3, tile), strict=True):
            assert_close(mine, theirs, what=f"{name} {tile}")
    out, lse = quantized_attention(x, layout, scale=0.3, return_lse=True, out_dtype=torch.float64)
    assert torch.equal(out, attention_fp8_reference(*x.dequantize(torch.float64), layout, 0.3, tile=64)[0])
    assert (out[:, 1, 64:128] == 0).all()
    assert (lse[:, 1, 64:128] == -math.inf).all()


def test_published_errors():
    """The table of CPU measurements this op was designed on: gaussian data, 3840 keys, head size 128."""
    (q,), (k, v) = tensors(1, 1, 512, 128, n=1), tensors(1, 1, 3840, 128, n=2)
    layout = BlockLayout.dense(512, 3840)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    x = quantize_qkv(q, k, v)
    out = quantized_attention(x, layout, out_dtype=torch.float64)
    assert relative(out, exact) == pytest.approx(0.055, abs=0.002)
    # What rounding P adds to the rounding of the operands.
    rounded = scaled_dot_product_attention(*x.dequantize(torch.float64))
    assert relative(out, rounded) == pytest.approx(0.0265, abs=0.002)
    # Keys that share an offset: it takes E4M3's range until it is subtracted.
    k = k + 8 * torch.randn(128)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    plain, smooth = (
        relative(quantized_attention(quantize_qkv(q, k, v, smooth_k=s), layout), exact) for s in (False, True)
    )
    assert smooth < 0.06
    assert plain > 1.5 * smooth


def test_representable_values_are_exact():
    """Powers of two times E4M3 numbers, where every weight is 1: one key, or equal logits."""
    grid = torch.randint(-15, 16, (1, 2, 200, 64)).float()
    grid[:, :, ::128] = 448.0  # each block's and channel's largest
    grid[:, :, 1] = 448.0
    v = grid * 2.0 ** torch.randint(-3, 4, (64,))
    layout = BlockLayout.dense(200, 200)
    x = quantize_qkv(grid, grid / 4, v)
    for rounded, given in zip(x.dequantize(), (grid, grid / 4, v), strict=True):
        assert torch.equal(rounded, given)
    out, lse = quantized_attention(x, layout, scale=1e-30, return_lse=True, out_dtype=torch.float64)
    assert_close(out, v.double().mean(2, keepdim=True).expand_as(out))
    assert_close(lse, torch.full_like(lse, math.log(200)))
    out = quantized_attention(x, layout, scale=0.001, out_dtype=torch.float64)
    want = scaled_dot_product_attention(grid.double(), grid.double() / 4, v.double(), scale=0.001)
    assert relative(out, want) < 0.03  # of P alone
    one = quantize_qkv(grid[:, :, :1], grid[:, :, :1], v[:, :, 1:2])
    assert torch.equal(quantized_attention(one, BlockLayout.dense(1, 1), out_dtype=torch.float32), v[:, :, 1:2])


def test_smoothing_leaves_the_log_sum_exp_of_the_keys_as_they_were():
    q, k, v = tensors(1, 2, 200, 64)
    k = k[:, :1] + 10 * torch.randn(64)
    layout = BlockLayout.dense(200, 200)
    _, want = block_sparse_attention(q, k, v[:, :1], layout, return_lse=True)
    _, got = quantized_attention(quantize_qkv(q, k, v[:, :1], smooth_k=True), layout, return_lse=True)
    _, rough = quantized_attention(quantize_qkv(q, k, v[:, :1]), layout, return_lse=True)
    assert (got - want).abs().max() < 0.1
    assert (rough - want).abs().max() > 0.5


def straight_through(q, k, v, layout, scale, smooth_k):
    """Exact attention at the rounded operands, whose rounding passes gradients on, by torch's own softmax."""
    block = 128 if layout.k_valid is None else layout.block_k
    x = quantize_qkv(q, k, v, smooth_k=smooth_k, block=block, k_valid=layout.k_valid)
    rounded = list(x.dequantize(q.dtype))
    if smooth_k:
        rounded[1] = rounded[1] + x.k_mean.unsqueeze(2)
    q, k, v = (y + (r - y).detach() for y, r in zip((q, k, v), rounded, strict=True))
    k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for y in (k, v))
    at = torch.arange(layout.tokens_k)
    allowed = layout.to_mask()[:, :, torch.arange(layout.tokens_q) // layout.block_q][..., at // layout.block_k]
    allowed = allowed & (at % layout.block_k < layout.key_counts()[:, at // layout.block_k])[:, None, None]
    logits = (scale * q @ k.transpose(-1, -2)).masked_fill(~allowed, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1), logits, v


@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_is_straight_through(smooth_k, padded, dtype):
    leaves = [*tensors(2, 4, 100, 16, n=1, dtype=dtype), *tensors(2, 2, 130, 16, n=2, dtype=dtype)]
    leaves[1] = leaves[1] + 2
    leaves = [x.requires_grad_() for x in leaves]
    mask = torch.rand(2, 4, 2, 3) < 0.6
    mask[..., 0] = True
    valid = torch.tensor([[64, 9, 2], [20, 64, 0]], dtype=torch.int32) if padded else None
    layout = BlockLayout.from_mask(mask, 100, 130, block_q=64, block_k=64, k_valid=valid)
    out, lse = straight_through_attention(*leaves, layout, scale=0.2, smooth_k=smooth_k, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), leaves)
    smooth_out, smooth_lse, *_ = straight_through(*leaves, layout, 0.2, smooth_k)
    want = torch.autograd.grad((smooth_out * dout).sum() + (smooth_lse * dlse).sum(), leaves)
    for name, g, w in zip("qkv", got, want, strict=True):
        assert_close(g, w, what=f"d{name}")
    x = quantize_qkv(*leaves, smooth_k=smooth_k, block=64 if padded else 128, k_valid=valid)
    value, value_lse = quantized_attention(x, layout, scale=0.2, return_lse=True, out_dtype=dtype)
    assert_close(out, value)
    assert_close(lse, value_lse, dtype=torch.float32)  # in which q . k_mean is kept


def test_delta_of_the_forward_output():
    """dS = P * (dP - sum(dout * out)) with the rounded output, written out."""
    leaves = [x.requires_grad_() for x in tensors(1, 2, 70, 16, dtype=torch.float64)]
    layout = BlockLayout.dense(70, 70, block_q=64, block_k=64)
    out = straight_through_attention(*leaves, layout, scale=0.3, delta="forward")
    dout = torch.randn_like(out)
    got = torch.autograd.grad((out * dout).sum(), leaves)
    _, _, logits, v = straight_through(*leaves, layout, 0.3, False)
    p = logits.softmax(-1)
    ds = p * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True))
    q, k, _ = quantize_qkv(*leaves).dequantize(torch.float64)
    assert_close(got[0], 0.3 * ds @ k)
    assert_close(got[1], 0.3 * ds.transpose(-1, -2) @ q)
    assert_close(got[2], p.transpose(-1, -2) @ dout)
    assert ds.sum(-1).abs().max() > 1e-3


def test_output_lies_as_the_projection_reads_it():
    x = quantize_qkv(*tensors(2, 3, 100, 64))
    out = quantized_attention(x, BlockLayout.dense(100, 100))
    assert out.dtype == torch.bfloat16
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("smooth_k", [False, True])
def test_autocast_changes_nothing(smooth_k):
    q, k, v = tensors(1, 2, 100, 16)
    layout = BlockLayout.from_topk(torch.rand(1, 2, 2, 2), 1, 100, 100, block_q=64, block_k=64)

    def attend():
        operands = quantize_qkv(q, k, v, smooth_k=smooth_k)
        apart = quantized_attention(operands, layout, return_lse=True, out_dtype=torch.float32)
        return (*apart, *straight_through_attention(q, k, v, layout, smooth_k=smooth_k, return_lse=True))

    want = attend()
    with torch.autocast("cpu", torch.bfloat16):
        got = attend()
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block": 32}, ValueError, "blocks of 64 or 128 tokens; got 32"),
        ({"group": 0}, ValueError, "group counts the blocks"),
        ({"group": torch.zeros(2, dtype=torch.int32)}, ValueError, "each block of 128 tokens: 1 of queries and 1 of"),
        ({"group": torch.zeros(1)}, TypeError, "group must be int32 or int64"),
        ({"rope": (torch.ones(100, 16), torch.ones(100, 32))}, ValueError, r"rope's cos must be .* = \[100, 32\]"),
        ({"rope": (torch.ones(32, 100),) * 2}, ValueError, r"rope's cos must be .* got \[32, 100\]"),
        ({"rope": (torch.ones(100, 32), torch.ones(100, 32).int())}, TypeError, "rope's sin must be floating point"),
        ({"rope": (torch.ones(100, 32, device="meta"),) * 2}, TypeError, "on cpu; got torch.float32 on meta"),
        ({"group": torch.zeros(1, dtype=torch.int32, device="meta")}, TypeError, "on cpu; got torch.int32 on meta"),
        ({"order": torch.zeros(9, dtype=torch.int32, device="meta")}, ValueError, r"on cpu; got torch.int32 \[9\] on"),
        ({"k_valid": torch.ones(1, 1, dtype=torch.int32, device="meta")}, TypeError, "int32 on cpu; got .* on meta"),
        ({"k_valid": torch.ones(3, 1, dtype=torch.int32)}, ValueError, r"k_valid must be \[1 or 1, 1\]"),
        ({"group": 1.5}, TypeError, "a count of blocks or a tensor of numbers; got 1.5"),
        ({"group": torch.zeros(1, dtype=torch.int32), "longest": 0}, ValueError, "longest counts .*; got 0"),
        ({"order": torch.ones(100)}, ValueError, "order must be"),
        ({"order": torch.ones(0, dtype=torch.int32)}, ValueError, "order must be"),
        ({"k_valid": torch.ones(1, 3, dtype=torch.int32)}, ValueError, "one count per block of 128 keys"),
        ({"k_valid": torch.ones(1, 1)}, TypeError, "k_valid must be int32"),
        ({"rope": (torch.ones(100, 32),)}, ValueError, r"rope must be a pair of tables \(cos, sin\); got 1"),
        ({"backend": "triton"}, ValueError, "cannot run this call"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        quantize_qkv(*tensors(1, 2, 100, 64), **options)


def test_bad_tensors():
    q, k, v = tensors(1, 2, 100, 64)
    layout = BlockLayout.dense(100, 100)
    with pytest.raises(TypeError, match="share a dtype"):
        quantize_qkv(q, k.half(), v)
    with pytest.raises(ValueError, match="k must have an entry along every axis"):
        quantize_qkv(q, k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match="k and v must have the same shape"):
        quantize_qkv(q, k[..., :32], v)
    with pytest.raises(ValueError, match="multiple of key heads; got 2 and 3"):
        quantize_qkv(q, *tensors(1, 3, 100, 64, n=2))
    with pytest.raises(ValueError, match="as many queries as keys"):
        quantize_qkv(q[:, :, :50], k, v, order=torch.arange(100))
    with pytest.raises(ValueError, match="rope and order need as many queries as keys; got 50 and 100"):
        quantize_qkv(q[:, :, :50], k, v, rope=(torch.ones(50, 32),) * 2)
    many = tensors(1, 2, 200, 64, n=2)
    with pytest.raises(ValueError, match="1 of queries and 2 of keys, which share it"):
        quantize_qkv(q, *many, group=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="delta must be one of"):
        straight_through_attention(q, k, v, layout, delta="none")
    x = quantize_qkv(q, k, v)
    with pytest.raises(ValueError, match="build the layout for these lengths"):
        quantized_attention(x, BlockLayout.dense(100, 90))
    with pytest.raises(TypeError, match="operands must be FP8Operands, from quantize_qkv; got tuple"):
        quantized_attention((x.q8, x.k8, x.v8), layout)
    with pytest.raises(TypeError, match="out_dtype must be float64"):
        quantized_attention(x, layout, out_dtype=torch.int32)
    with pytest.raises(ValueError, match="scale must be positive"):
        quantized_attention(x, layout, scale=0.0)
    with pytest.raises(TypeError, match="q8 must be float8_e4m3fn"):
        FP8Operands(q, x.k8, x.v8, x.q_scale, x.k_scale, x.v_scale, 128)
    with pytest.raises(TypeError, match="k_scale must be float32 on cpu"):
        FP8Operands(x.q8, x.k8, x.v8, x.q_scale, x.k_scale.double(), x.v_scale, 128)
    with pytest.raises(TypeError, match="v8 must be float8_e4m3fn on cpu"):
        FP8Operands(x.q8, x.k8, x.v8.to("meta"), x.q_scale, x.k_scale, x.v_scale, 128)
    with pytest.raises(ValueError, match=r"v8 must be \[1, 2, 64, 128\]"):
        FP8Operands(x.q8, x.k8, x.v8[..., :100], x.q_scale, x.k_scale, x.v_scale, 128)


def test_the_mean_of_long_sequences_is_that_of_a_sample():
    # Of 100 runs of 128 keys every second is in it; and of up to 8,192 keys all are.
    q, k = tensors(1, 1, 12_800, 16, n=2)
    seen = k.unflatten(2, (100, 128))[:, :, ::2].flatten(2, 3)
    x = quantize_qkv(q, k, k, smooth_k=True)
    assert_close(x.k_mean, seen.mean(2), atol=1e-6)
    # Whatever is subtracted, softmax does not notice: the log-sum-exp is that of the keys as they were.
    layout = BlockLayout.from_mask(torch.eye(100, dtype=torch.bool)[None, None], 12_800, 12_800)
    lse = quantized_attention(x, layout, return_lse=True)[1]
    own = (q[0, 0, :128] @ k[0, 0, :128].T / 4).logsumexp(-1)
    assert_close(lse[0, 0, :128], own, atol=0.1)
    few = quantize_qkv(*[k[:, :, :8192]] * 3, smooth_k=True)
    assert_close(few.k_mean, k[:, :, :8192].mean(2), atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_go_to_their_places_by_loops(padded):
    q, k, v = tensors(2, 2, 100, 16)
    order = torch.randperm(100)
    valid = torch.tensor([[64, 20], [10, 36]], dtype=torch.int32) if padded else None
    layout = BlockLayout.dense(100, 100, block_q=64, block_k=64)
    layout = replace(layout, k_valid=valid)
    x = quantize_qkv(q, k, v, block=64, order=order, k_valid=valid)
    rows = quantized_attention(x, layout, out_dtype=torch.float32)
    before = torch.randn(2, 2, 100, 16)
    out = before.clone()
    assert quantized_attention(x, layout, out=out, order=order) is out
    want = before.clone()
    for b in range(2):
        for slot in range(100):
            if not padded or slot % 64 < valid[b, slot // 64]:
                want[b, :, order[slot]] = rows[b, :, slot]
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": torch.arange(100)}, "order says where in out each row goes; pass out"),
        ({"out": torch.empty(1, 2, 99, 64)}, r"out must be \[1, 2, 100, 64\]"),
        ({"out": torch.empty(1, 2, 64, 100).transpose(2, 3)}, "with its channels side by side"),
        ({"out": torch.empty(1, 1, 1, 64).expand(1, 2, 100, 64)}, "out must have memory for each element"),
        ({"out": torch.empty(1, 2, 100, 64), "out_dtype": torch.float16}, "out_dtype is that of out, torch.float32"),
        ({"out": torch.empty(1, 2, 100, 64), "order": torch.arange(99)}, r"order must be \[100\]"),
        ({"out": torch.empty(1, 2, 100, 64), "order": torch.arange(100.0)}, "int32 or int64 on cpu; got torch.float32"),
        (
            {"out": torch.empty(1, 2, 100, 64), "order": torch.empty(100, dtype=torch.int32, device="meta")},
            "int32 or int64 on cpu; got torch.int32 .* on meta",
        ),
        ({"out": torch.empty(1, 2, 100, 64, device="meta")}, r"out must be .* on cpu .* on meta"),
        ({"return_lse": True}, "call quantize_qkv with for_lse=True"),
    ],
)
def test_bad_outputs(options, message):
    x = quantize_qkv(*tensors(1, 2, 100, 64), smooth_k=True, for_lse=False)
    with pytest.raises(ValueError, match=message):
        quantized_attention(x, BlockLayout.dense(100, 100), **options)


def test_places_of_padded_slots_are_those_of_the_keys():
    q, k, v = tensors(1, 2, 100, 64)
    layout = replace(BlockLayout.dense(50, 100), k_valid=torch.tensor([[90]], dtype=torch.int32))
    x = quantize_qkv(q[:, :, :50], k, v, k_valid=layout.k_valid)
    out, order = torch.empty(1, 2, 50, 64), torch.arange(50)
    with pytest.raises(ValueError, match="slots that queries and keys share; got 50 queries and 100 keys"):
        quantized_attention(x, layout, out=out, order=order)


def test_places_of_some_tokens():
    """Fewer queries than the output has places."""
    q, k, v = tensors(1, 2, 100, 64)
    x = quantize_qkv(q[:, :, :30], k, v)
    layout, order = BlockLayout.dense(30, 100), torch.randperm(100)[:30]
    rows = quantized_attention(x, layout, out_dtype=torch.float32)
    out = torch.zeros(1, 2, 100, 64)
    quantized_attention(x, layout, out=out, order=order)
    want = torch.zeros(1, 2, 100, 64)
    want[:, :, order] = rows
    assert torch.equal(out, want)


def test_longest_is_for_a_tensor():
    with pytest.raises(ValueError, match="longest is for a tensor of groups; got group=3"):
        quantize_qkv(*tensors(1, 2, 100, 64), group=3, longest=3)
