import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from hone_pmloss.data import training_batch
from hone_pmloss.teachers import DepthTeacher, OracleTeacher, PointMap, PrecomputedTeacher, Shots, name_views
from hone_splat.cameras import pixel_centres, rays
from hone_splat.rooms import Rooms


@pytest.fixture(scope="module")
def scene():
    return training_batch([3], 1, (8, 18), 28)


def test_the_oracle_sees_what_the_cameras_see(scene):
    answer = OracleTeacher(Rooms.draw([3]))(scene.context)
    assert torch.allclose(answer.points, scene.points(), atol=1e-4)
    with pytest.raises(ValueError, match="the oracle knows 2 rooms; got views of 1"):
        OracleTeacher(Rooms.draw([3, 4]))(scene.context)


def test_resizing_takes_the_nearest_pixel():
    points = torch.arange(12.0).view(1, 1, 2, 6, 1).expand(1, 1, 2, 6, 3)
    found = PointMap(points, points[..., 0]).resized((4, 3))
    want = torch.nn.functional.interpolate(points[0].movedim(-1, 1), (4, 3), mode="nearest-exact").movedim(1, -1)
    assert torch.equal(found.points[0], want)
    assert torch.equal(found.confidence, found.points[..., 0])


def test_precomputed_points_are_found_by_scene_and_frame(tmp_path, scene):
    points = torch.randn(4, 28, 28, 3)
    frames = torch.tensor([2, 5, 9, 11])
    save_safetensors({"points": points, "frames": frames}, tmp_path / "room.safetensors")
    teacher = PrecomputedTeacher(tmp_path)
    found = teacher(name_views(scene.context, [Shots("room", (9, 2))]))
    assert torch.equal(found.points[0], points[[2, 0]])
    assert found.confidence is None
    with pytest.raises(CheckpointError, match=r"no points of the frames \[3\]"):
        teacher(name_views(scene.context, [Shots("room", (9, 3))]))
    with pytest.raises(CheckpointError, match="no points of scene 'other'"):
        teacher(name_views(scene.context, [Shots("other", (9, 3))]))
    with pytest.raises(ValueError, match="do not say which pictures they are"):
        teacher(scene.context)
    with pytest.raises(ValueError, match=r"the frames of 2 views for each of 1 scenes; got \[1\]"):
        name_views(scene.context, [Shots("room", (9,))])


def test_precomputed_points_have_a_confidence_and_any_size(tmp_path, scene):
    points, trust = torch.randn(2, 14, 14, 3), torch.rand(2, 14, 14)
    frames = torch.tensor([0, 1])
    save_safetensors({"points": points, "frames": frames, "confidence": trust}, tmp_path / "a.safetensors")
    found = PrecomputedTeacher(tmp_path)(name_views(scene.context, [Shots("a", (1, 0))]))
    assert torch.equal(found.points[0], points[[1, 0]].repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert torch.equal(found.confidence[0], trust[[1, 0]].repeat_interleave(2, 1).repeat_interleave(2, 2))
    save_safetensors({"points": points, "frames": frames}, tmp_path / "b.safetensors")
    both = scene.context.map(lambda part: torch.cat([part, part]))
    with pytest.raises(CheckpointError, match="some scenes of the batch have a confidence and others none"):
        PrecomputedTeacher(tmp_path)(name_views(both, [Shots("a", (0, 1)), Shots("b", (0, 1))]))
    save_safetensors({"points": points[..., :2], "frames": frames}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"must hold points \[F, H, W, 3\]"):
        PrecomputedTeacher(tmp_path)(name_views(scene.context, [Shots("c", (0, 1))]))
    for changed in (
        {"frames": torch.tensor([0, 1, 2])},
        {"frames": torch.tensor([0])},
        {"confidence": trust[:, :7]},
        {"points": points.flatten(1, 2)},
    ):
        save_safetensors({"points": points, "frames": frames} | changed, tmp_path / "c.safetensors")
        with pytest.raises(CheckpointError, match=r"c\.safetensors must hold points \[F, H, W, 3\]"):
            PrecomputedTeacher(tmp_path)(name_views(scene.context, [Shots("c", (0, 1))]))
    save_safetensors({"points": points, "frames": torch.tensor([4, 4])}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a frame twice: \[4, 4\]"):
        PrecomputedTeacher(tmp_path)(name_views(scene.context, [Shots("c", (4, 4))]))
    (tmp_path / "d.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        PrecomputedTeacher(tmp_path)(name_views(scene.context, [Shots("d", (0, 1))]))
    (tmp_path / "x").mkdir()
    assert (tmp_path / "x" / "../a.safetensors").is_file()
    with pytest.raises(CheckpointError, match="no points of scene"):
        PrecomputedTeacher(tmp_path / "x")(name_views(scene.context, [Shots("../a", (0, 1))]))


def tiny_depth_anything(kind="metric"):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        head_hidden_size=8, depth_estimation_type=kind, max_depth=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():
        for part in model.parameters():
            part.mul_(8 if part.ndim > 1 else 1)  # so that depth follows the picture
    processor = DPTImageProcessor(size={"height": 28, "width": 28}, ensure_multiple_of=14, keep_aspect_ratio=True)
    return model, processor


def depth_of(points, views):
    """Depth along the optical axis of each point, by the inverse of its camera."""
    local = torch.linalg.solve(views.cam_to_world[0], torch.eye(4).expand(2, 4, 4))
    flat = points[0].flatten(1, 2) @ local[:, :3, :3].mT + local[:, None, :3, 3]
    grid = rays(pixel_centres(28, 28).flatten(0, 1).expand(2, -1, 2), views.intrinsics_norm[0], "depth_z")
    assert torch.allclose(flat, grid * flat[..., 2:], atol=1e-3)  # on the ray of its own pixel
    return flat[..., 2].view(2, 28, 28)


def test_depth_anything_is_unprojected_along_the_optical_axis(scene):
    model, processor = tiny_depth_anything()
    teacher = DepthTeacher(model, processor, name="tiny")
    depth = depth_of(teacher(scene.context).points, scene.context)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        want = model((scene.context.image_01[0] - mean) / std).predicted_depth
    assert float(want.std()) > 0.01
    assert torch.allclose(depth, want, atol=0.02 * float(want.std()))
    assert torch.equal(teacher(scene.context).centres, scene.context.cam_to_world[..., :3, 3])
    assert not teacher.model.training
    assert not any(part.requires_grad for part in teacher.parameters())
    half = DepthTeacher(model, processor, name="tiny", metres_per_unit=2.0)
    assert torch.allclose(depth_of(half(scene.context).points, scene.context), want / 2, atol=1e-3)
    assert half.name != teacher.name
    with pytest.raises(ValueError, match="metres_per_unit must be positive"):
        DepthTeacher(model, processor, name="tiny", metres_per_unit=0.0)
    with pytest.raises(ValueError, match="relative inverse depth"):
        DepthTeacher(*tiny_depth_anything("relative"), name="tiny")


def test_depth_pro_is_told_the_known_focal_length(scene):
    from transformers import DepthProConfig, DepthProForDepthEstimation, DepthProImageProcessor

    vit = {
        "model_type": "dinov2", "num_hidden_layers": 6, "hidden_size": 16, "num_attention_heads": 2, "patch_size": 4,
        "mlp_ratio": 2, "image_size": 8,
    }  # fmt: skip
    config = DepthProConfig(
        patch_size=8, patch_model_config=vit, image_model_config=vit, fov_model_config=vit, fusion_hidden_size=16,
        intermediate_hook_ids=[5, 4], intermediate_feature_dims=[8, 8], scaled_images_feature_dims=[8, 8, 8],
        scaled_images_ratios=[0.25, 0.5, 1], scaled_images_overlap_ratios=[0.0, 0.5, 0.25],
        merge_padding_value=1, use_fov_model=False, num_fov_head_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DepthProForDepthEstimation(config)
    processor = DepthProImageProcessor(size={"height": 32, "width": 32})
    teacher = DepthTeacher(model, processor, name="tiny")
    depth = depth_of(teacher(scene.context).points, scene.context)
    longer = scene.context.map(lambda part: part)
    wide = longer.intrinsics_norm.clone()
    wide[..., 0, 0] *= 2
    object.__setattr__(longer, "intrinsics_norm", wide)
    twice = depth_of(teacher(longer).points, longer)
    seen = depth < 1e3  # beyond lies what the head says nothing of
    assert seen.double().mean() > 0.5
    assert torch.allclose(twice[seen], 2 * depth[seen], rtol=1e-3, atol=1e-5)  # focal length over inverse depth
