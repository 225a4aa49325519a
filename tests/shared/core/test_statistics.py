import math

import numpy as np
import pytest
from hone_core.statistics import bootstrap_accuracies, bootstrap_interval, mcnemar, paired


def test_mcnemar_by_hand():
    # 1 against 5 of six flips: 2 * (C(6, 0) + C(6, 1)) / 64.
    assert mcnemar(5, 1) == pytest.approx(14 / 64)
    assert mcnemar(1, 5) == mcnemar(5, 1)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(10, 0) == pytest.approx(2 / 2**10)
    assert 0 <= mcnemar(3000, 0) < 1e-300


def test_interval_is_the_standard_error_for_many_values():
    values = np.random.default_rng(0).random(4000) < 0.3
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.21 / 4000), rel=0.08)
    assert low < values.mean() < high
    assert bootstrap_interval([1.0, 1.0]) == (1.0, 1.0)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    few = np.random.default_rng(0).integers(0, 10, (3, 10))
    assert bootstrap_interval(np.arange(10), draws=3) == bootstrap_interval(np.arange(10), resamples=few)


def test_a_wider_level_gives_a_wider_interval():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(values, level=0.5)
    # half of a normal distribution lies within 0.6745 standard deviations
    assert high - low == pytest.approx(2 * 0.6745 * values.std() / 20, rel=0.1)


def test_given_samples_are_the_ones_used():
    # the means of the four samples are 0, 1, 2 and 3; a quarter and three quarters of the way between their ends
    samples = np.array([[0, 0], [1, 1], [2, 2], [3, 3]])
    assert bootstrap_interval([0.0, 1.0, 2.0, 3.0], level=0.5, resamples=samples) == (0.75, 2.25)


def test_no_interval_of_nothing():
    for values in ([], [[1.0, 2.0]], 1.0):
        with pytest.raises(ValueError, match="a vector of at least one value"):
            bootstrap_interval(values)
    with pytest.raises(ValueError, match=r"level must lie in \(0, 1\)"):
        bootstrap_interval([1.0], level=95)


def test_pairs():
    result = paired([True, False, False, True], [True, True, True, False])
    assert (result.change, result.to_wrong, result.to_right) == (-0.25, 2, 1)
    assert result.interval[0] <= result.change <= result.interval[1]
    many = [index % 3 == 0 for index in range(200)], [index % 2 == 0 for index in range(200)]
    assert paired(*many, seed=1).interval != paired(*many).interval
    with pytest.raises(ValueError, match="the same items twice"):
        paired([True], [True, False])


def test_kinds_of_questions_are_drawn_apart():
    """The share of each kind is fixed: where answers are a matter of the kind alone, nothing is left to chance."""
    kinds = ["shape"] * 30 + ["order"] * 10
    drawn = bootstrap_accuracies([[kind == "shape", True] for kind in kinds], kinds)
    assert (drawn == [0.75, 1.0]).all()
    mixed = bootstrap_accuracies([[index % 2 == 0] for index in range(40)], kinds)
    assert mixed.std() == pytest.approx((0.25 / 40) ** 0.5, rel=0.1)
    with pytest.raises(ValueError, match="a stratum for each of 40 items; got 39"):
        bootstrap_accuracies([[True]] * 40, kinds[1:])
