from dataclasses import replace

import pytest
import torch
from hone_splat.depthsplat import DEPTHSPLATS, DepthSplat
from hone_splat.harmonics import _tables
from hone_splat.vit import ViTConfig

COUNTS = {
    "depthsplat-head-small-256x256": 38_346_416,
    "depthsplat-head-base-256x256": 120_747_896,
    "depthsplat-head-large-256x256": 354_337_760,
    "depthsplat-head-base-256x448": 120_877_016,
    "depthsplat-head-small-448x768": 38_404_880,
    "depthsplat-head-base-448x768": 120_877_016,
    "depthsplat-oct-small-256x256": 38_073_344,
    "depthsplat-oct-base-256x448": 118_140_194,
    "depthsplat-oct-pmloss-256x448": 118_140_194,
    "depthsplat-oct-zpressor-256x448": 116_072_834 - 1_485_312,  # the release counts ZPressor in
}
THIN = {"vit": ViTConfig(width=96, heads=6), "depth_channels": (16, 24, 32, 40), "depth_width": 16}


def build(name, **changes):
    """The published structure, with a thin prior: the oracle reads its widths off the weights."""
    torch.manual_seed(0)
    return DepthSplat(replace(DEPTHSPLATS[name], **THIN, **changes)).eval()


def relative(got, want):
    return float((got - want).abs().max() / want.abs().max())


def oracle(hostref, host, given, **settings):
    cfg = host.config
    return hostref.depthsplat(
        host.state_dict(), given.image_01[0], given.cam_to_world[0], given.intrinsics_norm[0], given.near[0],
        given.far[0], ns=cfg.num_scales, uf=cfg.upsample_factor, lowest=cfg.lowest, vit="vits", gen=cfg.generation,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "views", "size", "nearest"),
    [
        ("depthsplat-head-small-256x256", 5, (64, 80), 3),
        ("depthsplat-head-base-256x256", 2, (64, 64), None),
        ("depthsplat-head-base-256x448", 3, (64, 96), None),
        ("depthsplat-head-small-448x768", 4, (64, 96), 3),
        ("depthsplat-oct-small-256x256", 3, (64, 80), 3),
        ("depthsplat-oct-base-256x448", 4, (64, 64), 3),
        ("depthsplat-oct-pmloss-256x448", 3, (64, 64), 3),
        ("depthsplat-oct-zpressor-256x448", 4, (96, 64), 3),
    ],
)
@torch.no_grad()
def test_equals_the_oracle(hostref, perturb, make_views, name, views, size, nearest):
    host = perturb(build(name))
    given = make_views(views, *size, seed=views, far=200.0)
    free = {"offset": lambda raw: 0.5 * raw} if "pmloss" in name else {}
    depth, (means, covariances, sh, opacities) = oracle(hostref, host, given, nn=nearest, **free)
    found = host(given)
    cloud = found.gaussians[0]
    # Of the earlier generation's degree 4 no renderer reads more than degree 3.
    degree = cloud.degree
    standard = torch.einsum("ij,gcj->gci", _tables(degree)[2].float(), sh[..., : (degree + 1) ** 2])
    assert relative(found.depth[0], depth) < 1e-4
    assert relative(cloud.means, means) < 1e-4
    assert relative(cloud.covariances, covariances) < 1e-4
    assert relative(cloud.sh, standard) < 1e-4
    assert relative(cloud.opacities, opacities) < 1e-4


@pytest.mark.parametrize("name", DEPTHSPLATS)
def test_published_counts(name):
    with torch.device("meta"):
        host = DepthSplat(DEPTHSPLATS[name])
    assert sum(part.numel() for part in host.parameters()) == COUNTS[name]
    assert not list(host.buffers())


SHAPES = {
    "depthsplat-head-small-256x256": {
        "depth_predictor.regressor.0.0.weight": [128, 768, 3, 3],
        "depth_predictor.upsampler.concat_projects.0.weight": [48, 208, 1, 1],
        "depth_predictor.upsampler.concat_projects.1.weight": [96, 353, 1, 1],
        "depth_predictor.upsampler.scratch.output_conv.4.weight": [1, 16, 1, 1],
        "feature_upsampler.concat_projects.1.weight": [96, 352, 1, 1],
        "gaussian_regressor.0.weight": [64, 69, 3, 3],
        "gaussian_head.0.weight": [37, 132, 3, 3],
    },
    "depthsplat-head-small-448x768": {
        "depth_predictor.upsampler.concat_projects.0.weight": [48, 112, 1, 1],
        "depth_predictor.upsampler.concat_projects.1.weight": [96, 192, 1, 1],
        "depth_predictor.upsampler.concat_projects.2.weight": [192, 449, 1, 1],
        "feature_upsampler.concat_projects.2.weight": [192, 448, 1, 1],
    },
    "depthsplat-oct-base-256x448": {
        "depth_predictor.mono_pyramid.stages.1.0.weight": [768, 384, 2, 2],
        "depth_predictor.regressor.1.0.weight": [64, 576, 3, 3],
        "depth_predictor.depth_head.1.2.weight": [32, 128, 3, 3],
        "depth_predictor.regressor.0.3.input_blocks.5.1.qkv.weight": [384, 128, 1],
        "depth_predictor.pretrained.blocks.11.ls2.gamma": [768],
        "feature_upsampler.upsampler.0.8.weight": [64, 64, 3, 3],
        "feature_upsampler.upsampler.1.0.weight": [128, 544, 1, 1],
        "gaussian_regressor.3.output_blocks.9.0.skip_connection.weight": [32, 64, 1, 1],
        "gaussian_head.2.weight": [85, 170, 3, 3],
    },
    "depthsplat-oct-zpressor-256x448": {
        "depth_predictor.upsampler.concat_projects.2.weight": [384, 641, 1, 1],
        "feature_upsampler.upsampler.0.0.weight": [512, 1024, 1, 1],
        "feature_upsampler.upsampler.0.8.weight": [128, 128, 3, 3],
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes(name):
    with torch.device("meta"):
        state = DepthSplat(DEPTHSPLATS[name]).state_dict()
    assert {key: list(state[key].shape) for key in SHAPES[name]} == SHAPES[name]
    assert sum(key.startswith("depth_predictor.upsampler.") for key in state) == 66
    assert sum(key.startswith("depth_predictor.pretrained.") for key in state) == 174


@torch.no_grad()
def test_scenes_of_a_batch_are_as_alone(perturb, make_views):
    host = perturb(build("depthsplat-oct-base-256x448"))
    given = make_views(3, 64, 64, batch=2, far=200.0)
    both, alone = host(given), host(given.map(lambda part: part[1:]))
    assert relative(both.depth[1], alone.depth[0]) < 1e-4
    assert relative(both.gaussians.means[1], alone.gaussians.means[0]) < 1e-4
    assert relative(both.gaussians.sh[1], alone.gaussians.sh[0]) < 1e-4


def test_it_starts_without_size_and_colour_and_has_gradients(make_views):
    host = build("depthsplat-head-small-256x256")
    given = make_views(2, 64, 64, far=200.0)
    found = host(given)
    scale = torch.nn.functional.softplus(torch.tensor(-4.0))
    assert torch.allclose(found.gaussians.scales, scale.expand_as(found.gaussians.scales))
    assert not bool(found.gaussians.sh[..., 1:].any())
    found.gaussians.means.square().mean().backward()
    assert float(host.depth_predictor.backbone.conv1.weight.grad.abs().max()) > 0
    with pytest.raises(ValueError, match="multiples of 16"):
        host(make_views(2, 64, 72))


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("depthsplat-head-small-256x256", 3.0),
        ("depthsplat-head-small-448x768", 0.1),
        ("depthsplat-oct-small-256x256", 0.3),
    ],
)
@torch.no_grad()
def test_no_gaussian_is_larger_than_the_release_draws_them(make_views, name, most):
    host = build(name)
    host.gaussian_head[-1].bias[3:6] = 30.0
    scales = host(make_views(2, 64, 64, far=200.0)).gaussians.scales
    assert torch.equal(scales, torch.full_like(scales, most))
