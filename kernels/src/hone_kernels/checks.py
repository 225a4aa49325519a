"""Checks of arguments that ops share, and the strides that their kernels ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_contiguous", "check_heads", "check_programs", "check_scale", "check_tensor", "in_memory"]
__all__ += ["unit_last"]

MOST_PROGRAMS = 65_535
"""Along all but the first axis of a CUDA grid."""


def check_programs(what: str, count: int, each: int = 1) -> None:
    """Refuse more than a launch takes along its second axis.

    Args:
        what: Is spread over programs.
        count: Of it.
        each: How many of it a program takes.

    Raises:
        ValueError: There are more.
    """
    if count > (most := MOST_PROGRAMS * each):
        raise ValueError(f"one launch takes at most {most:,} {what}; got {count:,}. Call it for parts of them")


def check_heads(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Check ``q [B, H, TQ, D]``, ``k`` and ``v [B, HK, TK, D]`` against each other, H a multiple of HK.

    Raises:
        ValueError: If axes, devices or sizes do not fit together.
        TypeError: If dtypes differ.
    """
    tensors, names = ({"q": q, "k": k}, "q and k") if v is None else ({"q": q, "k": k, "v": v}, "q, k and v")
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, H, S, D]; got {x.dim()} dimensions, {list(x.shape)}")
        # A compiler may not know the sizes yet.
        if not torch.compiler.is_compiling() and 0 in x.shape:
            raise ValueError(f"{name} must have an entry along every axis [B, H, S, D]; got {list(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{names} must share a dtype; got {q.dtype} for q and {x.dtype} for {name}")
        if x.device != q.device:
            raise ValueError(f"{names} must share a device; q is on {q.device}, {name} on {x.device}")
    if v is not None and k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; got {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must share the batch size; got {q.shape[0]} and {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must share head_dim; got {q.shape[3]} and {k.shape[3]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads; got {q.shape[1]} and {k.shape[1]}")


def check_scale(scale: float | None, dim: int) -> float:
    """The factor on the logits, ``dim ** -0.5`` if None.

    Raises:
        TypeError: It is a tensor.
        ValueError: It is not positive and finite.
    """
    if scale is None:
        return dim**-0.5
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, through which no gradient flows; got a tensor. Call .item()")
    scale = float(scale)
    if not torch.compiler.is_compiling() and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite; got {scale}. Negate q for a negative one")
    return scale


def check_tensor(name: str, x: Tensor, shape: Sequence[int | None], device: torch.device, *dtypes: torch.dtype) -> None:
    """Check an argument's shape, of which None may be any size, its device and, where some are named, its dtype.

    Raises:
        ValueError: One does not fit; the message names the first dtype.
    """
    fits = x.dim() == len(shape) and all(want in (None, got) for got, want in zip(x.shape, shape, strict=True))
    if not fits or x.device != device or (dtypes and x.dtype not in dtypes):
        wanted = ", ".join("n" if want is None else str(want) for want in shape)
        of = f"{str(dtypes[0]).removeprefix('torch.')} " if dtypes else ""
        raise ValueError(f"{name} must be {of}[{wanted}] on {device}; got {x.dtype} {list(x.shape)} on {x.device}")


def check_contiguous(**tensors: Tensor | None) -> None:
    """Check arguments that a kernel takes without strides, by name; None is none.

    Raises:
        ValueError: One has gaps in memory, or another order.
    """
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(
                f"the kernel reads {name} as contiguous memory; got {list(x.shape)} with strides {list(x.stride())}. "
                "Lay it out by .contiguous() before the loop that calls this"
            )


def unit_last(x: Tensor) -> Tensor:
    """``x`` with neighbours of its last axis side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def in_memory(dout: Tensor) -> Tensor:
    """A gradient with every value in memory: a mean's repeats one along an axis, which the copy engine cannot."""
    return dout if all(dout.stride()) and dout.stride(-1) == 1 else dout.contiguous()
