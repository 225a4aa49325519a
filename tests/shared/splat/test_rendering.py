import math
import sys
import types

import pytest
import torch
from hone_core.errors import MissingExtraError
from hone_core.testing import requires_gpu
from hone_splat import Gaussians, render, rendering
from hone_splat.cameras import look_at, quat_to_matrix
from hone_splat.harmonics import C0, evaluate_sh


def cloud(count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    means = 0.6 * draw(1, count, 3)
    scales = 0.05 + 0.1 * draw(1, count, 3).abs()
    return Gaussians(means, scales, draw(1, count, 4), draw(1, count).sigmoid(), 0.4 * draw(1, count, 3, 4))


def cameras(dtype=torch.float64):
    places = torch.tensor([[0.0, 0.0, -3.0], [1.5, -0.7, -2.5]], dtype=dtype)
    poses = look_at(places, torch.zeros(2, 3, dtype=dtype), torch.tensor([0.0, 1.0, 0.0], dtype=dtype))[None]
    inner = torch.tensor([[1.1, 0.0, 0.47], [0.0, 1.3, 0.52], [0.0, 0.0, 1.0]], dtype=dtype)
    return poses, inner.expand(1, 2, 3, 3)


def brute_force(gaussians, pose, inner, height, width):
    """Every Gaussian on every pixel, one scene and one camera, written from the rules."""
    turn = pose[:3, :3].T
    k = inner * inner.new_tensor([[width], [height], [1.0]])
    rotation = quat_to_matrix(gaussians.quats_wxyz)
    full = rotation @ torch.diag_embed(gaussians.scales**2) @ rotation.mT
    seen = []
    for i in range(len(gaussians)):
        x, y, z = turn @ (gaussians.means[i] - pose[:3, 3])
        if z <= 0.2:
            continue
        fx, fy, cx, cy = k[0, 0], k[1, 1], k[0, 2], k[1, 2]
        tx = z * (x / z).clamp(-(cx + 0.15 * width) / fx, (width - cx + 0.15 * width) / fx)
        ty = z * (y / z).clamp(-(cy + 0.15 * height) / fy, (height - cy + 0.15 * height) / fy)
        zero = torch.zeros_like(z)
        jacobian = torch.stack(
            [torch.stack([fx / z, zero, -fx * tx / z**2]), torch.stack([zero, fy / z, -fy * ty / z**2])]
        )
        linear = jacobian @ turn
        spread = linear @ full[i] @ linear.T + 0.3 * torch.eye(2, dtype=z.dtype)
        direction = torch.nn.functional.normalize(gaussians.means[i] - pose[:3, 3], dim=0)
        colour = evaluate_sh(gaussians.sh[i], direction)
        seen.append(
            (z, torch.stack([fx * x / z + cx, fy * y / z + cy]), spread.inverse(), gaussians.opacities[i], colour)
        )
    seen.sort(key=lambda entry: float(entry[0].detach()))
    rows = torch.arange(height, dtype=pose.dtype) + 0.5
    columns = torch.arange(width, dtype=pose.dtype) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    light, image, depth = torch.ones_like(x), torch.zeros(3, height, width, dtype=pose.dtype), torch.zeros_like(x)
    for z, centre, inverse, opacity, colour in seen:
        offset = torch.stack([x, y], -1) - centre
        alpha = (opacity * torch.exp(-0.5 * torch.einsum("hwi,ij,hwj->hw", offset, inverse, offset))).clamp(max=0.999)
        alpha = torch.where(alpha < 1 / 255, 0.0, alpha)
        left = light * (1 - alpha)
        weight = torch.where(left > 1e-4, light * alpha, 0.0)
        image = image + weight * colour[:, None, None]
        depth = depth + weight * z
        light = left
    return image, depth


@pytest.mark.parametrize(("height", "width"), [(24, 24), (19, 30)])
def test_equals_brute_force(height, width):
    gaussians, (poses, inner) = cloud(80), cameras()
    found = render(gaussians, poses, inner, (height, width))
    for view in range(2):
        image, depth = brute_force(gaussians[0], poses[0, view], inner[0, view], height, width)
        assert torch.allclose(found.image_01[0, view], image, atol=1e-9)
        assert torch.allclose(found.depth_z[0, view] * found.alpha[0, view], depth, atol=1e-9)


def test_equals_brute_force_from_within_the_cloud():
    gaussians, (poses, inner) = cloud(80), cameras()
    poses[..., :3, 3] *= 0.15
    local = (gaussians.means[0] - poses[0, 0, :3, 3]) @ poses[0, 0, :3, :3]
    depth, slope = local[:, 2], (local[:, 0] / local[:, 2]).abs()
    assert bool(((depth > 0) & (depth < 0.2)).any())  # too near to be drawn
    assert bool(((depth > 0.2) & (slope > 1.3)).any())  # far beside the picture
    found = render(gaussians, poses, inner, (24, 24))
    for view in range(2):
        image, _ = brute_force(gaussians[0], poses[0, view], inner[0, view], 24, 24)
        assert torch.allclose(found.image_01[0, view], image, atol=1e-9)


def test_gradients_equal_brute_force():
    poses, inner = cameras()
    grads = []
    for draw in (
        lambda g: render(g, poses, inner, (16, 16)).image_01[0, 1],
        lambda g: brute_force(g[0], poses[0, 1], inner[0, 1], 16, 16)[0],
    ):
        leaves = cloud(40).map(lambda part: part.clone().requires_grad_())
        weight = torch.linspace(-1, 1, 3 * 256, dtype=torch.float64).view(3, 16, 16)
        (draw(leaves) * weight).sum().backward()
        grads.append(
            [leaves.means.grad, leaves.scales.grad, leaves.quats_wxyz.grad, leaves.opacities.grad, leaves.sh.grad]
        )
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 1e-4
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_one_gaussian_by_hand():
    # Straight ahead at depth 2, focal length 16 pixels, deviation 0.25: 2 pixels wide, and 0.3 of dilation.
    one = Gaussians(
        torch.tensor([[[0.0, 0.0, 2.0]]]), torch.full((1, 1, 3), 0.25), torch.tensor([[[1.0, 0, 0, 0]]]),
        torch.tensor([[0.8]]), torch.full((1, 1, 3, 1), 0.25 / C0),
    )  # fmt: skip
    pose, inner = torch.eye(4)[None, None], torch.tensor([[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1.0]])[None, None]
    found = render(one, pose, inner, (16, 16), background=torch.tensor([0.1, 0.2, 0.3]))
    variance = 2.0**2 + 0.3
    alpha = 0.8 * math.exp(-0.5 * (0.5**2 + 2.5**2) / variance)  # pixel centre at (8.5, 10.5)
    assert float(found.alpha[0, 0, 10, 8]) == pytest.approx(alpha, rel=1e-5)
    want = [0.75 * alpha + (1 - alpha) * back for back in (0.1, 0.2, 0.3)]
    assert found.image_01[0, 0, :, 10, 8].tolist() == pytest.approx(want, rel=1e-5)
    assert float(found.depth_z[0, 0, 10, 8]) == pytest.approx(2.0)


def test_nothing_in_sight_is_the_background():
    behind = cloud(10).map(lambda part: part.clone())
    behind.means[..., 2] -= 100
    poses, inner = cameras()
    found = render(behind, poses[:, :1], inner[:, :1], (8, 8), background=torch.full((3,), 0.5, dtype=torch.float64))
    assert torch.equal(found.image_01, torch.full_like(found.image_01, 0.5))


def test_no_gaussians_are_the_background():
    poses, inner = cameras()
    found = render(cloud(3)[:, :0], poses, inner, (17, 13), background=torch.full((3,), 0.5, dtype=torch.float64))
    assert torch.equal(found.image_01, torch.full((*poses.shape[:2], 3, 17, 13), 0.5, dtype=torch.float64))
    assert not found.alpha.any()
    assert not found.depth_z.any()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_gaussians_of_16_bits_are_drawn_in_float32(kind):
    short = cloud(10).map(lambda part: part.to(kind))
    poses, inner = (part.float() for part in cameras())
    found, want = (render(one, poses, inner, (17, 13)) for one in (short, short.map(lambda part: part.float())))
    assert found.image_01.dtype == torch.float32
    assert torch.equal(found.image_01, want.image_01)


def test_batches_that_do_not_fit_are_named():
    poses, inner = cameras()
    with pytest.raises(ValueError, match="of the same B"):
        render(cloud(3), poses.expand(2, -1, -1, -1), inner, (8, 8))
    with pytest.raises(ValueError, match="backend must be torch or gsplat; got 'other'"):
        render(cloud(3), poses, inner, (8, 8), backend="other")


def test_beside_the_picture_the_linear_map_stops_where_3dgs_stops():
    # 90 degrees, 8 pixels wide: the edge is at slope 1, and 0.3 of half the picture farther at 1.3.
    one = Gaussians(
        torch.tensor([[[4.0, 0.0, 2.0], [2.4, 0.0, 2.0]]]), torch.full((1, 2, 3), 0.5),
        torch.tensor([[[1.0, 0, 0, 0]] * 2]), torch.full((1, 2), 0.5), torch.zeros(1, 2, 3, 1),
    )  # fmt: skip
    inner = torch.tensor([[[[4.0, 0, 4], [0, 4, 4], [0, 0, 1]]]])
    values, _, _ = rendering._project(one, torch.eye(4)[None, None], inner, (8, 8), 0.2)
    for found, slope in zip(values[0, 0, :, 2], (1.3, 1.2), strict=True):
        assert float(1 / found) == pytest.approx(0.25 * 4 * (1 + slope**2) + 0.3)


def test_gsplat_gets_what_it_documents(monkeypatch):
    poses, inner = cameras(torch.float32)
    drawn = torch.rand(1, 2, 6, 8, 4)

    def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, **rest):
        assert means.shape == scales.shape == (1, 5, 3)
        assert (quats.shape, opacities.shape, colors.shape) == ((1, 5, 4), (1, 5), (1, 5, 4, 3))
        assert torch.allclose(viewmats @ poses, torch.eye(4).expand(1, 2, 4, 4), atol=1e-5)
        assert torch.allclose(Ks[0, 1], inner[0, 1] * torch.tensor([[8.0], [6.0], [1.0]]))
        assert (rest["width"], rest["height"], rest["near_plane"], rest["eps2d"], rest["sh_degree"]) == (
            8,
            6,
            0.3,
            0.3,
            1,
        )
        assert rest["backgrounds"].shape == (1, 2, 3)
        return drawn, drawn[..., :1] / 2, {}

    monkeypatch.setitem(sys.modules, "gsplat", types.SimpleNamespace(rasterization=rasterization))
    found = render(cloud(5, dtype=torch.float32), poses, inner, (6, 8), near=0.3, backend="gsplat")
    assert torch.equal(found.image_01[0, 1, 2], drawn[0, 1, :, :, 2])
    assert torch.equal(found.alpha, drawn[..., 0] / 2)
    assert torch.equal(found.depth_z, drawn[..., 3])
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(MissingExtraError, match="gsplat"):
        render(cloud(5, dtype=torch.float32), poses, inner, (6, 8), backend="gsplat")


@requires_gpu(min_sm=80)
def test_gsplat_draws_the_same_with_the_same_gradients():
    pytest.importorskip("gsplat")
    poses, inner = (part.cuda() for part in cameras(torch.float32))
    weight = torch.linspace(-1, 1, 2 * 3 * 24 * 24, device="cuda").view(1, 2, 3, 24, 24)
    found = []
    for backend in ("torch", "gsplat"):
        leaves = cloud(80, dtype=torch.float32).map(lambda part: part.cuda().requires_grad_())
        picture = render(
            leaves, poses, inner, (24, 24), background=torch.tensor([0.1, 0.2, 0.3]).cuda(), backend=backend
        )
        grads = torch.autograd.grad((picture.image_01 * weight).sum(), [leaves.means, leaves.scales, leaves.sh])
        found.append([picture.image_01, picture.alpha, picture.depth_z, *grads])
    names = ("image", "alpha", "depth", "means", "scales", "sh")
    apart = {
        name: float((ours - theirs).detach().norm() / theirs.detach().norm())
        for name, ours, theirs in zip(names, *found, strict=True)
    }
    assert max(apart.values()) < 1e-3, apart
