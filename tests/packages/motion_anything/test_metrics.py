import numpy as np
import pytest
from hone_motion_anything.metrics import diversity, frechet, matching, multimodality, r_precision, repeated


def test_frechet_of_gaussians_known_by_hand():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(500, 3))
    white = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    # Means 3 apart; deviations 1 and (2, 1, 0.5): 9 + 1 + 0 + 0.25.
    assert frechet(white, white * [2, 1, 0.5] + [3, 0, 0]) == pytest.approx(10.25)
    assert frechet(white, white) == pytest.approx(0, abs=1e-9)
    # Rank-deficient sets, which a matrix square root stumbles over.
    assert frechet(white[:3], white[3:6]) == pytest.approx(frechet(white[3:6], white[:3]))


def test_frechet_of_few_vectors_of_many_numbers_is_finite():
    few = np.random.default_rng(0).normal(size=(6, 40))
    assert frechet(few, few) == pytest.approx(0, abs=1e-5)
    assert frechet(few[:3], few[3:]) > 0


def test_frechet_of_correlated_gaussians_is_the_trace_formula():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(ca @ cb).real).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * roots
    assert frechet(a, b) == pytest.approx(wanted)


def test_frechet_of_single_numbers_and_of_what_is_no_set():
    # Variances 2 and 8 (N - 1), means 4 apart.
    assert frechet([[0.0], [2.0]], [[3.0], [7.0]]) == pytest.approx(16 + 2 + 8 - 2 * 4)
    for first, second in (((1, 3), (4, 3)), ((4, 3), (1, 3)), ((4, 3), (4, 2)), ((4,), (4, 3)), ((4, 3), (4,))):
        with pytest.raises(ValueError, match="two sets of at least two vectors of one width"):
            frechet(np.zeros(first), np.zeros(second))


def test_r_precision_and_matching_are_the_loops():
    rng = np.random.default_rng(0)
    text, motion = rng.normal(size=(70, 5)), rng.normal(size=(70, 5))
    motion[:40] = text[:40] + 0.3 * motion[:40]
    hits = np.zeros(3)
    for pool in range(2):
        rows = slice(32 * pool, 32 * pool + 32)
        for i in range(32):
            distance = [np.linalg.norm(text[rows][i] - motion[rows][j]) for j in range(32)]
            rank = sum(d < distance[i] for d in distance)
            hits += [rank < 1, rank < 2, rank < 3]
    assert r_precision(text, motion) == pytest.approx(hits / 64)
    assert matching(text, motion) == pytest.approx(
        np.mean([np.linalg.norm(a - b) for a, b in zip(text, motion, strict=True)])
    )
    assert r_precision(text[:32], text[:32]).tolist() == [1, 1, 1]
    # Of equal ones the own comes first in one of the pool only.
    assert r_precision(np.zeros((9, 2)), np.zeros((9, 2)), top=2, pool=4) == pytest.approx([1 / 4, 2 / 4])
    for first, second in ((text[:31], motion[:31]), (text, motion[:69]), (text[0], motion[0])):
        with pytest.raises(ValueError, match="at least a pool of 32"):
            r_precision(first, second)


def test_diversity_and_multimodality():
    vectors = np.arange(400.0)[:, None] * np.ones((1, 4))
    # Two independent draws of 300 of 400 numbers: a mean distance near a third of the range, in four dimensions.
    assert diversity(vectors, np.random.default_rng(0)) == pytest.approx(2 * 400 / 3, rel=0.1)
    # One vector of 301 is away: it is in a draw once at most, so that two pairs show it at most.
    away = np.eye(301)[:, :1]
    seen = [round(300 * diversity(away, np.random.default_rng(seed))) for seed in range(20)]
    assert max(seen) == 2
    # Pairs are the same for all texts.
    motions = np.random.default_rng(1).normal(size=(3, 12, 4))
    rng = np.random.default_rng(2)
    first, second = (rng.choice(12, 7, replace=False) for _ in range(2))
    distances = [np.linalg.norm(own[a] - own[b]) for own in motions for a, b in zip(first, second, strict=True)]
    assert multimodality(motions, np.random.default_rng(2), pairs=7) == pytest.approx(np.mean(distances))
    lone = np.eye(11)[None, :, :1]
    assert max(round(10 * multimodality(lone, np.random.default_rng(seed))) for seed in range(20)) == 2
    with pytest.raises(ValueError, match="over 300 pairs needs more motions; got 300"):
        diversity(vectors[:300], np.random.default_rng(0))
    with pytest.raises(ValueError, match="more than 10"):
        multimodality(np.zeros((3, 10, 4)), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"expected \[texts, motions, width\]"):
        multimodality(np.zeros((30, 40)), np.random.default_rng(0))


def test_intervals_of_repetitions():
    mean, half = repeated([1.0, 3.0, 1.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(1.96 / 2))
