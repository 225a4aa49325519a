import math

import pytest
import torch
from hone_rstitch.config import LARGE, SMALL, StitchConfig
from hone_rstitch.method import (
    Gate,
    _philox,
    agreement,
    choose,
    entropy_nats,
    read_logits,
    stitch,
    token_time,
    uniform,
)


def waves(rows, size, scale):
    place = torch.arange(rows * size, dtype=torch.float64).view(rows, size)
    return (scale * torch.sin(place * 12.9898 + 78.233)).float()


def one(logits, size):
    return float(read_logits(logits[None], size).entropy)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 300.0])
def test_entropy_is_that_of_float64_probabilities(scale):
    logits = waves(4, 5000, scale)
    p = logits.double().softmax(-1)
    wanted = -torch.special.xlogy(p, p).sum(-1)
    torch.testing.assert_close(entropy_nats(logits).double(), wanted, atol=5e-5, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("rows", "size", "scale", "nats"),
    [
        (3, 50, 1.0, [3.694717, 3.704692, 3.713939]),
        (3, 50, 8.0, [2.375879, 2.416853, 2.625435]),
        (2, 1000, 3.0, [6.059571, 6.063285]),
        (2, 151936, 12.0, [10.292162, 10.292161]),
    ],
)
def test_entropy_of_the_r2r_release(rows, size, scale, nats):
    # thu-nics/R2R, r2r/utils/metrics.py: compute_entropy.
    assert entropy_nats(waves(rows, size, scale)).tolist() == pytest.approx(nats, abs=4e-5)


@pytest.mark.parity
def test_greedy_tokens_of_the_r2r_release():
    assert choose(waves(3, 50, 8.0), None) == [12, 36, 1]
    assert choose(waves(2, 151936, 12.0), None) == [2668, 4462]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_entropy_where_probabilities_underflow(dtype):
    # -(p * p.log()).sum() is NaN here, and NaN > tau never fires.
    logits = torch.full((1, 1000), -200.0)
    logits[0, 3] = 0.0
    p = logits.to(dtype).softmax(-1)
    assert torch.isnan((p * p.log()).sum())
    assert float(entropy_nats(logits.to(dtype))) == pytest.approx(0.0, abs=1e-6)


def test_entropy_is_normalised_by_the_shared_vocabulary():
    flat = torch.zeros(1, 64)
    assert one(flat[0], 64) == pytest.approx(1.0)
    masked = flat[0].clone()
    masked[8:] = -torch.inf
    assert one(masked, 64) == pytest.approx(0.5)


def test_uniform_distribution_is_never_above_one():
    for size in (3, 17, 97, 151665):
        assert one(torch.full((size,), 0.1), size) <= 1.0


def test_published_thresholds_in_nats():
    nats = [round(tau * math.log(151936), 4) for tau in (0.001, 0.02, 0.03)]
    assert nats == [0.0119, 0.2386, 0.3579]


def test_confidence_and_forced():
    logits = torch.tensor([[1.0, 3.0, 2.0], [-torch.inf, -torch.inf, 5.0]])
    found = read_logits(logits, 3)
    assert float(found.confidence[0]) == pytest.approx(float(logits[0].softmax(-1)[1]))
    assert found.forced.tolist() == [False, True]
    assert found.entropy[1] == 0
    assert found.confidence[1] == 1


def test_agreement():
    small = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    large = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert float(agreement(small, large)) == 0.75


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_known_answers(counter, key, wanted):
    assert _philox(counter, key) == wanted


def test_uniform_depends_on_seed_position_and_stream():
    draws = {uniform(seed, position, stream) for seed in range(3) for position in range(50) for stream in (0, 1)}
    assert len(draws) == 300
    assert all(0 <= draw < 1 for draw in draws)
    many = torch.tensor([uniform(7, position) for position in range(20_000)])
    assert abs(float(many.mean()) - 0.5) < 0.01
    assert abs(float(many.var()) - 1 / 12) < 0.003


def test_draws_have_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, 0.5]])
    numbers = [uniform(1, position) for position in range(20_000)]
    tokens = torch.tensor(choose(logits.expand(len(numbers), -1), numbers))
    shares = torch.bincount(tokens, minlength=5) / len(tokens)
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.012, rtol=0)
    assert shares[2] == 0


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_a_draw_is_never_a_masked_token(number):
    logits = torch.full((1, 9), -torch.inf)
    logits[0, 2:5] = torch.tensor([1.0, 2.0, 3.0])
    assert choose(logits, [number])[0] in (2, 3, 4)


# The gate, one decision at a time


def test_boundaries_are_those_of_algorithm_1():
    gate = Gate(StitchConfig(tau=0.2))
    assert gate.step(0.2) == (True, SMALL)  # H <= tau: kept
    assert gate.step(0.2000001) == (False, LARGE)  # strict: thrown away
    assert gate.step(0.9) == (True, LARGE)  # a high-entropy token of the large model is kept, and it stays
    assert gate.step(0.2) == (True, SMALL)  # the token that hands back is kept
    assert gate.position == 3


def test_confidence_boundaries():
    gate = Gate(StitchConfig(gate="confidence", tau=0.7))
    assert gate.step(0.7) == (True, SMALL)
    assert gate.step(0.69) == (False, LARGE)
    assert gate.step(0.69) == (True, LARGE)
    assert gate.step(0.7) == (True, SMALL)


def test_one_token_hands_back_at_once():
    gate = Gate(StitchConfig(policy="one-token", tau=0.2))
    assert gate.step(0.9) == (False, LARGE)
    assert gate.step(0.9) == (True, SMALL)


def test_hysteresis_and_least_run():
    gate = Gate(StitchConfig(tau=0.5, tau_back=0.1, min_large_run=3))
    gate.step(0.6)
    assert [gate.step(signal).model for signal in (0.05, 0.05, 0.3, 0.1)] == [LARGE, LARGE, LARGE, SMALL]


def test_window_averages_what_was_emitted():
    gate = Gate(StitchConfig(tau=0.3, window=3))
    assert gate.step(0.3).emit  # 0.3
    assert gate.step(0.2).emit  # 0.25
    assert gate.step(0.4) == (True, SMALL)  # 0.3: exactly tau
    assert gate.step(0.9) == (False, LARGE)  # (0.2 + 0.4 + 0.9) / 3
    # The signal of the token thrown away is gone with it: (0.2 + 0.4 + 0.1) / 3 <= 0.3.
    assert gate.step(0.1) == (True, SMALL)


def test_forced_tokens_stay_small_and_hand_nothing_back():
    gate = Gate(StitchConfig(tau=-1))
    assert gate.step(0.0, forced=True) == (True, SMALL)
    gate = Gate(StitchConfig(tau=0.2))
    gate.step(0.9)
    assert gate.step(0.0, forced=True) == (True, LARGE)
    assert gate.step(0.0) == (True, SMALL)


@pytest.mark.parametrize(("share", "run_length"), [(0.3, None), (0.3, 4.0), (0.7, 5.0), (0.0, None), (1.0, None)])
def test_random_routing_has_its_share_and_runs(share, run_length):
    gate = Gate(StitchConfig(policy="random", share=share, run_length=run_length), seed=3)
    who = []
    for _ in range(20_000):
        who.append(gate.active)
        assert gate.step(0.99).emit
    who = torch.tensor(who)
    assert abs(float(who.float().mean()) - share) < 0.025
    if run_length is not None:
        starts = int((who[1:] > who[:-1]).sum()) + int(who[0])
        assert abs(int(who.sum()) / starts - run_length) < 0.3


def test_drawn_discards_cost_what_the_gate_costs():
    config = StitchConfig(policy="random", share=0.3, run_length=4.0, discards=True)
    gate, plain = Gate(config, seed=3), Gate(StitchConfig(policy="random", share=0.3, run_length=4.0), seed=3)
    who, thrown, same = [], 0, []
    while gate.position < 5000:
        active = gate.active
        if gate.step(0.0).emit:
            who.append(active)
            same.append(plain.active)
            plain.step(0.0)
        else:
            assert active == SMALL
            assert gate.active == LARGE
            thrown += 1
    assert who == same  # the same tokens are the large model's
    starts = sum(b > a for a, b in zip([SMALL, *who[:-1]], who, strict=True))
    assert thrown == starts


def test_alone():
    for policy, who in (("small", SMALL), ("large", LARGE)):
        gate = Gate(StitchConfig(policy=policy))
        assert gate.active == who
        assert [gate.step(signal) for signal in (0.0, 1.0)] == [(True, who)] * 2


# The loop


def scripted(entropies):
    """Models over two tokens with given entropies in bits per position; the argmax is 0 for small, 1 for large."""

    def model(who):
        def logits(tokens):
            wanted = entropies[who][len(tokens)]
            low, high = 0.0, 60.0
            for _ in range(80):
                middle = (low + high) / 2
                p = torch.tensor([middle, 0.0], dtype=torch.float64).softmax(-1)
                bits = float(-torch.special.xlogy(p, p).sum()) / math.log(2)
                low, high = (middle, high) if bits > wanted else (low, middle)
            found = torch.tensor([middle, 0.0], dtype=torch.float64)
            return found if who == SMALL else found.flip(0)

        return logits

    return [model(SMALL), model(LARGE)]


def test_a_worked_example():
    models = scripted([[0.1, 0.5, 0.9, 0.1, 0.8, 0.1], [0.0, 0.7, 0.2, 0.9, 0.6, 0.1]])
    steps = stitch(models, StitchConfig(tau=0.3), size=2, budget=6)
    # 0: small, sure. 1: small unsure, large writes, unsure, stays. 2: large, sure, hands back. 3: small. 4: small
    # unsure, large writes, unsure, stays. 5: large.
    assert [step.model for step in steps] == [0, 1, 1, 0, 1, 1]
    assert [step.token for step in steps] == [0, 1, 1, 0, 1, 1]
    assert [step.discarded for step in steps] == [False, True, False, False, True, False]
    assert [round(step.entropy, 4) for step in steps] == [0.1, 0.7, 0.2, 0.1, 0.6, 0.1]


def test_the_budget_counts_emitted_tokens():
    models = scripted([[0.9] * 4, [0.1] * 4])
    steps = stitch(models, StitchConfig(tau=0.3), size=2, budget=4)
    assert len(steps) == 4
    assert all(step.discarded and step.model == LARGE for step in steps)


def test_token_time():
    # Spec table: 1.5B with 7B at 80 % of the bandwidth, (u, s) = (.2, .1): 687 tokens a second.
    assert 1000 / token_time(0.2, 0.1, small=0.80, large=3.68) == pytest.approx(687, rel=0.005)
    assert token_time(0.0, 0.0, small=2.0, large=9.0) == 2.0
    assert token_time(1.0, 0.0, small=2.0, large=9.0, overhead=0.5) == 9.5


def test_a_forced_token_is_not_remembered():
    gate = Gate(StitchConfig(tau=0.5, window=2))
    gate.step(0.4)
    gate.step(0.0, forced=True)
    # The mean of 0.4 and 0.7: the forced token's 0 would have let it pass.
    assert gate.doubts(0.7)
    assert not gate.step(0.7).emit


@pytest.mark.parametrize("discards", [False, True])
def test_a_share_of_one_is_never_left(discards):
    gate = Gate(StitchConfig(policy="random", share=1.0, run_length=2.0, discards=discards))
    found = [(gate.active, gate.step(0.5).emit) for _ in range(50)]
    assert found == [(SMALL, False)] * discards + [(LARGE, True)] * (50 - discards)
