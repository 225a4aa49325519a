"""Metrics of dance.

Source: the evaluation code of Bailando (AIST++ protocol).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["beat_alignment", "motion_beats", "resampled"]

FPS = 60
"""Frames a second that the metrics are defined at."""


def resampled(joints: ArrayLike, fps: float, to: float = FPS) -> NDArray[np.floating]:
    """Joints ``[frames, joints, 3]`` at another frame rate, straight between frames."""
    data = np.asarray(joints, dtype=np.float64)
    last = (len(data) - 1) / fps
    at = np.arange(round(last * to) + 1) * fps / to
    low = np.minimum(at.astype(int), len(data) - 2)
    part = (at - low)[:, None, None]
    return data[low] * (1 - part) + data[low + 1] * part


def motion_beats(joints: ArrayLike) -> NDArray[np.integer]:
    """Frames at which the smoothed mean speed of the joints is least around them."""
    data = np.asarray(joints, dtype=np.float64)
    speed = np.linalg.norm(np.diff(data, axis=0), axis=2).mean(1)
    # A Gaussian of 5 frames, cut off at four deviations; the signal is mirrored at its ends, as SciPy does.
    at = np.arange(-20, 21)
    weights = np.exp(-0.5 * (at / 5.0) ** 2)
    smooth = np.convolve(np.pad(speed, 20, mode="symmetric"), weights / weights.sum(), mode="valid")
    return np.nonzero((smooth[1:-1] < smooth[:-2]) & (smooth[1:-1] < smooth[2:]))[0] + 1


def beat_alignment(joints: ArrayLike, music_beats: ArrayLike) -> float:
    """BAS: how near a motion's beats lie to each beat of the music, the mean over the music's.

    Args:
        joints: ``[frames, joints, 3]`` at 60 frames a second.
        music_beats: Frames of the music's beats.

    Returns:
        In [0, 1]; 0 where the motion has no beat.

    Raises:
        ValueError: The music has no beat.
    """
    beats = np.asarray(music_beats, dtype=np.float64)
    if not len(beats):
        raise ValueError("the music has no beat to align with")
    found = motion_beats(joints)
    if not len(found):
        return 0.0
    nearest = np.abs(found[None] - beats[:, None]).min(1)
    return float(np.exp(-(nearest**2) / 2 / 9).mean())
