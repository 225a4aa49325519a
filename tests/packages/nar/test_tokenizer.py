import re

import pytest
import torch
from hone_nar.models import tiny_tokenizer
from hone_nar.tokenizer import LlamaGenVQModel
from transformers import JanusVQVAE, JanusVQVAEConfig

RENAMED = {"mid.0": "mid.block_1", "mid.1": "mid.attn_1", "mid.2": "mid.block_2"}


@pytest.fixture(scope="module")
def pair():
    """Ours, and the same network of transformers with the same weights, its codebook normalised."""
    torch.manual_seed(0)
    ours = LlamaGenVQModel(64, 8, 32, 32, (1, 2, 2), 1).eval()
    theirs = JanusVQVAE(
        JanusVQVAEConfig(
            embed_dim=8, num_embeddings=64, latent_channels=32, base_channels=32, channel_multiplier=[1, 2, 2],
            num_res_blocks=1, num_patches=8,
        )
    ).eval()  # fmt: skip
    state = {}
    for name, value in ours.state_dict().items():
        for ours_name, theirs_name in RENAMED.items():
            name = re.sub(rf"(coder\.){re.escape(ours_name)}\.", rf"\1{theirs_name}.", name)
        name = re.sub(r"^encoder\.conv_blocks\.(\d+)\.res", r"encoder.down.\1.block", name)
        name = re.sub(r"^decoder\.conv_blocks\.(\d+)\.res", r"decoder.up.\1.block", name)
        name = re.sub(r"^encoder\.conv_blocks", "encoder.down", name)
        name = re.sub(r"^decoder\.conv_blocks", "decoder.up", name)
        state[name] = value
    state["quantize.embedding.weight"] = torch.nn.functional.normalize(state["quantize.embedding.weight"], dim=-1)
    theirs.load_state_dict(state)
    return ours, theirs


def test_decoding_is_that_of_transformers(pair):
    ours, theirs = pair
    codes = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs.decode(codes).clamp(-1, 1)
        found = ours.decode(codes.unflatten(1, (8, 8)))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_many_images_are_decoded_in_parts(pair, monkeypatch):
    ours, _ = pair
    codes = torch.randint(64, (5, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = ours.decode(codes)
        made = []
        monkeypatch.setattr("hone_nar.tokenizer.PIXELS", 2 * 32 * 32)
        hook = ours.decoder.register_forward_pre_hook(lambda module, given: made.append(len(given[0])))
        torch.testing.assert_close(ours.decode(codes), wanted, atol=1e-5, rtol=0)
        hook.remove()
    assert made == [2, 2, 1]


def test_encoding_takes_the_entry_most_alike(pair):
    ours, _ = pair
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        codes = ours.encode(image)
        latent = ours.quant_conv(ours.encoder(image))
    assert codes.shape == (1, 8, 8)
    entries = ours.quantize.embedding.weight
    for row, column in ((0, 0), (3, 7), (5, 2)):
        likeness = torch.nn.functional.cosine_similarity(latent[0, :, row, column][None], entries)
        assert int(likeness.argmax()) == int(codes[0, row, column])


def test_a_grid_need_not_be_square():
    model = tiny_tokenizer()
    image = torch.zeros(1, 3, 16, 28)
    assert model.decode(model.encode(image)).shape == image.shape


def test_bad_input_is_named():
    model = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"multiples of 4; got \[1, 3, 30, 32\]"):
        model.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="codes must lie in 0 to 31; got 0 to 32"):
        model.decode(torch.tensor([[[0, 32]]]))


def test_latents_that_are_not_finite_are_no_codes():
    model = tiny_tokenizer()
    with pytest.raises(RuntimeError, match=r"latents are not finite in torch\.float32"):
        model.encode(torch.full((1, 3, 8, 8), torch.nan))
