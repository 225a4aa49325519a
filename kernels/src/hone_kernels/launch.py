"""Launches at little cost to the host: what the shapes of a call decide is worked out once.

At every launch Triton works out from type, value and alignment of each argument which compiled kernel it needs; with
strides gathered and tensor descriptors built, that is 40 to 80 us a kernel. All of it follows from the geometry of the
tensors and the options of the call: only the addresses change. So the first launch of a geometry goes Triton's way, and
what came of it, the compiled kernel and its list of arguments, is kept; a later one puts its tensors into that list.

What a whole call checks, makes and launches follows from the same things. ``Notes`` take that down during the first
call of a kind, and a ``Plan`` does it again: it asks whether the tensors are of that kind, allocates, and launches.

Nothing that is kept of a launch or a call holds a tensor, and the number of them is bounded. What is made of a tensor
(``kept_beside``) goes when that goes.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hone_kernels.backends import HAS_TRITON, INTERPRETED

__all__ = [
    "KEEP",
    "Kept",
    "Notes",
    "Plan",
    "Plans",
    "Replay",
    "addresses_of",
    "dependent",
    "eager",
    "geometry",
    "kept_beside",
    "launch",
    "launches_overlap",
    "number",
    "on_device_of",
    "plannable",
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
    state: list[Hashable] = [0]
    for x in tensors:
        if x.is_inference():
            return None
        state.append((x.data_ptr(), x._version))
    if tensors[0].is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        state[0] = torch._C._cuda_getCurrentRawStream(tensors[0].get_device())
    return tuple(state)


_beside: dict[int, tuple[weakref.ref[Tensor], Hashable, Any]] = {}
"""By a tensor's identity, for as long as it lives: what was made of it last, and of what state for what."""


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
    found = _beside.get(id(x))
    # Another tensor may have the number of one that is gone.
    if found is None or found[0]() is not x or found[1] != (state, what):
        found = _beside[id(x)] = (weakref.ref(x, functools.partial(_forget, id(x))), (state, what), make())
    return found[2]


def _forget(which: int, gone: weakref.ref[Tensor]) -> None:
    found = _beside.get(which)
    if found is not None and found[0] is gone:
        del _beside[which]


def eager(*tensors: Tensor | None) -> bool:
    """Whether a call is what it looks like: nothing traces, transforms or watches it, and these are plain tensors.

    Only then an op may run without the dispatcher of torch, which costs some 30 us for an operator written in Python.
    """
    if not _unwatched():
        return False
    for x in tensors:
        if type(x) is not Tensor and type(x) not in _PLAIN:
            return False
    return torch._C._functorch.peek_interpreter_stack() is None


def _unwatched() -> bool:
    return not (
        not KEEP
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd.forward_ad._current_level >= 0
    )


def plannable() -> bool:
    """Whether a plan may do a call: what its look at the tensors does not see."""
    return not INTERPRETED and _unwatched()


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """``torch.cuda.device_of``, which takes its time, where it would change something."""
    if x.device.type != "cuda" or x.get_device() == torch._C._cuda_getDevice():
        return _NOWHERE
    return torch.cuda.device_of(x)


Build = Callable[..., tuple[tuple[int, ...], Sequence[Any], dict[str, Any]]]


class _Launch:
    """A compiled kernel with its grid and arguments, of which each launch gives the addresses anew.

    Attributes:
        whole: Whether addresses are all that it needs of tensors.
    """

    __slots__ = ("_arguments", "_descriptors", "_maps", "_places", "_run", "whole")

    def __init__(self, compiled: Any, grid: tuple[int, ...], arguments: list[Any], tensors: Sequence[Tensor | None]):
        """Raises ValueError: a tensor among the arguments is none of these."""
        index = {id(x): i for i, x in enumerate(tensors) if x is not None}
        self._places: list[tuple[int, int]] = []
        self._descriptors: list[tuple[int, int, type, dict[str, Any]]] = []
        self._maps: list[tuple[int, int, int, Callable[[int], Any]]] = []
        run = compiled.run
        raw, encode = _below(run)
        self._run = raw or run
        options = (run.launch_cooperative_grid, run.launch_pdl, None, None) if raw else ()
        # As they are passed, with room for the stream.
        all_of_it = [*(*grid, 1, 1)[:3], 0, compiled.function, *options, compiled.packed_metadata, None, None, None]
        self._arguments: list[Any] = all_of_it
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
        self.whole = not self._descriptors

    @staticmethod
    def _of(x: Tensor, index: dict[int, int]) -> int:
        if id(x) not in index:
            raise ValueError("a tensor that was made on the way")
        return index[id(x)]

    def __call__(self, tensors: Sequence[Any], stream: int) -> None:
        arguments = self._arguments.copy()
        arguments[3] = stream
        for at, i in self._places:
            # Of a number the driver is not asked whether it is an address of the GPU's.
            arguments[at] = tensors[i].data_ptr()
        for at, i, argument, encode in self._maps:
            arguments[at] = _map(argument, tensors[i].data_ptr(), encode)
        for at, i, kind, fields in self._descriptors:
            arguments[at] = _descriptor(kind, fields, tensors[i])
        self._run(*arguments)

    def at(self, slots: Sequence[int | None]) -> Callable[[Sequence[int], int], None]:
        """The same launch for a plan: its tensors' addresses stand in these places of a list.

        Raises:
            ValueError: One of its tensors has no place, or more than the address of one is wanted.
        """

        def slot(i: int) -> int:
            found = slots[i]
            if found is None:
                raise ValueError("a tensor that was made on the way")
            return found

        if not self.whole:
            raise ValueError("a descriptor that cannot be kept")
        places = [(at, slot(i)) for at, i in self._places]
        maps = [(at, slot(i), argument, encode) for at, i, argument, encode in self._maps]
        template, run, known = self._arguments, self._run, _maps

        def launch(addresses: Sequence[int], stream: int) -> None:
            arguments = template.copy()
            arguments[3] = stream
            for at, i in places:
                arguments[at] = addresses[i]
            for at, i, argument, encode in maps:
                found = known.get((argument, addresses[i]))
                arguments[at] = _map(argument, addresses[i], encode) if found is None else found
            run(*arguments)

        return launch


def _map(argument: int, address: int, encode: Callable[[int], Any]) -> Any:
    """The encoded descriptor of a launch's argument whose base has this address."""
    found = _maps.get((argument, address))
    if found is None:
        found = encode(address)
        _maps.keep((argument, address), found)
    return found


class _At:
    """Stands for a tensor of which the address is all that is asked."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


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

    def encode(which: int, kind: type, fields: dict[str, Any], address: int) -> Any:
        return make_tensordesc_arg(_descriptor(kind, fields, _At(address)), metas[which])[0]

    return launcher, encode


def _descriptor(kind: type, fields: dict[str, Any], base: Any) -> Any:
    """Without its checks, which are of what has not changed."""
    descriptor: Any = object.__new__(kind)
    descriptor.__dict__ = {"base": base, **fields}
    return descriptor


_launches = Kept()

if HAS_TRITON:
    from triton.knobs import runtime as _RUNTIME


def _watched(kernel: Any) -> Any:
    """Whether a profiler wants to see each launch."""
    return kernel.pre_run_hooks or _watched_all()


def _watched_all() -> Any:
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    return getattr(enter, "calls", enter) or getattr(leave, "calls", leave)


def launch(
    kernel: Any, key: Hashable | None, tensors: Sequence[Tensor | None], build: Build, notes: Notes | None = None
) -> None:
    """Launch a Triton or Gluon kernel.

    Args:
        kernel: Decorated function.
        key: All that ``build`` and the compiler look at but addresses: ``geometry`` of what the tensors came from, and
            the options of the call. None: nothing is kept.
        tensors: Whose addresses the kernel gets, the first on the device on which it runs. Those that ``key`` does not
            hold are made by the caller, alike for equal keys.
        build: Takes ``tensors``, returns the grid, the arguments in order, and the named ones. It may look at the
            tensors' geometry, not at what is in them.
        notes: Where to take it down.
    """
    known = _launch(kernel, key, tensors, build)
    if notes is not None:
        notes.launched(kernel, known, tensors)


def _launch(kernel: Any, key: Hashable | None, tensors: Sequence[Tensor | None], build: Build) -> _Launch | None:
    """Launch, and return what is kept of it."""
    # What stands in for a kernel (the interpreter's, one that takes notes) has no compiled form.
    if key is None or not KEEP or INTERPRETED or not HAS_TRITON or not hasattr(kernel, "device_caches"):
        grid, arguments, named = build(*tensors)
        kernel[grid](*arguments, **named)
        return None
    first = tensors[0]
    assert first is not None
    device = first.get_device()
    whole = (id(kernel), device, key)
    known: _Launch | None = _launches.get(whole)
    if known is not None and not _watched(kernel):
        known(tensors, torch._C._cuda_getCurrentRawStream(device))
        return known
    # Two of them may be one tensor, which says nothing about the next call: each gets a face of its own.
    faces = [None if x is None else x.detach() for x in tensors]
    grid, arguments, named = build(*faces)
    compiled = kernel[grid](*arguments, **named)
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    try:
        known = _Launch(compiled, grid, [given[name] for name in kernel.arg_names], faces)
    except ValueError:
        # A copy of what the copy engine cannot address: such calls go Triton's way.
        return None
    _launches.keep(whole, known)
    return known


_DYNAMO = torch._C._dynamo.guards
_EMPTY = {name: getattr(_DYNAMO, f"_empty_strided_{name}", None) for name in ("cuda", "cpu")}
"""What compiled graphs allocate by, on the current device, without torch's dispatcher."""

_BOUNDARY = 512
"""Bytes: what the caching allocator aligns to."""


class Notes:
    """What a call makes and launches, taken down while it does so.

    Args:
        given: The call's tensors, as ``Replay`` gets their addresses.
    """

    def __init__(self, *given: Tensor) -> None:
        self._given = given
        self._slots: dict[int, int] = {id(x): i for i, x in enumerate(given)}
        self._made: list[tuple[Tensor, bool]] = []
        self._launches: list[tuple[Any, _Launch | None, list[int | None]]] = []
        # While these live no other tensor gets their numbers.
        self._alive: list[Tensor] = []

    def made(self, x: Tensor, zeros: bool = False) -> Tensor:
        """Take down an allocation: not what is in it, but ``zeros``."""
        self._slots[id(x)] = len(self._given) + len(self._made)
        self._made.append((x, zeros))
        return x

    def same(self, x: Tensor | None, of: Tensor | None) -> None:
        """Take down that ``x`` is the memory of ``of``, if so, to a kernel that knows its strides."""
        if x is not None and of is not None and id(of) in self._slots and x.data_ptr() == of.data_ptr():
            self._slots[id(x)] = self._slots[id(of)]
            self._alive.append(x)

    def launched(self, kernel: Any, kept: _Launch | None, tensors: Sequence[Tensor | None]) -> None:
        """Take down a launch, of which None can be repeated."""
        self._launches.append((kernel, kept, [None if x is None else self._slots.get(id(x)) for x in tensors]))

    def replay(self, *wanted: Tensor | None) -> Replay | None:
        """What does it again and gives these tensors; None where more than allocations and kept launches was done."""
        if len({id(x) for x in self._given}) != len(self._given):
            return None
        kinds = {x.device.type for x in (*self._given, *(x for x, _ in self._made))}
        if len(kinds) != 1 or _EMPTY.get(*kinds) is None:
            return None
        order: list[tuple[int, Tensor, bool]] = [(len(self._given) + i, *x) for i, x in enumerate(self._made)]
        names = [id(x) for x in wanted if x is not None]
        if not {*names} <= {id(x) for _, x, _ in order}:
            return None
        order.sort(key=lambda made: (id(made[1]) not in names, not made[2]))
        places = {slot: len(self._given) + i for i, (slot, _, _) in enumerate(order)}
        steps, kernels = [], []
        for kernel, kept, slots in self._launches:
            if kept is None:
                return None
            try:
                steps.append(kept.at([None if i is None else places.get(i, i) for i in slots]))
            except ValueError:
                return None
            kernels.append(kernel)
        own = [(tuple(x.shape), x.stride(), x.dtype, zeros) for _, x, zeros in order if id(x) in names or zeros]
        shared = [x.numel() * x.element_size() for _, x, zeros in order if id(x) not in names and not zeros]
        if any(not x.is_contiguous() for _, x, zeros in order if id(x) not in names and not zeros):
            return None
        at = {id(x): i for i, (_, x, _) in enumerate(order)}
        which = [None if x is None else at[id(x)] for x in wanted]
        return Replay(_EMPTY[kinds.pop()], own, shared, steps, kernels, which)


class Replay:
    """Allocations and launches of a call, to be done again."""

    __slots__ = ("_bytes", "_empty", "_hooked", "_offsets", "_own", "_plain", "_steps", "_which")

    def __init__(self, empty: Any, own: list[Any], shared: list[int], steps: list[Any], kernels: list[Any],
                 which: list[int | None]) -> None:  # fmt: skip
        self._empty, self._own, self._steps, self._which = empty, own, steps, which
        self._plain = which == [*range(len(own))]
        self._hooked = kernels
        self._offsets, self._bytes = [], 0
        for size in shared:
            self._offsets.append(self._bytes)
            self._bytes += -(-size // _BOUNDARY) * _BOUNDARY

    def watched(self) -> Any:
        """Whether a profiler wants to see a launch."""
        for kernel in self._hooked:
            if kernel.pre_run_hooks:
                return True
        return _watched_all()

    def __call__(self, addresses: list[int], stream: int) -> list[Any]:
        """Do it.

        Args:
            addresses: Of the given tensors; those of what is made are added.
            stream: The current one.
        """
        empty, made = self._empty, []
        for size, stride, dtype, zeros in self._own:
            x = empty(size, stride, dtype)
            if zeros:
                x.zero_()
            made.append(x)
            addresses.append(x.data_ptr())
        if self._bytes:
            # One allocation for all that nobody gets to see.
            scratch = empty((self._bytes,), (1,), torch.uint8)
            base = scratch.data_ptr()
            for offset in self._offsets:
                addresses.append(base + offset)
        for step in self._steps:
            step(addresses, stream)
        return made if self._plain else [None if i is None else made[i] for i in self._which]


class Plan:
    """What calls of one kind do.

    Args:
        given: Tensors of a call of that kind.
        parts: What it does, one ``Replay`` or more by name; and what else its caller wants to know.
    """

    def __init__(self, given: Sequence[Tensor], **parts: Any) -> None:
        # As torch.compile asks whether a graph is for these: by type, dtype, device, sizes, strides, requires_grad and
        # dispatch keys, those of the thread among them (autocast, inference mode, transforms).
        self.fits = _DYNAMO.TensorGuards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self.device = given[0].get_device()
        self.parts = SimpleNamespace(**parts)
        self.replays = [x for x in parts.values() if isinstance(x, Replay)]


class Plans:
    """Plans by what their tensors do not tell. The few kinds of one key are tried in turn."""

    def __init__(self, kinds: int = 8) -> None:
        self._kept, self._kinds = Kept(), kinds

    def find(self, key: Hashable, given: Sequence[Any]) -> tuple[Any, list[int], int] | None:
        """The parts of the plan for these tensors, their addresses and the stream; None: the long way.

        Args:
            key: All but the tensors on which the call depends, with how many tensors there are.
            given: The tensors.
        """
        for plan in self._kept.get(key, ()):
            if plan.fits(*given):
                addresses = addresses_of(given)
                if addresses is None:
                    return None
                # A capture goes the long way: what the host spends on it is no matter.
                if plan.device >= 0 and (
                    plan.device != torch._C._cuda_getDevice() or torch.cuda.is_current_stream_capturing()
                ):
                    return None
                for replay in plan.replays:
                    if replay.watched():
                        return None
                return plan.parts, addresses, torch._C._cuda_getCurrentRawStream(plan.device)
        return None

    def add(self, key: Hashable, given: Sequence[Tensor], **parts: Any) -> None:
        """Keep what calls of the kind of ``given`` do, unless a part of it is None."""
        known = self._kept.get(key, ())
        # A call that one fits goes the long way where that is watched or captured.
        if None in parts.values() or not hasattr(_DYNAMO, "TensorGuards") or any(x.fits(*given) for x in known):
            return
        self._kept.keep(key, (Plan(given, **parts), *known[: self._kinds - 1]))

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()


def addresses_of(given: Sequence[Tensor]) -> list[int] | None:
    """Addresses, if all are of whole 16 bytes."""
    addresses, every = [], 0
    for x in given:
        address = x.data_ptr()
        every |= address
        addresses.append(address)
    return None if every % _ALIGNED else addresses


@functools.lru_cache
def launches_overlap(device: torch.device) -> bool:
    """Whether a launch can be on its way while the one before ends: programmatic dependent launch, from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def dependent(overlap: bool) -> dict[str, bool]:
    """Option of a launch that is to be so; older compilers do not know it, so that it is not named where it is off."""
    return {"launch_pdl": True} if overlap else {}
