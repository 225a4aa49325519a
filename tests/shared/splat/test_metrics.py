from pathlib import Path

import pytest
import torch
import torchmetrics
from hone_core.errors import CheckpointError
from hone_splat.metrics import PSNR_CEILING, Lpips, psnr, ssim
from torchvision.models.vgg import cfgs, make_layers


def test_by_hand():
    true = torch.full((3, 3, 16, 16), 0.5)
    drawn = true.clone()
    drawn[0] += 0.1
    drawn[1] = 7.0  # clipped to 1: half off
    assert psnr(drawn, true).tolist() == pytest.approx([20.0, 6.0206, PSNR_CEILING], abs=1e-3)
    flat = (2 * 0.5 * 1.0 + 1e-4) / (0.5**2 + 1.0 + 1e-4)
    assert ssim(drawn, true).tolist()[1:] == pytest.approx([flat, 1.0], abs=1e-4)
    with pytest.raises(ValueError, match="two sets of pictures"):
        psnr(true, true[:1])
    with pytest.raises(ValueError, match=r"11 x 11 pixels at a time; got pictures \[16, 10\]"):
        ssim(drawn[..., :10], true[..., :10])


def test_lpips_is_its_definition_on_the_weights_that_are_given():
    torch.manual_seed(0)
    layers = make_layers(cfgs["D"])
    lpips = Lpips({f"features.{name}": value for name, value in layers.state_dict().items()})
    drawn, true = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    drawn.requires_grad_()
    found = lpips(drawn, true)
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    linear = torch.load(folder / "vgg.pth", weights_only=True, map_location="cpu")
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((2 * x - 1 - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for x in (drawn, true))
    want, depth = 0.0, 0
    for number, layer in enumerate(layers[:30]):
        a, b = layer(a), layer(b)
        if number in (3, 8, 15, 22, 29):
            unit = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b)]
            gap = (unit[0] - unit[1]).square() * linear[f"lin{depth}.model.1.weight"][0]
            want, depth = want + gap.sum(1).mean((1, 2)), depth + 1
    assert torch.allclose(found, want, rtol=1e-4)
    (grad,) = torch.autograd.grad(found.sum(), drawn)
    assert float(grad.abs().max()) > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    with pytest.raises(CheckpointError, match=r"no weights of torchvision's VGG-16: features\.0\.bias"):
        Lpips({"features.0.weight": layers[0].weight})
