import pytest
import torch
from hone_zpressor.budget import Budget, Cost, forward_cost, most_anchors
from hone_zpressor.config import ZPressorConfig
from hone_zpressor.data import graded_rooms
from hone_zpressor.models import attach, tiny


@pytest.mark.parametrize("most", [2, 3, 7, 24, 100])
@pytest.mark.parametrize("limit", [2.0, 2.5, 3.0, 6.0, 23.9, 24.0, 99.0, 1e9])
def test_equals_trying_all(most, limit):
    tried = []

    def cost(anchors):
        tried.append(anchors)
        return Cost(float(anchors))

    found = most_anchors(cost, most, Budget(seconds=limit))
    assert found == max(n for n in range(2, most + 1) if n <= limit)
    assert len(tried) == len({*tried})
    assert len(tried) <= 2 * most.bit_length()


def test_memory_and_what_ran_out_of_it():
    found = most_anchors(lambda n: Cost(0.0, n * 2**30) if n < 20 else None, 60, Budget(gib=1000.0))
    assert found == 19
    assert most_anchors(lambda n: Cost(1.0, n * 2**30), 60, Budget(seconds=5.0, gib=7.5)) == 7
    with pytest.raises(ValueError, match=r"2 anchors takes 4\.00 s and holds 2\.00 GiB"):
        most_anchors(lambda n: Cost(2.0 * n, n * 2**30), 8, Budget(seconds=1.0))
    with pytest.raises(ValueError, match="2 anchors ran out of memory"):
        most_anchors(lambda n: None, 8, Budget(seconds=1.0))
    with pytest.raises(ValueError, match="on a CUDA device alone"):
        most_anchors(lambda n: Cost(1.0), 8, Budget(gib=1.0))


def test_a_forward_is_measured_with_its_anchors(small):
    host = tiny(small)
    views = graded_rooms([0], 8, 1, 32).context
    with attach(host, ZPressorConfig(anchors=3, layers=1, precision="float32")):
        cost = forward_cost(host, views, 5)
        assert cost.seconds > 0
        assert cost.peak_bytes is None
        with torch.inference_mode():
            assert host(views).anchors.shape == (1, 5)
