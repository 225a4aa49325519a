"""How far a picture is from the true one, per picture: PSNR, SSIM and LPIPS by torchmetrics.

LPIPS is only LPIPS with VGG's published weights: they come from a file that the caller has, and nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from hone_core.errors import CheckpointError
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["PSNR_CEILING", "Lpips", "psnr", "ssim"]

PSNR_CEILING = 100.0
"""PSNR of equal pictures, in dB."""
WINDOW = 11


def psnr(
    image_01: Float[Tensor, "n 3 height width"], true_01: Float[Tensor, "n 3 height width"]
) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio in dB, of pictures clipped to [0, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check(image_01, true_01)
    found = peak_signal_noise_ratio(
        image_01.clamp(0, 1).double(), true_01.clamp(0, 1).double(), 1.0, reduction="none", dim=(1, 2, 3)
    )
    return found.clamp(max=PSNR_CEILING).float()


def ssim(
    image_01: Float[Tensor, "n 3 height width"], true_01: Float[Tensor, "n 3 height width"]
) -> Float[Tensor, " n"]:
    """Structural similarity, 11 x 11 Gaussian window, of pictures of at least 11 x 11 pixels.

    Raises:
        ValueError: Shapes differ, or pictures are smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(image_01, true_01)
    if min(image_01.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM looks at {WINDOW} x {WINDOW} pixels at a time; got pictures {list(image_01.shape[2:])}")
    values = structural_similarity_index_measure(
        image_01.clamp(0, 1).float(), true_01.clamp(0, 1).float(), data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values.reshape(len(image_01))


class Lpips(nn.Module):
    """Distance of VGG-16's features under the published linear layers, frozen; gradients reach the pictures.

    Args:
        state: VGG-16's state dict as torchvision publishes it (``vgg16-397923af.pth``); its classifier is not looked
            at. The linear layers come with torchmetrics.

    Raises:
        CheckpointError: It is no VGG-16's.

    Source: LPIPS 0.1, net "vgg".
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS

        with torch.random.fork_rng(devices=[]):
            self.net = _LPIPS(net="vgg", pnet_rand=True)
        # Blocks of torchmetrics keep the layers' numbers: features.5 is slice2.5.
        places = {name.split(".", 1)[1]: name for name in self.net.net.state_dict()}
        wanted = {f"features.{name}": place for name, place in places.items()}
        shapes = {name: self.net.net.state_dict()[place].shape for name, place in wanted.items()}
        wrong = [name for name, shape in shapes.items() if name not in state or state[name].shape != shape]
        if wrong:
            raise CheckpointError(f"these are no weights of torchvision's VGG-16: {', '.join(wrong[:3])} do not fit")
        self.net.net.load_state_dict({place: state[name] for name, place in wanted.items()})

    @classmethod
    def load(cls, path: str | Path) -> Lpips:
        """Read VGG-16's weights from a file, ``.pth`` or ``.safetensors``.

        Raises:
            CheckpointError: The file is missing or damaged, or no VGG-16's.
        """
        from .published import read_state

        return cls(read_state(path))

    def forward(
        self, image_01: Float[Tensor, "n 3 height width"], true_01: Float[Tensor, "n 3 height width"]
    ) -> Float[Tensor, " n"]:
        """Of each picture; values outside of [0, 1] are not clipped, so that a loss has a gradient there."""
        _check(image_01, true_01)
        return self.net(image_01, true_01, normalize=True).flatten()


def _check(image_01: Tensor, true_01: Tensor) -> None:
    if image_01.shape != true_01.shape or image_01.ndim != 4:
        raise ValueError(
            f"expected two sets of pictures [N, 3, H, W]; got {list(image_01.shape)} and {list(true_01.shape)}"
        )
