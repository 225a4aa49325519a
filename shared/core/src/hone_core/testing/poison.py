"""Fresh memory filled with NaN, so that an element that a kernel forgot to write cannot pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["nan_poison"]

_EMPTY = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided}


class _Poison(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _EMPTY and isinstance(out, Tensor):
            with torch._C.DisableTorchFunction(), torch.no_grad():
                if out.is_floating_point() or out.is_complex():
                    out.fill_(torch.nan)
                elif out.dtype != torch.bool:
                    # Integers have no NaN: the largest value makes a forgotten count or index fail loudly.
                    out.fill_(torch.iinfo(out.dtype).max)
        return out


@contextmanager
def nan_poison() -> Iterator[None]:
    """Fill what ``torch.empty`` and its relatives return: NaN, or the largest integer.

    It reaches calls made from Python in this thread, which is how kernels' outputs are allocated.
    """
    with _Poison():
        yield
