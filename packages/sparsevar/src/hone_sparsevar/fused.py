"""A sparse scale of Infinity with fused kernels around its blocks: gather and first norm, last sum and map, draws."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from hone_kernels.backends import Backend
from hone_kernels.kept_tokens import add_change, draw_bits, gather_modulate
from hone_visual_ar.generation import Generation
from hone_visual_ar.layers import attend
from torch import Tensor

__all__ = ["draw_fused", "fuses_draws", "run_fused"]


def run_fused(
    run: Generation,
    x: Tensor,
    scale: int,
    rows: Tensor,
    *,
    spread: Tensor | None,
    detector: int | None,
    metric: Literal["abs", "rel"],
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    """All blocks on the kept tokens of a scale.

    Args:
        run: Of an ``Infinity``.
        x: ``[R, L, C]``, all tokens of the scale.
        scale: Number.
        rows: ``[R, n]``, positions of the kept ones.
        spread: See ``AttentionContext``.
        detector: Block whose change is wanted; None: of none.
        metric: See ``method.change_map``.
        backend: Of the kernels.

    Returns:
        Tokens ``[R, n, C]``, and the change ``[B, n]`` of the conditional rows.
    """
    condition, layers = run.condition, run.model.layers
    modulation = condition.modulation
    assert modulation is not None
    context = run.context(scale, positions=rows, spread=spread)
    cached, kept, change = run.cache.lengths[-1], rows.shape[1], None
    for number, block in enumerate(layers):
        around = (context.rope, context.spread, context.rope_k)
        if number == 0:
            _, _, scale1, _, shift1, _ = (part[:, 0] for part in block.modulation(condition))
            x, h = gather_modulate(x, rows, scale1, shift1, dtype=run.model.body_dtype, backend=backend)
            q, k, v = block.project(h, *around)
        else:
            q, k, v = block.before(x, modulation, *around)
        entered = x
        x, q = block.between(x, attend(q, k, v, context, number), modulation)
        out = F.scaled_dot_product_attention(q, *condition.keys[number], attn_mask=condition.mask)
        if number == detector:
            x, update = block.almost(x, out, modulation)
            gamma2 = block.modulation(condition)[1][:, 0]
            x, change = add_change(
                x, update, gamma2, entered, images=condition.images, relative=metric == "rel", backend=backend
            )
        else:
            x = block.after(x, out, modulation)
    run.ran(scale, kept, len(x), keys=cached + (kept if spread is None else run.schedule.tokens(scale)))
    return x, change


def fuses_draws(run: Generation) -> bool:
    """Whether the kernel draws as this run samples: of bits, at random, without top-k."""
    sampling = run.sampling
    return run.model.choices == 2 and not sampling.greedy and sampling.top_k != 1


def draw_fused(run: Generation, hidden: Tensor, scale: int, slot: Tensor, backend: Backend) -> Tensor:
    """Codes ``[B, L, d]`` at every position from the kept tokens' hidden states ``[R, n, C]``.

    Args:
        run: Of an ``Infinity``.
        hidden: Of the last block.
        scale: Number.
        slot: ``[B, L]``, which kept token speaks for each position.
        backend: Of the kernel.
    """
    guidance, temperature = run.sampling.at(scale, len(run.schedule))
    begin = run.schedule.start(scale)
    bits = draw_bits(
        run.raw_logits(hidden),
        run.uniform[:, begin : begin + run.schedule.tokens(scale)],
        slot=slot,
        guidance=guidance,
        temperature=temperature,
        top_p=run.sampling.top_p,
        backend=backend,
    )
    run.indices.append(bits)
    return run.embed_indices(bits)
