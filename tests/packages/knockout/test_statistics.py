import math

import numpy as np
import pytest
from hone_knockout.statistics import bootstrap_interval, mcnemar, paired


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
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])


def test_pairs():
    result = paired([True, False, False, True], [True, True, True, False])
    assert (result.change, result.to_wrong, result.to_right) == (-0.25, 2, 1)
    assert result.interval[0] <= result.change <= result.interval[1]
    with pytest.raises(ValueError, match="the same items twice"):
        paired([True], [True, False])
