import math

import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.guided_draw import draw_tokens


def test_by_hand():
    # Guided: 3 times the second less 2 times the first is ln of 1, 2, 3, 4.
    wanted = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).log()
    first = torch.tensor([0.3, -1.0, 0.2, 0.7], dtype=torch.float64)
    logits = torch.stack([first, (wanted + 2 * first) / 3])[:, None].expand(-1, 6, -1)
    uniform = torch.tensor([0.0, 0.09, 0.11, 0.31, 0.59, 0.61])
    token, chance = draw_tokens(logits, (-2.0, 3.0), uniform)
    assert token.tolist() == [0, 0, 1, 2, 2, 3]
    assert_close(chance, (token + 1).double() / 10)
    # Of the two likeliest, whose shares are 3 and 4 sevenths; their probability is still among all.
    token, chance = draw_tokens(logits, (-2.0, 3.0), torch.tensor([0.0, 0.2, 0.42, 0.43, 0.5, 0.99]), keep=2)
    assert token.tolist() == [2, 2, 2, 3, 3, 3]
    assert_close(chance, (token + 1).double() / 10)
    # At half the temperature masses are squares: 1, 4, 9, 16 of 30.
    token, _ = draw_tokens(logits, (-2.0, 3.0), torch.tensor([0.03, 0.04, 0.16, 0.17, 0.46, 0.47]), temperature=0.5)
    assert token.tolist() == [0, 1, 1, 2, 2, 3]
    token, chance = draw_tokens(logits, (-2.0, 3.0), uniform, temperature=0.0, keep=1)
    assert token.tolist() == [3] * 6
    assert_close(chance, torch.full((6,), 0.4, dtype=torch.float64))


def test_ties_and_what_cannot_come():
    row = torch.tensor([1.0, 5.0, -torch.inf, 5.0, 2.0])
    logits = row.expand(1, 4, -1)
    token, chance = draw_tokens(logits, (1.0,), torch.tensor([0.0, 0.49, 0.51, 1 - 2**-24]), keep=1)
    # Both that tie for the last place may come.
    assert token.tolist() == [1, 1, 3, 3]
    assert_close(chance, row.softmax(-1)[token])
    assert draw_tokens(logits, (1.0,), torch.zeros(4), temperature=0.0)[0].tolist() == [1] * 4
    alone = torch.full((1, 2, 3), -torch.inf)
    alone[..., 1] = 2.0
    token, chance = draw_tokens(alone, (1.0,), torch.tensor([0.0, 0.999]))
    assert token.tolist() == [1, 1]
    assert chance.tolist() == [1.0, 1.0]


def test_draws_follow_the_softmax_of_the_kept():
    count = 20000
    logits = torch.randn(3, 1, 7, generator=torch.Generator().manual_seed(0)).expand(-1, count, -1)
    weights = (0.5, -1.0, 1.5)
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(1))
    token, _ = draw_tokens(logits, weights, uniform, keep=4, temperature=1.3)
    guided = (logits[:, 0] * torch.tensor(weights)[:, None]).sum(0)
    kept = guided.masked_fill(guided < guided.topk(4).values[-1], -math.inf)
    shares = (kept / 1.3).softmax(-1)
    found = torch.bincount(token, minlength=7) / count
    assert found[shares == 0].sum() == 0
    expected = shares[shares > 0]
    chi = count * ((found[shares > 0] - expected) ** 2 / expected).sum()
    assert float(chi) < 16.3  # a thousandth of all draws with three degrees of freedom go beyond


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_opcheck():
    torch.library.opcheck(
        torch.ops.hone_kernels.draw_tokens.default,
        (torch.randn(2, 3, 12), [0.5, 0.5], torch.rand(3), 5, 1.0, "reference"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 7)}, r"logits must be \[S, N, V\]"),
        ({"logits": torch.zeros(4, 3, 7)}, "one to three settings"),
        ({"weights": (1.0, 2.0)}, "weights must be 1"),
        ({"uniform": torch.zeros(2)}, r"uniform must be float32 \[3\] on cpu; got torch.float32 \[2\]"),
        ({"uniform": torch.zeros(3, dtype=torch.float64)}, "got torch.float64"),
        ({"keep": 0}, "keep must be 1 to 7"),
        ({"keep": 8}, "keep must be 1 to 7"),
        ({"temperature": -1.0}, "temperature not negative"),
        ({"backend": "triton"}, "needs a CUDA device"),
        ({"logits": torch.zeros(1, 3, 5000), "backend": "triton"}, "takes 4096 tokens at most; got 5000"),
    ],
)
def test_bad_arguments(change, message):
    call = {"logits": torch.zeros(1, 3, 7), "weights": (1.0,), "uniform": torch.zeros(3)} | change
    with pytest.raises(ValueError, match=message):
        draw_tokens(call.pop("logits"), call.pop("weights"), call.pop("uniform"), **call)
