from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hone_splat.depthsplat import DEPTHSPLATS, DepthSplat
from hone_splat.mvsplat import MVSplat
from hone_splat.published import PUBLISHED, build_published
from hone_splat.ranges import HOSTS
from hone_splat.vit import ViTConfig
from hone_zpressor import ZPressorConfig, attach
from hone_zpressor.config import PRESETS
from hone_zpressor.data import graded_rooms
from hone_zpressor.host import build_arm
from hone_zpressor.models import attention_for, tiny

CONFIG = ZPressorConfig(anchors=3, layers=2, precision="float32")


@pytest.fixture(scope="module")
def host(small):
    return tiny(small)


@pytest.fixture(scope="module")
def views():
    return graded_rooms([0, 1], 7, 1, 32).context


@torch.no_grad()
def test_detach_gives_the_host_back_bit_for_bit(host, views):
    before, keys = host(views), set(host.state_dict())
    with attach(host, CONFIG) as handle:
        inside = host(views)
        assert inside.anchors.shape == (2, 3)
        assert len(inside.gaussians) == 3 * 32 * 32
        assert inside.depth.shape == (2, 3, 32, 32)
        rows = torch.arange(2)[:, None]
        assert torch.equal(inside.views.cam_to_world, views.cam_to_world[rows, inside.anchors])
        assert torch.equal(inside.views.image_01, views.image_01[rows, inside.anchors])
        with handle.disabled():
            assert torch.equal(host(views).gaussians.means, before.gaussians.means)
        assert {name for name in host.state_dict() if name not in keys} == {
            f"backbone.zipmatch.{name}" for name in handle.compressor.state_dict()
        }
    after = host(views)
    assert not handle.attached
    assert set(host.state_dict()) == keys
    assert after.anchors is None
    assert torch.equal(after.depth, before.depth)
    assert torch.equal(after.gaussians.sh, before.gaussians.sh)


@torch.no_grad()
def test_anchors_alone_are_the_host_on_those_views(host, views):
    with attach(host, ZPressorConfig(anchors=3, fuse=False)) as handle:
        assert not list(handle.compressor.parameters())
        found = host(views)
    want = host(views.take(found.anchors))
    assert torch.allclose(found.depth, want.depth, atol=1e-5)


@torch.no_grad()
def test_fusion_reads_the_views_that_are_left_out(host, views):
    with attach(host, CONFIG):
        found = host(views)
        left = next(k for k in range(7) if k not in found.anchors[0].tolist())
        changed = views.map(lambda part: part.clone())
        changed.image_01[0, left] = 1 - changed.image_01[0, left]
        other = host(changed)
    assert torch.equal(found.anchors, other.anchors)
    assert not torch.allclose(found.depth[0], other.depth[0], atol=1e-5)
    assert torch.allclose(found.depth[1], other.depth[1], atol=1e-5)


@torch.no_grad()
def test_no_more_views_than_anchors(host, views):
    few = views.map(lambda part: part[:, :3])
    with attach(host, ZPressorConfig(anchors=6, layers=2)):
        found = host(few)
    assert sorted(found.anchors[0].tolist()) == [0, 1, 2]


def test_random_anchors_are_a_seed(host, views):
    settings = [ZPressorConfig(anchors=3, fuse=False, selection="random", seed=seed) for seed in (0, 0, 1)]
    chosen = []
    for config in settings:
        with attach(host, config) as handle:
            chosen.append(handle.compressor.choose(views).tolist())
    assert chosen[0] == chosen[1] != chosen[2]
    assert all(len(set(row)) == 3 for row in chosen[2])
    present = torch.zeros_like(views.near, dtype=torch.bool)
    present[:, [1, 3, 4]] = True
    with attach(host, settings[2]) as handle:
        found = handle.compressor.choose(replace(views, present=present))
    assert (found.sort(1).values == torch.tensor([1, 3, 4])).all()


def test_overlap_is_between_the_least_and_the_largest_depth(host, views, monkeypatch):
    asked = []

    def record(poses, inner, near, far):
        asked.append((near, far))
        return torch.eye(len(poses))

    monkeypatch.setattr("hone_zpressor.models.overlap", record)
    bounds = torch.ones_like(views.near)
    bounds[0, 2] = 0.5
    given = replace(views, near=bounds, far=4 / bounds)
    with attach(host, replace(CONFIG, selection="overlap")) as handle:
        handle.compressor.anchors_of(given)
    assert asked == [(0.5, 8.0), (1.0, 4.0)]


def test_ragged_lists_where_a_gpu_takes_them(monkeypatch):
    def chosen(cuda=True, sm=(9, 0), **settings):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: sm)
        return attention_for(ZPressorConfig(**settings), SimpleNamespace(is_cuda=cuda, device="cuda"))

    assert chosen() == "varlen"
    assert chosen(cuda=False) == chosen(sm=(7, 5)) == chosen(precision="float32") == "padded"
    assert chosen(attention="padded") == "padded"
    assert chosen(cuda=False, attention="varlen") == "varlen"  # which the module then refuses


def test_a_compressor_is_of_its_hosts_precision(small):
    host = tiny(small).double()
    with attach(host, CONFIG) as handle:
        assert {part.dtype for part in handle.compressor.parameters()} == {torch.float64}
        assert not handle.compressor.training
    with attach(host.train(), CONFIG) as handle:
        assert handle.compressor.training


def test_what_cannot_be_attached_is_named(host):
    with pytest.raises(TypeError, match="Linear has no place for a compressor"):
        attach(torch.nn.Linear(2, 2))
    with attach(host, CONFIG), pytest.raises(ValueError, match="has a compressor already"):
        attach(host, CONFIG)
    weights = build_arm_state()
    with pytest.raises(ValueError, match="of no ZPressor of 3 layers"):
        attach(host, ZPressorConfig(layers=3), weights=weights)
    assert host.join.zipmatch is None


def build_arm_state():
    from hone_zpressor.method import ZPressor

    return ZPressor(32, 2).state_dict()


def test_mvsplat_with_zpressor_has_the_published_count():
    with torch.device("meta"):
        host = MVSplat()
    attach(host, "mvsplat")
    assert sum(part.numel() for part in host.parameters()) == 13_441_046


@torch.no_grad()
def test_mvsplat_with_zpressor_equals_the_oracle(hostref, monkeypatch):
    from hone_splat.views import Views

    torch.manual_seed(0)
    host = MVSplat().eval()
    attach(host, ZPressorConfig(anchors=4, precision="float32"))
    for parameter in host.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn(parameter.shape)
        elif not parameter.any():
            parameter += 0.05 * torch.randn(parameter.shape)
    given = graded_rooms([3], 7, 1, 64).context
    given = Views(
        *(getattr(given, n) for n in ("image_01", "cam_to_world", "intrinsics_norm", "near")), 100 * given.near
    )
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    depth, (means, covariances, _, opacities) = hostref.mvsplat(
        host.state_dict(), given.image_01[0], given.cam_to_world[0], given.intrinsics_norm[0], given.near[0],
        given.far[0], N=4,
    )  # fmt: skip
    found = host(given)
    for ours, theirs in (
        (found.depth[0], depth), (found.gaussians.means[0], means),
        (found.gaussians.covariances[0], covariances), (found.gaussians.opacities[0], opacities),
    ):  # fmt: skip
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def test_tiny_is_a_seed(small):
    first, again, other = tiny(small), tiny(small), tiny(small, seed=1)
    name = "backbone.backbone.conv1.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert build_arm(small, "anchors").handle.config.fuse is False


@torch.no_grad()
def test_depthsplat_with_zpressor_equals_the_oracle(hostref, monkeypatch):
    thin = {"vit": ViTConfig(width=96, heads=6), "depth_channels": (16, 24, 32, 40), "depth_width": 16}
    torch.manual_seed(0)
    host = DepthSplat(replace(DEPTHSPLATS["depthsplat-oct-zpressor-256x448"], **thin)).eval()
    handle = attach(host, ZPressorConfig(anchors=4, precision="float32"))
    for parameter in host.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn(parameter.shape)
        elif not parameter.any():
            parameter += 0.05 * torch.randn(parameter.shape)
    given = graded_rooms([3], 7, 1, 64).context
    given = replace(given, far=200 * given.near)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    depth, (means, covariances, _, opacities) = hostref.depthsplat(
        host.state_dict(), given.image_01[0], given.cam_to_world[0], given.intrinsics_norm[0], given.near[0],
        given.far[0], ns=1, uf=8, lowest=8, vit="vits", gen="oct", nn=3, N=4,
    )  # fmt: skip
    found = host(given)
    for ours, theirs in (
        (found.depth[0], depth), (found.gaussians.means[0], means),
        (found.gaussians.covariances[0], covariances), (found.gaussians.opacities[0], opacities),
    ):  # fmt: skip
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4
    handle.detach()
    assert host(given).anchors is None


@pytest.mark.parametrize(("kind", "count"), [("mvsplat", 13_441_046), ("depthsplat-oct-zpressor-256x448", 116_072_834)])
def test_published_counts_with_zpressor(kind, count):
    with torch.device("meta"):
        host = build_published(kind)
        attach(host, PRESETS[kind.partition("-")[0]].config)
    assert sum(part.numel() for part in host.parameters()) == count
    names = [name for name in host.state_dict() if ".zipmatch." in name]
    assert len(names) == 102
    assert set(HOSTS) == {"tiny", *PUBLISHED}


@torch.no_grad()
def test_anchors_by_overlap_take_cameras_that_look_elsewhere(host, views):
    turned = views.cam_to_world[:, :1].clone()
    turned[..., :3, :3] = turned[..., :3, :3] @ torch.diag(torch.tensor([-1.0, 1, -1]))
    # All but the last look the same way from one place; the last looks back.
    poses = torch.cat([views.cam_to_world[:, :1].expand(-1, views.count - 1, -1, -1), turned], 1)
    with attach(host, replace(CONFIG, selection="overlap", anchors=2)):
        found = host(replace(views, cam_to_world=poses))
    assert found.anchors.tolist() == [[0, views.count - 1]] * 2
