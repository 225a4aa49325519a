"""Launches at little cost to the host: what the shapes of a call decide is worked out once.

At every launch Triton works out from type, value and alignment of each argument which compiled kernel it needs; with
strides gathered and tensor descriptors built, that is 40 to 80 us a kernel. All of it follows from the geometry of the
tensors and the options of the call: only the addresses change. So the first launch of a geometry goes Triton's way, and
what came of it, the compiled kernel and its list of arguments, is kept; a later one puts its tensors into that list.

Nothing that is kept of a launch holds a tensor, and the number of launches kept is bounded. What is made of a tensor
(``kept_beside``) goes when that goes.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import types
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hone_kernels.backends import HAS_TRITON, INTERPRETED

__all__ = [
    "KEEP",
    "Kept",
    "dependent",
    "eager",
    "geometry",
    "kept_beside",
    "launch",
    "launches_overlap",
    "number",
    "on_device_of",
    "unchanged",
]

KEEP = os.environ.get("HONE_KEEP_LAUNCHES", "1") == "1"
"""If not, every call goes by torch's dispatcher and Triton's own way."""
LIMIT = 4096
"""Geometries kept; beyond that the oldest goes."""

_NOWHERE = nullcontext()

_PLAIN = (torch.nn.Parameter, type(None))

_ALIGNED = 16
"""Bytes: Triton compiles other code for bases that are not of whole 16 bytes."""


class Kept(dict[Hashable, Any]):
    """A dictionary of at most ``limit`` entries. To look one up costs what it costs in a dictionary."""

    def __init__(self, limit: int = LIMIT) -> None:
        super().__init__()
        self._limit, self._lock = limit, threading.Lock()

    def keep(self, key: Hashable, value: Any) -> None:
        """Add an entry, in place of the oldest if there are too many."""
        with self._lock:
            while len(self) >= self._limit:
                del self[next(iter(self))]
            self[key] = value


def geometry(*tensors: Tensor | None) -> tuple[Any, ...] | None:
    """All that a kernel's arguments depend on but the addresses; None if a base is not of whole 16 bytes."""
    address = 0
    facts: list[Any] = []
    for x in tensors:
        if x is None:
            facts.append(None)
        else:
            address |= x.data_ptr()
            facts += (x.shape, x.stride(), x.dtype, x.device)
    return None if address % _ALIGNED else tuple(facts)


_numbers, _unused = Kept(), itertools.count(1)


_maps = Kept(1 << 14)
"""Encoded descriptors by the number of a launch's argument and the address of its base, each some 400 bytes."""


def number(key: Hashable) -> int:
    """A number for a key that is looked up more than once: a tuple is hashed and compared anew each time."""
    known = _numbers.get(key)
    if known is None:
        known = next(_unused)
        _numbers.keep(key, known)
    return known


def unchanged(*tensors: Tensor) -> Hashable | None:
    """What stays the same for as long as these tensors are what they are and are used in one order.

    None where nobody could tell that they are (a CUDA graph, which reads whatever its memory holds when it is replayed;
    tensors made in inference mode, which do not count their changes). Of another stream it is another.
    """
    if any(x.is_inference() for x in tensors):
        return None
    stream = 0
    if tensors[0].is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch._C._cuda_getCurrentRawStream(tensors[0].get_device())
    return (stream, *((x.data_ptr(), x._version) for x in tensors))


_beside = WeakIdKeyDictionary()
"""By a tensor, for as long as it lives: what was made of it last, and of what state for what."""


def kept_beside(x: Tensor, what: Hashable, make: Callable[[], Any]) -> Any:
    """What ``make`` gives of ``x``, made once for as long as ``x`` is what it is and nothing else is made of it.

    Args:
        x: Lives longer than a call; no gradient is asked of it, for who trains it may write where nobody counts.
        what: Names it, with all that ``make`` looks at besides.
        make: From ``x``, without waiting for the device.
    """
    state = None if x.requires_grad else unchanged(x)
    if state is None:
        return make()
    found = _beside.get(x)
    if found is None or found[0] != (state, what):
        found = _beside[x] = ((state, what), make())
    return found[1]


def eager(*tensors: Tensor | None) -> bool:
    """Whether a call is what it looks like: nothing traces, transforms or watches it, and these are plain tensors.

    Only then an op may run without the dispatcher of torch, which costs some 30 us for an operator written in Python.
    """
    if not KEEP:
        return False
    for x in tensors:
        if type(x) is not Tensor and type(x) not in _PLAIN:
            return False
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """``torch.cuda.device_of``, which takes its time, where it would change something."""
    if x.device.type != "cuda" or x.get_device() == torch._C._cuda_getDevice():
        return _NOWHERE
    return torch.cuda.device_of(x)


Build = Callable[..., tuple[tuple[int, ...], Sequence[Any], dict[str, Any]]]


class _Launch:
    """A compiled kernel with its grid and arguments, of which each launch gives the addresses anew."""

    __slots__ = ("_arguments", "_descriptors", "_grid", "_maps", "_options", "_places", "_run")

    def __init__(self, compiled: Any, grid: tuple[int, ...], arguments: list[Any], tensors: Sequence[Tensor | None]):
        """Raises ValueError: a tensor among the arguments is none of these."""
        index = {id(x): i for i, x in enumerate(tensors) if x is not None}
        self._grid = (*grid, 1, 1)[:3]
        self._arguments: list[Any] = []
        self._places: list[tuple[int, int]] = []
        self._descriptors: list[tuple[int, int, type, dict[str, Any]]] = []
        self._maps: list[tuple[int, int, int, Callable[[Tensor], Any]]] = []
        run = compiled.run
        raw, encode = _below(run)
        self._run = raw or run
        options = (run.launch_cooperative_grid, run.launch_pdl, None, None) if raw else ()
        self._options = (compiled.function, *options, compiled.packed_metadata, None, None, None)
        for value in arguments:
            at = len(self._arguments)
            if isinstance(value, Tensor):
                self._places.append((at, self._of(value, index)))
                self._arguments.append(None)
            elif hasattr(value, "block_shape"):
                i = self._of(value.base, index)
                fields = {name: x for name, x in vars(value).items() if name != "base"}
                if encode is None:
                    self._descriptors.append((at, i, type(value), fields))
                    self._arguments.append(None)
                else:
                    make = functools.partial(encode, len(self._maps), type(value), fields)
                    self._maps.append((at, i, next(_unused), make))
                    self._arguments += [None, *value.shape, *value.strides]
            else:
                self._arguments.append(value)

    @staticmethod
    def _of(x: Tensor, index: dict[int, int]) -> int:
        if id(x) not in index:
            raise ValueError("a tensor that was made on the way")
        return index[id(x)]

    def __call__(self, tensors: Sequence[Any], stream: int) -> None:
        arguments = self._arguments.copy()
        for at, i in self._places:
            # Of a number the driver is not asked whether it is an address of the GPU's.
            arguments[at] = tensors[i].data_ptr()
        for at, i, argument, encode in self._maps:
            base = (argument, tensors[i].data_ptr())
            found = _maps.get(base)
            if found is None:
                found = encode(tensors[i])
                _maps.keep(base, found)
            arguments[at] = found
        for at, i, kind, fields in self._descriptors:
            arguments[at] = _descriptor(kind, fields, tensors[i])
        self._run(*self._grid, stream, *self._options, *arguments)


def _below(run: Any) -> tuple[Any, Callable[..., Any] | None]:
    """What Triton 3.6's launcher of a kernel calls in the end, and what encodes a descriptor for it, if it takes any.

    What a descriptor is encoded to follows from its fields and its base's address, so that it may be kept by that: the
    fields are those of a geometry, whatever else was in that memory before. Nones where the launcher is made otherwise.
    """
    plain = None, None
    launch = getattr(run, "launch", None)
    scratch = [getattr(run, name, None) for name in ("global_scratch_size", "profile_scratch_size")]
    # From 3.7 on the arguments go below as one tuple, with notes on them.
    if launch is None or scratch != [0, 0] or hasattr(run, "arg_annotations"):
        return plain
    if isinstance(launch, types.BuiltinFunctionType):
        return launch, None
    if getattr(getattr(launch, "__code__", None), "co_freevars", None) != (
        "launcher", "tensordesc_indices", "tensordesc_meta",
    ):  # fmt: skip
        return plain
    from triton.backends.nvidia.driver import make_tensordesc_arg

    launcher, _, metas = (cell.cell_contents for cell in launch.__closure__)
    if None in metas:
        return plain

    def encode(which: int, kind: type, fields: dict[str, Any], base: Tensor) -> Any:
        return make_tensordesc_arg(_descriptor(kind, fields, base), metas[which])[0]

    return launcher, encode


def _descriptor(kind: type, fields: dict[str, Any], base: Tensor | None) -> Any:
    """Without its checks, which are of what has not changed."""
    descriptor: Any = object.__new__(kind)
    descriptor.__dict__ = {"base": base, **fields}
    return descriptor


_launches = Kept()

if HAS_TRITON:
    from triton.knobs import runtime as _RUNTIME


def _watched(kernel: Any) -> Any:
    """Whether a profiler wants to see each launch."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    return kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave)


def launch(kernel: Any, key: Hashable | None, tensors: Sequence[Tensor | None], build: Build) -> None:
    """Launch a Triton or Gluon kernel.

    Args:
        kernel: Decorated function.
        key: All that ``build`` and the compiler look at but addresses: ``geometry`` of what the tensors came from, and
            the options of the call. None: nothing is kept.
        tensors: Whose addresses the kernel gets, the first on the device on which it runs. Those that ``key`` does not
            hold are made by the caller, alike for equal keys.
        build: Takes ``tensors``, returns the grid, the arguments in order, and the named ones. It may look at the
            tensors' geometry, not at what is in them.
    """
    # What stands in for a kernel (the interpreter's, one that takes notes) has no compiled form.
    if key is None or not KEEP or INTERPRETED or not HAS_TRITON or not hasattr(kernel, "device_caches"):
        grid, arguments, named = build(*tensors)
        kernel[grid](*arguments, **named)
        return
    first = tensors[0]
    assert first is not None
    device = first.get_device()
    whole = (id(kernel), device, key)
    known = _launches.get(whole)
    if known is not None and not _watched(kernel):
        known(tensors, torch._C._cuda_getCurrentRawStream(device))
        return
    # Two of them may be one tensor, which says nothing about the next call: each gets a face of its own.
    faces = [None if x is None else x.detach() for x in tensors]
    grid, arguments, named = build(*faces)
    compiled = kernel[grid](*arguments, **named)
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    try:
        _launches.keep(whole, _Launch(compiled, grid, [given[name] for name in kernel.arg_names], faces))
    except ValueError:
        # A copy of what the copy engine cannot address: such calls go Triton's way.
        return


@functools.lru_cache
def launches_overlap(device: torch.device) -> bool:
    """Whether a launch can be on its way while the one before ends: programmatic dependent launch, from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def dependent(overlap: bool) -> dict[str, bool]:
    """Option of a launch that is to be so; older compilers do not know it, so that it is not named where it is off."""
    return {"launch_pdl": True} if overlap else {}
