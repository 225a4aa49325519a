import pytest
import torch
from hone_splat.metrics import PSNR_CEILING, psnr, ssim


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
