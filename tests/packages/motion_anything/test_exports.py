import math

import numpy as np
import pytest
import torch
from hone_core.testing import assert_close
from hone_motion_anything.data import generated
from hone_motion_anything.exports import read_bvh, read_smpl, rest_offsets, write_bvh, write_smpl
from hone_motion_anything.grammar import draw_scenes, perform
from hone_motion_anything.rotations import axis_angle_to_quat, kabsch, matrix_to_axis_angle, to_matrix
from hone_motion_anything.skeletons import HUMANML3D, KIT


@pytest.fixture(scope="module")
def joints():
    return perform(draw_scenes(3, torch.Generator().manual_seed(2))).double()


def test_bvh_round_trip_is_under_a_tenth_of_a_millimetre(joints, tmp_path):
    for index, motion in enumerate(joints):
        path = write_bvh(motion, tmp_path / f"{index}.bvh")
        back, fps, names = read_bvh(path)
        assert (back - motion).norm(dim=-1).max() < 1e-4
        assert fps == pytest.approx(20)
        assert names == HUMANML3D.joints


def test_bvh_of_other_skeletons(tmp_path):
    offsets = torch.tensor(KIT.directions).double() * 0.2
    places = torch.zeros(1, 21, 3).double()
    for joint in range(1, 21):
        places[:, joint] = places[:, KIT.parents[joint]] + offsets[joint]
    path = write_bvh(places.repeat(3, 1, 1), tmp_path / "kit.bvh", KIT)
    back, fps, names = read_bvh(path, KIT)
    assert_close(back, places.repeat(3, 1, 1), atol=1e-6)
    assert fps == pytest.approx(12.5)
    with pytest.raises(ValueError, match=r"kit\.bvh is of another skeleton than HumanML3D"):
        read_bvh(path)
    assert read_bvh(path, None)[2] == tuple(KIT.joints[j] for j in KIT.order)
    assert names == KIT.joints


def test_smpl_round_trip(joints, tmp_path):
    path = write_smpl(joints[0], tmp_path / "a.npz", fps=20.0)
    back, fps = read_smpl(path)
    assert (back - joints[0]).norm(dim=-1).max() < 1e-4
    assert fps == 20.0
    with np.load(path) as data:
        assert data["poses"].shape == (81, 72)
        assert not data["poses"][:, 66:].any()
        assert data["trans"].shape == (81, 3)
    # The grammar's body has SMPL's mean bones.
    assert_close(rest_offsets(joints[0]), torch.from_numpy(np.load(path)["offsets"]))


def test_generated_features_come_through_a_bvh(tmp_path):
    from hone_motion_anything.features import recover

    motion = recover(generated(1, 0, dance=True).features)[0].double()
    back, _, _ = read_bvh(write_bvh(motion, tmp_path / "a.bvh"))
    assert (back - motion).norm(dim=-1).max() < 1e-3


def change_row(text, frame, change):
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("Frame Time")) + 1 + frame
    lines[at] = " ".join(change(lines[at].split()))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("OFFSET", "OFSET", 1), r"a\.bvh, line 4: expected OFFSET; got OFSET"),
        (lambda text: text.rsplit("\n", 3)[0], r"says 81 frames of 69 numbers and holds 79: frame 79 is cut short"),
        (lambda text: text.replace("Frames: 81", "Frames: x"), r"expected a number; got x"),
        (lambda text: text[:100], r"expected .*; got its end"),
        (lambda text: text.replace("Xrotation", "Wrotation", 1), "unknown channel Wrotation"),
        (
            lambda text: " ".join(text.split(" ")[:-1]) + " nan\n",
            r"line 215, frame 80: expected a finite number; got nan",
        ),
        (lambda text: change_row(text, 7, lambda row: row[:-1]), "frame 7 is cut short"),
        (lambda text: change_row(text, 7, lambda row: [*row, "1"]), "frame 7 is too much"),
        (lambda text: text + text.splitlines()[-1] + "\n", "holds 82: frame 81 is too much"),
        (lambda text: "HIERARCHY ROOT a { OFFSET 0 0 0 CHANNELS 0 } MOTION Frames: 2 Frame Time: 1", "has a channel"),
        (lambda text: "HIERARCHY ROOT a {" + 2000 * " OFFSET 0 0 0 CHANNELS 0 JOINT b {", "too deep"),
    ],
)
def test_a_damaged_bvh_is_refused_with_its_line(change, message, joints, tmp_path):
    path = write_bvh(joints[0], tmp_path / "a.bvh")
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        read_bvh(path)


def test_bad_npz(joints, tmp_path):
    path = write_smpl(joints[0], tmp_path / "a.npz")
    with np.load(path) as data:
        held = dict(data)
    held["poses"][5, 3] = math.nan
    np.savez(tmp_path / "b.npz", **held)
    with pytest.raises(ValueError, match=r"b\.npz, frame 5: a pose is not finite"):
        read_smpl(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", poses=held["poses"])
    with pytest.raises(ValueError, match=r"c\.npz has no trans, mocap_framerate"):
        read_smpl(tmp_path / "c.npz")
    (tmp_path / "d.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"d\.npz is no NPZ"):
        read_smpl(tmp_path / "d.npz")
    with pytest.raises(FileNotFoundError):
        read_smpl(tmp_path / "e.npz")
    held["poses"][5, 3] = 0
    for name, value, message in (
        ("poses", np.full((81, 72), "x"), "expected numbers; got <U1"),
        ("offsets", np.zeros((3, 3)), r"expected offsets \[22, 3\]"),
        ("mocap_framerate", np.ones(2), ".* one mocap_framerate"),
    ):
        np.savez(tmp_path / "f.npz", **held | {name: value})
        with pytest.raises(ValueError, match=rf"f\.npz: {message}"):
            read_smpl(tmp_path / "f.npz")


def test_rotation_vectors_and_the_fit_of_several_bones():
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(200, 3, generator=g).double()
    vectors = vectors / vectors.norm(dim=-1, keepdim=True) * math.pi * torch.rand(200, 1, generator=g).double()
    vectors[0] = 0
    vectors[1] = torch.tensor([math.pi, 0, 0])
    matrices = to_matrix(axis_angle_to_quat(vectors))
    assert_close(matrix_to_axis_angle(matrices)[2:], vectors[2:], atol=1e-7)
    assert_close(to_matrix(axis_angle_to_quat(matrix_to_axis_angle(matrices))), matrices, atol=1e-7)
    rest = torch.randn(200, 3, 3, generator=g).double()
    assert_close(kabsch(rest, (matrices[:, None] @ rest[..., None])[..., 0]), matrices, atol=1e-7)
