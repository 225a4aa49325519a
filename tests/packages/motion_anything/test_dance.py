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


def resting():
    """The rest pose of 24 joints: arms and legs straight."""
    places = np.zeros((24, 3))
    for joint, parent in enumerate((*HUMANML3D.parents, 20, 21)):
        if joint:
            places[joint] = places[parent] + SMPL_OFFSETS[joint]
    return places


def dancing(frames=90):
    """A body whose joints swing widely, so that every relation holds now and then."""
    rng = np.random.default_rng(3)
    places = resting()
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
    rest = np.repeat(resting()[None], 10, 0)  # nothing moves
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


ARM = 0.25686  # metres of the release's upper arm


@pytest.mark.parametrize(
    ("column", "joint", "arms"), [(12, 21, 2.5), (13, 20, 2.5), (21, 8, 2.5), (22, 7, 2.5), (31, 0, 2.3)]
)
def test_a_joint_is_fast_from_some_arms_a_second(column, joint, arms):
    for share in (0.98, 1.02):
        motion = np.repeat(resting()[None], 10, 0)
        # Time runs at 120 frames a second in the release.
        motion[:, joint] += np.arange(10)[:, None] * np.array([0.6, 0, 0.8]) * share * arms * ARM / 120
        found = geometric_features(motion)
        assert [number for number in (12, 13, 21, 22, 31) if found[number]] == ([column] if share > 1 else [])


def test_relations_that_hardly_change_in_a_dance():
    def still(joint, place):
        pose = resting()
        pose[joint] = place
        return geometric_features(np.repeat(pose[None], 4, 0))

    rest = resting()
    lowest = rest[:, 1].min()
    for column, wrist in ((29, 21), (30, 20)):  # a hand within 1.2 arms of the lowest joint
        for height, holds in ((1.18, 1), (1.22, 0)):
            assert still(wrist, [0.4, lowest + height * ARM, 0])[column] == holds
            assert still(41 - wrist, [0.4, lowest + height * ARM, 0])[column] == 0
    for degrees, holds in ((69, 0), (71, 1), (109, 1), (111, 0)):  # the trunk lies
        angle = np.radians(degrees)
        assert still(12, rest[0] - 0.5 * np.array([np.sin(angle), np.cos(angle), 0]))[28] == holds
    trunk = rest[0] - rest[12]
    side = np.cross(trunk, [0, 0, 1.0])
    trunk, side = trunk / np.linalg.norm(trunk), side / np.linalg.norm(side)
    for column, shoulder in ((23, 17), (24, 16)):  # an upper arm is off the trunk
        for degrees, holds in ((24, 0), (26, 1), (178, 1)):
            angle = np.radians(degrees)
            arm = np.cos(angle) * trunk + np.sin(angle) * side
            assert still(shoulder + 2, rest[shoulder] + 0.3 * arm)[column] == holds
    for column, hip, most in ((25, 2, 50), (26, 1, 50)):  # a thigh is lifted
        for degrees, holds in ((most - 1, 0), (most + 1, 1), (178, 1)):
            angle = np.radians(degrees)
            leg = np.cos(angle) * trunk + np.sin(angle) * side
            assert still(hip + 3, rest[hip] + 0.4 * leg)[column] == holds


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
    # One joint of one foot that stands is enough.
    for joint in (7, 8, 10, 11):
        stand = glide.copy()
        stand[:, joint] = 0
        assert foot_contact_score(stand) == 0


def test_foot_contact_is_the_loop():
    joints = dancing(20)
    force, slides = [], []
    for i in range(18):
        push = joints[i + 2, 0] - 2 * joints[i + 1, 0] + joints[i, 0]
        force.append(np.linalg.norm([push[0], max(push[1], 0), push[2]]))
        step = {j: np.linalg.norm((joints[i + 2, j] - joints[i + 1, j])[[0, 2]]) for j in (7, 8, 10, 11)}
        slides.append(min(step[7], step[10]) * min(step[8], step[11]))
    wanted = sum(f / max(force) * slide for f, slide in zip(force, slides, strict=True)) / 18 * 10000
    assert foot_contact_score(joints) == pytest.approx(wanted)


def test_bad_joints():
    with pytest.raises(ValueError, match=r"expected \[frames, 24, 3\]"):
        geometric_features(np.zeros((10, 22, 3)))
    bad = np.zeros((10, 24, 3))
    bad[6, 2, 1] = np.nan
    for metric in (kinetic_features, geometric_features, foot_contact_score):
        with pytest.raises(ValueError, match="frame 6 holds"):
            metric(bad)
        with pytest.raises(ValueError, match="of four frames or more; got"):
            metric(bad[:3])
        assert np.isfinite(metric(dancing(4))).all()
    with pytest.raises(ValueError, match=r"expected \[frames, joints, 3\]"):
        kinetic_features(np.zeros((10, 24, 2)))


def test_scores_of_equal_dances_and_of_one():
    real = np.random.default_rng(0).normal(size=(12, 3))
    real[:, 2] = 7  # a relation that never changes tells nothing
    fid, spread = dance_scores(np.repeat(real[:1] / 3 + [0, 0, 14 / 3], 5, 0), real)
    assert np.isfinite(fid)
    assert spread == pytest.approx(0, abs=1e-6)
    assert dance_scores(real, real) == pytest.approx((0, dance_scores(real[:, :2], real[:, :2])[1]), abs=1e-6)
    with pytest.raises(ValueError, match="at least two vectors"):
        dance_scores(real[:1], real)


def test_beats_are_the_loops_minima():
    speed = np.random.default_rng(17).random(240)
    joints = np.zeros((241, 3, 3))
    joints[1:, :, 1] = speed.cumsum()[:, None]
    weights = [np.exp(-((k / 5) ** 2) / 2) for k in range(-20, 21)]
    smooth = []
    for i in range(240):
        near = [k if k >= 0 else -1 - k for k in range(i - 20, i + 21)]  # the ends are mirrored, the last one twice
        near = [k if k < 240 else 479 - k for k in near]
        smooth.append(sum(w * speed[k] for w, k in zip(weights, near, strict=True)))
    wanted = [i for i in range(1, 239) if smooth[i] < smooth[i - 1] and smooth[i] < smooth[i + 1]]
    assert motion_beats(joints).tolist() == wanted
    assert (wanted[0], wanted[-1]) == (7, 224)  # near enough to the ends to feel the mirror


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
    assert resampled(joints**3, 20, 60)[[9, 10, -2, -1], 0, 0] == pytest.approx([27, 27 + 37 / 3, 64 - 37 / 3, 64])
    assert resampled(joints, 20).shape == (13, 2, 3)  # 60, if nothing is said
    # Never beyond the last frame.
    assert len(resampled(np.zeros((243, 2, 3)), 60, 20)) == 81
