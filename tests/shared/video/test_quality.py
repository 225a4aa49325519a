import math

import pytest
import torch
from hone_video.quality import psnr, ssim


def test_psnr_by_hand():
    reference = torch.zeros(3, 3, 2, 11, 11)
    clips = reference.clone()
    clips[0] = 0.1
    clips[1, :, 0] = 0.2  # half of the pixels off by 0.2: mean square 0.02
    assert psnr(clips, reference).tolist() == pytest.approx([20.0, -10 * math.log10(0.02), 100.0], rel=1e-5)


def test_ssim_by_hand():
    reference = torch.full((2, 3, 2, 16, 16), 0.25)
    clips = reference.clone()
    clips[0, :, 1] = 0.75
    # flat images: SSIM is (2 a b + c1) / (a^2 + b^2 + c1), c1 = 0.01^2; the other frame is equal
    flat = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(clips, reference).tolist() == pytest.approx([(1 + flat) / 2, 1.0], abs=1e-3)


def test_pairs_must_match():
    with pytest.raises(ValueError, match=r"must both be \[B, 3, F, H, W\]"):
        psnr(torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 4, 4, 2))
    with pytest.raises(ValueError, match=r"must both be \[B, 3, F, H, W\]"):
        ssim(torch.zeros(3, 2, 16, 16), torch.zeros(3, 2, 16, 16))
