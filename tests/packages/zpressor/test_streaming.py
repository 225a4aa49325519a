from dataclasses import replace

import pytest
import torch
from hone_splat.depthsplat import DEPTHSPLATS, DepthSplat
from hone_splat.vit import ViTConfig
from hone_zpressor import SceneStream, ZPressorConfig, attach
from hone_zpressor.data import graded_rooms
from hone_zpressor.models import tiny

CONFIG = ZPressorConfig(anchors=3, layers=2, precision="float32")


def some(views, *rows):
    return views.map(lambda part: part[:, list(rows)])


def built(kind, small):
    if kind == "mvsplat":
        return tiny(small)
    torch.manual_seed(0)
    thin = {"vit": ViTConfig(width=96, heads=6), "depth_channels": (16, 24, 32, 40), "depth_width": 16}
    return DepthSplat(replace(DEPTHSPLATS["depthsplat-oct-zpressor-256x448"], **thin)).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mvsplat", "depthsplat"])
def test_views_that_come_one_by_one_give_what_all_at_once_give(kind, small, monkeypatch):
    host = built(kind, small)
    views = graded_rooms([0], 8, 1, 64 if kind == "depthsplat" else 32).context
    with attach(host, CONFIG) as handle:
        stream = SceneStream(host, some(views, 0, 1, 2, 3, 4))
        first = host(some(views, 0, 1, 2, 3, 4))
        assert torch.equal(stream.output.anchors, first.anchors)
        assert torch.allclose(stream.output.depth, first.depth, atol=1e-4)
        for more in ((5,), (6, 7)):
            stream.add(some(views, *more))
        monkeypatch.setattr(handle.compressor, "anchors_of", lambda _: first.anchors)
        want = host(views)
        assert torch.equal(stream.output.anchors, want.anchors)
        assert torch.allclose(stream.output.depth, want.depth, atol=1e-4)
        assert torch.allclose(stream.output.gaussians.means, want.gaussians.means, atol=1e-4)
        assert not torch.allclose(first.depth, want.depth, atol=1e-4)
        assert torch.equal(stream.output.views.image_01, views.take(first.anchors).image_01)


@torch.no_grad()
def test_the_host_is_as_before_beside_a_stream(small):
    host = tiny(small)
    views = graded_rooms([0, 1], 5, 1, 32).context
    scene = views.map(lambda part: part[:1])
    with attach(host, CONFIG):
        before = host(views).depth
        stream = SceneStream(host, scene)
        assert torch.equal(host(views).depth, before)
        with pytest.raises(ValueError, match="holds one scene"):
            stream.add(views)
        with pytest.raises(ValueError, match=r"expected pictures of \(32, 32\)"):
            stream.add(graded_rooms([0], 2, 1, 64).context)
        assert torch.equal(host(views).depth, before)


def test_what_cannot_be_streamed_is_named(small):
    host = tiny(small)
    scene = graded_rooms([0], 5, 1, 32).context
    with pytest.raises(ValueError, match="no compressor that fuses"):
        SceneStream(host, scene)
    with attach(host, replace(CONFIG, fuse=False)), pytest.raises(ValueError, match="no compressor that fuses"):
        SceneStream(host, scene)
    with attach(host, CONFIG), pytest.raises(ValueError, match="holds one scene"):
        SceneStream(host, graded_rooms([0, 1], 5, 1, 32).context)
