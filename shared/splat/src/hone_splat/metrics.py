"""How far a picture is from the true one, per picture: PSNR and SSIM by torchmetrics.

LPIPS is not here: it is only LPIPS with its published VGG weights, which nothing in this repository downloads.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["PSNR_CEILING", "psnr", "ssim"]

PSNR_CEILING = 100.0
"""PSNR of equal pictures, in dB."""


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
    """Structural similarity, 11 x 11 Gaussian window, of pictures of at least 11 x 11 pixels."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(image_01, true_01)
    values = structural_similarity_index_measure(
        image_01.clamp(0, 1).float(), true_01.clamp(0, 1).float(), data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values.reshape(len(image_01))


def _check(image_01: Tensor, true_01: Tensor) -> None:
    if image_01.shape != true_01.shape or image_01.ndim != 4:
        raise ValueError(
            f"expected two sets of pictures [N, 3, H, W]; got {list(image_01.shape)} and {list(true_01.shape)}"
        )
