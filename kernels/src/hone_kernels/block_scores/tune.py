"""Tiles that the prober's shipped ones were chosen from."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from hone_core.runs import Run
from hone_core.timing import measure_interleaved

from hone_kernels.rows import timed

from .bench import SHAPES as BENCH_SHAPES
from .bench import Shape, check_values, inputs, sample_index

__all__ = ["SHAPES", "triton"]

SHAPES = {name: BENCH_SHAPES[name] for name in ("wan-1.3b 480p", "cogvideox-5b", "small")}
"""The last one only shows that everything runs."""

_KINDS = (("paper", 16), ("official", 32), ("lse", 16))
_log = logging.getLogger(__name__)


def triton(run: Run, shapes: Mapping[str, Shape], *, candidates: int | None, rounds: int, seed: int) -> None:
    """Tiles of the pass over sampled logits, by kind of score and samples of a block.

    Args:
        run: Gets the rows; ``split`` is the kind and the samples.
        shapes: Name to shape.
        candidates: Only so many tiles, or None.
        rounds: Timed calls of each.
        seed: Of the order.

    Raises:
        RuntimeError: A value is wrong; no time is reported then.
    """
    from .triton import Tile, block_scores_triton

    check_values()
    tiles = [
        Tile(rows, cols, warps, stages)
        for (rows, warps), cols, stages in itertools.product([(64, 4), (128, 4), (128, 8)], [32, 64, 128], [2, 3, 4])
    ]
    for (name, shape), (kind, samples) in itertools.product(shapes.items(), _KINDS):
        q, k = inputs(shape, 2)
        index = (sample_index(shape.tokens, samples), sample_index(shape.tokens, samples))
        scale = shape.dim**-0.5
        want = block_scores_triton(q, k, *index, kind, scale)
        calls: dict[str, Callable[[], object]] = {}
        errors = {}
        for tile in tiles[:candidates]:
            try:
                got = block_scores_triton(q, k, *index, kind, scale, tile=tile)
            except Exception as error:
                _log.info("%s %s fails: %s", name, tile, str(error).splitlines()[0][:100])
                continue
            errors[str(tile)] = worst = float((got - want).abs().max() / want.max())
            if not worst < 1e-4:
                raise RuntimeError(f"{name} {tile}: error {worst:.2e} is not under 1e-4. No time is reported")
            calls[str(tile)] = functools.partial(block_scores_triton, q, k, *index, kind, scale, tile=tile)
        for tried, timing in measure_interleaved(calls, rounds=rounds, seed=seed).items():
            fields: dict[str, Any] = dict(error=errors[tried], shape=name, dim=shape.dim, samples=samples)
            timed(run, tried, timing, split=kind, **fields)
