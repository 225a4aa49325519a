import math
import time

import pytest
import torch
from hone_core.testing import requires_gpu
from hone_core.timing import (
    AnswerWatch,
    Stopwatch,
    _percentile,
    check_values,
    measure,
    measure_host,
    measure_interleaved,
)


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


def test_host_time_is_of_one_call():
    ran = []
    timing = measure_host(lambda: ran.append(time.sleep(0.002)), warmup=1, repeats=3, calls=4)
    assert len(ran) == 1 + 3 * 4
    assert timing.n == 3
    assert 2 <= timing.ms_p20 <= timing.ms_p50 <= timing.ms_p80 < 500


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one run of one call"):
        measure_host(lambda: None, calls=0)
    with pytest.raises(ValueError, match="at least one timed call"):
        measure(lambda: None, repeats=0, device="cpu")
    with pytest.raises(ValueError, match="cold_l2 needs a CUDA device; got cpu"):
        measure(lambda: None, cold_l2=True, device="cpu")


def test_stopwatch():
    with Stopwatch("cpu") as watch:
        time.sleep(0.01)
    assert 0.01 <= watch.seconds < 5
    assert watch.peak_bytes is None
    with pytest.raises(KeyError), Stopwatch("cpu"):
        raise KeyError


def test_answer_watch_sees_the_end_of_the_first_forward_alone():
    model = torch.nn.Linear(2, 2)
    with AnswerWatch(model) as watch:
        time.sleep(0.01)
        model(torch.zeros(2))
        time.sleep(0.02)
        model(torch.zeros(2))
    assert 0.01 <= watch.prefill_seconds <= watch.seconds - 0.02
    with pytest.raises(KeyError), AnswerWatch(model):
        raise KeyError
    assert not model._forward_hooks


@requires_gpu()
def test_stopwatch_waits_for_the_device_and_sees_its_memory():
    x = torch.zeros(2**20, device="cuda")
    with Stopwatch("cuda") as watch:
        torch.cuda._sleep(200_000_000)
        y = x + 1
        del y
    # 0.2 s at 1 GHz; GPUs run at most at 2.5
    assert watch.seconds > 0.05
    assert watch.peak_bytes >= 2 * 4 * 2**20


def test_values_come_before_times():
    want = torch.tensor([3.0, 4.0])
    got = torch.tensor([3.0, 4.5])
    assert check_values("it", got, want, tolerance=0.2) == pytest.approx(0.1)
    assert check_values("it", got.double(), want, tolerance=0.2) == pytest.approx(0.1)
    assert check_values("it", want.bfloat16(), want, tolerance=1e-6) == 0
    with pytest.raises(RuntimeError, match=r"asa is wrong on cpu: relative error 1.00e-01, .*No time is reported"):
        check_values("asa", got, want, tolerance=0.1)
    for broken in (torch.tensor([3.0, math.nan]), torch.tensor([3.0, math.inf])):
        with pytest.raises(RuntimeError, match="is wrong on cpu"):
            check_values("it", broken, want, tolerance=0.1)
    with pytest.raises(RuntimeError, match=r"has the shape \[1\] and its reference \[2\]"):
        check_values("it", torch.zeros(1), want, tolerance=0.1)
