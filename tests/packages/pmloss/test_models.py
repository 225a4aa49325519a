from dataclasses import replace

import pytest
import torch
from hone_pmloss import attach
from hone_pmloss.config import HostConfig, PMLossConfig
from hone_pmloss.data import training_batch
from hone_pmloss.method import pm_loss
from hone_pmloss.models import PMLoss, tiny
from hone_pmloss.teachers import OracleTeacher, PointMap
from hone_splat.depthsplat import DEPTHSPLATS, DepthSplat
from hone_splat.rooms import Rooms
from hone_splat.vit import ViTConfig
from torch import nn

SMALL = HostConfig(channels=(8, 8, 32), layers=1, candidates=8, refine_channels=32, size=32)


@pytest.fixture
def scene():
    return training_batch([0, 1], 2, (8, 18), 32)


@pytest.fixture
def oracle():
    return OracleTeacher(Rooms.draw([0, 1]))


class Anchors(nn.Module):
    """A compressor that keeps views as they are, in an order of its own."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, features, views):
        rows = torch.arange(len(self.index))[:, None]
        return features[rows, self.index], self.index


def test_a_training_forward_carries_the_term_and_others_do_not(scene, oracle):
    host = tiny(SMALL)
    before = host(scene.context).gaussians.means
    with attach(host, "paper", teacher=oracle) as handle:
        assert not hasattr(host(scene.context), "pm")
        host.train()
        output = host(scene.context)
        want = pm_loss(output.gaussians.means, scene.points().flatten(1, 3))
        assert torch.allclose(output.pm.loss, want.loss, rtol=1e-4)
        assert torch.allclose(output.pm_loss, 0.005 * want.loss.mean(), rtol=1e-4)
        output.pm_loss.backward()
        assert all(part.grad.isfinite().all() for part in host.parameters() if part.grad is not None)
        assert float(host.depth_predictor.to_disparity[2].weight.grad.abs().max()) > 0
        with torch.no_grad():
            assert not hasattr(host(scene.context), "pm")
        with handle.disabled():
            assert not hasattr(host(scene.context), "pm")
        with pytest.raises(ValueError, match=r"detach\(\) its handle first"):
            attach(host, "paper", teacher=oracle)
    assert not hasattr(host(scene.context), "pm")
    assert torch.equal(host.eval()(scene.context).gaussians.means, before)


def test_the_teachers_rows_follow_the_anchors(oracle):
    scene = training_batch([0, 1], 1, (8, 18), 32)
    host = tiny(SMALL).train()
    index = torch.tensor([[1, 0], [0, 1]])
    host.join.zipmatch = Anchors(index)
    with attach(host, PMLossConfig(cap=None), teacher=oracle):
        output = host(scene.context)
    rows = torch.arange(2)[:, None]
    points = scene.points()
    right = pm_loss(output.gaussians.means, points[rows, index].flatten(1, 3), PMLossConfig(cap=None)).loss
    wrong = pm_loss(output.gaussians.means, points.flatten(1, 3), PMLossConfig(cap=None)).loss
    assert torch.allclose(output.pm.loss, right, rtol=1e-4)
    assert not torch.allclose(output.pm.loss[0], wrong[0], rtol=1e-2)


def test_a_trainer_gives_views_an_answer_or_points(scene, oracle):
    means = (scene.points() + 0.05 * torch.randn(scene.points().shape)).flatten(1, 3)
    pm = PMLoss(oracle)
    given = [pm(means, scene.context), pm(means, oracle(scene.context)), pm(means, scene.points())]
    given.append(pm(means.view(2, 2, 32, 32, 3), scene.points().flatten(1, 3)))
    for term in given[1:]:
        assert torch.allclose(term.loss, given[0].loss, rtol=1e-4)
    assert float(pm(scene.points().flatten(1, 3), scene.context).loss.max()) < 1e-8
    with pytest.raises(ValueError, match="there is no teacher to ask"):
        PMLoss()(means, scene.context)
    with pytest.raises(ValueError, match="of the same pixels"):
        pm(means[:, :100], scene.context)
    with pytest.raises(ValueError, match=r"same views and pixels; got \[2, 2, 16, 64, 3\] and \[2, 2, 32, 32, 3\]"):
        pm(means.view(2, 2, 16, 64, 3), scene.points())
    poses = PMLoss(lambda views: PointMap(scene.points()), PMLossConfig(align="pose"))
    poses.teacher.name = "function"
    with pytest.raises(ValueError, match="function gives no camera centres"):
        poses(means, scene.context)


def test_a_teacher_of_another_size_is_asked_for_its_nearest_pixels(scene, oracle):
    coarse = scene.points()[:, :, ::2, ::2]
    means = (scene.points() + 0.05).flatten(1, 3)
    found = PMLoss(lambda views: PointMap(coarse), PMLossConfig(align="none", direction="paired"))(means, scene.context)
    want = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(1, 3)
    assert torch.allclose(found.loss, (means - want).square().sum(-1).mean(1))


def test_centres_and_confidence_follow_the_anchors(scene):
    # Three views, so that their centres fix a frame; the teacher's is another one, and its order is turned.
    generator = torch.Generator().manual_seed(0)
    points, centres = torch.randn(1, 3, 4, 4, 3, generator=generator), torch.randn(1, 3, 3, generator=generator)
    confidence, index = torch.rand(1, 3, 4, 4, generator=generator) + 0.5, torch.tensor([[2, 0, 1]])
    poses = torch.eye(4).expand(1, 3, 4, 4).clone()
    poses[..., :3, 3] = 2 * centres + 1
    part = scene.context.map(lambda value: value[:1, :1].expand(1, 3, *value.shape[2:]))
    views = replace(part, cam_to_world=poses, image_01=torch.zeros(1, 3, 3, 4, 4))
    teacher = lambda views: PointMap(points, confidence, centres)  # noqa: E731
    cfg = PMLossConfig(align="pose", direction="paired", confidence=True)
    off = torch.zeros(1, 3, 4, 4, 3)
    off[0, 2] = 0.5  # the view that comes first among the anchors
    found = PMLoss(teacher, cfg)((2 * points + 1 + off)[:, index[0]], views, anchors=index)
    want = 0.75 * confidence[0, 2].sum() / confidence.sum()
    assert float(found.loss) == pytest.approx(float(want), rel=1e-3)


def test_shapes_and_pictures_that_do_not_go_are_named(scene, oracle):
    means, points = scene.points().flatten(1, 3), scene.points()
    pm = PMLoss(oracle)
    with pytest.raises(ValueError, match=r"expected centres \[B, N \* H \* W, 3\] or .*; got \[2048, 3\]"):
        pm(means[0], points)
    with pytest.raises(ValueError, match=r"expected points .*; got \[2, 32, 32, 3\]"):
        pm(means[:1], points[0])
    for pictures, message in (
        ((255 * scene.context.image_01).to(torch.uint8), "got torch.uint8 from"),
        (255 * scene.context.image_01, r"numbers in \[0, 1\]; got torch.float32 from .* to 2"),
        ((scene.context.image_01 - 0.5) / 0.22, r"numbers in \[0, 1\]; got torch.float32 from -"),
    ):
        with pytest.raises(ValueError, match=message):
            pm(means, pictures)


def test_another_network_is_named(oracle):
    host = nn.Linear(2, 2)
    with attach(host, "paper", teacher=oracle), pytest.raises(TypeError, match="Linear gave Tensor"):
        host(torch.zeros(1, 2))


def test_depthsplat_of_the_released_run_carries_the_term():
    scene = training_batch([0], 1, (8, 18), 64)
    thin = {"vit": ViTConfig(width=96, heads=6), "depth_channels": (16, 24, 32, 40), "depth_width": 16}
    torch.manual_seed(0)
    host = DepthSplat(replace(DEPTHSPLATS["depthsplat-oct-pmloss-256x448"], **thin)).train()
    with attach(host, "paper", teacher=OracleTeacher(Rooms.draw([0]))):
        output = host(scene.context)
    want = pm_loss(output.gaussians.means.detach(), scene.points().flatten(1, 3))
    assert torch.allclose(output.pm.loss, want.loss, rtol=1e-4)
    output.pm_loss.backward()
    assert float(host.depth_predictor.backbone.conv1.weight.grad.abs().max()) > 0
