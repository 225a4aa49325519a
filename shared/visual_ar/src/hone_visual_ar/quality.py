"""How far two sets of images lie apart, by features of them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["frechet"]


def frechet(first: Tensor, second: Tensor, *, ddof: int = 1) -> float:
    """Frechet distance of two sets of features ``[N, D]``, of normal distributions fitted to them.

    Args:
        first: One set.
        second: The other.
        ddof: A covariance is the sum over N less this.

    Raises:
        ValueError: A set has fewer than two.
    """
    a, b = (x.detach().cpu().double().numpy() for x in (first, second))
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs two images of each set; got {len(a)} and {len(b)}")
    cov_a, cov_b = np.cov(a, rowvar=False, ddof=ddof), np.cov(b, rowvar=False, ddof=ddof)
    # The trace of the root of a product of two covariances: the roots of its eigenvalues, which are not negative.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
