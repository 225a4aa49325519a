"""Values that are not finite, named where they first show, before hours are spent on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_latents", "check_weights"]


@torch.no_grad()
def check_weights(pipe: Any) -> None:
    """Refuse a pipeline with a transformer whose weights are not finite.

    Args:
        pipe: Whose weights are where they can be read.

    Raises:
        ValueError: A weight is NaN or infinite; it is named.
    """
    for part in ("transformer", "transformer_2"):
        model = getattr(pipe, part, None)
        for name, weight in () if model is None else model.named_parameters():
            if weight.device.type != "meta" and not bool(weight.isfinite().all()):
                raise ValueError(
                    f"the weight {name} of the {part} holds NaN or infinity: the file is damaged, its training "
                    f"diverged, or {str(weight.dtype).removeprefix('torch.')} cannot hold it. Take "
                    "another checkpoint or dtype"
                )


def check_latents(latents: Tensor, step: int, *, what: str, advice: str) -> None:
    """Stop a sampling whose latents are not finite after a step.

    Args:
        latents: After the step.
        step: From 0.
        what: Is drawn, such as "prompt 0"; the message begins with it.
        advice: What to do.

    Raises:
        RuntimeError: They are not; their attention or another layer overflowed in this step.
    """
    if not bool(latents.isfinite().all()):
        raise RuntimeError(f"{what}: the model's activations became NaN or infinite in step {step}; {advice}")
