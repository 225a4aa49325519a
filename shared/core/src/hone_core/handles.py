"""What ``attach`` gives back, in every package: one handle, the state of a running forward, hooks that are watched."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from hone_core.config import Preset

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CallState", "Handle", "Hooks", "resolve"]

C = TypeVar("C")
T = TypeVar("T")


def resolve(config: str | C, presets: Mapping[str, Preset[C]], kind: type[C]) -> C:
    """Turn the name of a preset, or settings, into settings.

    Args:
        config: A name in ``presets``, or settings of type ``kind``.
        presets: Name to preset.
        kind: The config dataclass.

    Raises:
        ValueError: There is no such preset.
        TypeError: ``config`` is neither a name nor a ``kind``.
    """
    if isinstance(config, kind):
        return config
    if not isinstance(config, str):
        raise TypeError(f"expected a preset's name or a {kind.__name__}; got {type(config).__name__}")
    if config not in presets:
        raise ValueError(f"no preset {config!r}; the presets are {', '.join(presets)}")
    return presets[config].config


class _Values(Generic[T]):
    def __init__(self) -> None:
        self.current: T | None = None
        self.disabled = False


class CallState(threading.local, Generic[T]):
    """What the hooks of one forward hand to each other.

    The first hook of a forward sets ``current``, the others read it, the last one sets it to None. Every thread has its
    own, so a model may run in several at once; a copy of a model begins without. A context variable would do the same,
    but torch.compile cannot trace one.

    Whatever a block needs that may be run again later, by gradient checkpointing, has to reach it with its arguments:
    backward runs in threads of its own, and after ``current`` has gone.
    """

    def __init__(self) -> None:
        # Called in each thread. The values are on an object of their own: torch 2.14's compiler forgets what it has set
        # on a thread's attributes.
        self._own: _Values[T] = _Values()

    @property
    def current(self) -> T | None:
        """Of the forward that runs in this thread, if one does."""
        return self._own.current

    @current.setter
    def current(self, value: T | None) -> None:
        self._own.current = value

    @property
    def disabled(self) -> bool:
        """Within ``Handle.disabled``: forwards run as if nothing were attached."""
        return self._own.disabled

    @disabled.setter
    def disabled(self, value: bool) -> None:
        self._own.disabled = value

    def __reduce__(self) -> tuple[Any, ...]:
        return CallState, ()


class Hooks:
    """Hooks on modules of a model, with a check that the model still calls them.

    A hook sits on a module object. What wraps or replaces that object later (LoRA, quantisation, a new ``rope``) leaves
    the hook behind in silence, so each forward begins with ``check``.

    Args:
        model: That the modules belong to.
    """

    def __init__(self, model: "nn.Module") -> None:
        self.model = model
        self._placed: list[tuple[str, nn.Module, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._placed)

    def add(self, path: str, register: "Callable[[nn.Module], Any]") -> None:
        """Put a hook on the module at ``path``.

        Args:
            path: As in ``named_modules``; empty for the model itself.
            register: Registers the hook on the module that it is given, and returns torch's handle.
        """
        module = self.model.get_submodule(path)
        self._placed.append((path, module, register(module)))

    def check(self) -> None:
        """Look whether every module is still the one that has the hook.

        Raises:
            RuntimeError: One was replaced after ``attach``.
        """
        for path, module, _ in self._placed:
            now = self.model.get_submodule(path)
            if now is not module:
                raise RuntimeError(
                    f"{path} was replaced after attach(): {type(now).__name__} stands where {type(module).__name__} "
                    "was. Call handle.detach(), replace it, then attach() again."
                )

    def remove(self) -> None:
        """Take every hook off, from wherever it sits by now; harmless when repeated."""
        for _, _, handle in self._placed:
            handle.remove()
        self._placed = []


class Handle(ABC, Generic[C]):
    """A method on a model, as ``attach`` returned it; also a context manager that detaches at the end.

    Attributes:
        config: The settings in use.
        models: What it is attached to, most often one.
    """

    def __init__(self, config: C, models: "Iterable[nn.Module]") -> None:
        self.config = config
        self.models: tuple[nn.Module, ...] = tuple(models)

    @property
    @abstractmethod
    def attached(self) -> bool:
        """Whether the models have the method on them."""

    @abstractmethod
    def detach(self) -> None:
        """Give the models back as they were, bit for bit; harmless when repeated."""

    @abstractmethod
    def _states(self) -> Iterable[CallState[Any]]:
        """State of the forwards of each model; they look at its ``disabled`` first."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run as if detached inside the block, in this thread; cheap, for switching between calls."""
        with ExitStack() as stack:
            for state in self._states():
                stack.callback(setattr, state, "disabled", state.disabled)
                state.disabled = True
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        names = ", ".join(type(model).__name__ for model in self.models)
        return f"<{type(self).__name__} on {names}, {'attached' if self.attached else 'detached'}>"
