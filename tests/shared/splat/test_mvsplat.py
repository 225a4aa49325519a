import dataclasses

import pytest
import torch
from hone_splat.harmonics import _tables
from hone_splat.hosts import check_views
from hone_splat.mvsplat import MVSplat, MVSplatConfig


@pytest.fixture(scope="module")
def host(perturb):
    torch.manual_seed(0)
    return perturb(MVSplat().eval())


def relative(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("views", "height", "width"), [(2, 64, 64), (3, 64, 128), (5, 64, 64)])
@torch.no_grad()
def test_equals_the_oracle(host, hostref, make_views, views, height, width):
    given = make_views(views, height, width, seed=views)
    depth, (means, covariances, sh, opacities) = hostref.mvsplat(
        host.state_dict(),
        given.image_01[0],
        given.cam_to_world[0],
        given.intrinsics_norm[0],
        given.near[0],
        given.far[0],
    )
    found = host(given)
    cloud = found.gaussians[0]
    standard = torch.einsum("ij,gcj->gci", _tables(3)[2].float(), sh)
    assert relative(found.depth[0], depth) < 1e-4
    assert relative(cloud.means, means) < 1e-4
    assert relative(cloud.covariances, covariances) < 1e-4
    assert relative(cloud.sh, standard) < 1e-4
    assert relative(cloud.opacities, opacities) < 1e-4


def test_published_counts():
    with torch.device("meta"):
        host = MVSplat()
    assert sum(part.numel() for part in host.parameters()) == 11_955_734
    shapes = {name: list(part.shape) for name, part in host.state_dict().items()}
    assert shapes["backbone.backbone.layer2.0.downsample.0.weight"] == [96, 64, 1, 1]
    assert shapes["backbone.transformer.layers.5.cross_attn_ffn.mlp.0.weight"] == [1024, 256]
    assert shapes["depth_predictor.regressor_residual.weight"] == [128, 256, 1, 1]
    assert shapes["depth_predictor.refine_unet.0.weight"] == [32, 37, 3, 3]
    assert shapes["depth_predictor.to_gaussians.2.weight"] == [84, 168, 3, 3]
    assert shapes["depth_predictor.to_disparity.2.weight"] == [2, 64, 3, 3]


@torch.no_grad()
def test_scenes_of_a_batch_are_as_alone(host, make_views):
    given = make_views(2, 64, 64, batch=2)
    both = host(given)
    alone = host(given.map(lambda part: part[1:]))
    assert relative(both.depth[1], alone.depth[0]) < 1e-4
    assert relative(both.gaussians.means[1], alone.gaussians.means[0]) < 1e-4


@torch.no_grad()
def test_the_right_mask_does_not_care_for_the_order_of_views(perturb, make_views):
    small = MVSplatConfig(channels=(16, 16, 32), layers=2, candidates=32, cost_channels=32, cost_mults=(1,),
                          refine_mults=(1, 1), sh_degree=0, swin_mask="correct")  # fmt: skip
    given = make_views(4, 64, 64)
    order = torch.tensor([[0, 3, 1, 2]])
    for mask, agrees in (("correct", True), ("official", False)):
        torch.manual_seed(0)
        host = perturb(
            MVSplat(type(small)(**{n: getattr(small, n) for n in small.__slots__} | {"swin_mask": mask}))
        ).eval()
        error = relative(host(given.take(order)).depth[0, 0], host(given).depth[0, 0])
        assert (error < 1e-4) == agrees, (mask, error)


def test_sides_that_do_not_fit_are_named(host, make_views):
    with pytest.raises(ValueError, match="pictures of 64 x 72 do not fit: both sides must be multiples of 16"):
        host(make_views(2, 64, 72))
    with pytest.raises(ValueError, match="at least two views"):
        host(make_views(1, 64, 64))


def test_scenes_of_different_views_need_a_compressor(make_views):
    views = make_views(3, 64, 64, batch=2)
    check_views(dataclasses.replace(views, present=torch.ones(2, 3, dtype=torch.bool)), 64, compressed=False)
    fewer = dataclasses.replace(views, present=torch.tensor([[True] * 3, [True, True, False]]))
    check_views(fewer, 64, compressed=True)
    with pytest.raises(ValueError, match="different numbers of views need a compressor"):
        check_views(fewer, 64, compressed=False)
    with pytest.raises(ValueError, match=r"64 x 64 do not fit: both sides must be multiples of 48"):
        check_views(views, 48, compressed=True)
