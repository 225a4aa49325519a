"""The selection against maps that are written out, by hand and in float64."""

import math

import pytest
import torch
from hone_zipr1 import method


def brute_map(query, key, scaling=None):
    """Causal map with heads averaged, one pair at a time."""
    batch, heads, tokens, dim = query.shape
    groups = heads // key.shape[1]
    found = torch.zeros(batch, tokens, tokens, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(tokens):
                logits = torch.stack([query[b, h, i] @ key[b, h // groups, j] for j in range(i + 1)])
                weights = torch.exp(logits * (scaling or dim**-0.5))
                found[b, i, : i + 1] += weights / weights.sum() / heads
    return found


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, 9, 8, generator=generator, dtype=torch.float64)
    return query, key


def test_column_mass_is_the_maps_column_sum(states):
    found = method.column_mass(*states)
    expected = brute_map(*states).sum(1)
    torch.testing.assert_close(found.mass, expected)
    torch.testing.assert_close(found.rank, expected / torch.arange(9, 0, -1))
    torch.testing.assert_close(found.mass.sum(-1), torch.full((2,), 9.0, dtype=torch.float64))


def test_probe_rows_count_themselves_and_zipcache_all_rows(states):
    rows = torch.tensor([[2, 7, 8], [0, 8, -1]])
    found = method.column_mass(*states, rows=rows)
    maps = brute_map(*states)
    expected = torch.stack([maps[0, [2, 7, 8]].sum(0), maps[1, [0, 8]].sum(0)])
    torch.testing.assert_close(found.mass, expected)
    seen = torch.tensor([[3, 3, 3, 2, 2, 2, 2, 2, 1], [2, 1, 1, 1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(found.rank, expected / seen)
    other = method.column_mass(*states, rows=rows, normalizer="zipcache")
    torch.testing.assert_close(other.rank, expected / torch.arange(9, 0, -1))


def test_padding_has_no_mass_and_changes_nothing(states):
    query, key = states
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :3] = False
    found = method.column_mass(query, key, real=real)
    alone = method.column_mass(query[:1, :, 3:], key[:1, :, 3:])
    torch.testing.assert_close(found.mass[0, 3:], alone.mass[0])
    torch.testing.assert_close(found.rank[0, 3:], alone.rank[0])
    assert not found.mass[0, :3].any()


def test_chunks_of_rows_change_nothing(states, monkeypatch):
    whole = method.column_mass(*states)
    monkeypatch.setattr(method, "_ELEMENTS", 2 * 4 * 9 * 2)
    for one, other in zip(whole, method.column_mass(*states), strict=True):
        torch.testing.assert_close(one, other)


def test_column_mass_has_the_gradient_of_its_definition(states):
    query, key = (t[:1, :, :5].clone().requires_grad_() for t in states)
    assert torch.autograd.gradcheck(lambda q, k: method.column_mass(q, k).mass, (query, key))


def test_budget_by_hand():
    mass = torch.tensor([[4.0, 1.0, 3.0, 2.0], [4.0, 1.0, 3.0, 2.0], [0.0, 5.0, 3.0, 2.0]])
    real = torch.tensor([[True] * 4, [True] * 4, [False, True, True, True]])
    # Sums 4, 7, 9, 10 of 10; and 5, 8, 10 of 10.
    assert method.topp_budget(mass, 0.4, real).tolist() == [1, 1, 1]
    assert method.topp_budget(mass, 0.7, real).tolist() == [2, 2, 2]
    assert method.topp_budget(mass, 0.71, real).tolist() == [3, 3, 2]
    assert method.topp_budget(mass, torch.tensor([0.4, 0.95, 1.0]), real).tolist() == [1, 4, 3]


def test_p_of_one_keeps_tokens_without_mass():
    mass = torch.tensor([[1.0, 0.0, 0.0]])
    real = torch.ones(1, 3, dtype=torch.bool)
    assert method.topp_budget(mass, 1.0, real).tolist() == [3]
    assert method.topp_budget(mass, 0.999, real).tolist() == [1]


def test_budget_does_not_fall_as_p_rises():
    mass = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    real = torch.ones(3, 50, dtype=torch.bool)
    budgets = torch.stack([method.topp_budget(mass, p / 100, real) for p in range(1, 101)])
    assert (budgets.diff(dim=0) >= 0).all()
    assert (budgets[-1] == 50).all()


def test_select_takes_protected_first_and_never_padding():
    rank = torch.tensor([[9.0, 1.0, 8.0, 7.0, 2.0]])
    real = torch.tensor([[False, True, True, True, True]])
    protected = torch.tensor([[True, True, False, False, False]])
    kept = [method.select(rank, torch.tensor([b]), real, protected)[0].int().tolist() for b in (1, 2, 3, 4)]
    assert kept == [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert method.token_ratio(torch.tensor([kept[1]]).bool(), real).tolist() == [0.5]


def test_kept_mass_is_not_p_where_budget_and_choice_differ():
    mass, rank = torch.tensor([[5.0, 3.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    real, nothing = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)
    keep = method.select(rank, method.topp_budget(mass, 0.5, real), real, nothing)
    assert keep.tolist() == [[False, False, True]]
    torch.testing.assert_close(method.kept_mass(mass, keep), torch.tensor([0.2]))


@pytest.mark.parametrize(
    ("recent", "random", "count"), [(4, 3, 7), (0.05, 0.05, 10), (0.041, 0.021, 8), (64, 64, 100), (200, 0, 100)]
)
def test_probe_rows(recent, random, count):
    rows = method.probe_rows(100, recent, random, seed=1)
    assert len(rows) == count
    assert rows.unique().tolist() == rows.tolist()
    last = min(100, recent if recent >= 1 else math.ceil(recent * 100))
    assert rows[-last:].tolist() == list(range(100 - last, 100))
    assert torch.equal(rows, method.probe_rows(100, recent, random, seed=1))
    if 0 < random < 64:
        assert not torch.equal(rows, method.probe_rows(100, recent, random, seed=2))


# In the document: x (1 - ln x) = p has these roots; and for 64 tokens, exactly.
@pytest.mark.parametrize(
    ("tokens", "expected", "digits"),
    [(16384, (0.187, 0.439, 0.674, 0.785, 0.862), 3), (64, (0.2031, 0.4531, 0.6875, 0.7969, 0.875), 4)],
)
def test_uniform_ratio(tokens, expected, digits):
    found = tuple(round(method.uniform_ratio(p, tokens), digits) for p in (0.5, 0.8, 0.94, 0.975, 0.99))
    assert found == expected


def test_uniform_ratio_over_probe_rows_is_another():
    rows = method.probe_rows(4096, 64, 64)
    assert method.uniform_ratio(0.94, 4096, rows) == pytest.approx(0.88, abs=0.01)
    assert method.uniform_ratio(0.975, 4096, rows) == pytest.approx(0.94, abs=0.01)
    assert method.uniform_ratio(0.5, 100, None, 90) == 0.9


def test_uniform_attention_gives_the_uniform_ratio():
    query = key = torch.zeros(1, 2, 64, 4)
    real = torch.ones(1, 64, dtype=torch.bool)
    mass = method.column_mass(query, key).mass
    for p in (0.5, 0.94, 0.975):
        assert int(method.topp_budget(mass, p, real)) / 64 == method.uniform_ratio(p, 64)


@pytest.mark.parametrize("kind", ["entropy", "participation"])
def test_soft_ratio(kind):
    real = torch.tensor([[True, True, True, True, False]])
    even = torch.tensor([[2.0, 2.0, 2.0, 2.0, 7.0]])
    one = torch.tensor([[0.0, 3.0, 0.0, 0.0, 7.0]])
    assert float(method.soft_ratio(even, real, kind)) == pytest.approx(1)
    assert float(method.soft_ratio(one, real, kind)) == pytest.approx(0.25)
    mass = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: method.soft_ratio(m, real, kind), (mass,))


def test_padding_takes_no_part_whatever_its_mass():
    real = torch.tensor([[False, True, True, True]])
    mass = torch.tensor([[9.0, 4.0, 3.0, 3.0]])
    assert method.topp_budget(mass, 0.4, real).tolist() == [1]
    assert method.topp_budget(mass, 0.8, real).tolist() == [3]


def test_protected_tokens_stay_beyond_the_budget():
    rank, real = torch.tensor([[0.1, 0.9, 0.2, 0.8]]), torch.ones(1, 4, dtype=torch.bool)
    protected = torch.tensor([[True, False, True, False]])
    kept = [method.select(rank, torch.tensor([budget]), real, protected)[0].tolist() for budget in (1, 2, 3)]
    assert kept == [[True, False, True, False]] * 2 + [[True, True, True, False]]
