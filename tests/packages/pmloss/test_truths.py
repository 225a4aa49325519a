import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hone_core.errors import CheckpointError
from hone_pmloss import geometry, truths
from hone_pmloss.config import EvalConfig
from hone_pmloss.evaluate import evaluate
from hone_pmloss.geometry import KnownDepth
from hone_pmloss.inputs import find_evaluated
from hone_pmloss.teachers import PointMap
from hone_pmloss.truths import KnownCloud, read_depth, thinned, truth_of
from hone_splat.captures import read_colmap
from hone_splat.files import write_ply
from hone_splat.gaussians import Gaussians
from hone_splat.rooms import Rooms
from PIL import Image
from scipy.io import savemat

spec = importlib.util.spec_from_file_location(
    "capturefiles", Path(__file__).parents[2] / "shared" / "splat" / "capturefiles.py"
)
capturefiles = importlib.util.module_from_spec(spec)
spec.loader.exec_module(capturefiles)


def splat(points, path):
    count = len(points)
    colour, turn = torch.zeros(count, 3, 1), torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(count, 4)
    write_ply(Gaussians(points.float(), torch.full((count, 3), 0.03), turn, torch.full((count,), 0.9), colour), path)
    return path


def cloud(points, path):
    lines = "\n".join(" ".join(map(repr, point)) for point in points)
    head = (
        f"ply\nformat ascii 1.0\nelement vertex {len(points)}\nproperty float x\nproperty float y\nproperty float z\n"
    )
    path.write_text(f"{head}end_header\n{lines}\n")
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A room as a COLMAP folder, with the exact depth of each picture."""
    folder = capturefiles.write_colmap(tmp_path_factory.mktemp("photographs") / "scene", binary=True)
    capture = read_colmap(folder)
    _, distance = Rooms.draw([3]).see(capture.cam_to_world[None].float(), capture.size)
    views = Rooms.draw([3]).views(torch.zeros(1, len(capture), dtype=torch.long), 8)[0]
    views = dataclasses.replace(
        views, cam_to_world=capture.cam_to_world[None].float(), intrinsics_norm=capture.intrinsics_norm[None].float()
    )
    return folder, KnownDepth.of_distance(views, distance[0])


def write_depths(folder, true, kind):
    folder.mkdir()
    for index, depth in enumerate(true.depth_z.numpy()):
        height, width = depth.shape
        if kind == "colmap":
            # COLMAP's order is column-major over (width, height): pixel (x, y) stands at x + width * y.
            data = f"{width}&{height}&1&".encode() + depth.astype("<f4").tobytes()
            (folder / f"{index:03d}.png.geometric.bin").write_bytes(data)
        elif kind == "npy":
            np.save(folder / f"{index:03d}.npy", depth)
        else:
            Image.fromarray((1000 * depth).round().astype(np.uint16)).save(folder / f"{index:03d}.png")
    return folder


@pytest.mark.parametrize("kind", ["colmap", "npy", "png"])
def test_a_splat_on_the_surfaces_of_photographs_is_right(photographs, tmp_path, start, kind):
    folder, true = photographs
    depths = write_depths(tmp_path / "depths", true, kind)
    ply = splat(true.points()[0][::3], tmp_path / "scene.ply")
    cfg = find_evaluated(EvalConfig(ply=ply, colmap=folder, depths=depths))
    found = truth_of(cfg, "cpu")
    assert torch.allclose(found.depth_z, true.depth_z, atol=6e-4 if kind == "png" else 1e-5)
    assert torch.allclose(found.points()[0], true.points()[0], atol=2e-3)
    with start(cfg, "eval") as run:
        values = {(row.metric, row.split): row.value for row in evaluate(cfg, run).rows}
    assert values["accuracy", "mean"] < 1e-3
    assert values["flying", ""] == 0
    assert values["depth_abs_rel", "elsewhere"] < 0.03
    small = truth_of(dataclasses.replace(cfg, side=32), "cpu")
    assert small.depth_z.shape == (6, 24, 32)
    assert set(small.depth_z.flatten().tolist()) <= set(found.depth_z.flatten().tolist())


def test_a_teacher_stands_in_for_depth(photographs, tmp_path, monkeypatch):
    folder, true = photographs
    ply = splat(true.points()[0][:9], tmp_path / "scene.ply")

    class Exact:
        @classmethod
        def load(cls, model, *, metres_per_unit, device):
            assert (model, metres_per_unit) == ("some/model", 2.0)
            return cls()

        def __call__(self, views):
            assert views.size == tuple(true.depth_z.shape[1:])
            return PointMap(true.points()[0].view(1, *true.depth_z.shape, 3))

    monkeypatch.setattr(truths, "DepthTeacher", Exact)
    cfg = find_evaluated(EvalConfig(ply=ply, colmap=folder, teacher="some/model", metres_per_unit=2.0))
    assert torch.allclose(truth_of(cfg, "cpu").depth_z, true.depth_z, atol=1e-4)


def test_broken_depths_are_named(photographs, tmp_path):
    folder, true = photographs
    depths = write_depths(tmp_path / "depths", true, "colmap")
    ply = splat(true.points()[0][:9], tmp_path / "scene.ply")
    cfg = EvalConfig(ply=ply, colmap=folder, depths=depths)
    (depths / "002.png.geometric.bin").write_bytes(b"4&4&1&123")
    with pytest.raises(CheckpointError, match="no depth map of COLMAP"):
        truth_of(cfg, "cpu")
    (depths / "002.png.geometric.bin").unlink()
    np.save(depths / "002.npy", np.ones((8, 8)))
    with pytest.raises(ValueError, match="another shape"):
        truth_of(cfg, "cpu")
    (depths / "002.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"no depth of 002\.png"):
        find_evaluated(cfg)
    np.save(tmp_path / "gaps.npy", np.array([[1.0, -1.0], [np.nan, np.inf]]))
    assert read_depth(tmp_path / "gaps.npy", 1.0).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_a_scanned_cloud_counts_where_it_was_observed(tmp_path, start):
    true = [(0.0, 0.0, 0.0), (0.0, 0.0, 10.0), (0.0, 0.0, -10.0), (9.5, 0.0, 0.0)]
    mask = np.zeros((2, 1, 2), np.uint8)
    mask[0, 0, :] = 1  # around (0, 0, 0) and (0, 0, 10), not around x = 10
    savemat(tmp_path / "ObsMask1_10.mat", {"ObsMask": mask, "BB": np.array([[0, 0, 0], [10, 0, 10.0]]), "Res": 10.0})
    savemat(tmp_path / "Plane1.mat", {"P": np.array([[0.0], [0.0], [1.0], [5.0]])})  # z > -5 counts
    centres = torch.tensor([(1.0, 0, 0), (0, 0, 13.0), (9.0, 0, 0), (0, 0, -8.0), (4.0, 0, 0)])
    ply = splat(centres, tmp_path / "scene.ply")
    cfg = EvalConfig(
        ply=ply, cloud=cloud(true, tmp_path / "stl.ply"), observed=tmp_path / "ObsMask1_10.mat",
        plane=tmp_path / "Plane1.mat", most=4.0,
    )  # fmt: skip
    with start(find_evaluated(cfg), "eval") as run:
        rows = {(row.metric, row.split): row.value for row in evaluate(cfg, run).rows}
    # (9, 0, 0) and (0, 0, -8) lie in cells that were not observed; the distance 4 is not below 4.
    assert rows["accuracy", "mean"] == pytest.approx((1 + 3) / 2)
    assert rows["left_out", "accuracy"] == pytest.approx(1 / 3)
    # To be near to a true point, a centre need not lie where it was observed.
    assert rows["completion", "mean"] == pytest.approx((1 + 3 + 0.5) / 3)
    assert rows["left_out", "completion"] == 0
    whole = KnownCloud.read(cfg.cloud)
    assert whole.sees(centres).all()
    assert whole.counted().all()
    savemat(tmp_path / "other.mat", {"x": 1})
    with pytest.raises(CheckpointError, match="lacks P"):
        find_evaluated(dataclasses.replace(cfg, plane=tmp_path / "other.mat"))
    far = dataclasses.replace(cfg, ply=splat(centres + 100, tmp_path / "far.ply"))
    with start(find_evaluated(far), "far") as run, pytest.raises(ValueError, match="no centre lies where"):
        evaluate(far, run)


def test_thinned_points_clear_their_neighbours():
    points = torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    kept = thinned(points, 0.2)
    assert 20 < len(kept) < 200
    between = torch.cdist(kept, kept, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(1.0)
    assert float(between.min()) > 0.2
    assert float(torch.cdist(points, kept).amin(1).max()) <= 0.2


def test_one_truth_is_asked_for():
    for changes, message in (
        ({}, "by one of truth, colmap"),
        ({"truth": "a", "cloud": "b"}, "by one of truth, colmap"),
        ({"colmap": "a"}, "--depths or --teacher, one"),
        ({"truth": "a", "teacher": "b"}, "--depths or --teacher, one"),
        ({"colmap": "a", "depths": "b", "teacher": "c"}, "--depths or --teacher, one"),
        ({"truth": "a", "thin": 0.2}, "belong to a scanned cloud"),
        ({"cloud": "a", "most": 0.0}, "most must be positive"),
        ({"transforms": "a", "depths": "b", "images": "c"}, "images belongs to colmap"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalConfig(ply="x", **changes)


def test_pictures_of_one_name_have_depths_of_their_own(photographs, tmp_path):
    folder, true = photographs
    capture = read_colmap(folder)
    names = ["left/000.png", "left/001.png", "right/000.png", "right/001.png", "right/002.png", "right/003.png"]
    capture = dataclasses.replace(capture, images=tuple(folder / "images" / name for name in names))
    depths = tmp_path / "depth_maps"
    depths.mkdir()
    for name, depth in zip(names, true.depth_z.numpy(), strict=True):
        (depths / name).parent.mkdir(exist_ok=True)
        np.save(depths / f"{name}.npy", depth)
    cfg = EvalConfig(ply=tmp_path / "scene.ply", colmap=folder, depths=depths)
    assert torch.equal(truths._stored_depth(cfg, capture).depth_z, true.depth_z)
    # In one folder, nobody knows whose 000.npy is.
    for index in range(4):
        np.save(depths / f"{index:03d}.npy", true.depth_z[0].numpy())
    for name in names:
        (depths / f"{name}.npy").unlink()
    with pytest.raises(ValueError, match=r"000\.npy would be the depth of .*left/000\.png and of .*right/000\.png"):
        truths._stored_depth(cfg, capture)


def test_a_splat_is_looked_at_by_one_camera_after_the_other(photographs, monkeypatch):
    _, true = photographs
    points = true.points()[0][::7].float()
    count = len(points)
    turn = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(count, 4)
    cloud = Gaussians(points, torch.full((count, 3), 0.03), turn, torch.full((count,), 0.9), torch.zeros(count, 3, 1))
    views, real = [], geometry.render
    monkeypatch.setattr(geometry, "render", lambda *args: views.append(args[1].shape[:2]) or real(*args))
    depth, cover = geometry.splat_depth(cloud, true)
    assert views == [(1, 1)] * 6
    whole = real(cloud[None], true.cam_to_world[None], true.intrinsics_norm[None], tuple(true.depth_z.shape[1:]))
    assert torch.allclose(depth, whole.depth_z[0], atol=1e-5)
    assert torch.allclose(cover, whole.alpha[0], atol=1e-6)


def test_a_missing_mat_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*ObsMask9_10\.mat; expected a \.mat of DTU with ObsMask"):
        KnownCloud.read(tmp_path / "stl.ply", tmp_path / "ObsMask9_10.mat")
