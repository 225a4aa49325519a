import pytest
import torch
from hone_core.errors import CheckpointError
from hone_pmloss.config import EvalConfig
from hone_pmloss.data import training_batch
from hone_pmloss.evaluate import GeometryReport, evaluate
from hone_pmloss.geometry import KnownDepth, boundary_band, cloud_errors, depth_edges, splat_depth
from hone_pmloss.inputs import find_evaluated
from hone_splat.files import read_ply, write_ply
from hone_splat.gaussians import Gaussians
from hone_splat.harmonics import C0


def wall(size=16):
    """A camera before a wall at depth 4, whose right half stands at 2."""
    depth = torch.full((1, size, size), 4.0)
    depth[:, :, size // 2 :] = 2.0
    inner = torch.tensor([[[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]]])
    return KnownDepth(torch.eye(4)[None], inner, depth)


def splat_of(points, scale=0.1):
    count = len(points)
    quats = torch.tensor([1.0, 0, 0, 0]).expand(count, 4)
    return Gaussians(points, torch.full((count, 3), scale), quats, torch.full((count,), 0.99), torch.zeros(count, 3, 1))


def test_edges_and_bands_by_hand():
    truth = wall()
    edges = depth_edges(truth.depth_z)
    assert edges[0, 3].nonzero()[:, 0].tolist() == [7, 8]
    assert boundary_band(truth.depth_z, width=2)[0, 3].nonzero()[:, 0].tolist() == list(range(5, 11))
    assert torch.equal(boundary_band(truth.depth_z, width=0), edges)
    assert not depth_edges(truth.depth_z, jump=1.1).any()
    # A share of the smaller depth.
    assert depth_edges(torch.tensor([[[1.0, 1.105]]])).all()
    assert depth_edges(truth.depth_z.mT)[0, :, 3].nonzero()[:, 0].tolist() == [7, 8]


def test_errors_of_a_cloud_by_hand():
    truth = wall()
    points, depth = truth.points()
    assert torch.allclose(points[:, 2], depth)
    assert float(points[0, 0]) == pytest.approx((0.5 / 16 - 0.5) * 4)
    same = cloud_errors(points, truth)
    assert float(same.accuracy.max()) == float(same.completion.max()) == 0
    assert not same.flying.any()
    assert float(same.spacing.min()) == pytest.approx(2 / 16, abs=1e-5)
    # One point 0.05 before the far half, 1.25 % of its depth; one before the near half, 2.5 %.
    moved = points[[0, 15]] - torch.tensor([0, 0, 0.05])
    errors = cloud_errors(moved, truth)
    assert errors.accuracy.tolist() == pytest.approx([0.05, 0.05], abs=1e-5)
    assert errors.flying.tolist() == [False, True]
    assert float(errors.completion.max()) > 1


def test_unknown_depth_is_left_out_and_bad_files_are_named(tmp_path):
    truth = wall()
    depth = truth.depth_z.clone()
    depth[0, 0] = 0
    depth[0, 1] = torch.inf
    part = KnownDepth(truth.cam_to_world, truth.intrinsics_norm, depth)
    assert len(part.points()[0]) == 14 * 16
    back = KnownDepth.read(part.write(tmp_path / "truth.safetensors"))
    assert torch.equal(back.known, part.known)
    with pytest.raises(ValueError, match="no depth is known"):
        KnownDepth(truth.cam_to_world, truth.intrinsics_norm, 0 * depth.nan_to_num(posinf=0))
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        KnownDepth.read(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"depth_z must be \[1, H, W\]"):
        KnownDepth(truth.cam_to_world, truth.intrinsics_norm, depth[0])


def test_known_depth_of_rooms_is_along_the_axis():
    scene = training_batch([5], 1, (8, 18), 16)
    truth = KnownDepth.of_distance(scene.context, scene.distance[0])
    assert torch.allclose(truth.points()[0], scene.points()[0].flatten(0, 2), atol=1e-4)


def test_the_report_of_a_true_splat_and_of_one_too_far(tmp_path, start):
    truth = wall(32)
    points, _ = truth.points()
    truth.write(tmp_path / "truth.safetensors")
    values = {}
    for name, factor in (("true", 1.0), ("far", 1.1)):
        splat = splat_of(factor * points, 0.02)
        depth, cover = splat_depth(splat, truth)
        assert float(cover.mean()) > 0.9
        assert float((depth / truth.depth_z).median()) == pytest.approx(factor, abs=0.01)
        write_ply(splat, tmp_path / f"{name}.ply")
        cfg = find_evaluated(EvalConfig(ply=tmp_path / f"{name}.ply", truth=tmp_path / "truth.safetensors", band=2))
        with start(cfg, f"eval-{name}") as run:
            report = evaluate(cfg, run)
        assert isinstance(report, GeometryReport)
        assert report.picture.is_file()
        shown = read_ply(report.errors)
        assert torch.equal(shown.means, read_ply(cfg.ply).means)
        # Dark where the splat is right, light where it is not.
        assert float((shown.sh[..., 0] * C0 + 0.5).mean()) == pytest.approx(0.0 if name == "true" else 0.9, abs=0.15)
        assert "depth_abs_rel" in str(report)
        values[name] = {(row.metric, row.split): row.value for row in report.rows}
    assert values["true"]["accuracy", "mean"] < 1e-5
    assert values["true"]["flying", ""] == 0
    assert values["true"]["depth_abs_rel", "elsewhere"] < 0.01
    assert values["true"]["depth_abs_rel", "at edges"] > values["true"]["depth_abs_rel", "elsewhere"]
    # Nothing is aligned: a splat of another scale is wrong everywhere.
    assert values["far"]["flying", ""] > 0.9
    assert values["far"]["depth_abs_rel", "elsewhere"] == pytest.approx(0.1, abs=0.01)


def test_what_is_uncovered_unknown_or_faint_does_not_count(tmp_path, start):
    depth = torch.full((1, 32, 32), 4.0)
    depth[:, :4] = 0.0
    truth = KnownDepth(torch.eye(4)[None], wall().intrinsics_norm, depth)
    truth.write(tmp_path / "truth.safetensors")
    points, _ = truth.points()
    left = points[points[:, 0] < 0]
    # Faint ones fly before the other half.
    opacities = torch.cat([torch.full((len(left),), 0.99), torch.full((9,), 0.04)])
    splat = splat_of(torch.cat([left, torch.tensor([[0.5, 0.0, 2.0]]).expand(9, 3)]), 0.02)
    splat = Gaussians(splat.means, splat.scales, splat.quats_wxyz, opacities, splat.sh)
    write_ply(splat, tmp_path / "half.ply")
    cfg = find_evaluated(EvalConfig(ply=tmp_path / "half.ply", truth=tmp_path / "truth.safetensors", band=2))
    with start(cfg, "eval") as run:
        rows = {(row.metric, row.split): row for row in evaluate(cfg, run).rows}
    # No depth edge: where it is not known there is none.
    assert not [split for _, split in rows if split == "at edges"]
    assert rows["uncovered", "elsewhere"].value == pytest.approx(0.5, abs=0.05)
    assert rows["uncovered", "elsewhere"].n == 28 * 32
    assert rows["depth_abs_rel", "elsewhere"].n == pytest.approx(14 * 32, abs=40)
    assert rows["depth_abs_rel", "elsewhere"].value < 0.01
    assert rows["flying", ""].n == len(left)
    assert rows["flying", ""].value == 0
    assert rows["accuracy", "mean"].value < 1e-5


def report(truth, tmp_path, start):
    write_ply(splat_of(truth.points()[0], 0.02), tmp_path / "splat.ply")
    truth.write(tmp_path / "truth.safetensors")
    cfg = find_evaluated(EvalConfig(ply=tmp_path / "splat.ply", truth=tmp_path / "truth.safetensors", band=2))
    with start(cfg, "eval") as run:
        found = evaluate(cfg, run)
    assert found.picture.is_file()
    return {(row.metric, row.split): row for row in found.rows}


@pytest.mark.parametrize("hole", [0.0, torch.nan, torch.inf])
def test_around_holes_of_the_true_depth_there_is_no_edge(tmp_path, start, hole):
    depth = torch.full((1, 32, 32), 2.0)  # what most pixels have
    depth[:, :, :12] = 4.0
    depth[:, 10:14, 2:5] = hole
    rows = report(KnownDepth(torch.eye(4)[None], wall().intrinsics_norm, depth), tmp_path, start)
    assert rows["uncovered", "at edges"].n == 6 * 32  # two pixels to either side of the step, and it
    assert rows["uncovered", "elsewhere"].n == 26 * 32 - 12


@pytest.mark.parametrize("known", [32 * 32, 1])
def test_a_view_without_a_known_depth_is_no_obstacle(tmp_path, start, known):
    depth = torch.zeros(2, 32, 32)
    depth[1].flatten()[:known] = 2.0
    poses, inner = torch.eye(4).repeat(2, 1, 1), wall().intrinsics_norm.repeat(2, 1, 1)
    rows = report(KnownDepth(poses, inner, depth), tmp_path, start)
    assert rows["uncovered", "elsewhere"].n == known
    # One point has no neighbour.
    assert (("truth_spacing", "median") in rows) == (known > 1)


def test_a_splat_that_is_too_faint_is_named(tmp_path):
    truth = wall()
    truth.write(tmp_path / "truth.safetensors")
    faint = splat_of(truth.points()[0])
    write_ply(
        Gaussians(faint.means, faint.scales, faint.quats_wxyz, 0.01 * faint.opacities, faint.sh), tmp_path / "a.ply"
    )
    with pytest.raises(ValueError, match=r"none of 256 Gaussians has an opacity of 0\.05"):
        find_evaluated(EvalConfig(ply=tmp_path / "a.ply", truth=tmp_path / "truth.safetensors"))
