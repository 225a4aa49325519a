"""Blending beside torch's operations and gsplat's rasteriser, forward and backward: values first, then times."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from hone_core.runs import Run
from hone_core.timing import check_values, measure_interleaved
from torch import Tensor

from hone_kernels.rows import timed

from .api import blend_tiles
from .lists import tile_lists
from .reference import LEAST_ALPHA, TILE

__all__ = ["SHAPES", "bench", "parse"]

SHAPES = ("1x688128x256x448", "4x688128x256x448", "1x2396160x480x832")
"""Pictures, Gaussians, height and width: what six views of DepthSplat give, at both sizes of hone-zpressor."""

_GSPLAT_TILE = 16


def parse(text: str) -> tuple[int, int, int, int]:
    """Sizes of PICTURESxGAUSSIANSxHEIGHTxWIDTH.

    Raises:
        ValueError: It is none.
    """
    parts = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if len(parts) != 4 or min(parts) < 1 or parts[2] % TILE or parts[3] % TILE:
        raise ValueError(
            f"a shape is PICTURESxGAUSSIANSxHEIGHTxWIDTH, sides multiples of {TILE}, such as 1x688128x256x448; got "
            f"{text!r}"
        )
    return parts[0], parts[1], parts[2], parts[3]


def bench(run: Run, shapes: Sequence[str], *, rounds: int = 20, seed: int = 0) -> None:
    """Measure, and write rows into the run.

    Args:
        run: The run, entered.
        shapes: See ``parse``.
        rounds: Timed calls of each.
        seed: Of data and order.

    Raises:
        RuntimeError: A value is wrong; no time is reported then.
    """
    for text in shapes:
        values, low, high = _cloud(*parse(text), seed, torch.device("cuda"))
        size = parse(text)[2:]
        ways = _ways(values, low, high, size)
        grad = torch.linspace(-1, 1, values.shape[0] * math.prod(size) * 5, device="cuda")
        grad = grad.view(values.shape[0], *size, 5)
        errors = _check(ways, values, grad)
        lists = {"lists": partial(tile_lists, values[..., 9], low, high, size[0] // TILE, size[1] // TILE)}
        for way, timing in measure_interleaved(lists, warmup=2, rounds=rounds, seed=seed).items():
            timed(run, way, timing, split="lists", shape=text, dtype="float32")
        forward = {way: partial(call, values) for way, call in ways.items()}
        both = {way: partial(_gradient, call, values, grad) for way, call in ways.items()}
        for split, calls in (("forward", forward), ("forward and backward", both)):
            with torch.no_grad():
                times = measure_interleaved(calls, warmup=2, rounds=rounds, seed=seed)
            for way, timing in times.items():
                timed(run, way, timing, split=split, error=errors.get((way, split)), shape=text, dtype="float32")
        del values, low, high, ways, grad, lists, forward, both
        torch.cuda.empty_cache()


def _cloud(
    pictures: int, count: int, height: int, width: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A per-pixel cloud as each picture sees it, ``[B, G, 10]``, and boxes around it; deviations are about a pixel."""
    generator = torch.Generator().manual_seed(seed)

    def draw(last: int) -> Tensor:
        return torch.rand(pictures, count, last, generator=generator).to(device)

    place = draw(2) * torch.tensor([width, height], device=device)
    spread = 0.3 + (0.5 + draw(2)).square()  # variances, with the dilation of the rasteriser
    lean = (1.6 * draw(1) - 0.8) * spread.prod(-1, keepdim=True).sqrt()
    inverse = torch.cat([spread[..., 1:], -lean, spread[..., :1]], -1) / (spread.prod(-1, keepdim=True) - lean.square())
    opacity = draw(1)
    values = torch.cat([place, inverse, opacity, draw(3), 1 + 9 * draw(1)], -1)
    reach = (2 * (opacity / LEAST_ALPHA).clamp(min=1).log()).sqrt() * spread.sqrt()
    edge = torch.tensor([width, height], device=device)
    low, high = (place - reach).clamp(min=0), torch.minimum(place + reach, edge)
    return values, low, torch.where((opacity >= LEAST_ALPHA) & (high > low).all(-1, keepdim=True), high, -1.0)


def _ways(values: Tensor, low: Tensor, high: Tensor, size: tuple[int, int]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each gives pictures ``[B, H, W, 5]`` of values, by lists that are made beforehand."""
    height, width = size
    rows, columns = height // TILE, width // TILE
    order, counts = tile_lists(values[..., 9], low, high, rows, columns)

    def ours(backend: str, values: Tensor) -> Tensor:
        drawn = blend_tiles(values.flatten(0, -2), order, counts, rows, columns, backend=backend)  # type: ignore[arg-type]
        tiles = drawn.view(len(values), rows, columns, TILE, TILE, 5).transpose(2, 3)
        return tiles.reshape(len(values), height, width, 5)

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "triton": partial(ours, "triton"),
        "torch": partial(ours, "reference"),
    }
    if values.is_cuda and (theirs := _gsplat(values, low, high, size)) is not None:
        ways["gsplat"] = theirs
    return ways


def _gsplat(values: Tensor, low: Tensor, high: Tensor, size: tuple[int, int]) -> Callable[[Tensor], Tensor] | None:
    """The rasteriser of gsplat, colour and depth in one pass; None where it is not installed."""
    try:
        gsplat = importlib.import_module("gsplat")
    except ImportError:
        return None
    down, across = (-(-side // _GSPLAT_TILE) for side in size)
    place = values[..., :2].contiguous()
    # Radii about the centre that reach over our boxes, which end at the picture's edges.
    radii = torch.maximum(place - low, high - place).ceil().int().clamp(min=0)
    radii = torch.where(high[..., :1] > 0, radii, 0).contiguous()
    _, numbers, members = gsplat.isect_tiles(place, radii, values[..., 9].contiguous(), _GSPLAT_TILE, across, down)
    offsets = gsplat.isect_offset_encode(numbers, len(values), across, down)

    def draw(values: Tensor) -> Tensor:
        centre, inverse, opacity, drawn = values.split([2, 3, 1, 4], -1)
        colour, cover = gsplat.rasterize_to_pixels(
            centre.contiguous(), inverse.contiguous(), drawn.contiguous(), opacity[..., 0].contiguous(), size[1],
            size[0], _GSPLAT_TILE, offsets, members,
        )  # fmt: skip
        return torch.cat([colour[..., :3], cover, colour[..., 3:]], -1)

    return draw


def _gradient(call: Callable[[Tensor], Tensor], values: Tensor, grad: Tensor) -> Tensor:
    values = values.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(call(values), values, grad)[0]


def _check(ways: dict[str, Callable[[Tensor], Tensor]], values: Tensor, grad: Tensor) -> dict[tuple[str, str], float]:
    """Errors of pictures and gradients over torch's; all of its rules are thresholds, which rounding may cross."""
    want, want_grad = ways["torch"](values), _gradient(ways["torch"], values, grad)
    errors = {}
    for way in [way for way in ways if way != "torch"]:
        errors[way, "forward"] = check_values(f"pictures by {way}", ways[way](values), want, tolerance=1e-3)
        found = _gradient(ways[way], values, grad)
        errors[way, "forward and backward"] = check_values(f"gradients by {way}", found, want_grad, tolerance=1e-2)
    return errors
