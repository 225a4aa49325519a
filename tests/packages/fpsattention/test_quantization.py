import itertools

import pytest
import torch
from hone_core.testing import assert_close
from hone_fpsattention.quantization import E4M3_MAX, round_e4m3, round_qkv
from hone_fpsattention.tiles import Tiling
from hone_kernels.attention_fp8 import quantize_qkv
from hone_kernels.attention_fp8.reference import in_mean


def e4m3_values():
    """Every finite value of the format, from its definition: sign, 4 exponent bits of bias 7, 3 of mantissa."""
    positive = [m / 8 * 2.0**-6 for m in range(8)]  # subnormal
    positive += [
        (1 + m / 8) * 2.0 ** (e - 7) for e, m in itertools.product(range(1, 16), range(8)) if (e, m) != (15, 7)
    ]
    return torch.tensor(sorted({-x for x in positive} | set(positive)), dtype=torch.float64)


def nearest(x):
    """x on the format's grid, by looking at all of it."""
    grid = e4m3_values()
    return grid[(x.double().unsqueeze(-1) - grid).abs().argmin(-1)]


def test_the_largest_value():
    assert float(e4m3_values().max()) == E4M3_MAX
    assert len(e4m3_values()) == 253  # 256 codes less two NaN, and one zero of two


def test_rounding_finds_the_nearest_value():
    x = torch.randn(2000) * torch.logspace(-4, 2, 2000)
    amax = x.abs().max()
    scale = amax.double() / 448
    assert_close(round_e4m3(x, amax).double(), nearest(x.double() / scale) * scale, dtype=torch.float32)


def test_rounding_by_hand():
    # At scale 1: between 1 and 2 the values are 1/8 apart, between 256 and 448 they are 32 apart.
    x = torch.tensor([1.0, 1.06, 1.07, 300.0, -310.0, 448.0, 0.0])
    assert round_e4m3(x, torch.tensor(448.0)).tolist() == [1.0, 1.0, 1.125, 288.0, -320.0, 448.0, 0.0]
    assert round_e4m3(x * 2, torch.tensor(896.0)).tolist() == [2.0, 2.0, 2.25, 576.0, -640.0, 896.0, 0.0]


def test_beyond_the_range_it_stops_and_what_is_not_finite_is_nan():
    got = round_e4m3(torch.tensor([1000.0, -1000.0, torch.inf, -torch.inf, torch.nan]), torch.tensor(448.0))
    assert got[:2].tolist() == [448.0, -448.0]
    assert bool(got[2:].isnan().all())
    assert round_e4m3(torch.zeros(3), torch.tensor(0.0)).tolist() == [0.0, 0.0, 0.0]


def operands(slots, heads=2, kv_heads=2, dim=16, batch=2):
    q = torch.randn(batch, heads, slots, dim) * torch.logspace(-2, 2, slots)[:, None]
    k, v = torch.randn(2, batch, kv_heads, slots, dim)
    return q, k * torch.logspace(1, -1, slots)[:, None] + 3, v * torch.logspace(-1, 1, dim)


def test_scales_by_loops():
    q, k, v = operands(12)
    groups = torch.tensor([0, 0, 0, 2, 2, 1, 1, 1, 0, 0, 3, 3])
    present = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0], dtype=torch.bool)
    got = round_qkv(q, k, v, groups=groups, present=present, smooth_k=True)
    mean = k[:, :, present].mean(2)
    assert_close(got.k_mean, mean)
    smooth = k - mean.unsqueeze(2)
    for x, rounded, scale in ((q, got.q, got.q_scale), (smooth, got.k, got.k_scale)):
        for group in range(3):
            mine = present & (groups == group)
            top = x[:, :, mine].abs().amax((2, 3))
            assert_close(
                scale[:, :, groups == group], (top / 448)[..., None].expand(-1, -1, int((groups == group).sum()))
            )
            step = (top / 448).double()[..., None, None]
            assert_close(
                rounded[:, :, mine].double(), nearest(x[:, :, mine].double() / step) * step, dtype=torch.float32
            )
    top = v[:, :, present].abs().amax(2)
    assert_close(got.v_scale, top / 448)
    step = (top / 448).double().unsqueeze(2)
    assert_close(got.v[:, :, present].double(), nearest(v[:, :, present].double() / step) * step, dtype=torch.float32)
    # Slots without a token are zero whatever they held.
    for x in (got.q, got.k, got.v):
        assert bool((x[:, :, ~present] == 0).all())
    assert bool((got.k_scale > 0).all())


def test_slots_without_a_token_count_nowhere():
    q, k, v = operands(8)
    present = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0], dtype=torch.bool)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    expected = round_qkv(q, k, v, groups=groups, present=present)
    for x in (q, k, v):
        x[:, :, ~present] = 1e9
    got = round_qkv(q, k, v, groups=groups, present=present)
    for name in ("q", "k", "v", "q_scale", "k_scale", "v_scale", "k_mean"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_the_mean_of_many_keys_is_that_of_the_kernels_sample():
    slots = 8_320
    seen = in_mean(slots, torch.device("cpu"))
    assert 0 < int(seen.sum()) < slots
    k = torch.where(seen[:, None], 1.0, 3.0).expand(1, 1, slots, 4)
    made = round_qkv(k, k, k, groups=torch.zeros(slots, dtype=torch.int64), present=torch.ones(slots, dtype=torch.bool))
    assert (made.k_mean == 1.0).all()


def test_autocast_changes_no_bit():
    q, k, v = torch.randn(3, 1, 2, 32, 8)
    where = {"groups": torch.arange(32) // 8, "present": torch.ones(32, dtype=torch.bool)}
    plain = round_qkv(q, k, v, **where)
    with torch.autocast("cpu", torch.bfloat16):
        cast = round_qkv(q, k, v, **where)
    for name in ("q", "k", "v", "q_scale", "k_scale", "v_scale", "k_mean"):
        assert torch.equal(getattr(cast, name), getattr(plain, name))


def test_what_is_not_finite_spoils_itself_only():
    q, k, v = operands(8)
    k[0, 0, 2, 3] = v[0, 0, 2, 3] = torch.inf
    got = round_qkv(q, k, v, groups=torch.zeros(8, dtype=torch.int64), present=torch.ones(8, dtype=torch.bool))
    for x, scale in ((got.k, got.k_scale), (got.v, got.v_scale)):
        assert x.isnan().nonzero().tolist() == [[0, 0, 2, 3]]
        assert bool(scale.isfinite().all())


def test_scales_of_zeros_divide():
    zero = torch.zeros(1, 1, 4, 8)
    got = round_qkv(zero, zero, zero, groups=torch.arange(4), present=torch.ones(4, dtype=torch.bool))
    for x, scale in ((got.q, got.q_scale), (got.k, got.k_scale), (got.v, got.v_scale)):
        assert bool((scale > 0).all())
        assert bool((x == 0).all())


def test_finer_scales_and_smoothing_keep_more_of_a_drifting_key():
    # The format floats, so only values below its normal range gain from a finer scale.
    q, k, v = operands(64)
    k = k * torch.logspace(0, 6, 64)[:, None]
    every = torch.ones(64, dtype=torch.bool)

    def error(groups):
        rounded = round_qkv(q, k, v, groups=groups, present=every, smooth_k=False).k
        return float(((rounded - k) / k).square().mean())

    coarse, fine, token = (
        error(torch.zeros(64, dtype=torch.int64)),
        error(torch.arange(64) // 8),
        error(torch.arange(64)),
    )
    assert token <= fine < coarse / 10


# ---- against the emulation of the kernels


@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize(("block", "grid", "tile"), [(64, (9, 6, 11), (4, 4, 4)), (128, (7, 9, 17), (4, 4, 8))])
@pytest.mark.parametrize("whole", [False, True])
def test_operands_equal_the_kernels(smooth_k, block, grid, tile, whole):
    # Tiles of one block: a tile's scale is a block's; the whole video's is that of all blocks.
    tiling = Tiling.of(grid, tile, block=block)
    q, k, v = operands(tiling.tokens, heads=4, kv_heads=2)
    q, k, v = (x[:, :, tiling.slots] for x in (q, k, v))
    blocks = len(tiling.tile_of_block)
    present = torch.zeros(len(tiling.slots), dtype=torch.bool)
    present[tiling.places] = True
    groups = tiling.scale_groups(None if whole else tile).repeat_interleave(block)
    got = round_qkv(q, k, v, groups=groups, present=present, smooth_k=smooth_k)
    theirs = quantize_qkv(
        torch.where(present[:, None], q, 0), k, v, block=block, group=blocks if whole else 1, smooth_k=smooth_k,
        k_valid=tiling.valid, backend="reference",
    )  # fmt: skip
    for mine, other in zip((got.q, got.k, got.v), theirs.dequantize(), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(got.q_scale[..., ::block], theirs.q_scale)
    assert torch.equal(got.k_scale[..., ::block], theirs.k_scale)
    assert torch.equal(got.v_scale, theirs.v_scale)
    if smooth_k:
        assert torch.equal(got.k_mean, theirs.k_mean)


def test_a_scale_per_token_gains_by_what_it_makes_exact():
    """E4M3 floats, so it has no need of scales; but each token's largest entry becomes 448, which it holds exactly."""
    k = torch.randn(1, 1, 256, 64)
    k[..., 5] = 6 + 4 * torch.rand(256)  # an entry that stands out
    present, zero = torch.ones(256, dtype=torch.bool), torch.zeros(256, dtype=torch.long)

    def error(groups):
        found = round_qkv(k, k, k, groups=groups, present=present, smooth_k=False).k
        return float((found - k).norm() / k.norm())

    def inexact():
        """The largest entries at 432, half way between two values."""
        found = round_e4m3(k, k.abs().amax(-1, keepdim=True) * 448 / 432)
        return float((found - k).norm() / k.norm())

    assert error(torch.arange(256)) < 0.8 * error(zero)
    assert inexact() > error(zero)
