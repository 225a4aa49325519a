import math

import pytest
import torch
from hone_nar.larp import LARPTokenizer, sincos
from hone_nar.models import tiny
from hone_nar.pipelines import NARVideoPipeline

TABLES = ("encoder_patch_pe", "decoder_patch_query_embed", "decoder_latent_pe")


WANTED = (
    [0.6476, 0.58212, 0.05391, 0.25886, 0.89198, 0.66853, 0.27029, 0.12101],
    [0.64809, 0.58327, 0.059, 0.25714, 0.88645, 0.6716, 0.2768, 0.12333],
)


def small(**options):
    defaults = {"frames": 4, "size": 16, "tokens": 6, "dim": 16, "depth": 1, "heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LARPTokenizer(**(defaults | {"codebook_size": 16, "bottleneck_dim": 4} | options)).eval()


@torch.no_grad()
def test_codes_and_clips_are_the_releases():
    """Weights by a formula; numbers of the release's class with the norms of its time."""
    model = small()
    for at, (name, value) in enumerate(sorted(model.state_dict().items())):
        if name not in TABLES:
            wave = 0.35 * torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + 1.3 * at)
            value.copy_((wave + (value.ndim == 1 and "norm" in name)).view(value.shape))
    model.final_layer.linear.weight.mul_(0.1)
    model.final_layer.linear.bias.fill_(0.5)
    clips = (torch.sin(torch.arange(2 * 3 * 4 * 16 * 16).float() * 0.11) / 2 + 0.5).view(2, 3, 4, 16, 16)
    assert model.encode(clips).tolist() == 2 * [[10, 12, 3, 3, 10, 12]]
    found = model.decode(torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]]))
    places = [(at % 3, at % 4, 5 * at % 16, 3 * at % 16) for at in range(8)]
    for row, wanted in enumerate(WANTED):
        values = torch.stack([found[(row, *place)] for place in places])
        torch.testing.assert_close(values, torch.tensor(wanted), atol=2e-5, rtol=0)


def test_places_by_hand():
    found = sincos(torch.tensor([0, 1]), 4)
    assert found[0].tolist() == [0, 0, 1, 1]
    wanted = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    torch.testing.assert_close(found[1], torch.tensor(wanted, dtype=torch.float64))


def test_a_patch_of_the_clip_is_where_it_belongs():
    """Of a decoder whose last layer alone speaks, so that every patch is the same."""
    model = small()
    pixels = torch.rand(4, 8, 8, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.final_layer.linear.weight.zero_()
        model.final_layer.linear.bias.copy_(pixels.flatten())
        clip = model.decode(torch.zeros(1, 6, dtype=torch.long))
    for rows in (slice(0, 8), slice(8, 16)):
        torch.testing.assert_close(clip[0, :, :, rows, 8:], pixels.permute(3, 0, 1, 2))


def test_bad_input_is_named():
    model = small()
    with pytest.raises(ValueError, match=r"expected clips \[B, 3, 4, 16, 16\]; got \[1, 3, 8, 16, 16\]"):
        model.encode(torch.zeros(1, 3, 8, 16, 16))
    with pytest.raises(ValueError, match=r"expected codes \[B, 6\]; got \[1, 5\]"):
        model.decode(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="codes must lie in 0 to 15; got 0 to 16"):
        model.decode(torch.tensor([[0, 1, 2, 3, 4, 16]]))
    with pytest.raises(ValueError, match="no multiple of square patches"):
        small(size=20)


def test_clips_of_classes(tmp_path):
    pipe = NARVideoPipeline(tiny("video", grid=(1, 2, 3), vocab_size=16), small())
    both = pipe([3, 7], seeds=[1, 5], output_type="pt")
    assert both.shape == (2, 3, 4, 16, 16)
    torch.testing.assert_close(pipe(7, seeds=5, output_type="pt"), both[1:], atol=1e-5, rtol=0)
    pipe.save_pretrained(tmp_path)
    again = NARVideoPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(again([3, 7], seeds=[1, 5], output_type="pt"), both)
    assert pipe(3).shape == (1, 4, 16, 16, 3)
    assert pipe(3, output_type="codes").shape == (1, 6)
    with pytest.raises(ValueError, match="classes are 0 to 9; got 10"):
        pipe(10)
    with pytest.raises(ValueError, match="output_type must be np, pt or codes"):
        pipe(3, output_type="pil")
    with pytest.raises(ValueError, match="do not belong together: 24 tokens of 32 codes, and 6 of 16"):
        NARVideoPipeline(tiny("video"), small())
    with pytest.raises(ValueError, match="no published model of clips 'nar_b'"):
        NARVideoPipeline.from_published("nar_b", transformer="x", vae="y")
