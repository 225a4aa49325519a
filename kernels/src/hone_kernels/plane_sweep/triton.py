"""Plane sweep in Triton: nothing warped is stored.

A program takes some pixels of a view and some candidates, reads four taps of each neighbour and keeps their product
with the view's own feature.
Gradients of neighbours are added up by atomics, so that two runs may differ in the last bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.checks import check_programs

from .reference import LEAST_DEPTH

__all__ = ["CANDIDATES", "PIXELS", "sweep_planes_backward", "sweep_planes_forward"]

PIXELS, CANDIDATES = 8, 8
"""Of a program."""


@triton.jit
def _place(
    RAY, SHIFT, pair, pixel, real, depth, tokens, height, width, HALF: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Where pixels fall in a neighbour: the tap above on the left, and how far beyond it."""
    ray, shift = RAY + pair * 3 * tokens + pixel, SHIFT + pair * 3
    x = tl.load(ray, mask=real, other=0.0) * depth + tl.load(shift)
    y = tl.load(ray + tokens, mask=real, other=0.0) * depth + tl.load(shift + 1)
    z = tl.maximum(tl.load(ray + 2 * tokens, mask=real, other=1.0) * depth + tl.load(shift + 2), LEAST)
    # Far outside is as far as just outside, and fits an integer.
    x = tl.minimum(tl.maximum(x / z - HALF, -2.0), width + 1.0)
    y = tl.minimum(tl.maximum(y / z - HALF, -2.0), height + 1.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def _tap(left, top, right, below, ACROSS: tl.constexpr, DOWN: tl.constexpr, height, width, real):
    """Token of a tap, whether it is in the picture, and its weight."""
    column, row = left + ACROSS, top + DOWN
    inside = real & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    across = right if ACROSS else 1.0 - right
    down = below if DOWN else 1.0 - below
    return tl.where(inside, row * width + column, 0), inside, tl.where(inside, across * down, 0.0)


@triton.jit
def _forward_kernel(
    FEATURES, OTHERS, RAY, SHIFT, INVERSE, OUT, others, candidates, tokens, height, width, inverse_pixel, scale,
    channels: tl.constexpr, PADDED: tl.constexpr, PIXELS: tl.constexpr, CANDIDATES: tl.constexpr, HALF: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    real = pixel < tokens
    channel = tl.arange(0, PADDED)
    wide = real[:, None] & (channel < channels)[None, :]
    own = tl.load(FEATURES + (view * tokens + pixel)[:, None] * channels + channel[None, :], mask=wide, other=0.0)
    for step in range(CANDIDATES):
        plane = tl.program_id(2) * CANDIDATES + step
        if plane < candidates:
            at = INVERSE + (view * candidates + plane) * (tokens if inverse_pixel else 1)
            inverse = tl.load(at + (pixel if inverse_pixel else pixel * 0), mask=real, other=1.0)
            depth = 1.0 / inverse
            total = tl.zeros([PIXELS, PADDED], tl.float32)
            for other in range(others):
                pair = view * others + other
                base = FEATURES + tl.load(OTHERS + pair) * tokens * channels
                left, top, right, below = _place(
                    RAY, SHIFT, pair, pixel, real, depth, tokens, height, width, HALF, LEAST
                )
                for tap in tl.static_range(4):
                    token, inside, weight = _tap(left, top, right, below, tap % 2, tap // 2, height, width, real)
                    mask = inside[:, None] & (channel < channels)[None, :]
                    found = tl.load(base + token[:, None] * channels + channel[None, :], mask=mask, other=0.0)
                    total += weight[:, None] * found
            cost = tl.sum(total * own, 1) * scale
            tl.store(OUT + (view * candidates + plane) * tokens + pixel, cost, mask=real)


@triton.jit
def _backward_kernel(
    FEATURES, OTHERS, RAY, SHIFT, INVERSE, GRAD, GRADS, others, candidates, tokens, height, width, inverse_pixel, scale,
    channels: tl.constexpr, PADDED: tl.constexpr, PIXELS: tl.constexpr, CANDIDATES: tl.constexpr, HALF: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    real = pixel < tokens
    channel = tl.arange(0, PADDED)
    wide = real[:, None] & (channel < channels)[None, :]
    mine = (view * tokens + pixel)[:, None] * channels + channel[None, :]
    own = tl.load(FEATURES + mine, mask=wide, other=0.0)
    grad_own = tl.zeros([PIXELS, PADDED], tl.float32)
    for step in range(CANDIDATES):
        plane = tl.program_id(2) * CANDIDATES + step
        if plane < candidates:
            at = INVERSE + (view * candidates + plane) * (tokens if inverse_pixel else 1)
            inverse = tl.load(at + (pixel if inverse_pixel else pixel * 0), mask=real, other=1.0)
            depth = 1.0 / inverse
            grad = tl.load(GRAD + (view * candidates + plane) * tokens + pixel, mask=real, other=0.0) * scale
            for other in range(others):
                pair = view * others + other
                start = tl.load(OTHERS + pair) * tokens * channels
                left, top, right, below = _place(
                    RAY, SHIFT, pair, pixel, real, depth, tokens, height, width, HALF, LEAST
                )
                for tap in tl.static_range(4):
                    token, inside, weight = _tap(left, top, right, below, tap % 2, tap // 2, height, width, real)
                    mask = inside[:, None] & (channel < channels)[None, :]
                    place = start + token[:, None] * channels + channel[None, :]
                    share = (grad * weight)[:, None]
                    grad_own += share * tl.load(FEATURES + place, mask=mask, other=0.0)
                    tl.atomic_add(GRADS + place, share * own, mask=mask)
    tl.atomic_add(GRADS + mine, grad_own, mask=wide)


def _launch(
    features: Tensor, others: Tensor, ray: Tensor, shift: Tensor, inverse_depth: Tensor, half: float
) -> tuple[tuple[int, int, int], tuple[Tensor, ...], tuple[int | float, ...], dict[str, int | float]]:
    """Grid, tensors with channels last, sizes, and constants."""
    views, channels, height, width = features.shape
    tokens, candidates = height * width, inverse_depth.shape[1]
    check_programs("pixels of a view", tokens, PIXELS)
    flat = inverse_depth.flatten(2).contiguous()
    grid = (views, triton.cdiv(tokens, PIXELS), triton.cdiv(candidates, CANDIDATES))
    last = features.flatten(2).mT.contiguous()
    tensors = (last, others.contiguous(), ray.contiguous(), shift.contiguous(), flat)
    scale = 1 / (others.shape[1] * channels**0.5)
    sizes = (others.shape[1], candidates, tokens, height, width, int(flat.shape[2] > 1), scale)
    constants = {
        "channels": channels, "PADDED": triton.next_power_of_2(channels), "PIXELS": PIXELS, "CANDIDATES": CANDIDATES,
        "HALF": half, "LEAST": LEAST_DEPTH,
    }  # fmt: skip
    return grid, tensors, sizes, constants


def sweep_planes_forward(
    features: Tensor, others: Tensor, ray: Tensor, shift: Tensor, inverse_depth: Tensor, half: float
) -> Tensor:
    """See ``sweep_planes``."""
    grid, tensors, sizes, constants = _launch(features, others, ray, shift, inverse_depth, half)
    views, _, height, width = features.shape
    out = features.new_empty(views, inverse_depth.shape[1], height, width)
    _forward_kernel[grid](*tensors, out, *sizes, **constants, num_warps=4)
    return out


def sweep_planes_backward(
    features: Tensor, others: Tensor, ray: Tensor, shift: Tensor, inverse_depth: Tensor, half: float, grad: Tensor
) -> Tensor:
    """Gradient of ``features``."""
    grid, tensors, sizes, constants = _launch(features, others, ray, shift, inverse_depth, half)
    grads = torch.zeros_like(tensors[0])
    _backward_kernel[grid](*tensors, grad.contiguous(), grads, *sizes, **constants, num_warps=4)
    return grads.mT.reshape(features.shape)
