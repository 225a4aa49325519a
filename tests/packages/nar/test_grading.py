import math

import pytest
import torch
from hone_nar.data import digits
from hone_nar.grading import accuracy, bits, distance, nearest


def test_held_out_digits_read_as_what_they_show_and_shuffled_ones_do_not():
    test = digits("test")
    assert float(accuracy(test.tokens, test.labels).float().mean()) > 0.97
    assert torch.equal(nearest(digits("train").tokens[:50]), digits("train").labels[:50])
    mixed = test.tokens[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    assert float(accuracy(mixed, test.labels).float().mean()) < 0.3


def test_distance_is_nil_for_the_training_digits_and_grows():
    train, test = digits("train").tokens, digits("test").tokens
    assert distance(train) == pytest.approx(0.0, abs=1e-5)
    assert 1 < distance(test) < 50 < distance(train + 3)


def test_bits_are_nats_over_the_logarithm_of_two():
    found = bits(lambda tokens, labels: torch.full(tokens.shape, math.log(17.0)), digits("test"), batch=100)
    assert found.shape == (297, 64)
    assert float(found.mean()) == pytest.approx(math.log2(17))
