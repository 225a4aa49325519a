import math

import pytest
import torch
from hone_kernels.draw_codes import draw_codes


def logs(*shares):
    return torch.tensor(shares, dtype=torch.float64).log()


def one(*rows):
    return torch.stack(rows)[:, None]


def at(value):
    return torch.tensor([[value]], dtype=torch.float64)


WHOLE = at(1.0)


def test_running_sums_by_hand():
    # Shares .5, .25, .25: borders at .5 and .75.
    logits = one(logs(2, 1, 1))
    for uniform, want in ((0.0, 0), (0.49, 0), (0.5, 1), (0.74, 1), (0.75, 2), (0.999, 2)):
        assert int(draw_codes([logits], WHOLE, at(uniform))) == want


def test_heads_guidance_temperature_and_top_k_by_hand():
    uniform = at(0.5)
    right, below = one(logs(9, 1, 1)), one(logs(1, 1, 9))
    # The average of logs is that of a geometric mean: 3, 1, 3.
    half = torch.tensor([[0.5, 0.5]]).double()
    assert int(draw_codes([right, below], half, uniform)) == 1
    assert int(draw_codes([right, below], torch.tensor([[1.0, 0.0]]).double(), uniform)) == 0
    # u + 2 (c - u) of c = (2, 1, 1) and u = (1, 1, 4) is (4, 1, 1/4).
    rows = one(logs(2, 1, 1), logs(1, 1, 4))
    border = at(4 / 5.25 + 1e-9).double()
    assert int(draw_codes([rows], WHOLE, border, guidance=2.0)) == 1
    assert int(draw_codes([rows], WHOLE, border - 2e-9, guidance=2.0)) == 0
    # A temperature of 1/2 squares: 16, 1, 1.
    logits = one(logs(4, 1, 1))
    assert int(draw_codes([logits], WHOLE, at(16 / 18 - 1e-9).double(), temperature=0.5)) == 0
    assert int(draw_codes([logits], WHOLE, at(16 / 18 + 1e-9).double(), temperature=0.5)) == 1
    # Of 1, 5, 3, 5 two or three: ties with the last stay.
    logits = one(logs(1, 5, 3, 5))
    assert int(draw_codes([logits], WHOLE, at(0.0).double(), top_k=2)) == 1
    assert int(draw_codes([logits], WHOLE, at(0.49).double(), top_k=1)) == 1
    assert int(draw_codes([logits], WHOLE, at(0.51).double(), top_k=1)) == 3
    assert int(draw_codes([logits], WHOLE, at(5 / 13 + 1e-9).double(), top_k=3)) == 2


def test_draws_follow_the_distribution():
    shares = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.25])
    logits = shares.log().expand(1, 20_000, 5)
    uniform = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0))
    found = torch.bincount(draw_codes([logits], torch.ones(20_000, 1), uniform)[0], minlength=5) / 20_000
    assert found[2] == 0
    assert float((found - shares).abs().max()) < 4 * math.sqrt(0.25 / 20_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": []}, "1 to 3 heads; got 0"),
        ({"logits": [torch.zeros(2, 3)]}, r"logits must be \[R, n, V\]"),
        ({"logits": [torch.zeros(2, 3, 70_000)]}, "V at most 65536"),
        ({"logits": [torch.zeros(2, 3, 5), torch.zeros(2, 3, 4)]}, "all heads must have one shape"),
        ({"weight": torch.ones(3, 2)}, r"weight must be float32 \[3, 1\]"),
        ({"uniform": torch.zeros(1, 3)}, r"uniform must be float32 \[2, 3\]"),
        ({"guidance": 2.0}, r"uniform must be float32 \[1, 3\]"),
        ({"logits": [torch.zeros(3, 3, 5)], "guidance": 2.0}, "as many each; got 3"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_k": -1}, "top_k not negative"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"logits": [torch.zeros(2, 3, 5)], "weight": torch.ones(3, 1), "uniform": torch.zeros(2, 3)} | change
    with pytest.raises(ValueError, match=message):
        draw_codes(**given)
