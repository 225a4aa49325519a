import re

import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.splat_blend import blend_tiles

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def scene(counts, seed=0, device="cpu", opacity=1.0):
    """Tiles of two pictures with these many Gaussians, most near them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator)

    total = 40
    a, c = 0.1 + 0.8 * draw(total), 0.1 + 0.8 * draw(total)
    b = (2 * draw(total) - 1) * 0.9 * (a * c).sqrt()
    place = draw(total, 2) * 12 - 2
    values = torch.cat(
        [place, torch.stack([a, b, c, opacity * draw(total)], -1), draw(total, 3), 1 + draw(total, 1)], 1
    )
    # Gaussians that reach the limits: opaque, and too faint to be drawn.
    values[0, 5], values[1, 5] = 1.0, 0.003
    values[0, :2] = 1.5
    order = torch.cat([torch.randperm(total, generator=generator)[:count] for count in counts])
    return values.to(device), order.to(device), torch.tensor(counts, device=device)


def compare(counts, rows, columns, device="cpu", *, opacity=1.0, slots=16):
    from hone_kernels.splat_blend.triton import blend_tiles_backward, blend_tiles_forward

    values, order, counts = scene(counts, device=device, opacity=opacity)
    exact = values.double().requires_grad_()
    want = blend_tiles(exact, order, counts, rows, columns, backend="reference")
    grad = torch.linspace(-1, 1, want.numel(), device=device).view_as(want)
    (want_grad,) = torch.autograd.grad(want, exact, grad.double())
    with nan_poison():
        got = blend_tiles_forward(values, order, counts, rows, columns, slots=slots)
        got_grad = blend_tiles_backward(values, order, counts, got, grad, rows, columns, slots=slots)
    assert want.abs().max() > 0.3
    assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
    scale = want_grad.abs().amax(0).clamp(min=1e-3)
    assert_close(got_grad.double() / scale, want_grad / scale, atol=1e-4, rtol=0)


@pytest.mark.interpret
def test_interpreted():
    compare([40, 0, 3, 17, 40, 1, 33, 8], 2, 2)
    compare([40, 30], 1, 1, slots=32)
    # Faint ones, of which no pixel runs out of light.
    compare([40, 40], 1, 2, opacity=0.2)


@pytest.mark.interpret
def test_interpreted_autograd():
    values, order, counts = scene([12, 20])
    values.requires_grad_()
    grads = [
        torch.autograd.grad(blend_tiles(values, order, counts, 1, 2, backend=backend).square().sum(), values)[0]
        for backend in ("reference", "triton")
    ]
    assert grads[0].abs().max() > 0.1
    assert_close(grads[1], grads[0], atol=1e-3, rtol=1e-3)


@pytest.mark.interpret
def test_interpreted_counts_that_lie_apart_and_another_default_dtype():
    values, order, counts = scene([12, 20])
    want = blend_tiles(values, order, counts, 1, 2, backend="reference")
    torch.set_default_dtype(torch.float64)
    try:
        got = blend_tiles(values, order, torch.stack([counts, 0 * counts], 1)[:, 0], 1, 2, backend="triton")
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.compile
def test_compiles_without_spills():
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.splat_blend import triton as module

    values, order, counts = scene([12, 20])
    with record_launches(module, "_forward_kernel", "_backward_kernel") as launches:
        out = module.blend_tiles_forward(values, order, counts, 1, 2)
        module.blend_tiles_backward(values, order, counts, out, out, 1, 2)
    assert len(launches) == 2
    for launch in launches:
        for sm in (80, 90):
            assert compile_launch(launch, sm).spills == 0, launch
        assert launch.options["enable_fp_fusion"] is False
        code = compile_launch(launch, 90).sass
        assert fused_with_a_lane("SHFL.BFLY PT, R4, R2, 0x1, 0x1f ;\nFFMA R2, R3, R5, R4 ;") == 1
        assert "SHFL.BFLY" in code
        assert fused_with_a_lane(code) == 0


def fused_with_a_lane(sass):
    """Products that are added unrounded to what another lane sent: then each lane of a sum has another last bit."""
    sent, found = set(), 0
    for name, to, operands in re.findall(r"\b([A-Z][A-Z0-9.]+) (?:PT, )?(R\d+), (.*?) ;", sass):
        read = set(re.findall(r"R\d+", operands))
        found += name.startswith("FFMA") and bool(read & sent)
        sent.discard(to)
        if name.startswith("SHFL"):
            sent.add(to)
    return found


@requires_gpu(min_sm=80)
def test_on_a_gpu():
    compare([40, 0, 3, 17, 40, 1, 33, 8], 2, 2, "cuda")
    compare([40] * 64, 4, 8, "cuda", opacity=0.3)
    values, order, counts = scene([40, 30], device="cuda")
    drawn = [blend_tiles(values, order, counts, 1, 2) for _ in range(2)]
    assert torch.equal(*drawn)
