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
from hone_pmloss.vggt import VGGT, VGGTConfig, VGGTTeacher, published_layout

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


# Tensors, parameters, and a digest of sorted names and shapes, read off VGGT's class as PM-Loss's release has it.
PUBLISHED = (1797, 1_256_537_516, "7db43ba7e2e0d371")
PARTS = {
    "aggregator": (1210, 909_112_320),
    "camera_head": (69, 216_174_610),
    "point_head": (62, 32_654_628),
    "depth_head": (62, 32_654_562),
    "track_head": (394, 65_941_396),
}


def test_names_and_shapes_are_frozen():
    layout = published_layout()
    state = layout.state_dict()
    assert {value.device.type for value in state.values()} == {"meta"}
    listing = "\n".join(f"{name} {list(value.shape)}" for name, value in sorted(state.items()))
    size = sum(value.numel() for value in state.values())
    assert (len(state), size, hashlib.sha256(listing.encode()).hexdigest()[:16]) == PUBLISHED
    for name, part in layout.named_children():
        inner = part.state_dict()
        assert (len(inner), sum(value.numel() for value in inner.values())) == PARTS[name]
    with torch.device("meta"):
        own = VGGT().state_dict()
    assert list(own) == [name for name in state if name.startswith(("aggregator.", "point_head."))]
    assert sum(value.numel() for value in own.values()) == 941_766_948


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


def spread(state):
    """Tensors of one stored number each, so that files are small."""
    return {name: torch.zeros(1).expand(value.shape) for name, value in state.items()}


@pytest.fixture(scope="module")
def whole(model):
    """As the release stores it, small."""
    return spread(published_layout(TINY).state_dict()) | model.state_dict()


def test_a_published_file_loads_strictly(model, whole, tmp_path, caplog):
    state = model.state_dict()
    torch.save(whole, tmp_path / "model.pt")
    with caplog.at_level(logging.INFO):
        teacher = VGGTTeacher.load(tmp_path / "model.pt", config=TINY)
    assert "CC BY-NC 4.0" in caplog.text
    for head in ("camera_head", "depth_head", "track_head"):
        count = sum(value.numel() for name, value in whole.items() if name.startswith(head))
        assert f"{head} is left out, {count:,} parameters that give no points" in caplog.text
    assert caplog.text.count("is left out") == 3
    assert list(teacher.model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in teacher.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_published_size_loads(tmp_path):
    torch.save(spread(published_layout().state_dict()), tmp_path / "model.pt")
    teacher = VGGTTeacher.load(tmp_path / "model.pt")
    assert sum(value.numel() for value in teacher.parameters()) == 941_766_948
    assert not any(value.is_meta for value in teacher.state_dict().values())


@pytest.mark.parametrize(
    ("gone", "more", "message"),
    [
        (
            ["point_head.norm.bias"],
            {"other.weight": (1,)},
            "missing: point_head.norm.bias; too many: other.weight",
        ),
        (["aggregator.camera_token"], {}, "missing: aggregator.camera_token"),
        (["track_head.tracker.query_ref_token"], {}, "missing: track_head.tracker.query_ref_token"),
        ([], {"camera_head.embed_pose.weight": (64, 8)}, "of another shape: camera_head.embed_pose.weight"),
        ([], {"depth_head.norm.scale": (1,)}, "too many: depth_head.norm.scale"),
        ([], {"camera_head2.weight": (1,), "decoder.weight": (1,)}, "too many: camera_head2.weight, decoder.weight"),
    ],
)
def test_what_does_not_fit_a_published_file_is_named(whole, tmp_path, gone, more, message):
    state = {name: value for name, value in whole.items() if name not in gone}
    torch.save(state | {name: torch.zeros(shape) for name, shape in more.items()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=rf"is no checkpoint of VGGT: {message}$"):
        VGGTTeacher.load(tmp_path / "model.pt", config=TINY)


def test_heads_that_give_no_points_may_be_absent(model, whole, tmp_path, caplog):
    state = {name: value for name, value in whole.items() if not name.startswith("track_head.")}
    torch.save(state, tmp_path / "model.pt")
    with caplog.at_level(logging.INFO):
        VGGTTeacher.load(tmp_path / "model.pt", config=TINY)
    assert "depth_head is left out" in caplog.text
    assert "track_head" not in caplog.text
    torch.save(
        {name: value for name, value in whole.items() if not name.startswith("point_head.")}, tmp_path / "model.pt"
    )
    with pytest.raises(CheckpointError, match=r"missing: point_head.norm.weight, .* and 59 more"):
        VGGTTeacher.load(tmp_path / "model.pt", config=TINY)


def test_the_cache_tells_weights_apart_that_lie_in_files_of_one_name(model, tmp_path):
    state = model.state_dict()
    changed = {name: value + (name == "point_head.scratch.output_conv2.2.bias") for name, value in state.items()}
    names = []
    for folder, weights in (("one", state), ("same", state), ("other", changed)):
        (tmp_path / folder).mkdir()
        save_safetensors(weights, tmp_path / folder / "model.safetensors")
        names.append(VGGTTeacher.load(tmp_path / folder / "model.safetensors", config=TINY).name)
    assert names[0] == names[1] != names[2]


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
