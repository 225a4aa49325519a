import math

import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.logits import read_logits


def test_by_hand():
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -torch.inf, -torch.inf], [-torch.inf, 5.0, -torch.inf, -torch.inf]],
        dtype=torch.float64,
    )
    got = read_logits(logits, threshold=torch.tensor([0.9, 0.1, -1.0]))
    three = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert_close(got.entropy, torch.tensor([1.0, three, 0.0], dtype=torch.float64))
    assert_close(got.confidence, torch.tensor([0.25, 0.75, 1.0], dtype=torch.float64))
    assert got.token.tolist() == [0, 0, 1]
    assert got.forced.tolist() == [False, False, True]
    # A token that had to come opens no gate, however low its threshold.
    assert got.uncertain.tolist() == [True, True, False]
    other = read_logits(logits, threshold=torch.tensor([0.25, 0.76, 2.0]), gate="confidence")
    assert other.uncertain.tolist() == [False, True, False]


def test_size_is_what_the_entropy_is_over():
    logits = torch.zeros(1, 5)
    logits[0, 4] = -torch.inf
    assert float(read_logits(logits, size=4).entropy) == 1.0
    assert_close(read_logits(logits).entropy, torch.tensor([math.log(4) / math.log(5)]))


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_brute_force(spread):
    logits = torch.randn(6, 301, dtype=torch.float64) * spread + 500
    logits[torch.rand(6, 301) < 0.2] = -torch.inf
    got = read_logits(logits)
    for row, entropy, confidence, token in zip(logits.tolist(), got.entropy, got.confidence, got.token, strict=True):
        top = max(row)
        weights = [math.exp(x - top) for x in row]
        shares = [weight / math.fsum(weights) for weight in weights]
        want = -math.fsum(share * math.log(share) for share in shares if share > 0) / math.log(301)
        assert abs(float(entropy) - want) < 1e-12
        assert abs(float(confidence) - max(shares)) < 1e-12
        assert int(token) == row.index(top)


def test_broken_logits_have_no_entropy():
    logits = torch.randn(3, 9)
    logits[0, 4], logits[1, 2] = torch.nan, torch.inf
    got = read_logits(logits)
    assert got.entropy.isnan().tolist() == got.confidence.isnan().tolist() == [True, True, False]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("threshold", [None, torch.full((2,), 0.5)])
def test_opcheck(threshold):
    torch.library.opcheck(
        torch.ops.hone_kernels.read_logits.default, (torch.randn(2, 12), 12, threshold, "entropy", "reference")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be \[B, V\]"),
        ({"logits": torch.zeros(0, 3)}, "not empty"),
        ({"size": 1}, "size must be at least 2"),
        ({"gate": "mass"}, "gate must be one of"),
        ({"threshold": torch.zeros(3)}, r"threshold must be float32 \[2\] on cpu; got torch.float32 \[3\] on cpu"),
        ({"threshold": torch.zeros(2, dtype=torch.float64)}, "got torch.float64"),
        ({"backend": "triton"}, "needs a CUDA device"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "got torch.int64"),
    ],
)
def test_bad_arguments(change, message):
    call = {"logits": torch.zeros(2, 7)} | change
    with pytest.raises(ValueError, match=message):
        read_logits(call.pop("logits"), **call)
