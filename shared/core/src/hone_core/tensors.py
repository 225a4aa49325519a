"""Tensors that outlive the call that makes them."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["plain_tensors"]


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
