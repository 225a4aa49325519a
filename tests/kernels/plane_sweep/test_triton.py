import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.plane_sweep import sweep_planes

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def inputs(views, channels, size, count, candidates, per_pixel, half, device="cpu"):
    """Views that see each other, some pixels behind a camera and some outside."""
    generator = torch.Generator().manual_seed(views + channels)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    height, width = size
    features = draw(views, channels, height, width)
    others = torch.stack([torch.randperm(views - 1, generator=generator)[:count] for _ in range(views)])
    others = others + (others >= torch.arange(views)[:, None])
    rows, columns = torch.meshgrid(torch.arange(height) + half, torch.arange(width) + half, indexing="ij")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)]).flatten(1)
    turn = torch.eye(3) + 0.05 * draw(views, count, 3, 3) * torch.tensor([1.0, 1.0, 0.1])[:, None]
    ray = turn @ pixels
    shift = draw(views, count, 3, 1) * torch.tensor([3.0, 3.0, 1.0])[:, None]
    place = (height, width) if per_pixel else (1, 1)
    inverse = 0.2 + torch.rand(views, candidates, *place, generator=generator)
    return [part.to(device) for part in (features, others, ray, shift, inverse)]


def compare(*arguments, device="cpu"):
    from hone_kernels.plane_sweep.triton import sweep_planes_backward, sweep_planes_forward

    half = arguments[-1]
    features, others, *geometry = inputs(*arguments, device=device)
    exact = features.double().requires_grad_()
    want = sweep_planes(exact, others, *(part.double() for part in geometry), half=half, backend="reference")
    grad = torch.linspace(-1, 1, want.numel(), device=device).view_as(want)
    (want_grad,) = torch.autograd.grad(want, exact, grad.double())
    with nan_poison():
        got = sweep_planes_forward(features, others, *geometry, half)
        got_grad = sweep_planes_backward(features, others, *geometry, half, grad)
    assert want.abs().max() > 0.3
    # Places in float32 move a tap's weight by about 1e-5.
    assert_close(got.double(), want, atol=2e-4, rtol=1e-3)
    assert_close(got_grad.double(), want_grad, atol=2e-3, rtol=2e-3)


@pytest.mark.interpret
@pytest.mark.parametrize(
    "arguments",
    [(3, 8, (3, 5), 2, 3, False, 0.0), (2, 24, (4, 6), 1, 9, True, 0.5), (4, 16, (2, 4), 3, 8, True, 0.0)],
    ids=str,
)
def test_interpreted(arguments):
    compare(*arguments)


def test_more_pixels_than_a_launch_takes_are_refused():
    from hone_kernels.plane_sweep.triton import sweep_planes_forward

    tensors = inputs(2, 1, (725, 724), 1, 1, False, 0.0)
    with pytest.raises(ValueError, match=r"one launch takes at most 524,280 pixels of a view; got 524,900\. Call it"):
        sweep_planes_forward(*tensors, 0.0)


@pytest.mark.interpret
def test_interpreted_autograd():
    features, *rest = inputs(3, 8, (4, 5), 2, 3, False, 0.0)
    features.requires_grad_()
    grads = [
        torch.autograd.grad(sweep_planes(features, *rest, half=0.0, backend=name).square().sum(), features)[0]
        for name in ("reference", "triton")
    ]
    assert grads[0].abs().max() > 0.1
    assert_close(grads[1], grads[0], atol=2e-3, rtol=2e-3)
    rest[-1].requires_grad_()
    with pytest.raises(ValueError, match="gives rays and depths no gradient"):
        sweep_planes(features, *rest, half=0.0, backend="triton")


@pytest.mark.interpret
def test_interpreted_under_another_default_dtype():
    tensors = inputs(2, 4, (1, 3), 1, 2, False, 0.0)
    torch.set_default_dtype(torch.float64)
    try:
        got = sweep_planes(*tensors, half=0.0, backend="triton")
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32


@pytest.mark.compile
@pytest.mark.parametrize("channels", [64, 128])
def test_compiles_without_spills(channels):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.plane_sweep import triton as module

    tensors = inputs(2, channels, (8, 8), 1, 16, True, 0.0)
    with record_launches(module, "_forward_kernel", "_backward_kernel") as launches:
        out = module.sweep_planes_forward(*tensors, 0.0)
        module.sweep_planes_backward(*tensors, 0.0, out)
    assert len(launches) == 2
    for launch in launches:
        for sm in (80, 90):
            assert compile_launch(launch, sm).spills == 0, launch


@requires_gpu(min_sm=80)
def test_on_a_gpu():
    compare(3, 128, (32, 56), 2, 128, False, 0.0, device="cuda")
    compare(4, 64, (33, 20), 3, 32, True, 0.5, device="cuda")
    tensors = inputs(3, 128, (32, 56), 2, 128, False, 0.0, device="cuda")
    drawn = [sweep_planes(*tensors, half=0.0) for _ in range(2)]
    assert torch.equal(*drawn)
