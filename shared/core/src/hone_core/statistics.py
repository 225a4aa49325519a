"""How sure a mean or a difference is: bootstrap intervals, McNemar's test, flips. On numpy alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

__all__ = ["Paired", "bootstrap_accuracies", "bootstrap_interval", "mcnemar", "paired"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """One configuration against the baseline on the same items.

    Attributes:
        change: accuracy minus the baseline's, in [-1, 1].
        interval: 95 % bootstrap interval of ``change``, items drawn together with their baseline.
        to_wrong: items that the baseline has right and this has wrong.
        to_right: the other way round.
        p: McNemar's exact two-sided p of the two counts.
    """

    change: float
    interval: tuple[float, float]
    to_wrong: int
    to_right: int
    p: float


def bootstrap_interval(
    values: "ArrayLike",
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    resamples: "NDArray[np.integer] | None" = None,
) -> tuple[float, float]:
    """Percentile interval of the mean.

    Args:
        values: ``[N]``, one per item.
        level: Coverage, in (0, 1).
        draws: Bootstrap samples.
        seed: Seed of the draws.
        resamples: ``[draws, N]`` the items of each sample, in place of ``draws`` and ``seed``: for who has drawn them
            already.

    Returns:
        Low and high end.

    Raises:
        ValueError: There are no values, they are no vector, or ``level`` is no share.
    """
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise ValueError(f"an interval needs a vector of at least one value; got shape {list(data.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), such as 0.95; got {level}")
    if resamples is None:
        rng, means = np.random.default_rng(seed), []
        # In parts, so that many items do not fill the memory.
        for at in range(0, draws, 200):
            means.append(data[rng.integers(0, len(data), (min(200, draws - at), len(data)))].mean(1))
        drawn = np.concatenate(means)
    else:
        drawn = data[resamples].mean(1)
    tail = (100 - 100 * level) / 2  # exact at 0.95
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_accuracies(
    right: Sequence[Sequence[bool]], strata: Sequence[str], *, seed: int = 0, draws: int = 2000
) -> "NDArray[np.float64]":
    """Accuracies of several configurations on the same drawn items, for intervals of what is computed from them.

    Args:
        right: ``[items, configurations]``, whether each answer is right.
        strata: Of each item. As many are drawn of each as there are: how many was a choice, not chance.
        seed: Seed of the draws.
        draws: Bootstrap samples.

    Returns:
        ``[draws, configurations]``, in [0, 1].

    Raises:
        ValueError: There are no items, or not as many strata.
    """
    import numpy as np

    data = np.asarray(right, dtype=np.float64)
    items = len(data)
    if not items:
        raise ValueError("an interval needs at least one item")
    if len(strata) != items:
        raise ValueError(f"expected a stratum for each of {items} items; got {len(strata)}")
    rng = np.random.default_rng(seed)
    kinds = np.asarray(strata)
    total = np.zeros((draws, data.shape[1]))
    for kind in np.unique(kinds):
        part = data[kinds == kind]
        # How often each item is drawn is multinomial.
        total += rng.multinomial(len(part), np.full(len(part), 1 / len(part)), size=draws) @ part
    return total / items


def mcnemar(to_wrong: int, to_right: int) -> float:
    """Exact two-sided p that as many items flip each way: binomial with one half.

    Args:
        to_wrong: Items right before and wrong after.
        to_right: Items wrong before and right after.
    """
    total, few = to_wrong + to_right, min(to_wrong, to_right)
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(few + 1))
    # Integers to the end: a float of 2 ** total overflows past a thousand flips.
    return min(1.0, 2 * tail / 2**total)


def paired(right: Sequence[bool], baseline: Sequence[bool], *, seed: int = 0) -> Paired:
    """Compare right answers with the baseline's on the same items.

    Raises:
        ValueError: The lists differ in length.
    """
    import numpy as np

    if len(right) != len(baseline):
        raise ValueError(f"expected the same items twice; got {len(right)} and {len(baseline)}")
    now, before = np.asarray(right, dtype=bool), np.asarray(baseline, dtype=bool)
    difference = now.astype(float) - before.astype(float)
    to_wrong, to_right = int((before & ~now).sum()), int((now & ~before).sum())
    return Paired(
        change=float(difference.mean()),
        interval=bootstrap_interval(difference, seed=seed),
        to_wrong=to_wrong,
        to_right=to_right,
        p=mcnemar(to_wrong, to_right),
    )
