import pytest
import torch
from hone_core.hosts import HostFacts
from hone_sparsevar.config import HostConfig
from hone_sparsevar.host import Host, save_host

FACTS = HostFacts(
    command="hone-sparsevar train-host",
    seed=0,
    steps=1,
    seconds=1.0,
    result={"objects": 0.9},
    gates={},
    passed=True,
    train_config={},
    environment={},
)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """An untrained host on disk, small enough to draw with in a moment."""
    host = Host.untrained(HostConfig(depth=2, width=32, heads=2, grader_channels=8), seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in host.transformer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return save_host(host, tmp_path_factory.mktemp("host") / "host.safetensors", FACTS)


@pytest.fixture(scope="session")
def model():
    """A model of three blocks with weights large enough to matter, its tokenizer, a condition and a ragged schedule."""
    from hone_visual_ar import BSQVAE, Infinity, ScaleSchedule

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = Infinity(depth=3, width=64, num_heads=2, chunks=1, code_dim=4, text_channels=128, text_maxlen=8)
        tokenizer = BSQVAE(latent_dim=4, channels=32, multipliers=(1, 1), blocks=1)
        for parameter in transformer.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
        words = torch.randn(2, 6, 128)
    transformer, tokenizer = transformer.eval(), tokenizer.eval()
    with torch.no_grad():
        condition = transformer.condition(words, [6, 4])
    return transformer, tokenizer, condition, ScaleSchedule(((1, 1), (3, 2), (5, 4), (7, 6), (10, 9)), (16, 14))


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory):
    """A saved pipeline that reads two words."""
    from hone_visual_ar import InfinityPipeline
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = T5EncoderModel(T5Config(vocab_size=4, d_model=128, d_kv=16, d_ff=64, num_layers=1, num_heads=2)).eval()
    path = tmp_path_factory.mktemp("pipeline")
    InfinityPipeline(model[0], model[1], text, tokenizer).save_pretrained(path)
    return path
