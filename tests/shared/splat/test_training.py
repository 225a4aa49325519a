import collections
import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hone_core.runs import Run
from hone_splat import training
from hone_splat.chunks import ChunkSet
from hone_splat.rooms import Rooms
from hone_splat.training import choose_views, mirrored, picture_loss, scene_of
from hone_splat.training_config import FitConfig


def config(**changes):
    return FitConfig(chunks=Path("chunks"), lpips=0.0, **changes)


def test_views_lie_in_a_span_and_contexts_are_its_farthest_cameras():
    line = torch.arange(80.0)[:, None] * torch.tensor([1.0, 0.0, 0.0])
    cfg, seen = config(), collections.Counter()
    for seed in range(300):
        given, asked = choose_views(line, cfg, torch.Generator().manual_seed(seed))
        assert list(given) == sorted(set(given))
        assert list(asked) == sorted(set(asked))
        assert len(asked) == 8
        span = given[-1] - given[0]  # on a line the ends are the farthest
        share = 6 // len(given)
        assert max(20 // share, 7) <= span <= max(50 // share, 7)
        assert given[0] <= asked[0] <= asked[-1] <= given[-1]
        seen[len(given)] += 1
        if len(given) == 3:
            assert abs(given[1] - (given[0] + given[2]) / 2) <= 0.5
    assert sorted(seen) == [2, 3, 4, 5, 6]
    assert min(seen.values()) > 30
    with pytest.raises(ValueError, match="of 7 frames is too short: 8"):
        choose_views(line[:7], config(context=(2, 2), gap=(3, 5)), torch.Generator())


def test_each_pass_has_every_scene_once_chunk_after_chunk():
    chunks = ChunkSet.__new__(ChunkSet)
    chunks.index = {f"s{i}": f"{i // 3}.torch" for i in range(10)}
    first, second = ([scene_of(chunks, turn * 10 + i, 0) for i in range(10)] for turn in (0, 1))
    assert sorted(first) == sorted(second) == sorted(chunks.index)
    assert first != second
    files = [chunks.index[key] for key in first]
    assert sum(a != b for a, b in itertools.pairwise(files)) == 3
    assert [scene_of(chunks, i, 1) for i in range(10)] != first


def test_a_mirrored_camera_sees_the_mirrored_point_at_the_mirrored_pixel():
    rooms = Rooms.draw([0])
    views, _ = rooms.views(torch.tensor([[3, 9]]), 8)
    inner = views.intrinsics_norm.clone()
    inner[..., 0, 2] = 0.4
    views = dataclasses.replace(views, intrinsics_norm=inner)
    other = mirrored(views)
    point = torch.tensor([0.3, -0.2, 0.5])

    def pixel(views, point):
        local = torch.linalg.inv(views.cam_to_world[0]) @ torch.cat([point, torch.ones(1)])
        image = (views.intrinsics_norm[0] @ local[:, :3, None])[..., 0]
        return image[:, :2] / image[:, 2:]

    want, found = pixel(views, point), pixel(other, point * torch.tensor([-1.0, 1.0, 1.0]))
    assert torch.allclose(found[:, 0], 1 - want[:, 0], atol=1e-5)
    assert torch.allclose(found[:, 1], want[:, 1], atol=1e-5)
    assert torch.equal(other.image_01, views.image_01.flip(-1))
    assert torch.allclose(torch.linalg.det(other.cam_to_world), torch.ones(1, 2))


def test_outliers_are_left_out_of_the_mean():
    drawn, true = torch.tensor([0.0, 0.1, 0.9, 0.5]).view(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    loss, logged = picture_loss(drawn, true, config(), None)
    assert float(loss) == pytest.approx((0.0 + 0.01) / 2)  # 0.81 and 0.25 are left out
    assert float(logged["mse"]) == pytest.approx((0.01 + 0.81 + 0.25) / 4)
    assert float(picture_loss(drawn, true, config(drop_error=None), None)[0]) == pytest.approx(float(logged["mse"]))
    whole, logged = picture_loss(drawn, true, FitConfig(chunks=Path("c"), vgg=Path("v")), lambda a, b: a.mean() + 1)
    assert float(whole) == pytest.approx(0.005 + 0.05 * 1.375)


class Toy(torch.nn.Module):
    """Draws one grey, the sum of a weight of the prior and of another."""

    def __init__(self):
        super().__init__()
        self.pretrained, self.own = (torch.nn.Parameter(torch.tensor(0.4)) for _ in range(2))

    def forward(self, views):
        return SimpleNamespace(gaussians=self.pretrained + self.own)


def test_the_prior_learns_slowly_and_steps_far_off_hardly_count(tmp_path, monkeypatch):
    views, _ = Rooms.draw([0]).views(torch.arange(2)[None], 8)
    drawn = training.Drawn("room", (0,), views, dataclasses.replace(views, image_01=torch.zeros(1, 2, 3, 8, 8)))
    grey = torch.ones(1, 2, 3, 8, 8)
    monkeypatch.setattr(training, "ChunkSet", lambda folder: None)
    monkeypatch.setattr(training, "_draw", lambda *_: drawn)
    monkeypatch.setattr(training, "render", lambda value, *_, **__: SimpleNamespace(image_01=value * grey))
    monkeypatch.setattr(training, "SKIP_AFTER", 1)  # the second step, from 0, is the last that counts in full
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def watch(parameters, most):
        norms.append((float(clip(parameters, most)), most))

    monkeypatch.setattr(training.nn.utils, "clip_grad_norm_", watch)
    cfg = config(steps=4, lr=1e-2, lr_pretrained=1e-4, weight_decay=0.0, drop_error=None, clip=0.3, skip_loss=0.1)
    host = Toy()
    run = Run.start(package="hone-splat", verb="train", out=tmp_path / "run", device="cpu", quiet=True)
    with run:
        training.fit(cfg, host, run, term=lambda output, drawn: (torch.zeros(()), {}))
    moved = [0.4 - float(part.detach()) for part in (host.own, host.pretrained)]
    assert moved[0] / moved[1] == pytest.approx(100, rel=0.01)
    assert {most for _, most in norms} == {0.3}
    assert norms[0][0] == pytest.approx(2 * 0.8 * 2**0.5, rel=1e-5)
    assert norms[2][0] == pytest.approx(1e-8 * norms[1][0], rel=0.05)


@pytest.mark.parametrize(
    ("name", "value"), [("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")]
)
def test_what_the_launcher_asks_for_in_vain_is_named(name, value, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    run = Run.start(package="hone-splat", verb="train", out=tmp_path / "run", device="cpu", quiet=True)
    try:
        with run, pytest.raises(ValueError, match=f"trained in float32, .* accelerate was told .*{value}"):
            training.fit(config(), Toy(), run, term=lambda *_: None)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_bad_settings_are_named():
    for changes, message in (
        ({"context": (1, 2)}, "2 <= context"),
        ({"gap": (4, 50)}, "context - 1 <= gap"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"flip": 2.0}, "flip must lie"),
        ({"clip": 0.0}, "clip must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**changes)
    with pytest.raises(ValueError, match="give --vgg FILE"):
        FitConfig(chunks=Path("chunks"))
