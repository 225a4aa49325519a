import pytest
import torch
from hone_kernels.token_select import select_tokens


def one(*values):
    return torch.tensor([values], dtype=torch.float64)


def flags(*values):
    return torch.tensor([values], dtype=torch.bool)


def chosen(selected, row=0):
    assert selected.idx[row, int(selected.num[row]) :].sum() == 0
    found = selected.idx[row, : int(selected.num[row])].tolist()
    assert selected.keep[row].nonzero()[:, 0].tolist() == found
    return found


ALL, NONE = flags(1, 1, 1, 1), flags(0, 0, 0, 0)


@pytest.mark.parametrize(("p", "want"), [(0.3, [0]), (0.5, [0]), (0.51, [0, 2]), (0.9, [0, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_by_hand(p, want):
    # Shares .5, .05, .25, .2; the rank is of another order where it is asked to be.
    mass = one(10, 1, 5, 4)
    assert chosen(select_tokens(mass, mass=mass, p=torch.tensor([p]), real=ALL, protected=NONE)) == want
    turned = select_tokens(mass.flip(1), mass=mass, p=torch.tensor([p]), real=ALL, protected=NONE)
    assert chosen(turned) == sorted(3 - j for j in want)


def test_protected_padding_and_ties_by_hand():
    rank = one(3, 9, 1, 2)
    real, protected = flags(1, 1, 1, 0), flags(0, 0, 1, 1)
    two, eight = torch.tensor([2]), torch.tensor([8])
    assert chosen(select_tokens(rank, budget=two, real=real, protected=protected)) == [1, 2]
    assert chosen(select_tokens(rank, budget=eight, real=real, protected=protected)) == [0, 1, 2]
    assert chosen(select_tokens(rank, budget=torch.tensor([1]), real=ALL, protected=flags(1, 0, 1, 1))) == [0, 2, 3]
    assert chosen(select_tokens(one(5, 7, 5, 5), budget=two, real=ALL, protected=NONE)) == [0, 1]
    # What padding holds does not count in the total.
    got = select_tokens(rank, mass=one(5, 3, 2, 90), p=torch.tensor([0.75]), real=flags(1, 1, 1, 0), protected=NONE)
    assert chosen(got) == [0, 1]
    # Nothing holds any mass.
    zero = one(0, 0, 0, 0)
    assert chosen(select_tokens(zero, mass=zero, p=torch.tensor([0.9]), real=ALL, protected=NONE)) == [0]


def test_brute_force():
    batch, tokens = 20, 31
    mass, rank = (torch.rand(batch, tokens, dtype=torch.float64) ** 4 for _ in range(2))
    p = torch.rand(batch)
    real, protected = torch.rand(batch, tokens) < 0.8, torch.rand(batch, tokens) < 0.1
    got = select_tokens(rank, mass=mass, p=p, real=real, protected=protected)
    for b in range(batch):
        places = [j for j in range(tokens) if real[b, j]]
        left = sorted((float(mass[b, j]) for j in places), reverse=True)
        reached, budget = 0.0, 0
        while reached < (float(p[b]) - 1e-6) * sum(left):
            reached += left[budget]
            budget += 1
        kept = [j for j in places if protected[b, j]]
        others = sorted((j for j in places if not protected[b, j]), key=lambda j: -float(rank[b, j]))
        kept += others[: max(0, budget - len(kept))]
        assert chosen(got, b) == sorted(kept)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_opcheck():
    rank, real = torch.rand(2, 6), torch.ones(2, 6, dtype=torch.bool)
    for budget in ((rank, torch.tensor([0.5, 1.0]), None), (None, None, torch.tensor([1, 3]))):
        torch.library.opcheck(torch.ops.hone_kernels.select_tokens.default, (rank, *budget, real, ~real, "reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": torch.zeros(3)}, r"rank must be \[B, T\]"),
        ({"budget": torch.ones(2, dtype=torch.int32)}, "from mass and p together, or from budget alone"),
        ({"p": None}, "from mass and p together, or from budget alone"),
        ({"p": torch.ones(3)}, r"p must be \[2\]"),
        ({"mass": torch.zeros(2, 4).double()}, r"mass must be float32 \[2, 4\]"),
        ({"real": torch.ones(2, 4)}, r"real must be bool \[2, 4\]"),
        ({"mass": None, "p": None, "budget": torch.ones(2)}, r"budget must be int64 \[2\]"),
        ({"backend": "triton"}, "needs a CUDA device"),
    ],
)
def test_bad_arguments(change, message):
    real = torch.ones(2, 4, dtype=torch.bool)
    call = {"rank": torch.zeros(2, 4), "mass": torch.zeros(2, 4), "p": torch.ones(2), "real": real, "protected": real}
    call |= change
    with pytest.raises(ValueError, match=message):
        select_tokens(call.pop("rank"), **call)
