from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hone_core.testing import assert_close
from hone_visual_ar import BSQVAE, VQVAE, ScaleSchedule
from hone_visual_ar.tokenizers import bits_of, codes_of

SCHEDULE = ScaleSchedule(((1, 1), (2, 2), (3, 2), (6, 4)))


@pytest.mark.parity
def test_bsq_as_the_release(fill):
    tokenizer = fill(BSQVAE(latent_dim=16, channels=32, multipliers=(1, 1, 2)), 0.1)
    image = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    indices, latent = tokenizer.encode(image, SCHEDULE)
    assert_close(latent[1].flatten()[:6], torch.tensor([-0.5, 0.0, -0.5, 0.0, -0.625, -0.125]))
    golden = torch.tensor([-0.1063, -0.81197, -0.60752, -0.55708, -0.41299, -0.36513])
    assert_close(tokenizer.decode(latent)[1].flatten()[:6], golden, atol=1e-4)
    assert [tuple(i.shape) for i in indices] == [(2, 16, h, w) for h, w in SCHEDULE.grids]


@pytest.mark.parity
def test_vq_as_the_release(var):
    model, tokenizer = var
    generator = torch.Generator().manual_seed(7)
    torch.randn(2, model.schedule.total - 1, 16, generator=generator)
    indices, latent = tokenizer.encode(torch.rand(2, 3, 128, 128, generator=generator) * 2 - 1, model.schedule)
    assert indices[-1][1].flatten()[:8].tolist() == [24, 32, 25, 53, 15, 57, 57, 53]
    golden = torch.tensor([-0.19822, -0.04199, -0.01564, 0.0527, -0.05226, -0.30688])
    assert_close(tokenizer.decode(latent)[1].flatten()[:6], golden, atol=1e-4)


def test_a_latent_is_the_sum_of_its_codes_brought_up(fill):
    tokenizer = fill(BSQVAE(latent_dim=4, channels=32, multipliers=(1, 1)), 0.1)
    indices, latent = tokenizer.to_scales(torch.randn(2, 4, 6, 4), SCHEDULE)
    total = torch.zeros(2, 4, 6, 4, dtype=torch.float64)
    for found in indices:
        code = (2.0 * found - 1).double() / 2
        total += F.interpolate(code[:, :, None], size=(1, 6, 4), mode="trilinear")[:, :, 0]
    assert_close(latent, total)


def test_codes_lie_on_the_sphere_and_nearest_is_the_sign():
    bits = bits_of(torch.tensor([-0.1, 0.0, 0.2]))
    assert bits.tolist() == [0, 0, 1]
    assert_close(codes_of(bits, 3).norm(), torch.tensor(1.0))
    tokenizer = BSQVAE(latent_dim=2, channels=32, multipliers=(1,))
    half = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    assert_close(tokenizer.mean_code(half), torch.tensor([0.0, 0.5 / 2**0.5]))


def test_vq_takes_the_nearest_entry_and_means_are_weighted_entries(var):
    _, tokenizer = var
    entries = tokenizer.quantize.embedding.weight
    latent = torch.randn(2, 16, 3, 2)
    slow = torch.cdist(latent.movedim(1, -1).reshape(-1, 16).double(), entries.double()).argmin(1)
    assert torch.equal(tokenizer.nearest(latent).flatten(), slow)
    p = torch.rand(5, 1, 64).softmax(-1)
    assert_close(tokenizer.mean_code(p), torch.einsum("nv,vd->nd", p[:, 0], entries))


def test_gradients_pass_straight_through_the_bits():
    tokenizer = BSQVAE(latent_dim=4, channels=32, multipliers=(1, 1))
    image = torch.rand(1, 3, 12, 8) * 2 - 1
    _, latent = tokenizer.encode(image, SCHEDULE)
    latent.square().sum().backward()
    assert tokenizer.encoder.conv_in.conv.weight.grad.abs().sum() > 0


def test_a_scales_gradient_is_of_its_own_rest_alone(fill):
    """What earlier scales took away counts as given: by hand, with what they took as constants."""
    tokenizer = fill(BSQVAE(latent_dim=4, channels=32, multipliers=(1, 1)), 0.1)
    features, weight = torch.randn(2, 4, 6, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 6, 4)
    indices, _ = tokenizer.to_scales(features, SCHEDULE)
    (got,) = torch.autograd.grad((tokenizer.to_scales(features, SCHEDULE)[1] * weight).sum(), features)
    up, total, taken = partial(F.interpolate, size=(6, 4), mode="bilinear", align_corners=False), 0, 0
    for found, grid in zip(indices, SCHEDULE.grids, strict=True):
        total = total + up(F.normalize(F.interpolate(features - taken, size=grid, mode="area"), dim=1))
        taken = taken + up((2.0 * found - 1).double() / 2)
    (want,) = torch.autograd.grad((total * weight).sum(), features)
    assert_close(got, want)


def test_images_of_another_size_are_refused():
    tokenizer = BSQVAE(latent_dim=4, channels=32, multipliers=(1, 1))
    with pytest.raises(ValueError, match=r"need images \[B, 3, 12, 8\]; got \[1, 3, 16, 8\]"):
        tokenizer.encode(torch.zeros(1, 3, 16, 8), SCHEDULE)


@pytest.mark.parametrize("kind", [BSQVAE, VQVAE])
def test_many_pixels_are_decoded_in_parts(kind, monkeypatch):
    tokenizer = kind(latent_dim=4, channels=32, multipliers=(1, 1), blocks=1).eval()
    latent, sizes = torch.randn(3, 4, 4, 6), []
    whole = tokenizer.decode(latent)
    monkeypatch.setattr("hone_visual_ar.tokenizers.PIXELS", 2 * 8 * 12)
    tokenizer.decoder.register_forward_hook(lambda *call: sizes.append(len(call[-1])))
    assert_close(tokenizer.decode(latent), whole, atol=1e-5)
    assert sizes == [2, 1]
