import pytest
import torch
from hone_visual_ar import BSQVAE, VAR, VQVAE, Infinity, infinity_schedule


def _fill(model, std):
    """Weights from each parameter's place in the sorted list of names, so that two implementations share them."""
    with torch.no_grad():
        for at, (name, parameter) in enumerate(sorted(model.named_parameters())):
            base = 1.0 if "norm" in name and name.endswith("weight") and parameter.dim() == 1 else 0.0
            parameter.copy_(base + std * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(at)))
    return model.eval()


@pytest.fixture(scope="session")
def fill():
    return _fill


@pytest.fixture(scope="session")
def make_infinity():
    def make(code_dim=16, patchify=False, **options):
        options = {"depth": 4, "width": 128, "num_heads": 4, "chunks": 2, "text_channels": 256} | options
        return _fill(Infinity(code_dim=code_dim, patchify=patchify, text_maxlen=16, **options), 0.08)

    return make


@pytest.fixture(scope="session")
def text():
    """Two prompts of 5 and 9 words, padded, and their lengths."""
    generator = torch.Generator().manual_seed(7)
    words = [torch.randn(n, 256, generator=generator) for n in (5, 9)]
    padded = torch.zeros(2, 9, 256)
    for row, prompt in zip(padded, words, strict=True):
        row[: len(prompt)] = prompt
    return padded, [5, 9], generator.get_state()


@pytest.fixture(scope="session")
def small():
    """A model of two blocks, its tokenizer, a condition of two guided prompts and a ragged schedule."""
    model = _fill(Infinity(depth=2, width=64, num_heads=2, chunks=1, code_dim=4, text_channels=128, text_maxlen=8), 0.1)
    tokenizer = _fill(BSQVAE(latent_dim=4, channels=32, multipliers=(1, 1)), 0.1)
    words = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(1))
    return model, tokenizer, model.condition(words, [6, 4]), infinity_schedule("0.06M", 1.25)


@pytest.fixture(scope="session")
def var():
    """A VAR of three blocks and its tokenizer."""
    model = VAR(depth=3, head_dim=32, patch_nums=(1, 2, 3, 5, 8), vocabulary=64, code_dim=16, num_classes=10)
    return _fill(model, 0.08), _fill(VQVAE(vocabulary=64, latent_dim=16, channels=32, scales=5), 0.1)
