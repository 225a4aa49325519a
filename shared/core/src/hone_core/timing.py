"""One timer for every speed figure: warm-up, percentiles, cold L2, peak memory, interleaved variants.

Values come before times: ``check_values`` first, then ``measure_interleaved``, or a ``Stopwatch`` for what runs once.
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

__all__ = ["AnswerWatch", "Stopwatch", "Timing", "check_values", "measure", "measure_host", "measure_interleaved"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Times of one call, in milliseconds.

    ``ms_p20``, ``ms_p50`` and ``ms_p80`` are percentiles over ``n`` timed calls. ``peak_bytes`` is the most memory
    that torch's allocator held during a call, inputs included (None on the CPU, where torch does not count).
    """

    ms_p20: float
    ms_p50: float
    ms_p80: float
    n: int
    peak_bytes: int | None = None


def measure(
    fn: Callable[[], object],
    *,
    warmup: int = 10,
    repeats: int = 50,
    cold_l2: bool = False,
    device: "str | torch.device | None" = None,
) -> Timing:
    """Time ``fn()``.

    Build the inputs outside ``fn``: everything that it does is timed.

    Args:
        fn: The call. On CUDA it is timed between two events of the current stream.
        warmup: Untimed calls first (compilation, autotuning, caches).
        repeats: Timed calls.
        cold_l2: Overwrite a buffer larger than the L2 cache before each call, so that inputs come from memory.
        device: Where ``fn`` runs. None: the current CUDA device if there is one, else the CPU.

    Raises:
        ValueError: ``repeats`` is not positive, ``warmup`` is negative, or ``cold_l2`` is asked of the CPU.
    """
    return measure_interleaved({"": fn}, warmup=warmup, rounds=repeats, cold_l2=cold_l2, device=device)[""]


def measure_interleaved(
    fns: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 10,
    rounds: int = 50,
    seed: int = 0,
    cold_l2: bool = False,
    device: "str | torch.device | None" = None,
) -> dict[str, Timing]:
    """Time several calls against each other.

    Each round runs every call once, in a fresh random order, so that clocks, heat and other load fall on all alike.

    Args:
        fns: Name to call.
        warmup: Untimed calls of each first.
        rounds: Timed calls of each.
        seed: Of the order.
        cold_l2: As in ``measure``.
        device: As in ``measure``.

    Raises:
        ValueError: As in ``measure``.
    """
    import torch

    if rounds < 1 or warmup < 0:
        raise ValueError(f"expected at least one timed call and no negative warm-up; got {rounds} and {warmup}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if cold_l2 and device.type != "cuda":
        raise ValueError(f"cold_l2 needs a CUDA device; got {device}. Pass cold_l2=False.")
    clock = _CudaClock(device, cold_l2) if device.type == "cuda" else _CpuClock()
    for fn in fns.values():
        for _ in range(warmup):
            fn()
    samples: dict[str, list[float]] = {name: [] for name in fns}
    peaks: dict[str, int | None] = dict.fromkeys(fns)
    order, rng = list(fns), random.Random(seed)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            milliseconds, peak = clock.time(fns[name])
            samples[name].append(milliseconds)
            if peak is not None:
                peaks[name] = max(peak, peaks[name] or 0)
    return {
        name: Timing(
            ms_p20=_percentile(values, 20),
            ms_p50=_percentile(values, 50),
            ms_p80=_percentile(values, 80),
            n=rounds,
            peak_bytes=peaks[name],
        )
        for name, values in samples.items()
    }


def measure_host(fn: Callable[[], object], *, warmup: int = 3, repeats: int = 50, calls: int = 20) -> Timing:
    """Time what a call costs the host, whatever the GPU takes for it.

    Args:
        fn: The call, small enough that the GPU waits for the host.
        warmup: Untimed calls first.
        repeats: Timed runs, each begun with the GPU idle and ended without waiting for it.
        calls: In a run, whose time is divided by them.

    Raises:
        ValueError: ``repeats`` or ``calls`` is not positive, or ``warmup`` is negative.
    """
    import torch

    if repeats < 1 or calls < 1 or warmup < 0:
        raise ValueError(
            f"expected at least one run of one call and no negative warm-up; got {repeats}, {calls} and {warmup}"
        )
    for _ in range(warmup):
        fn()
    each = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        each.append((time.perf_counter() - start) / calls * 1e3)
    p20, p50, p80 = (_percentile(each, percent) for percent in (20, 50, 80))
    return Timing(ms_p20=p20, ms_p50=p50, ms_p80=p80, n=repeats)


class Stopwatch:
    """Wall clock and peak memory of a block, which begins and ends with the device idle.

    For what runs once or a few times, such as a whole video: it synchronises twice, which a short call would feel.

    Attributes:
        seconds: Length of the block, once it has ended.
        peak_bytes: The most memory that torch's allocator held in it (None on the CPU, where torch does not count).

    Example:
        ``with Stopwatch(device) as watch: pipe(...)``, then ``watch.seconds``
    """

    seconds: float
    peak_bytes: int | None

    def __init__(self, device: "str | torch.device") -> None:
        import torch

        self._device = torch.device(device)

    def __enter__(self) -> Self:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import torch

        if error is not None:
            # Waiting for a device that failed would raise in place of the error.
            return
        gpu = self._device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(self._device)
        self.seconds = time.perf_counter() - self._start
        self.peak_bytes = torch.cuda.max_memory_allocated(self._device) if gpu else None


class AnswerWatch(Stopwatch):
    """A ``Stopwatch`` of one answer of a language model, which also sees the end of the prefill.

    Attributes:
        prefill_seconds: From the beginning to the end of the model's first forward. That one alone is waited for, so
            that decoding runs as it always does.
    """

    prefill_seconds: float

    def __init__(self, model: "torch.nn.Module") -> None:
        super().__init__(next(model.parameters()).device)
        self._model = model

    def __enter__(self) -> Self:
        import torch

        first = True

        def end(*_: object) -> None:
            nonlocal first
            if first:
                first = False
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                self.prefill_seconds = time.perf_counter() - self._start

        self._hook = self._model.register_forward_hook(end)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hook.remove()
        super().__exit__(kind, error, traceback)


def check_values(
    what: str, got: "torch.Tensor", want: "torch.Tensor", *, tolerance: float, advice: str = "Run its tests here"
) -> float:
    """Compare a result with its reference, so that what is wrong is never timed.

    Args:
        what: Is compared, such as "asa attention"; the message begins with it.
        got: The result.
        want: The reference, of the same shape.
        tolerance: Relative error from which it is wrong: the norm of the difference over that of ``want``.
        advice: What to do then.

    Returns:
        The relative error, computed in float32 (float64 where one of the two is).

    Raises:
        RuntimeError: The shapes differ, or the error is not below ``tolerance``, as with a NaN.
    """
    import torch

    if got.shape != want.shape:
        raise RuntimeError(
            f"{what} has the shape {list(got.shape)} and its reference {list(want.shape)}. No time is reported"
        )
    wide = torch.promote_types(torch.promote_types(got.dtype, want.dtype), torch.float32)
    expected = want.to(wide)
    error = float((got.to(wide) - expected).norm() / expected.norm())
    if not error < tolerance:
        raise RuntimeError(
            f"{what} is wrong on {got.device}: relative error {error:.2e}, expected below {tolerance:g}. "
            f"No time is reported. {advice}"
        )
    return error


class _CpuClock:
    def time(self, fn: Callable[[], object]) -> tuple[float, None]:
        start = time.perf_counter()
        fn()
        return (time.perf_counter() - start) * 1e3, None


_COVER_CYCLES = 4_000_000
"""About 2 ms of GPU clock: more than the host needs to enqueue an operation and its backward."""


class _CudaClock:
    def __init__(self, device: "torch.device", cold_l2: bool) -> None:
        import torch

        self.device = device
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
        # Twice the cache: replacement is not exactly least-recently-used.
        self.flush = torch.empty(2 * l2, dtype=torch.int8, device=device) if cold_l2 else None

    def time(self, fn: Callable[[], object]) -> tuple[float, int]:
        import torch

        with torch.cuda.device(self.device):
            torch.cuda.reset_peak_memory_stats()
            if self.flush is not None:
                self.flush.zero_()
            # The device is kept busy while the host enqueues, so that launch latency is not in a short kernel's time.
            torch.cuda._sleep(_COVER_CYCLES)
            self.begin.record()
            fn()
            self.end.record()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - (self.flush.numel() if self.flush is not None else 0)
        return self.begin.elapsed_time(self.end), peak


def _percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
