import dataclasses
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from hone_core.testing import assert_close, gradcheck
from hone_fpsattention import method
from hone_fpsattention.config import FPSAttentionConfig, Regime
from hone_fpsattention.method import Plan, fps_attention
from hone_fpsattention.tiles import Tiling
from hone_kernels.attention_fp8.quantize import fake_fields

GRID, TILE = (9, 3, 6), (4, 4, 4)  # 3 x 1 x 2 tiles of up to 64 tokens, short on three faces
CFG = FPSAttentionConfig(tile=TILE, block=64)
EXACT = Regime(window=(1, 3, 1), e4m3=False)
ROUNDED = Regime(window=(1, 3, 1))


def tensors(tokens, batch=1, heads=2, kv_heads=None, dim=8, dtype=torch.float64):
    return [torch.randn(batch, h, tokens, dim, dtype=dtype) for h in (heads, kv_heads or heads, kv_heads or heads)]


def attend(q, k, v, regime, cfg=CFG, grid=GRID, text=0, **options):
    tiling = Tiling.of(grid, cfg.tile, block=cfg.block, text_tokens=text)
    return fps_attention(q, k, v, plan=Plan.of(regime, tiling, cfg), cfg=cfg, **options)


def keep_by_loops(window, border="shift", grid=GRID, tile=TILE, text=0):
    """Which tokens (columns, in tile order) each token reads, by the rule's words."""
    counts = [math.ceil(g / t) for g, t in zip(grid, tile, strict=True)]
    order = Tiling.of(grid, tile, block=64).order.tolist()
    places = [(i // (grid[1] * grid[2]), i // grid[2] % grid[1], i % grid[2]) for i in order]
    tiles = [tuple(p // t for p, t in zip(place, tile, strict=True)) for place in places]

    def reads(q, k):
        for a, b, n, w in zip(q, k, counts, window, strict=True):
            reach = w // 2
            if border == "shift" and 2 * reach + 1 <= n:
                a = max(reach, min(a, n - 1 - reach))
            elif border == "shift":
                continue
            if abs(a - b) > reach:
                return False
        return True

    keep = torch.ones(len(order) + text, len(order) + text, dtype=torch.bool)
    for i, q in enumerate(tiles):
        for j, k in enumerate(tiles):
            keep[i, j] = reads(q, k)
    return keep


def turn(x, angle):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def masked(q, k, v, keep, scale=None):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = (q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~keep, -math.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


# ---- the window, unrounded


@pytest.mark.parametrize("border", ["shift", "cut"])
@pytest.mark.parametrize("window", [(1, 1, 1), (3, 1, 1), (1, 3, 2), (6, 6, 1)])
@pytest.mark.parametrize("text", [0, 5])
def test_window_by_loops(window, border, text):
    q, k, v = tensors(math.prod(GRID) + text, batch=2, heads=4, kv_heads=2)
    cfg = dataclasses.replace(CFG, border=border)
    keep = keep_by_loops(window, border, text=text)
    out, lse = attend(q, k, v, Regime(window=window, e4m3=False), cfg, text=text, return_lse=True)
    expected, expected_lse = masked(q, k, v, keep)
    assert_close(out, expected)
    assert_close(lse, expected_lse)


def test_borders_differ():
    q, k, v = tensors(math.prod((12, 4, 4)))
    cut = dataclasses.replace(CFG, border="cut")
    # Three tiles in a row: at its ends the shifted window of three reads all, the cut one two.
    out = attend(q, k, v, Regime(window=(3, 1, 1), e4m3=False), grid=(12, 4, 4))
    assert_close(out, F.scaled_dot_product_attention(q, k, v))
    out = attend(q, k, v, Regime(window=(3, 1, 1), e4m3=False), cut, grid=(12, 4, 4))
    dense = F.scaled_dot_product_attention(q, k, v)
    assert_close(out[:, :, 64:128], dense[:, :, 64:128])
    assert_close(out[:, :, :64], F.scaled_dot_product_attention(q[:, :, :64], k[:, :, :128], v[:, :, :128]))


@pytest.mark.parametrize("grid", [(8, 8, 8), (7, 6, 9), (5, 5, 5), (1, 9, 3), (3, 1, 1)])
@pytest.mark.parametrize("regime", [Regime(e4m3=False), Regime(window=(9, 9, 9), e4m3=False)])
@pytest.mark.parametrize("text", [0, 7])
def test_a_window_over_everything_is_dense_attention(grid, regime, text):
    q, k, v = tensors(math.prod(grid) + text, heads=4, kv_heads=2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert_close(attend(q, k, v, regime, grid=grid, text=text), expected)
    # And with a larger tile that the border cuts on all sides.
    cfg = FPSAttentionConfig()
    assert_close(attend(q, k, v, regime, cfg, grid=grid, text=text), expected)


def test_text_reads_and_is_read_by_everything():
    q, k, v = tensors(math.prod(GRID) + 9)
    regime = Regime(window=(1, 1, 1), e4m3=False)
    out = attend(q, k, v, regime, text=9)
    assert_close(out[:, :, -9:], F.scaled_dot_product_attention(q[:, :, -9:], k, v))
    moved = v.clone()
    moved[:, :, -1] += 1
    assert bool(((attend(q, k, moved, regime, text=9) - out).abs().amax((0, 1, 3)) > 1e-6).all())


def test_scale_and_rope():
    tokens = math.prod(GRID)
    q, k, v = tensors(tokens)
    keep = keep_by_loops(EXACT.window)
    assert_close(attend(q, k, v, EXACT, scale=0.3), masked(q, k, v, keep, 0.3)[0])
    angle = torch.rand(tokens, 4, dtype=torch.float64) * 6

    def turn(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    expected = masked(turn(q), turn(k), v, keep)[0]
    for regime, wanted in (
        (EXACT, expected),
        (Regime(e4m3=False), F.scaled_dot_product_attention(turn(q), turn(k), v)),
    ):
        assert_close(attend(q, k, v, regime, rope=(angle.cos(), angle.sin())), wanted)


def test_gradients_of_the_window():
    tokens = math.prod((5, 4, 3))
    leaves = [x.requires_grad_() for x in tensors(tokens, heads=1, dim=2)]
    gradcheck(lambda q, k, v: attend(q, k, v, Regime(window=(1, 1, 1), e4m3=False), grid=(5, 4, 3)), *leaves)


# ---- rounding


def values_e4m3():
    positive = [m / 512 for m in range(8)] + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)][:-1]
    return torch.tensor(sorted({-x for x in positive} | set(positive)), dtype=torch.float64)


def nearest(x):
    grid = values_e4m3()
    return grid[(x.unsqueeze(-1) - grid).abs().argmin(-1)]


@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rounding_by_brute_force(smooth_k, backend):
    # One tile in one block, so that the largest logit met so far is the row's.
    grid = (3, 4, 4)
    q, k, v = tensors(48, batch=2)
    k = k + 2
    cfg = dataclasses.replace(CFG, smooth_k=smooth_k, backend=backend)
    out, lse = attend(q, k, v, Regime(), cfg, grid=grid, return_lse=True)

    # Operands are rounded from float32, as a kernel has them.
    q32, k32, v32 = (x.float() for x in (q, k, v))
    mean = k32.mean(2, keepdim=True) if smooth_k else torch.zeros_like(k32[:, :, :1])

    def scaled(x, dims):
        step = (x.abs().amax(dims, keepdim=True) / 448).double()
        return nearest(x.double() / step) * step

    q8, k8, v8 = scaled(q32, (2, 3)), scaled(k32 - mean, (2, 3)), scaled(v32, (2,))
    logits = q8 @ k8.transpose(-1, -2) * 8**-0.5
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    expected = nearest(448 * p) / 448 @ v8 / p.sum(-1, keepdim=True)
    assert_close(out, expected, atol=1e-6)
    correction = 8**-0.5 * (q @ mean.double().transpose(-1, -2)).squeeze(-1)
    assert_close(lse, logits.logsumexp(-1) + correction, atol=1e-6)


@pytest.mark.parametrize(
    ("smooth_k", "window", "tile", "scales", "text"),
    [
        (False, None, (4, 4, 4), {"scales": "tile"}, 0),
        (True, (1, 3, 1), (4, 4, 4), {"scales": "tile"}, 70),
        (True, None, (4, 4, 4), {"scales": "tensor"}, 70),
        (False, (1, 1, 1), (4, 4, 4), {"scale_tile": (8, 4, 8)}, 7),
        (True, (1, 1, 1), (4, 4, 8), {"scales": "tile"}, 7),
        (False, (3, 1, 1), (4, 4, 8), {"scale_tile": (8, 4, 8)}, 0),
    ],
)
def test_the_definition_and_the_kernels_emulation_agree(smooth_k, window, tile, scales, text):
    q, k, v = tensors(math.prod(GRID) + text, batch=2, heads=4, kv_heads=2)
    k = k + 2
    cfg = dataclasses.replace(CFG, smooth_k=smooth_k, tile=tile)
    angle = torch.rand(q.shape[2], 4, dtype=torch.float64) * 6
    results = []
    for backend in ("auto", "reference"):
        own = dataclasses.replace(cfg, backend=backend)
        options = {"text": text, "return_lse": True, "rope": (angle.cos(), angle.sin())}
        results.append(attend(q, k, v, Regime(window=window, **scales), own, **options))
    # The prologue rotates by float32 tables: where P or an operand is about to round the other way, it may.
    for theirs, mine in zip(*results, strict=True):
        assert float((theirs - mine).norm() / mine.norm()) < 1e-3
    # Rotated beforehand, nothing differs but the last bits of the mean.
    rotated = [turn(x, angle) for x in (q, k)]
    results = [
        attend(*rotated, v, Regime(window=window, **scales), dataclasses.replace(cfg, backend=backend), text=text)
        for backend in ("auto", "reference")
    ]
    assert_close(*results, atol=1e-5)


def test_error_is_that_of_the_format():
    q, k, v = tensors(math.prod(GRID), dim=64)
    exact = attend(q, k, v, Regime(e4m3=False))
    errors = []
    for regime in (Regime(), Regime(scales="tensor"), Regime(scales="token"), Regime(scale_tile=(8, 8, 8))):
        errors.append(float((attend(q, k, v, regime) - exact).norm() / exact.norm()))
        assert 0.02 < errors[-1] < 0.08, regime
    # The format floats: what shares a scale matters little where magnitudes are alike.
    assert max(errors) < 1.1 * min(errors)


def test_granularities_differ_where_magnitudes_drift():
    q, k, v = tensors(math.prod(GRID), dim=16)
    k = k * torch.logspace(-5, 0, k.shape[2])[:, None]
    regimes = [Regime(scales="tensor"), Regime(scale_tile=(8, 8, 8)), Regime(), Regime(scales="token")]
    cfg = dataclasses.replace(CFG, smooth_k=False)
    outs = [attend(q, k, v, regime, cfg) for regime in regimes]
    for i, one in enumerate(outs):
        for other in outs[:i]:
            assert float((one - other).abs().max()) > 1e-6


def test_smoothing_helps_where_keys_share_a_part_and_keeps_the_log_sum_exp():
    q, k, v = tensors(math.prod(GRID), dim=16)
    k = k + 40 * torch.randn(16, dtype=torch.float64)
    exact, exact_lse = attend(q, k, v, EXACT, return_lse=True)
    errors = {}
    for smooth_k in (False, True):
        out, lse = attend(q, k, v, ROUNDED, dataclasses.replace(CFG, smooth_k=smooth_k), return_lse=True)
        errors[smooth_k] = float((out - exact).norm() / exact.norm())
        if smooth_k:
            # Logits of this size reach the log-sum-exp: a correction of the wrong sign would be off by a hundred.
            assert float(exact_lse.abs().max()) > 50
            assert_close(lse, exact_lse, atol=0.2)
    assert errors[True] < errors[False] / 5


def test_a_plain_regime_takes_the_scale_and_no_autocast():
    q, k, v = tensors(math.prod(GRID), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, Regime(e4m3=False), scale=0.3)
    assert out.dtype == torch.float32
    assert_close(out, masked(q, k, v, torch.tensor(True), 0.3)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("regime", [EXACT, ROUNDED])
@pytest.mark.parametrize("trained", range(3))
def test_a_gradient_of_one_operand_alone(regime, trained):
    # As of a LoRA on one projection.
    operands = tensors(math.prod(GRID))
    operands[trained].requires_grad_()
    attend(*operands, regime).square().sum().backward()
    assert operands[trained].grad.abs().sum() > 0


def test_backend_reference_is_the_definition_and_no_kernel(monkeypatch):
    monkeypatch.setattr(method, "quantize_qkv", None)
    attend(*tensors(math.prod(GRID)), ROUNDED, dataclasses.replace(CFG, backend="reference"))


def test_padding_weighs_nothing():
    # The second tile has 16 tokens of 64; zeros in its padding would add log(1 + 48 / 130) = 0.3 to the log-sum-exp.
    q, k, v = tensors(80)
    options = {"grid": (4, 4, 5), "return_lse": True}
    out, lse = attend(q, k, v, Regime(), dataclasses.replace(CFG, smooth_k=False), **options)
    exact, exact_lse = attend(q, k, v, Regime(e4m3=False), **options)
    assert_close(lse, exact_lse, atol=0.1)
    assert float((out - exact).norm() / exact.norm()) < 0.08


def test_one_regime_is_the_same_at_every_step():
    q, k, v = tensors(math.prod(GRID))
    staged = FPSAttentionConfig(
        tile=TILE, block=64, regimes=(EXACT, ROUNDED, Regime(e4m3=False)), boundaries=(0.2, 0.8)
    )
    for i, regime in enumerate(staged.regimes):
        constant = staged.constant(i)
        assert torch.equal(attend(q, k, v, constant.regimes[0], constant), attend(q, k, v, regime, staged))


# ---- gradients through the rounding


def straight_through(q, k, v, smooth_k):
    """One tile: rounded operands whose gradient is the identity's."""

    def scaled(x, dims):
        step = (x.detach().float().abs().amax(dims, keepdim=True) / 448).double()
        return x + (nearest(x.detach().float().double() / step) * step - x).detach()

    if smooth_k:
        k = k - k.detach().float().mean(2, keepdim=True).double()
    return scaled(q, (2, 3)), scaled(k, (2, 3)), scaled(v, (2,))


@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_exact_gradients_are_those_of_attention_at_the_rounded_operands(smooth_k, backend):
    leaves = [x.requires_grad_() for x in tensors(48)]
    cfg = dataclasses.replace(CFG, smooth_k=smooth_k, backend=backend)
    out, lse = attend(*leaves, Regime(), cfg, grid=(3, 4, 4), return_lse=True)
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), leaves, (grad, grad_lse))
    q, k, v = straight_through(*leaves, smooth_k)
    expected_out, expected_lse = masked(q, k, v, torch.ones(48, 48, dtype=torch.bool))
    if smooth_k:
        mean = leaves[1].detach().float().mean(2, keepdim=True).double()
        expected_lse = expected_lse + 8**-0.5 * (leaves[0] @ mean.transpose(-1, -2)).squeeze(-1)
    expected = torch.autograd.grad((expected_out, expected_lse), leaves, (grad, grad_lse))
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs, atol=1e-5)


def test_forward_gradients_subtract_the_rounded_output():
    leaves = [x.requires_grad_() for x in tensors(48)]
    cfg = dataclasses.replace(CFG, smooth_k=False, delta="forward")
    out = attend(*leaves, Regime(), cfg, grid=(3, 4, 4))
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    q, k, v = (x.detach() for x in straight_through(*leaves, False))
    p = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
    dp = grad @ v.transpose(-1, -2)
    ds = p * (dp - (grad * out.detach()).sum(-1, keepdim=True)) * 8**-0.5
    for mine, theirs in zip(got, (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad), strict=True):
        assert_close(mine, theirs, atol=1e-5)
    # And so differ from the exact ones, by what the rounding of P leaves.
    exact = torch.autograd.grad(
        attend(*leaves, Regime(), dataclasses.replace(cfg, delta="exact"), grid=(3, 4, 4)), leaves, grad
    )
    assert float((got[0] - exact[0]).abs().max()) > 1e-4
    assert_close(got[2], exact[2])


@pytest.mark.parametrize("delta", ["exact", "forward"])
@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("scales", [{"scales": "tile"}, {"scales": "tensor"}, {"scale_tile": (8, 4, 8)}])
def test_gradients_agree_with_the_kernels_emulation(delta, smooth_k, scales):
    leaves = [x.requires_grad_() for x in tensors(math.prod(GRID), heads=4, kv_heads=2)]
    cfg = dataclasses.replace(CFG, smooth_k=smooth_k, delta=delta)
    grads, results = None, []
    for backend in ("auto", "reference"):
        own = dataclasses.replace(cfg, backend=backend)
        outs = attend(*leaves, Regime(window=(1, 3, 1), **scales), own, return_lse=True)
        grads = grads or [torch.randn_like(x) for x in outs]
        results.append((*outs, *torch.autograd.grad(outs, leaves, grads)))
    for theirs, mine in zip(*results, strict=True):
        assert_close(theirs, mine, atol=1e-5)


def test_a_pass_without_gradient_gives_what_training_saw():
    q, k, v = tensors(math.prod(GRID))
    trained = attend(*(x.clone().requires_grad_() for x in (q, k, v)), ROUNDED)
    assert_close(attend(q, k, v, ROUNDED), trained.detach(), atol=1e-6)


def test_half_precision_keeps_its_dtype():
    q, k, v = tensors(math.prod(GRID), dtype=torch.bfloat16)
    for regime in (EXACT, ROUNDED, Regime(e4m3=False)):
        out = attend(q, k, v, regime)
        assert out.dtype == torch.bfloat16
        exact = attend(*(x.double() for x in (q, k, v)), regime)
        assert_close(out, exact, dtype=torch.bfloat16)


# ---- what does not fit


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 161, 8), "q must have the 162 tokens of the plan's grid and text; got 161"),
        ((2, 162, 8), r"q must be \[batch, heads, tokens, dim\]"),
    ],
)
def test_other_lengths_are_refused(shape, message):
    x = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        attend(x, x, x, EXACT)


def test_tables_of_another_length_are_refused():
    q, k, v = tensors(math.prod(GRID))
    table = torch.ones(10, 4)
    with pytest.raises(ValueError, match=r"rope must be two tables \[tokens, dim / 2\] = \[162, 4\]; got \[10, 4\]"):
        attend(q, k, v, EXACT, rope=(table, table))


# ---- memory


@pytest.mark.parametrize("regime", [EXACT, ROUNDED, Regime(scales="tensor")])
@pytest.mark.parametrize("text", [0, 7])
def test_heads_in_parts_and_the_memory_of_q_change_nothing(regime, text, monkeypatch):
    tokens = math.prod(GRID) + text
    q, k, v = (torch.randn(2, tokens, h, 8).transpose(1, 2) for h in (10, 5, 5))
    angle = torch.rand(tokens, 4) * 6
    options = {"text": text, "rope": (angle.cos(), angle.sin())}
    expected, expected_lse = attend(q, k, v, regime, return_lse=True, **options)
    monkeypatch.setattr(method, "_LARGE", 1)
    out, lse = attend(q, k, v, regime, return_lse=True, **options)
    assert_close(out, expected, atol=1e-6)
    assert_close(lse, expected_lse, atol=1e-6)
    given = q.clone()  # its memory order
    got = attend(given, k, v, regime, overwrite_q=True, **options)
    assert got is given
    assert_close(got, expected, atol=1e-6)
    # Heads one after another in memory: the projection behind wants it otherwise.
    apart = q.contiguous()
    assert attend(apart, k, v, regime, overwrite_q=True, **options) is not apart
    assert torch.equal(apart, q)


def test_operands_of_one_part_at_a_time(monkeypatch):
    monkeypatch.setattr(method, "_LARGE", 1)
    alive, most, made = set(), 0, []
    quantize = method.quantize_qkv

    def counted(*args, **options):
        nonlocal most
        operands = quantize(*args, **options)
        made.append(tuple(operands.q8.shape))
        alive.add(len(made))
        most = max(most, len(alive))
        weakref.finalize(operands, alive.discard, len(made))
        return operands

    monkeypatch.setattr(method, "quantize_qkv", counted)
    attend(*tensors(math.prod(GRID), heads=6, kv_heads=3, dtype=torch.float32), ROUNDED)
    slots = len(Tiling.of(GRID, TILE, block=64).slots)
    assert made == [(1, 4, slots, 8), (1, 2, slots, 8)]
    assert most == 1


@pytest.mark.parametrize(
    ("grid", "heads", "text"),
    [((21, 45, 80), 40, 0), ((21, 30, 52), 40, 0), ((21, 45, 80), 12, 0), ((33, 45, 80), 24, 256)],
)
def test_a_large_attention_needs_no_more_memory_than_a_dense_one(grid, heads, text):
    # In place of an output, which takes q's memory, stand the operands of half of the heads.
    tiling = Tiling.of(grid, (6, 8, 8), text_tokens=text)
    q = torch.empty(1, tiling.tokens, heads, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    part = q[:, method._parts(q, q, method._PARTS[True])[0][0]]
    assert part.shape[1] == heads // 2
    fields = fake_fields(part, part, len(tiling.slots), 128, True, False)
    lse = 4 * part.shape[1] * len(tiling.slots)
    tables = 4 * tiling.tokens * 128
    size = q.numel() * q.element_size()
    assert size >= method._LARGE
    assert sum(x.numel() * x.element_size() for x in fields) + lse + tables < size


def test_groups_of_a_plan_stand_in_rows_where_they_do():
    tiling = Tiling.of((9, 8, 8), (4, 4, 4), block=64, text_tokens=70)
    cfg = dataclasses.replace(CFG, tile=(4, 4, 4))
    assert Plan.of(Regime(), tiling, cfg).longest == 2  # the text's
    assert Plan.of(Regime(scale_tile=(4, 4, 8)), tiling, cfg).longest == 2
    # Boxes of two by two tiles are not one after another.
    assert Plan.of(Regime(scale_tile=(4, 8, 4)), Tiling.of((4, 8, 8), (4, 4, 4), block=64), cfg).longest is None
    assert Plan.of(Regime(scales="tensor"), tiling, cfg).longest == 12
