import numpy as np
import pytest
from hone_motion_anything.dance import (
    beat_alignment,
    dance_scores,
    foot_contact_score,
    geometric_features,
    kinetic_features,
    motion_beats,
    resampled,
)
from hone_motion_anything.skeletons import HUMANML3D, SMPL_OFFSETS


def dancing(frames=90):
    """A body whose joints swing widely, so that every relation holds now and then."""
    rng = np.random.default_rng(3)
    places = np.zeros((24, 3))
    for joint, parent in enumerate((*HUMANML3D.parents, 20, 21)):
        if joint:
            places[joint] = places[parent] + SMPL_OFFSETS[joint]
    t = np.arange(frames)[:, None, None] / 60
    phase, speed, size = rng.random((3, 24, 3))
    swing = (0.05 + 0.4 * size) * np.sin(2 * np.pi * (t * (0.5 + 2 * speed) + phase))
    joints = places + swing
    return joints - joints[:1, :1]


def loop_kinetic(joints):
    """Frame by frame, as the release does it, its misplaced bracket included."""
    dt, frames = 1 / 60, len(joints)
    found = []
    for joint in range(joints.shape[1]):
        p = joints[:, joint]
        sums = np.zeros(3)
        for i in range(1, frames):
            near = [j for j in range(i - 2, i + 3) if 1 <= j < frames]
            v = sum(p[j] - p[j - 1] for j in near) / (len(near) * dt)
            inner = [j for j in near if j + 1 < frames]
            a = sum(((p[j + 1] - p[j]) / dt - (p[j] - p[j - 1] / dt)) / dt for j in inner) / len(inner)
            sums += [v[0] ** 2 + v[2] ** 2, v[1] ** 2, np.linalg.norm(a)]
        found.extend(sums / (frames - 1))
    return np.array(found)


def test_kinetic_features_are_the_loops():
    joints = dancing(40)
    assert kinetic_features(joints) == pytest.approx(loop_kinetic(joints), rel=1e-9)


@pytest.mark.parity
def test_features_of_the_release(golden):
    joints = dancing()
    kinetic = kinetic_features(joints)
    for at, value in golden["dance"]["kinetic"].items():
        assert kinetic[int(at)] == pytest.approx(value, rel=1e-5, abs=1e-3)
    assert geometric_features(joints) == pytest.approx(golden["dance"]["geometric"], abs=1e-5)
    assert motion_beats(joints).tolist() == golden["dance"]["beats"]
    assert beat_alignment(joints, [10, 40, 77]) == pytest.approx(golden["dance"]["bas"], abs=1e-6)
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(30, 5)), rng.normal(size=(40, 5)) * 1.5 + 0.3
    assert dance_scores(first, second) == pytest.approx((golden["dance"]["fid"], golden["dance"]["distance"]), abs=1e-5)


def test_relations_known_by_hand():
    still = np.repeat(dancing(1), 10, 0)
    # The rest pose alone: arms and legs straight, nothing moves.
    places = np.zeros((24, 3))
    for joint, parent in enumerate((*HUMANML3D.parents, 20, 21)):
        if joint:
            places[joint] = places[parent] + SMPL_OFFSETS[joint]
    rest = np.repeat(places[None], 10, 0)
    found = geometric_features(rest)
    assert not found[[0, 1, 4, 5, 9, 10, 11, 12, 13, 21, 22, 31]].any()
    assert not found[[6, 7, 19, 20]].any()  # elbows and knees are stretched
    assert found[8] == 1  # hands are further apart than two and a half shoulders
    assert not found[[16, 17]].any()  # feet are on the floor
    assert found[[29, 30]].tolist() == [0, 0]
    bent = rest.copy()
    bent[:, 20] = bent[:, 18] + [0.0, 0.26, 0.0]  # the left forearm straight up
    assert geometric_features(bent)[7] == 1
    assert kinetic_features(still)[:2] == pytest.approx([0, 0])


def test_corrected_accelerations_do_not_depend_on_the_place():
    joints = dancing(30)
    away = joints + np.array([5.0, 0, 0])
    assert kinetic_features(away, corrected=True) == pytest.approx(kinetic_features(joints, corrected=True))
    assert np.abs(kinetic_features(away) - kinetic_features(joints)).max() > 1
    fall = np.zeros((20, 1, 3))
    fall[:, 0, 1] = -9.81 / 2 * (np.arange(20) / 60) ** 2
    assert kinetic_features(fall, corrected=True)[2] == pytest.approx(9.81)


def test_foot_contact():
    glide = np.zeros((40, 24, 3))
    t = np.arange(40) / 30
    glide[..., 0] = 0.5 * t[:, None] ** 2  # all of the body is accelerated, feet slide
    assert foot_contact_score(glide) > 1
    stand = glide.copy()
    stand[:, [7, 10]] = 0
    assert foot_contact_score(stand) == 0
    assert foot_contact_score(np.zeros((10, 24, 3))) == 0
    # By hand: constant acceleration is its own maximum, so the mean of the feet's squared steps.
    step = np.diff(0.5 * t**2)[1:]
    assert foot_contact_score(glide) == pytest.approx(10000 * (step**2).mean())
    # Who falls while the feet slide evenly is pushed by nothing.
    fall = np.zeros((40, 24, 3))
    fall[..., 0] = np.arange(40)[:, None] / 64
    fall[:, 0, 1] = -(np.arange(40) ** 2)
    assert foot_contact_score(fall) == 0


def test_bad_joints():
    with pytest.raises(ValueError, match=r"expected \[frames, 24, 3\]"):
        geometric_features(np.zeros((10, 22, 3)))
    bad = np.zeros((10, 24, 3))
    bad[6, 2, 1] = np.nan
    with pytest.raises(ValueError, match="frame 6 holds"):
        kinetic_features(bad)


def test_beats_of_a_pendulum():
    t = np.arange(240) / 60
    joints = np.zeros((240, 2, 3))
    joints[:, 0, 0] = np.cos(np.pi * (t + 0.002))  # it stands at each whole second
    found = motion_beats(joints)
    assert np.abs(found - [60, 120, 180]).max() <= 1
    assert beat_alignment(joints, [60, 120, 180]) > 0.9
    assert beat_alignment(joints, [90, 150]) == pytest.approx(0, abs=1e-6)
    assert beat_alignment(joints, [63]) == pytest.approx(np.exp(-(min(abs(found - 63)) ** 2) / 18))
    assert beat_alignment(np.zeros((50, 2, 3)), [10]) == 0
    with pytest.raises(ValueError, match="has no beat"):
        beat_alignment(joints, [])


def test_resampling_is_straight_between_frames():
    joints = np.arange(5.0)[:, None, None] * np.ones((1, 2, 3))
    found = resampled(joints, 20, 60)
    assert found.shape == (13, 2, 3)
    assert found[:, 0, 0] == pytest.approx(np.arange(13) / 3)
    # Never beyond the last frame.
    assert len(resampled(np.zeros((243, 2, 3)), 60, 20)) == 81
