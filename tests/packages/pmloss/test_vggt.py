import hashlib
import logging

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from hone_core.testing import assert_close
from hone_pmloss.cache import CachedTeacher
from hone_pmloss.data import training_batch
from hone_pmloss.models import PMLoss, tiny
from hone_pmloss.teachers import Shots, name_views
from hone_pmloss.vggt import VGGT, VGGTConfig, VGGTTeacher

from .vggtref import vggt_points

TINY = VGGTConfig(
    width=32, heads=2, patch_blocks=2, blocks=4, taps=(0, 1, 2, 3), head_channels=(8, 8, 16, 16), head_width=16
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = VGGT(TINY).eval()
    with torch.no_grad():
        # Every tensor counts, and special tokens and scales are no longer near their initial values.
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def test_names_and_shapes_are_frozen():
    with torch.device("meta"):
        net = VGGT()
    state = net.state_dict()
    listing = "\n".join(f"{name} {list(value.shape)}" for name, value in sorted(state.items()))
    assert (len(state), hashlib.sha256(listing.encode()).hexdigest()[:16]) == (1272, "3546fb8ea01ead60")
    # Of 1,256,537,516 in the published file; the others are of heads that give no points.
    assert sum(value.numel() for value in state.values()) == 941_766_948
    assert round(sum(value.numel() for value in net.point_head.state_dict().values()) / 1e6, 2) == 32.65


@pytest.mark.parametrize(("height", "width", "views"), [(28, 42, 3), (56, 28, 1)])
@torch.no_grad()
def test_equals_the_oracle(model, height, width, views):
    generator = torch.Generator().manual_seed(views)
    image = torch.rand(2, views, 3, height, width, generator=generator)
    points, trust = model(image)
    for scene in range(2):
        want, sure = vggt_points(model.state_dict(), image[scene], 2, 4, 2, TINY.taps)
        assert want.std() > 1e-3
        assert_close(points[scene], want, atol=2e-6, rtol=1e-4)
        assert_close(trust[scene], sure, atol=2e-6, rtol=1e-4)


@torch.no_grad()
def test_only_the_first_picture_is_special(model):
    image = torch.rand(1, 3, 3, 28, 28)
    points, _ = model(image)
    swapped, _ = model(image[:, [0, 2, 1]])
    assert_close(swapped[:, [0, 2, 1]], points, atol=1e-5, rtol=1e-3)
    turned, _ = model(image[:, [1, 0, 2]])
    assert (turned[:, [1, 0, 2]] - points).abs().max() > 1e-3
    with pytest.raises(ValueError, match="multiples of 14; got 28 x 30"):
        model(torch.rand(1, 1, 3, 28, 30))


def test_a_published_file_loads_strictly(model, tmp_path, caplog):
    state = model.state_dict()
    whole = state | {"camera_head.trunk.weight": torch.ones(2), "depth_head.norm.weight": torch.ones(2)}
    save_safetensors(whole, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        teacher = VGGTTeacher.load(tmp_path / "model.safetensors", config=TINY)
    assert "CC BY-NC 4.0" in caplog.text
    assert all(torch.equal(value, state[name]) for name, value in teacher.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    # The cache tells weights apart that lie in files of one name.
    changed = {name: value + (name == "point_head.scratch.output_conv2.2.bias") for name, value in state.items()}
    names = {teacher.name}
    for folder, weights in (("same", state), ("other", changed)):
        (tmp_path / folder).mkdir()
        save_safetensors(weights, tmp_path / folder / "model.safetensors")
        names.add(VGGTTeacher.load(tmp_path / folder / "model.safetensors", config=TINY).name)
    assert len(names) == 2
    short = {name: value for name, value in state.items() if name != "point_head.norm.bias"}
    torch.save(short | {"other.weight": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"missing: point_head.norm.bias; too many: other.weight"):
        VGGTTeacher.load(tmp_path / "model.pt", config=TINY)


def test_teaches_a_host(model):
    scene = training_batch([0], 1, (8, 18), 32)
    teacher = VGGTTeacher(model, name="tiny")
    answer = teacher(scene.context)
    assert answer.points.shape == (1, 2, 28, 28, 3)
    assert answer.centres is None
    assert answer.confidence.min() > 1
    host = tiny().train()
    means = host(scene.context).gaussians.means
    term = PMLoss(teacher)(means, scene.context)
    assert term.loss.isfinite().all()
    (grad,) = torch.autograd.grad(term.loss.sum(), means)
    assert grad.abs().max() > 0


@torch.no_grad()
def test_under_autocast_tokens_are_short_and_the_head_is_not(model):
    seen = []
    parts = model.aggregator.patch_embed.patch_embed.proj, model.point_head.scratch.output_conv1
    hooks = [part.register_forward_hook(lambda part, args, out: seen.append(out.dtype)) for part in parts]
    with torch.autocast("cpu", torch.bfloat16):
        points, trust = model(torch.rand(1, 2, 3, 28, 28))
    for hook in hooks:
        hook.remove()
    assert seen == [torch.bfloat16, torch.float32]
    assert points.dtype == trust.dtype == torch.float32


def test_pictures_smaller_than_a_patch_are_named(model):
    scene = training_batch([0], 1, (8, 18), 16)
    small = scene.context.map(lambda part: part[..., :12, :] if part is scene.context.image_01 else part)
    with pytest.raises(ValueError, match=r"at least 14 x 14 pixels; got \(12, 16\)"):
        VGGTTeacher(model, name="tiny")(small)


def test_its_answers_are_cached_at_sizes_that_are_no_multiples_of_a_patch(model, tmp_path):
    scene = training_batch([0], 1, (8, 18), 32)
    teacher = VGGTTeacher(model, name="tiny")
    cached = CachedTeacher(teacher, tmp_path)
    views = name_views(scene.context, [Shots("a", (1, 9))])
    means = scene.points().flatten(1, 3)
    want = PMLoss(teacher)(means, views).loss
    for _ in range(2):
        assert torch.equal(PMLoss(cached)(means, views).loss, want)
    assert (cached.asked, cached.found) == (1, 1)
