import math

import numpy as np
import pytest
import torch
from hone_core.testing import assert_close
from hone_motion_anything.data import generated
from hone_motion_anything.exports import _euler, export_distance, fit_rig, read_bvh, read_smpl, write_bvh, write_smpl
from hone_motion_anything.gltf import write_gltf
from hone_motion_anything.grammar import draw_scenes, perform
from hone_motion_anything.rotations import axis_angle_to_quat, kabsch, matrix_to_axis_angle, to_matrix
from hone_motion_anything.skeletons import HUMANML3D, KIT, SMPL_OFFSETS, forward_kinematics
from hone_motion_anything.viewer import write_viewer


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


@pytest.fixture(scope="module")
def stretching(joints):
    """Joints that belong to no rigid skeleton."""
    return joints[0] + 0.02 * torch.randn(joints[0].shape, generator=torch.Generator().manual_seed(0)).double()


def test_several_motions_are_no_file(joints, tmp_path):
    for write in (write_bvh, write_smpl, write_gltf):
        with pytest.raises(ValueError, match=r"expected one motion, \[frames, 22, 3\]; got \[3, 81, 22, 3\]\. Pass"):
            write(joints, tmp_path / "a")
    with pytest.raises(ValueError, match="expected one motion"):
        write_viewer({"three": joints}, tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_stretched_bones_put_every_joint_where_it_is(joints, stretching, tmp_path):
    for motion in (joints[0], stretching):
        path = write_bvh(motion, tmp_path / "a.bvh", bones="stretched")
        assert path.read_text().count("CHANNELS 6 Xposition Yposition Zposition Zrotation Yrotation Xrotation") == 22
        assert (read_bvh(path)[0] - motion).norm(dim=-1).max() < 1e-6
    text = write_bvh(stretching, tmp_path / "a.bvh").read_text()
    assert (text.count("CHANNELS 6"), text.count("End Site")) == (1, 5)
    with pytest.raises(ValueError, match="bones must be one of fixed, stretched; got 'loose'"):
        write_bvh(stretching, tmp_path / "b.bvh", bones="loose")


@pytest.mark.parametrize("skeleton", [HUMANML3D, KIT], ids=lambda skeleton: skeleton.name)
def test_fixed_bones_keep_their_mean_length_and_say_how_far_joints_are_off(skeleton, stretching, tmp_path):
    motion = stretching[:, : skeleton.count]
    back = read_bvh(write_bvh(motion, tmp_path / "a.bvh", skeleton), skeleton)[0]
    found = export_distance(motion, skeleton)
    assert_close((back - motion).norm(dim=-1), found, atol=1e-6)
    assert found.max() > 0.02
    assert not found[:, 0].any()
    spans = [(x[:, 1:] - x[:, list(skeleton.parents[1:])]).norm(dim=-1) for x in (motion, back)]
    assert spans[0].std(0).min() > 5e-3
    assert spans[1].std(0).max() < 1e-6
    # Where several bones leave one joint they keep their angles too, which makes their mean a little shorter.
    alone = [joint - 1 for own in skeleton.children if len(own) == 1 for joint in own]
    assert_close(spans[1][0, alone], spans[0].mean(0)[alone], atol=1e-6)


def test_distances_of_an_npz_are_the_same(stretching, tmp_path):
    back, _ = read_smpl(write_smpl(stretching, tmp_path / "a.npz"))
    assert_close((back - stretching).norm(dim=-1), export_distance(stretching), atol=1e-6)


def test_a_rigid_motion_of_another_body_comes_back(tmp_path):
    # Bones of other lengths and at other angles to each other than SMPL's.
    g = torch.Generator().manual_seed(0)
    offsets = torch.tensor(SMPL_OFFSETS[:22]).double() + 0.03 * torch.randn(22, 3, generator=g).double()
    turns = axis_angle_to_quat(torch.randn(30, 22, 3, generator=g).double())
    motion = forward_kinematics(turns, torch.randn(30, 3, generator=g).double(), offsets, HUMANML3D.parents)
    for bones in ("fixed", "stretched"):
        assert (read_bvh(write_bvh(motion, tmp_path / "a.bvh", bones=bones))[0] - motion).norm(dim=-1).max() < 1e-6
    assert (read_smpl(write_smpl(motion, tmp_path / "a.npz"))[0] - motion).norm(dim=-1).max() < 1e-6
    assert export_distance(motion).max() < 1e-9


def test_a_bvh_by_hand_in_another_order_of_channels(tmp_path):
    path = tmp_path / "hand.bvh"
    path.write_text(
        """HIERARCHY
        ROOT a
        {
            OFFSET 1 2 3
            CHANNELS 3 Xrotation Yrotation Zrotation
            JOINT b
            {
                OFFSET 0 10 0
                CHANNELS 4 Yrotation Zposition Yposition Xposition
                JOINT c { OFFSET 0 0 10 CHANNELS 0 End Site { OFFSET 0 0 5 } }
            }
        }
        MOTION
        Frames: 2
        Frame Time: 0.04
        0 0 0 90 7 8 9
        90 0 90 0 0 20 0
        """
    )
    joints, fps, names = read_bvh(path, None)
    assert (fps, names) == (25, ("a", "b", "c"))
    # 90 degrees about y take +z to +x; about z, and then about x, they take +y to -x.
    wanted = [[[1, 2, 3], [10, 10, 10], [20, 10, 10]], [[1, 2, 3], [-19, 2, 3], [-19, -8, 3]]]
    assert_close(joints, torch.tensor(wanted).double() / 100, atol=1e-9)


def test_euler_angles_make_their_matrix_again_where_two_axes_are_one():
    g = torch.Generator().manual_seed(0)
    angles = (torch.rand(40, 3, generator=g).double() * 2 - 1) * math.pi
    angles[:20, 1] = math.pi / 2
    angles[10:20, 1] *= -1

    def made(vectors):
        turns = [to_matrix(axis_angle_to_quat(part * torch.eye(3).double()[axis])) for part, axis in vectors]
        return turns[0] @ turns[1] @ turns[2]

    def matrix(zyx):
        return made([(zyx[:, number, None], 2 - number) for number in range(3)])

    found = _euler(matrix(angles))
    assert_close(matrix(torch.deg2rad(found)), matrix(angles), atol=1e-6)
    assert not found[:20, 2].any()


def test_what_is_no_bvh(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*none\.bvh"):
        read_bvh(tmp_path / "none.bvh")
    path = tmp_path / "a.bvh"
    for content, message in (
        (b"\xff\xfe", "it is no text"),
        (b"", "line 1: expected HIERARCHY; got its end"),
        (b"HIERARCHY ROOT a { OFFSET 0 0 0 CHANNELS 0 } MOTION Frames: 0 Frame Time: 1", "says 0 frames of 1.0 s"),
        (b"HIERARCHY ROOT a { OFFSET 0 0 0 CHANNELS 0 } MOTION Frames: 2 Frame Time: 0", "says 2 frames of 0.0 s"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_bvh(path)


def test_bvh_of_other_skeletons(tmp_path):
    offsets = torch.tensor(KIT.directions).double() * 0.2
    places = torch.zeros(1, 21, 3).double()
    for joint in range(1, 21):
        places[:, joint] = places[:, KIT.parents[joint]] + offsets[joint]
    assert read_bvh(write_bvh(places.repeat(3, 1, 1), tmp_path / "fast.bvh", KIT, fps=30), KIT)[1] == pytest.approx(30)
    path = write_bvh(places.repeat(3, 1, 1), tmp_path / "kit.bvh", KIT)
    back, fps, names = read_bvh(path, KIT)
    assert_close(back, places.repeat(3, 1, 1), atol=1e-6)
    assert fps == pytest.approx(12.5)
    with pytest.raises(ValueError, match=r"kit\.bvh is of another skeleton than HumanML3D"):
        read_bvh(path)
    assert read_bvh(path, None)[2] == tuple(KIT.joints[j] for j in KIT.order)
    assert names == KIT.joints


def test_smpl_round_trip(joints, tmp_path):
    path = write_smpl(joints[0], tmp_path / "a.npz", fps=30.0)
    back, fps = read_smpl(path)
    assert (back - joints[0]).norm(dim=-1).max() < 1e-4
    assert fps == 30.0
    with np.load(path) as data:
        assert data["gender"] == "neutral"
        assert data["betas"].tolist() == [0] * 10
        wide = dict(data)
        assert data["poses"].shape == (81, 72)
        assert not data["poses"][:, 66:].any()
        assert data["trans"].shape == (81, 3)
    # The grammar's body has SMPL's mean bones; AMASS has hands in 156 columns and no bones.
    assert_close(fit_rig(joints[0]).offsets, torch.tensor(SMPL_OFFSETS[:22]).double(), atol=1e-6)
    del wide["offsets"]
    np.savez(tmp_path / "amass.npz", **wide | {"poses": np.pad(wide["poses"], ((0, 0), (0, 84)), constant_values=0.5)})
    assert (read_smpl(tmp_path / "amass.npz")[0] - joints[0]).norm(dim=-1).max() < 1e-4
    np.savez(tmp_path / "body.npz", **wide | {"poses": wide["poses"][:, :66]})
    assert (read_smpl(tmp_path / "body.npz")[0] - joints[0]).norm(dim=-1).max() < 1e-4


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
        ("poses", np.zeros((81, 65)), r"expected poses \[frames, 66 or more\]"),
        ("trans", np.zeros((80, 3)), r"expected .* trans \[frames, 3\]; got \(81, 72\), \(80, 3\)"),
    ):
        np.savez(tmp_path / "f.npz", **held | {name: value})
        with pytest.raises(ValueError, match=rf"f\.npz: {message}"):
            read_smpl(tmp_path / "f.npz")
    # Objects in a file could run code as they are loaded.
    np.savez(tmp_path / "h.npz", **held | {"gender": np.array(["neutral"], dtype=object)})
    with pytest.raises(ValueError, match=r"h\.npz is a damaged NPZ: .*allow_pickle=False"):
        read_smpl(tmp_path / "h.npz")
    held["trans"][9, 1] = math.inf
    np.savez(tmp_path / "g.npz", **held)
    with pytest.raises(ValueError, match=r"g\.npz, frame 9: a pose is not finite"):
        read_smpl(tmp_path / "g.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000] + bytes(100) + whole[1100:])
    with pytest.raises(ValueError, match=r"a\.npz is a damaged NPZ"):
        read_smpl(path)


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
