import json
import pickle
import sys

import numpy as np
import pytest
import torch
from hone_core.testing import assert_close
from hone_motion_anything.cli import main
from hone_motion_anything.exports import read_bvh, write_bvh, write_smpl
from hone_motion_anything.features import extract, recover
from hone_motion_anything.grammar import draw_scenes, perform
from hone_motion_anything.motion_files import Motion, read_motion, write_motion
from hone_motion_anything.skeletons import HUMANML3D, KIT


@pytest.fixture(scope="module")
def joints():
    return perform(draw_scenes(1, torch.Generator().manual_seed(0)))[0].double()


def save(path, joints):
    np.save(path, np.asarray(joints))
    return path


def test_formats_hold_the_same_motion(joints, tmp_path):
    source = save(tmp_path / "a.npy", joints)
    motion = read_motion(source, fps=20)
    for name in ("b.bvh", "b.npz", "b.npy"):
        back = read_motion(write_motion(motion, tmp_path / name), fps=20)
        assert (back.joints - joints).norm(dim=-1).max() < 1e-3, name
    path = write_motion(motion, tmp_path / "c.npy", features=True)
    assert_close(torch.from_numpy(np.load(path)), extract(joints).float())
    again = read_motion(path)
    assert again.fps == 20
    assert_close(again.joints, recover(torch.from_numpy(np.load(path)).double()))
    assert write_motion(Motion(joints[:3], 20, HUMANML3D), tmp_path / "d.mp4").stat().st_size > 1000


def test_other_frame_rates_are_resampled_for_features(joints, tmp_path):
    fast = torch.from_numpy(np.repeat(joints.numpy(), 3, 0))
    path = write_motion(Motion(fast, 60, HUMANML3D), tmp_path / "a.npy", features=True)
    found = np.load(path)
    assert found.shape == (80, 263)
    assert found == pytest.approx(extract(joints).numpy(), abs=1e-4)


def test_z_up_is_turned(joints, tmp_path):
    turned = torch.stack([joints[..., 0], -joints[..., 2], joints[..., 1]], -1)
    source = save(tmp_path / "z.npy", turned)
    assert_close(read_motion(source, fps=20, up="z").joints, joints)
    with pytest.raises(ValueError, match=r"z\.npy: bodies stand along z and not along y, as was said; pass --up z"):
        read_motion(source, fps=20)
    with pytest.raises(ValueError, match=r"y\.npy: bodies stand along y and not along z"):
        read_motion(save(tmp_path / "y.npy", joints), fps=20, up="z")


def test_what_is_said_may_differ_by_a_hundredth(joints, tmp_path):
    path = write_bvh(joints, tmp_path / "a.bvh")
    assert read_motion(path, fps=20.1).fps == pytest.approx(20)
    with pytest.raises(ValueError, match=r"has 20 frames a second and not 20\.3"):
        read_motion(path, fps=20.3)
    with pytest.raises(ValueError, match="must be positive; got inf"):
        read_motion(save(tmp_path / "a.npy", joints), fps=float("inf"))


def test_stance_and_length(joints, tmp_path):
    # Who leans by half a right angle still stands; who is a tenth as tall is no person.
    half = 0.5**0.5
    y, z = joints[..., 1], joints[..., 2]
    leaning = torch.stack([joints[..., 0], half * (y - z), half * (y + z)], -1)
    assert len(read_motion(save(tmp_path / "a.npy", leaning[:2]), fps=20).joints) == 2
    with pytest.raises(ValueError, match="no person is so"):
        read_motion(save(tmp_path / "b.npy", 0.1 * joints), fps=20)
    with pytest.raises(ValueError, match=r"c\.npy has 1 frame; expected two at least"):
        read_motion(save(tmp_path / "c.npy", joints[:1]), fps=20)
    features = extract(joints)
    features[5, 9] = torch.inf
    with pytest.raises(ValueError, match=r"d\.npy, row 5: a feature is not finite"):
        read_motion(save(tmp_path / "d.npy", features))
    with pytest.raises(ValueError, match=r"e\.txt: expected a file that ends in \.npy"):
        read_motion(save(tmp_path / "e.txt.npy", joints).rename(tmp_path / "e.txt"), fps=20)
    for name, message, options in (
        ("a.fbx", "expected a file that ends in .npy", {}),
        ("a.npz", "bones are stretched in .bvh, .gltf", {"bones": "stretched"}),
    ):
        with pytest.raises(ValueError, match=message):
            write_motion(Motion(joints, 20, HUMANML3D), tmp_path / name, **options)


def test_bounds_of_height_and_lean(tmp_path):
    # A stick from the feet to the head, so long and so far off the upright.
    def stick(height, degrees):
        joints = torch.zeros(2, 22, 3).double()
        angle = np.radians(degrees)
        joints[:, HUMANML3D.joints.index("head")] = height * torch.tensor([0.0, np.cos(angle), np.sin(angle)]).double()
        return save(tmp_path / "a.npy", joints)

    for height, degrees in ((0.31, 0), (2.9, 0), (1.7, 59), (0.4, 40)):
        read_motion(stick(height, degrees), fps=20)
    for height in (0.29, 3.1):
        with pytest.raises(ValueError, match="no person is so"):
            read_motion(stick(height, 0), fps=20)
    for height in (0.4, 2.9):
        with pytest.raises(ValueError, match="bodies stand along z and not along y"):
            read_motion(stick(height, 61), fps=20)
    # Objects in a file could run code as they are loaded.
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"b\.npy is no array of numbers: .*allow_pickle=False"):
        read_motion(tmp_path / "b.npy", fps=20)


def test_a_motion_of_aist(joints, tmp_path):
    with np.load(write_smpl(joints, tmp_path / "a.npz")) as data:
        held = {"smpl_poses": data["poses"], "smpl_scaling": np.array([93.0]), "smpl_trans": data["trans"] * 93}
    path = tmp_path / "gBR_sBM_cAll_d04_mBR0_ch01.pkl"
    path.write_bytes(pickle.dumps(held))
    motion = read_motion(path)
    assert motion.fps == 60
    assert (motion.joints - joints).norm(dim=-1).max() < 1e-3
    # The set's own files name NumPy's module as it was called before.
    path.write_bytes(pickle.dumps(held, protocol=3).replace(b"numpy._core", b"numpy.core"))
    assert torch.equal(read_motion(path).joints, motion.joints)
    path.write_bytes(pickle.dumps(held | {"smpl_trans": held["smpl_trans"][1:]}))
    with pytest.raises(ValueError, match=r"expected poses \[frames, 72\] and a way .* got \(81, 72\) and \(80, 3\)"):
        read_motion(path)
    path.write_bytes(pickle.dumps({"smpl_poses": print}))
    with pytest.raises(ValueError, match=r"is no motion of AIST\+\+: it asks for builtins\.print"):
        read_motion(path)


def bad_files(joints, folder):
    holed = joints.clone()
    holed[7, 3, 1] = torch.nan
    write_bvh(joints, folder / "cut.bvh")
    text = (folder / "cut.bvh").read_text()
    (folder / "cut.bvh").write_text(text[: len(text) * 2 // 3])
    save(folder / "a.npy", joints)
    save(folder / "nan.npy", holed)
    save(folder / "kit.npy", joints[:, :21])
    save(folder / "cm.npy", 100 * joints)
    save(folder / "flat.npy", joints.flatten(1))
    write_bvh(joints, folder / "a.bvh")
    (folder / "text.npy").write_text("no array")
    (folder / "empty.npy").write_bytes(b"")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "zip.npy").write_bytes(write_smpl(joints, folder / "a.npz").read_bytes())
    save(folder / "complex.npy", joints.numpy() + 1j)
    save(folder / "side.npy", joints[..., [1, 0, 2]])
    one = joints.clone()
    one[7, 15] = one[7, 12]
    save(folder / "one.npy", one)
    with np.load(folder / "a.npz") as data:
        np.savez(folder / "still.npz", **{**data, "mocap_framerate": 0.0})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("a.npy",), "does not say how fast it is"),
        (("nan.npy", "--fps", "20"), "nan.npy, frame 7: a joint is not finite"),
        (("kit.npy", "--fps", "20"), "which is another skeleton"),
        (("a.npy", "--fps", "20", "--skeleton", "kit"), "expected [frames, 21, 3] for KIT-ML"),
        (("cm.npy", "--fps", "20"), "no person is so"),
        (("flat.npy", "--fps", "20"), "got [81, 66]"),
        (("a.npy", "--fps", "20", "--up", "z"), "bodies stand along y"),
        (("a.bvh", "--fps", "30"), "has 20 frames a second and not 30"),
        (("cut.bvh",), "is cut short"),
        (("text.npy", "--fps", "20"), "is no array of numbers"),
        (("empty.npy", "--fps", "20"), "is no array of numbers"),
        (("empty.npz",), "is no NPZ"),
        (("zip.npy", "--fps", "20"), "it holds several arrays"),
        (("complex.npy", "--fps", "20"), "it holds complex128"),
        (("side.npy", "--fps", "20"), "bodies stand along x and not along y, as was said; turn it first"),
        (("still.npz",), "frames a second must be positive; got 0"),
        (("a.npy", "--fps", "-20"), "frames a second must be positive; got -20"),
        (("nowhere.npy",), "there is no"),
        (("one.npy", "--fps", "20", "--to", "npy", "--features"), "one.npy, frame 7: neck and head are in one place"),
        (("a.npy", "--to", "fbx"), "--to must be one of"),
        (("a.bvh", "--to", "bvh", "--features"), "features are written as .npy"),
        (("a.npy", "--model", "magic"), "no published model 'magic'"),
        (("a.npy", "--model", "momask-mask"), "cannot be read as a checkpoint"),
    ],
)
def test_bad_input_names_file_and_frame(argv, message, joints, tmp_path, monkeypatch, capsys):
    bad_files(joints, tmp_path)
    source, *rest = argv
    command = ["convert", "--source", str(tmp_path / source), *rest, "--out", str(tmp_path / "run"), "--quiet"]
    monkeypatch.setattr(sys, "argv", ["hone-motion-anything", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    assert out == ""
    assert message in err
    assert source in err or "--to" in message or "model" in message


def verb(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["hone-motion-anything", "convert", *map(str, argv), "--quiet"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_verb_writes_and_repeats(joints, tmp_path, monkeypatch, capsys):
    source = save(tmp_path / "a.npy", joints)
    command = ("--source", source, "--fps", 20, "--to", "npz", "--out", tmp_path / "run")
    printed = [verb(monkeypatch, capsys, *command) for _ in range(2)]
    assert printed[0] == printed[1]
    assert printed[0].splitlines() == [
        str(tmp_path / "run" / "artifacts" / "a.npz"),
        "81 frames, 20 frames a second",
        "npz: bones of one length, joints 0.0 mm off on average, 0.0 mm at most",
    ]
    assert (tmp_path / "run" / "artifacts" / "a.npz").is_file()
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    distances = {"distance of joints, mean", "distance of joints, greatest"}
    assert {row["metric"] for row in rows} == {"frames", "frames a second"} | distances


def test_the_verb_says_how_far_joints_are_off(joints, tmp_path, monkeypatch, capsys):
    motion = joints + 0.02 * torch.randn(joints.shape, generator=torch.Generator().manual_seed(0)).double()
    source = save(tmp_path / "a.npy", motion)
    base = ("--source", source, "--fps", 20, "--to", "bvh", "--out")
    said = verb(monkeypatch, capsys, *base, tmp_path / "fixed").splitlines()[-1]
    off = 1000 * (read_bvh(tmp_path / "fixed" / "artifacts" / "a.bvh")[0] - motion).norm(dim=-1)
    rows = json.loads((tmp_path / "fixed" / "results.json").read_text())["rows"]
    found = [row["value"] for row in rows if row["unit"] == "mm"]
    assert found == pytest.approx([off.mean().item(), off.max().item()], abs=1e-3)
    assert said == (
        f"bvh: bones of one length, joints {off.mean():.1f} mm off on average, {off.max():.1f} mm at most; "
        "in bvh and gltf --bones stretched puts them where they are"
    )
    out = verb(monkeypatch, capsys, *base, tmp_path / "free", "--bones", "stretched")
    assert out.splitlines()[1:] == ["81 frames, 20 frames a second"]
    assert (read_bvh(tmp_path / "free" / "artifacts" / "a.bvh")[0] - motion).norm(dim=-1).max() < 1e-6


def test_features_of_kit(tmp_path):
    # Hips and shoulders of one width would cancel in the release's heading.
    offsets = torch.tensor(KIT.directions).double() * torch.linspace(0.1, 0.3, 21)[:, None]
    places = torch.zeros(4, 21, 3).double()
    for joint in range(1, 21):
        places[:, joint] = places[:, KIT.parents[joint]] + offsets[joint]
    path = write_motion(Motion(places, 12.5, KIT), tmp_path / "k.npy", features=True)
    assert np.load(path).shape == (3, 251)
    assert read_motion(path, KIT).joints.shape == (3, 21, 3)
