"""Which denoising step a forward belongs to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Steps"]


class Steps(threading.local):
    """The denoising step of each thread's video, from the timesteps that the model is called with.

    A step is a maximal run of forwards at one timestep, so the conditional and the unconditional call count once. A
    timestep above the previous one starts a new video at step 0; where a new video does not rise above the last
    timestep (video-to-video, or after a run that was broken off), the caller has to ``reset``. The value is the largest
    of the tensor (a batch, or the per-token times of Wan2.2, whose image tokens are at 0).

    Args:
        plan: Maps a step and its timestep to how it runs, see ``Method.plan``. Called when a step begins: a compiled
            graph sees the plan and not the step.
        plan_each: Maps the timesteps of samples that are at different ones, see ``Method.plan_each``.

    Attributes:
        step: From 0; -1 before the first, or where nothing counts.
        call: Forwards within the step that were recorded, less one.
        manual: Whether the caller says which step it is.
        plan: Of the step; that of step 0 where nothing counts.
    """

    def __init__(self, plan: Callable[[int, float | None], Any], plan_each: Callable[[Sequence[float]], Any]) -> None:
        # Called in each thread.
        self._plan, self._plan_each = plan, plan_each
        self.reset()

    def __reduce__(self) -> tuple[Any, ...]:
        return Steps, (self._plan, self._plan_each)

    def reset(self) -> None:
        """Forget the step: the next forward is step 0 of a new video."""
        self.step, self.call, self.manual = -1, -1, False
        self._last: float | None = None
        self.plan = self._plan(0, None)

    def set(self, step: int) -> None:
        """Say the step of the coming forwards."""
        self.step, self.call, self.manual = step, -1, True
        self.plan = self._plan(step, None)

    # Python numbers cannot come out of a compiled graph, so a compiled model breaks its graph here.
    @torch.compiler.disable(
        reason="reading the timestep; call handle.begin_step(i) before each step to compile the model as one graph"
    )
    def observe(self, timestep: Tensor | float) -> None:
        """Count a forward.

        Raises:
            RuntimeError: The model is being exported: a program has no step to count.
        """
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "torch.export cannot read the timestep that the steps are counted by; call handle.begin_step(i) before "
                "it, and export a program for dense steps and one for sparse ones"
            )
        values = _per_sample(timestep)
        if len(set(values)) > 1:
            # A batch of a training, of no step.
            self.reset()
            self.plan = self._plan_each(values)
            return
        value = values[0]
        if self._last is None or value > self._last:
            self.step, self.call = 0, -1
        elif value < self._last:
            self.step, self.call = self.step + 1, -1
        else:
            return
        self._last = value
        self.plan = self._plan(self.step, value)


def _per_sample(timestep: Tensor | float) -> list[float]:
    """The timestep of each sample; of one with a time for each token, the largest."""
    if not isinstance(timestep, Tensor):
        return [float(timestep)]
    return (timestep.flatten(1).amax(1) if timestep.dim() > 1 else timestep.reshape(-1)).tolist()
