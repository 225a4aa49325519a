"""Baselines and peers in the same loop: our re-implementations, under the names of what they follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from hone_visual_ar.generation import Generation, Policy
from hone_visual_ar.infinity import InfinityBlock
from hone_visual_ar.schedules import ScaleSchedule
from torch import Tensor

__all__ = ["EarlyStop", "FastVARStyle", "SkipUncond", "SkipVARStyle"]

Action = Literal["stop", "unguided", "dense"]


class EarlyStop(Policy):
    """Leave the last scales out: the line that every method has to beat.

    Args:
        count: Scales that are left out.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"expected at least one scale to leave out; got {count}")
        self.count = count

    def capacity(self, schedule: ScaleSchedule) -> int:
        """See the base class."""
        return schedule.start(max(0, len(schedule) - self.count))

    def begin(self, run: Generation) -> None:
        """See the base class."""
        if self.count >= len(run.schedule):
            raise ValueError(f"this schedule has {len(run.schedule)} scales; got {self.count} to leave out")

    def scale(self, run: Generation, scale: int, state: None) -> Tensor | None:
        """See the base class."""
        return None if scale >= len(run.schedule) - self.count else super().scale(run, scale, state)


class SkipUncond(Policy):
    """Run the last scales without guidance, on the conditional rows alone.

    Args:
        count: Scales without.

    Source: one of SkipVAR's two actions (fakerone-li/SkipVAR).
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"expected at least one scale without guidance; got {count}")
        self.count = count

    def scale(self, run: Generation, scale: int, state: None) -> Tensor | None:
        """See the base class."""
        if scale < len(run.schedule) - self.count:
            return super().scale(run, scale, state)
        hidden = run.run(run.embed(scale)[: run.condition.images], scale)
        return run.codes(run.logits(hidden, scale), scale)


class FastVARStyle(Policy):
    """Each sublayer runs the tokens farthest from the mean, and takes the others' output from an earlier scale.

    Args:
        ratio: Share of tokens that a sublayer of a sparse scale leaves out.
        start_scale: First sparse scale; the one before is what outputs are taken from.
        first_block: Blocks before it run everything; an eleventh of the depth if None.

    Source: csguoh/FastVAR, Infinity, without its pruning of the last two scales as a whole, which is ``EarlyStop``.
    Differs: rates and scales are arguments, where the release has them by width; state lives with the generation.
    """

    def __init__(self, *, ratio: float = 0.5, start_scale: int = -3, first_block: int | None = None) -> None:
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio must lie in [0, 1); got {ratio}")
        self.ratio, self.start_scale, self.first_block = ratio, start_scale, first_block

    def begin(self, run: Generation) -> dict[tuple[int, int], Tensor]:
        """See the base class."""
        if not isinstance(run.model.layers[0], InfinityBlock):
            raise ValueError(f"FastVARStyle runs on Infinity; got {type(run.model).__name__}")
        if run.schedule.resolve(self.start_scale) < 1:
            raise ValueError(f"start_scale must leave a scale before it; got {self.start_scale}")
        return {}

    def scale(self, run: Generation, scale: int, state: dict[tuple[int, int], Tensor]) -> Tensor | None:
        """See the base class."""
        start = run.schedule.resolve(self.start_scale)
        if scale < start - 1:
            return super().scale(run, scale, state)
        grid, tokens = run.schedule.grids[scale], run.schedule.tokens(scale)
        condition, source = run.condition, run.schedule.grids[start - 1]
        first = len(run.model.layers) // 11 if self.first_block is None else self.first_block
        kept = tokens - int(self.ratio * tokens) if scale >= start else tokens
        x = run.embed(scale)
        keys = 0
        for number, block in enumerate(run.model.layers):
            parts = block.modulation(condition)
            sparse = scale >= start and number >= first
            for which in range(3):
                here, context = x, None
                idx = None
                if sparse:
                    far = (x - x.mean(1, keepdim=True)).square().sum(-1)
                    idx = far.sort(dim=-1, descending=True, stable=True).indices[:, :kept].sort(-1).values
                    here = x.gather(1, idx[..., None].expand(-1, -1, x.shape[-1]))
                if which == 0:
                    context = run.context(scale, positions=idx)
                    keys = run.cache.lengths[number] + here.shape[1]
                    out = block.self_attend(here, parts, context, number)
                elif which == 1:
                    out = block.cross_attend(here, condition.keys[number], condition.mask)
                else:
                    out = block.feed_forward(here, parts)
                if scale == start - 1 and number >= first:
                    state[number, which] = out
                if idx is not None:
                    old = state[number, which].transpose(1, 2).unflatten(2, source)
                    full = F.interpolate(old, size=grid, mode="area").flatten(2).transpose(1, 2)
                    out = full.scatter(1, idx[..., None].expand(-1, -1, out.shape[-1]), out)
                x = x + out
        run.ran(scale, kept, x.shape[0], keys=keys)
        return run.codes(run.logits(x, scale), scale)


class SkipVARStyle(Policy):
    """Look at an image when it is half drawn, and stop early, go on without guidance, or change nothing.

    Args:
        decide: Of an image's change of edges and share of high frequencies, the action and how many scales it is for.
        at: Scale after which is decided, from its thumbnail and that of the scale before.
        side: Latents of a thumbnail, along a side.

    Source: fakerone-li/SkipVAR: thumbnails of 8 x 8 latents after the tenth of thirteen scales, Sobel maps of both
        and a spectrum beyond 0.4, and both actions for one to three scales.
    Differs: the release decides by a pickled logistic regression, which is not read: ``decide`` is the caller's.
    """

    def __init__(self, decide: Callable[[float, float], tuple[Action, int]], *, at: int = -4, side: int = 8) -> None:
        self.decide, self.at, self.side = decide, at, side

    def begin(self, run: Generation) -> dict[str, Any]:
        """See the base class."""
        if run.condition.images != 1:
            raise ValueError(f"SkipVARStyle decides for one image; got a batch of {run.condition.images}")
        if not 1 <= run.schedule.resolve(self.at) < len(run.schedule) - 1:
            raise ValueError(f"at must have a scale before and one behind it; got {self.at}")
        return {"action": "dense", "count": 0}

    def scale(self, run: Generation, scale: int, state: dict[str, Any]) -> Tensor | None:
        """See the base class."""
        at = run.schedule.resolve(self.at)
        if scale == at:
            state["before"] = self._thumbnail(run)
        elif scale == at + 1:
            now = self._thumbnail(run)
            change, high = float(edge_change(state.pop("before"), now)[0]), float(high_frequency(now)[0])
            state["action"], state["count"] = self.decide(change, high)
            if state["action"] not in get_args(Action) or state["count"] < 0:
                raise ValueError(
                    f"decide must name stop, unguided or dense and a count; got {state['action']!r}, {state['count']}"
                )
        if scale <= at or scale < len(run.schedule) - state["count"] or state["action"] == "dense":
            return super().scale(run, scale, state)
        if state["action"] == "stop":
            return None
        hidden = run.run(run.embed(scale)[: run.condition.images], scale)
        return run.codes(run.logits(hidden, scale), scale)

    def _thumbnail(self, run: Generation) -> Tensor:
        size = (min(self.side, run.latent.shape[-2]), min(self.side, run.latent.shape[-1]))
        return run.tokenizer.decode(run.tokenizer.shrink(run.latent, size)).float()


def edge_change(before: Tensor, after: Tensor) -> Tensor:
    """Mean absolute change of the Sobel maps ``[B]`` of images ``[B, 3, H, W]``."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=before.device)
    kernels = torch.stack([kernel, kernel.T])[:, None]
    maps = [
        F.conv2d(image.mean(1, keepdim=True), kernels, padding=1).square().sum(1).sqrt() for image in (before, after)
    ]
    return (maps[1] - maps[0]).abs().mean((-2, -1))


def high_frequency(image: Tensor) -> Tensor:
    """Share of an image's spectrum beyond 0.4 of the Nyquist radius, ``[B]``, of images ``[B, 3, H, W]``."""
    spectrum = torch.fft.fft2(image.float().mean(1)).abs()
    y, x = (torch.fft.fftfreq(side, device=image.device) * 2 for side in image.shape[-2:])
    far = (y[:, None] ** 2 + x[None] ** 2).sqrt() > 0.4
    return (spectrum * far).sum((-2, -1)) / spectrum.sum((-2, -1)).clamp(min=1e-12)
