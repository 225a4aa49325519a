"""Blending in Triton: one program per tile walks its list until no pixel has light left, forward and backward.

The backward pass walks forward too: what lies behind a Gaussian is the pixel's sum without what lies before it.
Gradients of a Gaussian are added up from its tiles by atomics, so that two runs may differ in the last bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import DRAWN, LEAST_ALPHA, LEAST_LIGHT, MAX_ALPHA, TILE, VALUES

__all__ = ["SLOTS", "blend_tiles_backward", "blend_tiles_forward"]

SLOTS = 16
"""Gaussians of a list that are composed at a time."""
STOP = math.log(LEAST_LIGHT)


@triton.jit
def _step(
    VALUES_, ORDER, start, at, count, pixel_x, pixel_y, light,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, STOP: tl.constexpr,
):  # fmt: skip
    """The next Gaussians of a list: their numbers, and at each pixel what their gradients need."""
    slot = at + tl.arange(0, SLOTS)
    used = slot < count
    member = tl.load(ORDER + start + slot, mask=used, other=0)
    row = VALUES_ + member * WIDTH
    dx = pixel_x[None, :] - tl.load(row, mask=used, other=0.0)[:, None]
    dy = pixel_y[None, :] - tl.load(row + 1, mask=used, other=0.0)[:, None]
    a = tl.load(row + 2, mask=used, other=0.0)[:, None]
    b = tl.load(row + 3, mask=used, other=0.0)[:, None]
    c = tl.load(row + 4, mask=used, other=0.0)[:, None]
    opacity = tl.load(row + 5, mask=used, other=0.0)[:, None]
    power = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    fall = tl.exp(-tl.maximum(power, 0.0))
    raw = opacity * fall
    alpha = tl.minimum(raw, MOST)
    seen = (alpha >= LEAST) & (power >= 0.0) & used[:, None]
    alpha = tl.where(seen, alpha, 0.0)
    log_light = tl.log(1.0 - alpha)
    after = light[None, :] + tl.cumsum(log_light, 0)
    drawn = seen & (after > STOP)
    before = tl.exp(after - log_light)
    return member, used, dx, dy, a, b, c, fall, raw, alpha, log_light, drawn, before


@triton.jit
def _forward_kernel(
    VALUES_, ORDER, STARTS, COUNTS, OUT, tiles, columns,
    SIDE: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, DRAWN: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr, STOP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    start, count = tl.load(STARTS + tile), tl.load(COUNTS + tile)
    pixel = tl.arange(0, SIDE * SIDE)
    within = tile % tiles
    pixel_x = (within % columns * SIDE + pixel % SIDE).to(tl.float32) + 0.5
    pixel_y = (within // columns * SIDE + pixel // SIDE).to(tl.float32) + 0.5
    light = tl.zeros([SIDE * SIDE], tl.float32)
    red, green, blue, cover, depth = light, light, light, light, light
    at = 0
    while (at < count) & (tl.max(light, 0) > STOP):
        member, used, _dx, _dy, _a, _b, _c, _fall, _raw, alpha, log_light, drawn, before = _step(
            VALUES_, ORDER, start, at, count, pixel_x, pixel_y, light, SLOTS, WIDTH, LEAST, MOST, STOP
        )
        weight = tl.where(drawn, alpha * before, 0.0)
        row = VALUES_ + member * WIDTH
        red += tl.sum(weight * tl.load(row + 6, mask=used, other=0.0)[:, None], 0)
        green += tl.sum(weight * tl.load(row + 7, mask=used, other=0.0)[:, None], 0)
        blue += tl.sum(weight * tl.load(row + 8, mask=used, other=0.0)[:, None], 0)
        depth += tl.sum(weight * tl.load(row + 9, mask=used, other=0.0)[:, None], 0)
        cover += tl.sum(weight, 0)
        light += tl.sum(log_light, 0)
        at += SLOTS
    out = OUT + (tile * SIDE * SIDE + pixel) * DRAWN
    tl.store(out, red)
    tl.store(out + 1, green)
    tl.store(out + 2, blue)
    tl.store(out + 3, cover)
    tl.store(out + 4, depth)


@triton.jit
def _backward_kernel(
    VALUES_, ORDER, STARTS, COUNTS, OUT, GRAD, GRADS, tiles, columns,
    SIDE: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, DRAWN: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr, STOP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    start, count = tl.load(STARTS + tile), tl.load(COUNTS + tile)
    pixel = tl.arange(0, SIDE * SIDE)
    within = tile % tiles
    pixel_x = (within % columns * SIDE + pixel % SIDE).to(tl.float32) + 0.5
    pixel_y = (within // columns * SIDE + pixel // SIDE).to(tl.float32) + 0.5
    place = (tile * SIDE * SIDE + pixel) * DRAWN
    g0, g1, g2 = tl.load(GRAD + place), tl.load(GRAD + place + 1), tl.load(GRAD + place + 2)
    g3, g4 = tl.load(GRAD + place + 3), tl.load(GRAD + place + 4)
    # What the rest of the list gives to the loss, at first all of it.
    rest = g0 * tl.load(OUT + place) + g1 * tl.load(OUT + place + 1) + g2 * tl.load(OUT + place + 2)
    rest += g3 * tl.load(OUT + place + 3) + g4 * tl.load(OUT + place + 4)
    light = tl.zeros([SIDE * SIDE], tl.float32)
    at = 0
    while (at < count) & (tl.max(light, 0) > STOP):
        member, used, dx, dy, a, b, c, fall, raw, alpha, log_light, drawn, before = _step(
            VALUES_, ORDER, start, at, count, pixel_x, pixel_y, light, SLOTS, WIDTH, LEAST, MOST, STOP
        )
        row = VALUES_ + member * WIDTH
        gain = tl.load(row + 6, mask=used, other=0.0)[:, None] * g0[None, :] + g3[None, :]
        gain += tl.load(row + 7, mask=used, other=0.0)[:, None] * g1[None, :]
        gain += tl.load(row + 8, mask=used, other=0.0)[:, None] * g2[None, :]
        gain += tl.load(row + 9, mask=used, other=0.0)[:, None] * g4[None, :]
        weight = tl.where(drawn, alpha * before, 0.0)
        given = weight * gain
        behind = rest[None, :] - tl.cumsum(given, 0)
        grad_alpha = tl.where(drawn & (raw <= MOST), before * gain - behind / (1.0 - alpha), 0.0)
        grad_power = -raw * grad_alpha
        grad_x = -(a * dx + b * dy) * grad_power
        grad_y = -(c * dy + b * dx) * grad_power
        out = GRADS + member * WIDTH
        tl.atomic_add(out, tl.sum(grad_x, 1), mask=used)
        tl.atomic_add(out + 1, tl.sum(grad_y, 1), mask=used)
        tl.atomic_add(out + 2, tl.sum(0.5 * dx * dx * grad_power, 1), mask=used)
        tl.atomic_add(out + 3, tl.sum(dx * dy * grad_power, 1), mask=used)
        tl.atomic_add(out + 4, tl.sum(0.5 * dy * dy * grad_power, 1), mask=used)
        tl.atomic_add(out + 5, tl.sum(fall * grad_alpha, 1), mask=used)
        tl.atomic_add(out + 6, tl.sum(weight * g0[None, :], 1), mask=used)
        tl.atomic_add(out + 7, tl.sum(weight * g1[None, :], 1), mask=used)
        tl.atomic_add(out + 8, tl.sum(weight * g2[None, :], 1), mask=used)
        tl.atomic_add(out + 9, tl.sum(weight * g4[None, :], 1), mask=used)
        rest -= tl.sum(given, 0)
        light += tl.sum(log_light, 0)
        at += SLOTS


def _options(slots: int) -> dict[str, float | int]:
    # Without fused products: lanes that add up one sum would round the product that is their own less than those they
    # are sent, and write sums that differ in their last bit to one place.
    return {
        "SIDE": TILE, "SLOTS": slots, "WIDTH": VALUES, "DRAWN": DRAWN, "LEAST": LEAST_ALPHA, "MOST": MAX_ALPHA,
        "STOP": STOP, "enable_fp_fusion": False,
    }  # fmt: skip


def blend_tiles_forward(
    values: Tensor, order: Tensor, counts: Tensor, rows: int, columns: int, *, slots: int = SLOTS, warps: int = 1
) -> Tensor:
    """See ``blend_tiles``."""
    out = values.new_empty(len(counts), TILE * TILE, DRAWN)
    if len(counts):
        _forward_kernel[(len(counts),)](
            values, order, counts.cumsum(0) - counts, counts, out, rows * columns, columns, **_options(slots),
            num_warps=warps,
        )  # fmt: skip
    return out


def blend_tiles_backward(
    values: Tensor,
    order: Tensor,
    counts: Tensor,
    out: Tensor,
    grad: Tensor,
    rows: int,
    columns: int,
    *,
    slots: int = SLOTS,
    warps: int = 1,
) -> Tensor:
    """Gradient of ``values``, ``[M, 10]``."""
    grads = torch.zeros_like(values)
    if len(counts):
        _backward_kernel[(len(counts),)](
            values, order, counts.cumsum(0) - counts, counts, out, grad, grads, rows * columns, columns,
            **_options(slots), num_warps=warps,
        )  # fmt: skip
    return grads
