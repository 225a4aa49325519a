"""Tensors that outlive the call that makes them: those of caches and checkpoints."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["not_finite", "plain_tensors"]


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Make tensors that any later caller can use, whatever mode the first one is in; for what a cache keeps.

    One made in inference mode could not be saved for a backward, one made during an export would be a fake, and one
    made under a default device would be there.
    """
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    with torch.inference_mode(False), torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def not_finite(state: Any, name: str = "") -> str | None:
    """Name of the first tensor of a state that holds NaN or infinity; None where all are finite.

    Args:
        state: Mappings and sequences of tensors, such as a ``state_dict``; of a sharded tensor this process's part is
            looked at, and what is no tensor is not.
        name: Of the state; the keys below it are added with dots.
    """
    import torch

    if isinstance(state, torch.Tensor):
        value = state.to_local() if hasattr(state, "to_local") else state
        if not (value.is_floating_point() or value.is_complex()):
            return None
        # Types of 8 bits have no isfinite.
        value = value.float() if value.element_size() == 1 else value
        return None if bool(value.isfinite().all()) else name
    parts: Any = ()
    if isinstance(state, Mapping):
        parts = state.items()
    elif isinstance(state, (list, tuple)):
        parts = enumerate(state)
    for key, value in parts:
        found = not_finite(value, f"{name}.{key}" if name else str(key))
        if found is not None:
            return found
    return None
