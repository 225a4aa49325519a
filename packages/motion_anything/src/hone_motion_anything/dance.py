"""Metrics of dance, over all frames and joints at once: kinetic and geometric features, beats, foot contacts.

Kept from the evaluation code of AIST++ and Bailando, since published numbers were made so: in the kinetic features a
frame's "velocity" before is a place less a velocity; in the geometric ones time runs at 120 frames a second, two
columns are the same, and a wrist that is named is not looked at.

Source: the evaluation code of Bailando (Siyao et al., CVPR 2022) and of EDGE (Tseng et al., CVPR 2023).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .metrics import frechet

__all__ = ["beat_alignment", "dance_scores", "foot_contact_score", "geometric_features", "kinetic_features"]
__all__ += ["motion_beats", "resampled"]

FPS = 60
"""Frames a second that the metrics are defined at."""
Array = NDArray[Any]


def resampled(joints: ArrayLike, fps: float, to: float = FPS) -> Array:
    """Joints ``[frames, joints, 3]`` at another frame rate, straight between frames."""
    data = np.asarray(joints, dtype=np.float64)
    last = (len(data) - 1) / fps
    at = np.arange(int(last * to + 1e-9) + 1) * fps / to
    low = np.minimum(at.astype(int), len(data) - 2)
    part = (at - low)[:, None, None]
    return data[low] * (1 - part) + data[low + 1] * part


def _checked(joints: ArrayLike, count: int | None = None) -> Array:
    data = np.asarray(joints, dtype=np.float64)
    if data.ndim != 3 or data.shape[2] != 3 or len(data) < 4 or (count is not None and data.shape[1] != count):
        raise ValueError(f"expected [frames, {count or 'joints'}, 3] of four frames or more; got {list(data.shape)}")
    if not np.isfinite(data).all():
        raise ValueError(
            f"frame {int(np.nonzero(~np.isfinite(data).all((1, 2)))[0][0])} holds a joint that is not finite"
        )
    return data


def _window_mean(values: Array, first: int, frames: int, radius: int = 2) -> Array:
    """Mean over the valid places of a window around each frame from 1.

    ``values[k]`` belongs to frame ``first + k``; frames whose window reaches beyond take what is there.
    """
    sums = np.concatenate([np.zeros((1, *values.shape[1:])), values.cumsum(0)])
    at = np.arange(1, frames)
    low = np.clip(at - radius - first, 0, len(values))
    high = np.clip(at + radius + 1 - first, 0, len(values))
    return (sums[high] - sums[low]) / (high - low).reshape(-1, *[1] * (values.ndim - 1))


def kinetic_features(joints: ArrayLike, *, corrected: bool = False) -> Array:
    """72 numbers for 24 joints: of each the mean squared horizontal and vertical speed, and the mean acceleration.

    Args:
        joints: ``[frames, joints, 3]`` in metres at 60 frames a second, +y up.
        corrected: Accelerations as they should be; a different metric, not comparable with published numbers.

    Raises:
        ValueError: There are fewer than four frames, or a joint is not finite; the message names the frame.
    """
    data = _checked(joints)
    steps = np.diff(data, axis=0)  # of frames 1 and up
    speed = _window_mean(steps, 1, len(data)) * FPS
    horizontal = (speed[..., 0] ** 2 + speed[..., 2] ** 2).mean(0)
    vertical = (speed[..., 1] ** 2).mean(0)
    if corrected:
        second = (steps[1:] - steps[:-1]) * FPS**2
    else:
        # (p_i - p_{i-1} / dt) in place of (p_i - p_{i-1}) / dt.
        second = (steps[1:] * FPS - (data[1:-1] - data[:-2] * FPS)) * FPS
    energy = np.linalg.norm(_window_mean(second, 1, len(data)), axis=-1).mean(0)
    return np.stack([horizontal, vertical, energy], -1).reshape(-1)


_L_SHOULDER = np.array([1.99113488e-01, 2.36807942e-01, -1.80702247e-02])
_L_ELBOW = np.array([4.54445392e-01, 2.21158922e-01, -4.10167128e-02])
_R_SHOULDER = np.array([-1.91692337e-01, 2.36928746e-01, -1.23055102e-02])
_L_HIP = np.array([5.64076714e-02, -3.23069185e-01, 1.09197125e-02])
_R_HIP = np.array([-6.24834076e-02, -3.31302464e-01, 1.50412619e-02])
_NAMES = (
    *("root", "lhip", "rhip", "belly", "lknee", "rknee", "spine", "lankle", "rankle", "chest", "ltoes", "rtoes"),
    *("neck", "linshoulder", "rinshoulder", "head", "lshoulder", "rshoulder", "lelbow", "relbow", "lwrist", "rwrist"),
    *("lhand", "rhand"),
)


def geometric_features(joints: ArrayLike) -> Array:
    """32 shares of frames in which a relation of the body holds.

    Args:
        joints: ``[frames, 24, 3]`` in metres, SMPL's order, +y up.

    Raises:
        ValueError: There are fewer than four frames, other joints, or one is not finite.
    """
    data = _checked(joints, 24)
    now, before = data[1:], data[:-1]
    arm = float(np.linalg.norm(_L_SHOULDER - _L_ELBOW))
    shoulders = float(np.linalg.norm(_L_SHOULDER - _R_SHOULDER))
    hips = float(np.linalg.norm(_L_HIP - _R_HIP))
    low = np.zeros_like(now[:, 0])
    low[:, 1] = now[..., 1].min(1)
    fixed = {"zero": np.zeros(3), "up": np.array([0.0, 1, 0]), "down": np.array([0.0, -1, 0]), "lowest": low}

    def at(name: str, frames: Array = now) -> Array:
        return np.broadcast_to(fixed[name], low.shape) if name in fixed else frames[:, _NAMES.index(name)]

    def along(vector: Array, direction: Array) -> Array:
        return (vector * direction).sum(-1) / np.linalg.norm(direction, axis=-1)

    def velocity(point: str, base: str) -> Array:
        return (at(point) - at(base) - at(point, before) + at(base, before)) * 120

    def plane(a: str, b: str, c: str) -> Array:
        return np.cross(at(c) - at(a), at(b) - at(a))

    def move(a: str, b: str, point: str, least: float) -> Array:
        return along(velocity(point, a), at(b) - at(a)) > least

    def across(a: str, b: str, c: str, point: str, least: float) -> Array:
        return along(velocity(point, a), plane(a, b, c)) > least

    def beyond(a: str, b: str, c: str, point: str, least: float) -> Array:
        return along(at(point) - at(a), plane(a, b, c)) > least

    def towards(a: str, b: str, base: str, point: str, least: float) -> Array:
        return along(at(point) - at(base), at(b) - at(a)) > least

    def angle(a: str, b: str, c: str, d: str, least: float, most: float) -> Array:
        first, second = at(b) - at(a), at(d) - at(c)
        cosine = (first * second).sum(-1) / (np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1))
        degrees = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        return (degrees > least) & (degrees < most)

    def fast(point: str, least: float) -> Array:
        return np.linalg.norm(at(point) - at(point, before), axis=-1) * 120 > least

    chest = move("belly", "chest", "chest", 1.8 * arm)
    columns = [
        across("neck", "rhip", "lhip", "rwrist", 1.8 * arm),
        across("neck", "lhip", "rhip", "lwrist", 1.8 * arm),
        towards("chest", "neck", "neck", "rwrist", 0.2 * arm),
        towards("chest", "neck", "neck", "lwrist", 0.2 * arm),
        chest,
        chest,
        angle("relbow", "rshoulder", "relbow", "rwrist", 0, 110),
        angle("lelbow", "lshoulder", "lelbow", "lwrist", 0, 110),
        towards("lshoulder", "rshoulder", "lwrist", "rwrist", 2.5 * shoulders),
        move("lwrist", "rwrist", "rwrist", 1.4 * arm),
        move("rwrist", "root", "lwrist", 1.4 * arm),
        move("lwrist", "root", "rwrist", 1.4 * arm),
        fast("rwrist", 2.5 * arm),
        fast("lwrist", 2.5 * arm),
        beyond("root", "lhip", "ltoes", "rankle", 0.38 * arm),
        beyond("root", "rhip", "rtoes", "lankle", 0.38 * arm),
        towards("zero", "up", "lowest", "rankle", 1.2 * arm),
        towards("zero", "up", "lowest", "lankle", 1.2 * arm),
        towards("lhip", "rhip", "lankle", "rankle", 2.1 * hips),
        angle("rknee", "rhip", "rknee", "rankle", 0, 110),
        angle("lknee", "lhip", "lknee", "lankle", 0, 110),
        fast("rankle", 2.5 * arm),
        fast("lankle", 2.5 * arm),
        angle("neck", "root", "rshoulder", "relbow", 25, 180),
        angle("neck", "root", "lshoulder", "lelbow", 25, 180),
        angle("neck", "root", "rhip", "rknee", 50, 180),
        angle("neck", "root", "lhip", "lknee", 50, 180),
        beyond("rankle", "neck", "lankle", "root", 0.5 * arm),
        angle("neck", "root", "zero", "up", 70, 110),
        towards("zero", "down", "lowest", "rwrist", -1.2 * arm),
        towards("zero", "down", "lowest", "lwrist", -1.2 * arm),
        fast("root", 2.3 * arm),
    ]
    return np.stack(columns, -1).mean(0)


def dance_scores(generated: ArrayLike, real: ArrayLike) -> tuple[float, float]:
    """Frechet distance of features to the real ones, and the mean distance between generated ones.

    Both sets are put on the real set's means and deviations.

    Args:
        generated: ``[N, D]`` kinetic or geometric features.
        real: ``[M, D]``.

    Raises:
        ValueError: A set has fewer than two rows, or the widths differ.
    """
    made, true = np.asarray(generated, dtype=np.float64), np.asarray(real, dtype=np.float64)
    mean, deviation = true.mean(0), true.std(0) + 1e-10
    made, true = (made - mean) / deviation, (true - mean) / deviation
    count = len(made)
    squares = (made**2).sum(1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * made @ made.T, 0))
    return frechet(made, true), float(distance[~np.eye(count, dtype=bool)].mean())


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


def foot_contact_score(joints: ArrayLike) -> float:
    """EDGE's PFC: the root may be accelerated only where a foot stands; times 10,000, lower is better.

    Args:
        joints: ``[frames, joints, 3]``, SMPL's order, +y up; published numbers are at 30 frames a second.

    Raises:
        ValueError: There are fewer than four frames, or a joint is not finite.
    """
    data = _checked(joints)
    root = data[:, 0]
    second = np.diff(np.diff(root, axis=0), axis=0)  # put on the largest below: no frame rate counts
    second[:, 1] = np.maximum(second[:, 1], 0)  # pushed upwards, or sideways
    force = np.linalg.norm(second, axis=-1)
    if not force.max():
        return 0.0
    # Steps of the feet are metres a frame, not a second.
    feet = np.linalg.norm(np.diff(data[1:][:, [7, 10, 8, 11]][..., [0, 2]], axis=0), axis=-1)
    left, right = feet[:, :2].min(1), feet[:, 2:].min(1)
    return float((force / force.max() * left * right).mean() * 10000)
