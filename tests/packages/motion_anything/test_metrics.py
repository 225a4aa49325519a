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


def test_frechet_of_correlated_gaussians_is_the_trace_formula():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(ca @ cb).real).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * roots
    assert frechet(a, b) == pytest.approx(wanted)


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
    with pytest.raises(ValueError, match="at least a pool of 32"):
        r_precision(text[:20], motion[:20])


def test_diversity_and_multimodality():
    vectors = np.arange(400.0)[:, None] * np.ones((1, 4))
    # Two independent draws of 300 of 400 numbers: a mean distance near a third of the range, in four dimensions.
    assert diversity(vectors, np.random.default_rng(0)) == pytest.approx(2 * 400 / 3, rel=0.1)
    assert multimodality(np.zeros((3, 12, 4)), np.random.default_rng(0)) == 0
    with pytest.raises(ValueError, match="over 300 pairs needs more motions; got 300"):
        diversity(vectors[:300], np.random.default_rng(0))
    with pytest.raises(ValueError, match="more than 10"):
        multimodality(np.zeros((3, 10, 4)), np.random.default_rng(0))


def test_intervals_of_repetitions():
    mean, half = repeated([1.0, 3.0, 1.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(1.96 / 2))
