import sys
import types

import pytest
import torch
from hone_kernels.splat_blend import bench as module
from hone_kernels.splat_blend.bench import _check, _cloud, _gsplat, _ways, parse

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


@pytest.mark.interpret
def test_what_is_timed_is_alike_or_is_not_timed():
    values, low, high = _cloud(*parse("2x40x8x12"), 0, torch.device("cpu"))
    ways = _ways(values, low, high, (8, 12))
    grad = torch.linspace(-1, 1, 2 * 8 * 12 * 5).view(2, 8, 12, 5)
    errors = _check(ways, values, grad)
    assert set(errors) == {("triton", "forward"), ("triton", "forward and backward")}
    assert max(errors.values()) > 0
    with pytest.raises(RuntimeError, match="pictures by triton is wrong"):
        _check(ways | {"triton": lambda x: 1.01 * ways["torch"](x)}, values, grad)


def test_pictures_are_every_gaussian_on_every_pixel():
    values, low, high = _cloud(1, 30, 8, 12, 0, torch.device("cpu"))
    drawn = _ways(values, low, high, (8, 12))["torch"](values)[0]
    y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(12) + 0.5, indexing="ij")
    light, want = torch.ones(8, 12), torch.zeros(8, 12, 5)
    for one in sorted(values[0].tolist(), key=lambda row: row[9]):
        dx, dy = x - one[0], y - one[1]
        alpha = one[5] * torch.exp(-0.5 * (one[2] * dx**2 + one[4] * dy**2) - one[3] * dx * dy)
        alpha = torch.where(alpha < 1 / 255, 0, alpha.clamp(max=0.999))
        weight = torch.where(light * (1 - alpha) > 1e-4, light * alpha, 0)
        want += weight[..., None] * torch.tensor([*one[6:9], 1.0, one[9]])
        light = light * (1 - alpha)
    assert torch.allclose(drawn, want, atol=1e-5)


def test_gsplat_gets_what_it_documents(monkeypatch):
    values, low, high = _cloud(2, 30, 20, 36, 0, torch.device("cpu"))
    seen = {}

    def isect_tiles(means, radii, depths, tile, across, down):
        assert (tile, across, down) == (16, 3, 2)
        assert radii.dtype == torch.int32
        assert (means.shape, radii.shape, depths.shape) == ((2, 30, 2), (2, 30, 2), (2, 30))
        shown = high[..., 0] > 0
        assert torch.equal((radii > 0).all(-1), shown)
        assert bool((means - radii <= low)[shown].all())
        assert bool((means + radii >= high)[shown].all())
        return None, "numbers", "members"

    def isect_offset_encode(numbers, images, across, down):
        assert (numbers, images, across, down) == ("numbers", 2, 3, 2)
        return "offsets"

    def rasterize_to_pixels(means, conics, colours, opacities, width, height, tile, offsets, members):
        assert (width, height, tile, offsets, members) == (36, 20, 16, "offsets", "members")
        assert torch.equal(torch.cat([means, conics, opacities[..., None], colours], -1), values)
        seen["colours"] = torch.rand(2, 20, 36, 4)
        return seen["colours"], torch.full((2, 20, 36, 1), 0.25)

    names = (isect_tiles, isect_offset_encode, rasterize_to_pixels)
    monkeypatch.setitem(sys.modules, "gsplat", types.SimpleNamespace(**{name.__name__: name for name in names}))
    found = _gsplat(values, low, high, (20, 36))(values)
    assert torch.equal(found[..., [0, 1, 2, 4]], seen["colours"])
    assert bool((found[..., 3] == 0.25).all())
    monkeypatch.setitem(sys.modules, "gsplat", None)
    assert module._gsplat(values, low, high, (20, 36)) is None


@pytest.mark.parametrize("text", ["1x30x10x12", "1x30x8", "0x30x8x12", "small"])
def test_a_shape_that_is_none_is_named(text):
    with pytest.raises(ValueError, match="PICTURESxGAUSSIANSxHEIGHTxWIDTH"):
        parse(text)
