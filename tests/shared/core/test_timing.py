import time

import pytest
from hone_core.timing import _percentile, measure, measure_interleaved


def test_percentiles_by_hand():
    values = [40.0, 10.0, 30.0, 20.0]
    # Ranks 0..3: the 20th percentile is at rank 0.6, the 50th at 1.5, the 80th at 2.4.
    assert _percentile(values, 20) == pytest.approx(16)
    assert _percentile(values, 50) == pytest.approx(25)
    assert _percentile(values, 80) == pytest.approx(34)
    assert _percentile([7.0], 80) == 7.0


def test_measure_counts_calls_and_orders_percentiles():
    calls = []
    timing = measure(lambda: (calls.append(1), time.sleep(0.002)), warmup=2, repeats=5, device="cpu")
    assert len(calls) == 7
    assert timing.n == 5
    assert 2 <= timing.ms_p20 <= timing.ms_p50 <= timing.ms_p80
    assert timing.peak_bytes is None


def test_interleaved_runs_each_variant_once_a_round_in_changing_order():
    order = []
    timings = measure_interleaved(
        {name: lambda name=name: order.append(name) for name in "abc"}, warmup=1, rounds=20, seed=0, device="cpu"
    )
    assert order[:3] == ["a", "b", "c"]
    rounds = [tuple(order[i : i + 3]) for i in range(3, len(order), 3)]
    assert len(rounds) == 20
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1
    assert timings.keys() == {"a", "b", "c"}


def test_slower_call_gets_the_larger_time():
    timings = measure_interleaved(
        {"slow": lambda: time.sleep(0.004), "fast": lambda: None}, warmup=0, rounds=5, device="cpu"
    )
    assert timings["slow"].ms_p50 > 3.5 > timings["fast"].ms_p50


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one timed call"):
        measure(lambda: None, repeats=0, device="cpu")
    with pytest.raises(ValueError, match="cold_l2 needs a CUDA device; got cpu"):
        measure(lambda: None, cold_l2=True, device="cpu")
