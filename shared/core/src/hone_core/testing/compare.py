"""``assert_close`` with one tolerance table for the repository."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["TOLERANCES", "Tolerance", "assert_close"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """An element passes when ``|actual - expected| <= atol + rtol * |expected|``."""

    atol: float
    rtol: float


# A few units in the last place of sums of order one: float64 has 2e-16, float32 1e-7, float16 1e-3, bfloat16 8e-3. The
# half-precision rows leave room for inputs and outputs rounded once each; accumulation is in float32 everywhere.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(atol=1e-10, rtol=1e-8),
    torch.float32: Tolerance(atol=2e-5, rtol=1e-4),
    torch.float16: Tolerance(atol=2e-3, rtol=5e-3),
    torch.bfloat16: Tolerance(atol=1e-2, rtol=2e-2),
}


def assert_close(
    actual: Any,
    expected: Any,
    *,
    dtype: torch.dtype | None = None,
    what: str = "",
    atol: float | None = None,
    rtol: float | None = None,
) -> None:
    """Assert that two tensors (arrays, numbers, nested lists) agree in shape and values.

    Equal infinities agree; a NaN agrees with nothing. Integers and booleans must be equal.

    Args:
        actual: What was computed.
        expected: What it should be.
        dtype: Row of ``TOLERANCES`` to use. None: the coarser of the two floating dtypes.
        what: Name for the message.
        atol: Instead of the table's value; say why beside the call.
        rtol: Likewise.

    Raises:
        AssertionError: With the worst element and its index, the largest absolute error and the relative RMS error.
    """
    __tracebackhide__ = True
    got, want = _tensor(actual), _tensor(expected)
    name = what or "values"
    if got.shape != want.shape:
        raise AssertionError(f"{name}: expected shape {tuple(want.shape)}; got {tuple(got.shape)}")
    tolerance = _tolerance(got.dtype, want.dtype, dtype)
    atol = tolerance.atol if atol is None else atol
    rtol = tolerance.rtol if rtol is None else rtol
    a, e = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
    error = torch.where(a == e, torch.zeros_like(a), (a - e).abs())
    excess = error - (atol + rtol * e.abs().nan_to_num(posinf=0.0, neginf=0.0))
    # A NaN on either side, or an infinity against a number, is worse than any finite error.
    excess = torch.where(error.isfinite(), excess, torch.full_like(excess, torch.inf))
    bad = excess > 0
    if not bool(bad.any()):
        return
    worst = int(excess.argmax())
    index = tuple(int(i) for i in np.unravel_index(worst, tuple(a.shape))) if a.dim() else ()
    finite = error.isfinite()
    scale = e[finite].square().sum().sqrt()
    rms = float(error[finite].square().sum().sqrt() / scale) if float(scale) > 0 else float("inf")
    largest = float(error[finite].max()) if bool(finite.any()) else float("nan")
    raise AssertionError(
        f"{name}: {int(bad.sum())} of {bad.numel()} elements differ by more than "
        f"atol {atol:g} + rtol {rtol:g} * |expected|\n"
        f"  worst at {index}: got {float(a.flatten()[worst]):.8g}, expected {float(e.flatten()[worst]):.8g}\n"
        f"  largest error {largest:.3g}, relative RMS {rms:.3g}, {int((~finite).sum())} not finite; "
        f"dtypes {got.dtype} and {want.dtype}"
    )


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))


def _tolerance(got: torch.dtype, want: torch.dtype, asked: torch.dtype | None) -> Tolerance:
    if asked is not None:
        if asked not in TOLERANCES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}; got {asked}")
        return TOLERANCES[asked]
    rows = [TOLERANCES[kind] for kind in (got, want) if kind.is_floating_point and kind in TOLERANCES]
    return max(rows, key=lambda row: row.atol) if rows else Tolerance(atol=0.0, rtol=0.0)
