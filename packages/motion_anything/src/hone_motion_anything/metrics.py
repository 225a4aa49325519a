"""Metrics of text to motion: retrieval precision, Frechet distance, diversity, over repetitions with intervals.

Source: the evaluation code of T2M and MoMask, in closed forms; indices are drawn with a generator of the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["diversity", "frechet", "matching", "multimodality", "r_precision", "repeated"]


def frechet(first: ArrayLike, second: ArrayLike) -> float:
    """Frechet distance of two sets of vectors ``[N, D]``, as Gaussians.

    The trace of the root of the product is the sum of roots of its eigenvalues, which for two covariances are those
    of a symmetric product: it needs no matrix square root and no added diagonal.

    Raises:
        ValueError: A set has fewer than two vectors, or they are of different widths.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (first, second))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"expected two sets of at least two vectors of one width; got {a.shape} and {b.shape}")
    mean = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _pools(text: ArrayLike, motion: ArrayLike, pool: int) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    texts, motions = (np.asarray(x, dtype=np.float64) for x in (text, motion))
    if texts.shape != motions.shape or texts.ndim != 2 or len(texts) < pool:
        raise ValueError(
            f"expected as many text as motion vectors, at least a pool of {pool}; got {texts.shape} and {motions.shape}"
        )
    count = len(texts) // pool
    return (x[: count * pool].reshape(count, pool, -1) for x in (texts, motions))  # type: ignore[return-value]


def r_precision(text: ArrayLike, motion: ArrayLike, *, top: int = 3, pool: int = 32) -> NDArray[np.floating]:
    """Share of texts whose own motion is among the nearest 1 to ``top`` of its pool, by Euclidean distance.

    Pools are taken in the given order and the rest is left out, as the release's loader does. Ties count for the own
    motion only where it comes first.
    """
    texts, motions = _pools(text, motion, pool)
    distance = np.linalg.norm(texts[:, :, None] - motions[:, None], axis=-1)
    order = distance.argsort(axis=-1, kind="stable")
    rank = (order == np.arange(pool)[:, None]).argmax(-1)
    return np.array([(rank < k).mean() for k in range(1, top + 1)])


def matching(text: ArrayLike, motion: ArrayLike) -> float:
    """Mean distance of each text to its own motion (MM-Dist)."""
    return float(
        np.linalg.norm(np.asarray(text, dtype=np.float64) - np.asarray(motion, dtype=np.float64), axis=1).mean()
    )


def diversity(motion: ArrayLike, rng: np.random.Generator, *, pairs: int = 300) -> float:
    """Mean distance of pairs of motions: two draws of ``pairs``, each without repeats.

    Raises:
        ValueError: There are not more motions than pairs.
    """
    vectors = np.asarray(motion, dtype=np.float64)
    if len(vectors) <= pairs:
        raise ValueError(f"diversity over {pairs} pairs needs more motions; got {len(vectors)}")
    first, second = (rng.choice(len(vectors), pairs, replace=False) for _ in range(2))
    return float(np.linalg.norm(vectors[first] - vectors[second], axis=1).mean())


def multimodality(motion: ArrayLike, rng: np.random.Generator, *, pairs: int = 10) -> float:
    """Mean distance of pairs of motions of one text, ``[texts, motions, D]``.

    Raises:
        ValueError: There are not more motions of a text than pairs.
    """
    vectors = np.asarray(motion, dtype=np.float64)
    if vectors.ndim != 3 or vectors.shape[1] <= pairs:
        raise ValueError(f"expected [texts, motions, width] with more than {pairs} motions; got {list(vectors.shape)}")
    first, second = (rng.choice(vectors.shape[1], pairs, replace=False) for _ in range(2))
    return float(np.linalg.norm(vectors[:, first] - vectors[:, second], axis=2).mean())


def repeated(values: Sequence[float]) -> tuple[float, float]:
    """Mean over repetitions, and half of its 95 % interval: 1.96 deviations over the root of their number."""
    data = np.asarray(values, dtype=np.float64)
    return float(data.mean()), float(1.96 * data.std() / math.sqrt(len(data)))
