import pytest
from hone_knockout.flops import DecoderShape, prefill_flops

QWEN2_7B = DecoderShape(layers=28, width=3584, intermediate=18944, heads=28, heads_k=4, head_dim=128)


def count(frames, **settings):
    settings = {"prefix": 0, "tokens_per_frame": 196, "suffix": 61} | settings
    return prefill_flops(QWEN2_7B, frames=frames, **settings)


@pytest.mark.parametrize(
    ("frames", "share", "exit_total", "both_total", "both_attention"),
    [(8, 2.4, 65.6, 65.0, 41.1), (32, 8.9, 64.6, 62.2, 37.1), (64, 16.2, 64.4, 59.9, 36.4)],
)
def test_bounds_of_the_paper_recipe(frames, share, exit_total, both_total, both_attention):
    base, exit, both = count(frames), count(frames, exit=18), count(frames, exit=18, window=8)
    assert 100 * base.attention / base.total == pytest.approx(share, abs=0.06)
    assert 100 * exit.total / base.total == pytest.approx(exit_total, abs=0.06)
    assert 100 * both.total / base.total == pytest.approx(both_total, abs=0.06)
    assert 100 * both.attention / base.attention == pytest.approx(both_attention, abs=0.1)


def test_published_convention():
    settings = {"convention": "square", "suffix": 0}
    base = count(32, **settings).attention
    assert count(32, exit=18, **settings).attention / base == pytest.approx(18 / 28)
    assert count(32, exit=18, window=8, **settings).attention / base == pytest.approx(0.375)


def test_pairs_against_a_sum_over_layers():
    shape = DecoderShape(layers=5, width=8, intermediate=12, heads=2, heads_k=1, head_dim=4)
    got = prefill_flops(shape, prefix=3, frames=4, tokens_per_frame=5, suffix=2, exit=3, window=1)

    def triangle(n):
        return sum(range(1, n + 1))

    local = triangle(3) + 4 * (5 * 3 + triangle(5)) + sum(3 + 20 + i for i in (1, 2))
    pairs = local + 2 * triangle(25) + 2 * triangle(5)
    assert got.attention == pairs * 4 * 8
    # q, k, v, o and three MLP matrices, two operations a weight.
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
    assert got.linear == (3 * 25 + 2 * 5) * 2 * weights
