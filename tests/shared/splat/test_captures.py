import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hone_splat.cameras import intrinsics_px, pixel_centres, rays
from hone_splat.captures import fit_range, load_views, overlap, read_colmap, read_points, read_transforms
from hone_splat.rooms import Rooms
from PIL import Image

spec = importlib.util.spec_from_file_location("capturefiles", Path(__file__).with_name("capturefiles.py"))
capturefiles = importlib.util.module_from_spec(spec)
spec.loader.exec_module(capturefiles)


@pytest.mark.parametrize("kind", ["bin", "txt", "transforms"])
def test_all_three_formats_give_the_cameras_that_were_written(kind, tmp_path):
    _, poses, inner, points = capturefiles.room()
    if kind == "transforms":
        capture = read_transforms(capturefiles.write_transforms(tmp_path))
    else:
        capture = read_colmap(capturefiles.write_colmap(tmp_path, binary=kind == "bin"))
    assert [path.name for path in capture.images] == [f"{index:03d}.png" for index in range(6)]
    assert torch.allclose(capture.cam_to_world, poses, atol=1e-5)
    assert torch.allclose(intrinsics_px(capture.intrinsics_norm, 48, 64)[0], inner, atol=1e-9)
    assert torch.allclose(capture.points, points, atol=1e-5)


def test_pictures_and_cameras_stay_together_through_scaling_and_cutting(tmp_path):
    capture = read_colmap(capturefiles.write_colmap(tmp_path, binary=True, height=96, width=128))
    scene = fit_range(capture, 1.0, 100.0)
    views = load_views(capture, (32, 32), scene)
    views.check()
    assert views.image_01.shape == (1, 6, 3, 32, 32)
    # The same rays through the room give the same colours, but for the blur of scaling down.
    rooms = Rooms.draw([3])
    poses = capture.cam_to_world.float()
    room = Rooms(*(getattr(rooms, n) for n in list(rooms.__dataclass_fields__)[:-1]), views.intrinsics_norm[:, 0])
    direct, _ = room.see(poses[None], (32, 32))
    assert (direct - views.image_01).abs().mean() < 0.03
    assert torch.allclose(views.cam_to_world[0, :, :3, 3], poses[:, :3, 3] * scene.scale, rtol=1e-5)


def test_a_principal_point_off_the_centre_is_read_and_cut_along(tmp_path):
    def move(data):
        data["cx"], data["cy"] = 24.0, 30.0

    capture = read_transforms(capturefiles.write_transforms(tmp_path / "off", change=move))
    assert capture.intrinsics_norm[0, :2, 2].tolist() == pytest.approx([24 / 64, 30 / 48])
    scene = fit_range(capture, 1.0, 100.0)
    # 48 x 64, without scaling: 16 columns are cut off at each side, or 12 rows above and below.
    tall, wide = (
        load_views(capture, size, scene).intrinsics_norm[0, 0, :2, 2].tolist() for size in ((48, 32), (24, 64))
    )
    assert tall == pytest.approx([(24 - 16) / 32, 30 / 48])
    assert wide == pytest.approx([24 / 64, (30 - 12) / 24])


def test_depths_go_where_the_host_knows_them(tmp_path):
    capture = read_colmap(capturefiles.write_colmap(tmp_path, binary=False))
    scene = fit_range(capture, 1.0, 100.0)
    local = (
        torch.linalg.inv(capture.cam_to_world)
        @ torch.cat([capture.points, torch.ones(len(capture.points), 1).double()], -1).mT
    )
    inside = []
    for inner, points in zip(capture.intrinsics_norm, local, strict=True):
        place = inner @ points[:3]
        x, y = place[0] / place[2], place[1] / place[2]
        inside.append(points[2][(points[2] > 0) & (x > 0) & (x < 1) & (y > 0) & (y < 1)])
    seen = torch.cat(inside).sort().values
    assert scene.depths[0] == pytest.approx(float(seen[round(0.05 * (len(seen) - 1))]), rel=0.02)
    assert scene.scale * scene.depths[0] == pytest.approx(1.5)
    assert (scene.near, scene.far) == (1.0, pytest.approx(1.5 * scene.scale * scene.depths[2]))
    assert fit_range(capture, 1.0, 2.0).far == 2.0
    assert fit_range(capture, 1.0, 100.0, bounds=(3.0, 30.0)).scale == pytest.approx(0.5)


def test_points_in_letters_are_read_in_the_order_that_the_header_says(tmp_path):
    lines = ["ply", "format ascii 1.0", "element vertex 2", "property float y", "property uchar red"]
    lines += ["property float x", "property float z", "end_header", "2 255 1 3", "-5 0 4.5 6", ""]
    (tmp_path / "points.ply").write_text("\n".join(lines))
    assert read_points(tmp_path / "points.ply").tolist() == [[1.0, 2.0, 3.0], [4.5, -5.0, 6.0]]


@pytest.mark.parametrize(
    ("change", "body", "message"),
    [
        (("", ""), "1 2 3\n4 5 6\n", None),
        (("\n", "\r\n"), "1 2 3\r\n4 5 6\r\n", None),
        (("", ""), "1 2 3\n", "is cut short: it holds 1 of 2 points"),
        (("", ""), "1 2 3\n4 5\n", "is damaged"),
        (("", ""), "1 2 3\n4 five 6\n", "is damaged: .*'five'"),
        (("", ""), "1 2 3\n4 nan 6\n", "1 of 2 points are not finite"),
        (("end_header", "property list uchar int near\nend_header"), "1 2 3 0\n4 5 6 0\n", "list uchar int near"),
        (("element", "element camera 1\nproperty float f\nelement"), "9\n1 2 3\n4 5 6\n", "vertices first, .*camera"),
        (("vertex 2", "vertex many"), "1 2 3\n", "vertices first, .*many"),
    ],
)
def test_points_are_read_right_or_named(tmp_path, change, body, message):
    path = tmp_path / "points.ply"
    head = ["ply", "format ascii 1.0", "element vertex 2", *(f"property float {axis}" for axis in "xyz"), "end_header"]
    head = "\n".join([*head, ""])
    path.write_bytes(((head.replace(*change) if change[0] else head) + body).encode())
    if message is None:
        assert read_points(path).tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
        return
    with pytest.raises(ValueError, match=rf"points\.ply.*{message}"):
        read_points(path)


@pytest.mark.parametrize("kind", ["colmap", "transforms"])
def test_pictures_are_in_the_order_in_which_they_were_numbered(tmp_path, kind):
    names = {"003.png": "shot 9.png", "004.png": "shot 10.png", "005.png": "shot 011.png"}
    if kind == "colmap":
        capturefiles.write_colmap(tmp_path, binary=False)
        file = tmp_path / "sparse/0/images.txt"
        want = read_colmap(tmp_path)
    else:
        file = capturefiles.write_transforms(tmp_path)
        want = read_transforms(file)
    text = file.read_text()
    for old, new in names.items():
        (tmp_path / "images" / old).rename(tmp_path / "images" / new)
        text = text.replace(old, new)
    file.write_text(text)
    found = read_colmap(tmp_path) if kind == "colmap" else read_transforms(file)
    assert [path.name for path in found.images] == ["000.png", "001.png", "002.png", *names.values()]
    assert torch.equal(found.cam_to_world, want.cam_to_world)


def test_points_behind_a_camera_have_no_depth():
    from hone_splat.captures import Capture

    poses, inner = torch.eye(4).double().repeat(2, 1, 1), torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]).double()
    points = torch.tensor([[0.0, 0, 2], [0, 0, 4], [0, 0, -50], [9, 0, 3]]).double()
    scene = fit_range(Capture((Path("a"),) * 2, poses, inner.expand(2, 3, 3), (8, 8), points), 1.0, 100.0)
    assert scene.depths == pytest.approx((2.0, 3.0, 4.0))


def test_without_points_depth_is_where_the_cameras_look():
    from hone_splat.cameras import look_at
    from hone_splat.captures import Capture

    angle = torch.linspace(0, 2, 5, dtype=torch.float64)
    centre = 4 * torch.stack([angle.cos(), 0 * angle, angle.sin()], -1)
    poses = look_at(centre, torch.zeros(3).double(), torch.tensor([0.0, 1, 0]).double())
    inner = torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]).double().expand(5, 3, 3)
    capture = Capture((Path("a"),) * 5, poses, inner, (8, 8), None)
    scene = fit_range(capture, 1.0, 100.0)
    assert scene.depths == pytest.approx((1.0, 4.0, 16.0))
    assert "guess" in scene.source
    side = poses.clone()
    side[:, :3, :3] = torch.eye(3)
    with pytest.raises(ValueError, match=r"look at no common place.*Give near and far"):
        fit_range(Capture(capture.images, side, inner, (8, 8), None), 1.0, 100.0)
    # One camera of five turns its back: its axis goes through the common place, which lies behind it.
    back = poses.clone()
    back[2, :3, [0, 2]] *= -1
    with pytest.raises(ValueError, match="look at no common place"):
        fit_range(Capture(capture.images, back, inner, (8, 8), None), 1.0, 100.0)


def test_overlap_counts_the_samples_that_others_see():
    poses = torch.eye(4).repeat(3, 1, 1)
    poses[1, 0, 3] = 0.5
    poses[2, :3, :3] = torch.diag(torch.tensor([-1.0, 1, -1]))  # looks back
    inner = torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]).expand(3, 3, 3)
    found = overlap(poses, inner, 1.0, 4.0, grid=16, planes=16)
    assert torch.equal(found.diagonal(), torch.ones(3))
    assert torch.equal(found[2, :2], torch.zeros(2))
    share = (torch.arange(16) + 0.5) / 16
    expected = 0.0
    directions = rays(pixel_centres(16, 16).flatten(0, 1), inner[0], "depth_z")
    for depth in 1 / (0.25 + 0.75 * share):
        x = (directions * depth)[:, 0]
        u = (x - 0.5) / depth + 0.5
        expected += float(((u > 0) & (u < 1)).float().mean()) / 16
    assert float(found[0, 1]) == pytest.approx(expected, abs=1e-6)
    assert 0 < expected < 1


def test_bad_colmap_models_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no COLMAP model"):
        read_colmap(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere, which is no folder\. Name the folder that COLMAP wrote"):
        read_colmap(tmp_path / "nowhere")
    bent = capturefiles.write_colmap(tmp_path / "bent", binary=True, model="OPENCV", extra=(0.1, 0, 0, 0))
    with pytest.raises(ValueError, match=r"a distorted camera, OPENCV with .*image_undistorter"):
        read_colmap(bent)
    straight = capturefiles.write_colmap(tmp_path / "straight", binary=False, model="OPENCV", extra=(0.0, 0, 0, 0))
    assert len(read_colmap(straight)) == 6
    short = capturefiles.write_colmap(tmp_path / "short", binary=True)
    path = short / "sparse/0/images.bin"
    whole = path.read_bytes()
    for cut in (4, 40, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"images.bin is cut short"):
            read_colmap(short)
    path.write_bytes(whole)
    cameras = short / "sparse/0/cameras.bin"
    cameras.write_bytes(cameras.read_bytes().replace(b"\x07", b"\x08", 1))
    with pytest.raises(ValueError, match=r"000.png has no intrinsics"):
        read_colmap(short)
    (bent / "images" / "002.png").unlink()
    gone = capturefiles.write_colmap(tmp_path / "gone", binary=True)
    (gone / "images" / "002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"6 pictures in .*images: 002.png is missing\. .*images holds"):
        read_colmap(gone)
    # Elsewhere than the model says: an empty folder, and none at all.
    with pytest.raises(FileNotFoundError, match=r"sparse: 000.png and 5 more are missing\. .*sparse holds 0/\. Copy"):
        read_colmap(gone, gone / "sparse")
    with pytest.raises(FileNotFoundError, match=r"nowhere, which is no folder: 000.png and 5 more"):
        read_colmap(gone, gone / "nowhere")
    (gone / "images").rename(gone / "images_4")
    sought = f"a folder {gone / 'images'} or {gone / 'sparse/0/images'} or {gone / 'sparse/images'} was sought"
    with pytest.raises(
        FileNotFoundError, match=re.escape(sought) + r"\. .*gone holds images_4/, sparse/\. Move or link"
    ):
        read_colmap(gone)
    for name in "abcdefg":
        (gone / name).touch()
    with pytest.raises(FileNotFoundError, match=r"gone holds a, b, c, d, e, f and 3 more\. "):
        read_colmap(gone)
    odd = capturefiles.write_colmap(tmp_path / "odd", binary=True)
    for shape in ((40, 40), (64, 46)):
        Image.new("RGB", shape).save(odd / "images" / "001.png")
        with pytest.raises(ValueError, match="another shape"):
            read_colmap(odd)
    Image.new("RGB", (64, 47)).save(odd / "images" / "001.png")  # a row less: rounding of a smaller copy
    assert len(read_colmap(odd)) == 6


def test_lines_of_images_go_by_two_whatever_is_empty(tmp_path):
    folder = capturefiles.write_colmap(tmp_path, binary=False)
    path = folder / "sparse/0/images.txt"
    whole = path.read_text()
    want = read_colmap(folder)
    lines = whole.splitlines()
    assert "" in lines  # a picture without points
    path.write_text("# a comment\n\n" + whole.replace("\n", "\n\n", 1) + "\n\n")
    again = read_colmap(folder)
    assert again.images == want.images
    assert torch.equal(again.cam_to_world, want.cam_to_world)
    path.write_text("\n".join(line for line in lines if line))
    with pytest.raises(ValueError, match=r"images\.txt: expected a line of X Y POINT3D_ID for the points of 005\.png"):
        read_colmap(folder)


def test_points_that_are_named_and_missing_are_said(tmp_path):
    path = capturefiles.write_transforms(tmp_path)
    (tmp_path / "sparse.ply").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 'sparse\.ply' as its points .*delete the entry"):
        read_transforms(path)


def test_what_image_undistorter_leaves_is_read(tmp_path):
    folder = capturefiles.write_colmap(tmp_path / "a", binary=True)
    (folder / "sparse" / "0").rename(folder / "0")
    (folder / "sparse").rmdir()
    (folder / "0").rename(folder / "sparse")
    assert len(read_colmap(folder)) == 6


def test_blenders_frames_have_an_angle_and_no_suffix(tmp_path):
    def blender(data):
        for frame in data["frames"]:
            frame["file_path"] = "./" + frame["file_path"].removesuffix(".png")
        data["frames"].reverse()
        for key in ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_model"):
            del data[key]
        data["camera_angle_x"] = math.radians(60)

    path = capturefiles.write_transforms(tmp_path, change=blender)
    capture = read_transforms(tmp_path)
    assert capture.images == read_transforms(path).images
    assert [image.name for image in capture.images] == [f"{index:03d}.png" for index in range(6)]
    focal = 32 / math.tan(math.radians(30))
    want = torch.tensor([[focal, 0, 32], [0, focal, 24], [0, 0, 1]]).double()
    assert torch.allclose(intrinsics_px(capture.intrinsics_norm, 48, 64)[0], want)
    _, poses, *_ = capturefiles.room()
    assert torch.allclose(capture.cam_to_world, poses, atol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"there is no .*transforms\.json: expected .* ns-process-data"):
        read_transforms(tmp_path / "images")
    (tmp_path / "images" / "002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"002 is missing\. .*images holds 000\.png, .*mend file_path"):
        read_transforms(path)


def test_damaged_pictures_are_named(tmp_path):
    folder = capturefiles.write_colmap(tmp_path, binary=True)
    capture = read_colmap(folder)
    path = folder / "images" / "002.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # its header is there, so that it is found out when it is opened
    assert len(read_colmap(folder)) == 6
    with pytest.raises(ValueError, match=r"002\.png cannot be read, copy it again"):
        load_views(capture, (32, 32), fit_range(capture, 1.0, 100.0))
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"002\.png cannot be read, copy it again"):
        read_colmap(folder)


def test_bad_transforms_are_named(tmp_path):
    def left(data):
        for row in data["frames"][2]["transform_matrix"][:3]:
            row[0] = -row[0]

    def nan(data):
        data["frames"][1]["transform_matrix"][0][3] = float("nan")

    def mixed(data):
        data["frames"][3] |= {"w": 32, "h": 24}

    cases = {
        "left-handed": left,
        "001.png: the pose is not finite": nan,
        "mixed sizes: images/000.png is 64 x 48 and images/003.png 32 x 24": mixed,
        "has no intrinsics": lambda data: data.pop("fl_x"),
        "a distorted camera": lambda data: data.update(k1=0.01),
        "at least two are needed; the capture has 1": lambda data: data.update(frames=data["frames"][:1]),
        "expected frames, each with": lambda data: data["frames"][0].pop("file_path"),
        r"json: expected frames, each with": lambda data: data["frames"].append(None),
        "expected frames, each with file_path": lambda data: data["frames"][0].update(file_path=3),
        r"transform_matrix of images/000\.png must be 4 x 4": lambda data: data["frames"][0].update(
            transform_matrix=[[1, 2], [3]]
        ),
        r"transform_matrix of images/001\.png must": lambda data: data["frames"][1].update(transform_matrix="x"),
        "expected a number as w, and positive": lambda data: data.update(w=0),
        r"000\.png: expected a number as fl_x, .*; got 'abc'": lambda data: data.update(fl_x="abc"),
    }
    for number, (message, change) in enumerate(cases.items()):
        path = capturefiles.write_transforms(tmp_path / str(number), change=change)
        with pytest.raises(ValueError, match=message):
            read_transforms(path)
    for broken in (b"{", b"\xff\xfe\x00"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"transforms\.json is no JSON"):
            read_transforms(path)


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_a_number_that_is_none_is_named_with_its_file(name, tmp_path):
    folder = capturefiles.write_colmap(tmp_path, binary=False)
    path = folder / f"sparse/0/{name}.txt"
    lines = path.read_text().splitlines()
    words = lines[1].split()
    words[3] = "abc"
    path.write_text("\n".join([lines[0], " ".join(words), *lines[2:]]))
    with pytest.raises(ValueError, match=rf"{name}\.txt cannot be read: .*'abc'"):
        read_colmap(folder)


def test_cameras_far_from_the_origin_are_refused(tmp_path):
    def shift(data, by):
        for frame in data["frames"]:
            frame["transform_matrix"][0][3] += by

    near = capturefiles.write_transforms(tmp_path / "near", change=lambda data: shift(data, 1e3))
    assert len(read_transforms(near)) == 6
    far = capturefiles.write_transforms(tmp_path / "far", change=lambda data: shift(data, 4e6))
    with pytest.raises(ValueError, match=r"stand 4e\+06 units from the origin and .* Take \[3999998"):
        read_transforms(far)


def test_pictures_of_sixteen_bits_are_refused(tmp_path):
    folder = capturefiles.write_colmap(tmp_path, binary=True)
    path = folder / "images" / "002.png"
    Image.fromarray(np.full((48, 64), 40_000, np.uint16)).save(path)
    capture = read_colmap(folder)
    with pytest.raises(ValueError, match=r"002\.png has more than 8 bits"):
        load_views(capture, (32, 32), fit_range(capture, 1.0, 100.0))
