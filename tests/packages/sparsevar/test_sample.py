import numpy as np
import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_sparsevar.config import GenerateConfig
from hone_sparsevar.sample import check_inputs, generate
from hone_visual_ar import InfinityPipeline
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = T5EncoderModel(T5Config(vocab_size=4, d_model=128, d_kv=16, d_ff=64, num_layers=1, num_heads=2)).eval()
    path = tmp_path_factory.mktemp("pipeline")
    InfinityPipeline(model[0], model[1], text, tokenizer).save_pretrained(path)
    return path


def draw(folder, path, **options):
    cfg = GenerateConfig(model=folder, prompts=("a cat", "a", "cat"), pixels="0.06M", **options)
    with Run.start(package="hone-sparsevar", verb="generate", config=cfg, out=path, device="cpu", quiet=True) as run:
        report = generate(cfg, run)
    return [np.asarray(Image.open(file)).astype(int) for file in report.images]


def test_every_prompt_has_its_image_whatever_the_batch(folder, tmp_path):
    one, two = draw(folder, tmp_path / "1"), draw(folder, tmp_path / "2", batch=2)
    assert len(one) == 3
    assert max(abs(a - b).max() for a, b in zip(one, two, strict=True)) <= 1
    dense = draw(folder, tmp_path / "3", dense=True)
    assert max(abs(a - b).max() for a, b in zip(one, dense, strict=True)) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aspect": 1.1}, "no schedule of height / width"),
        ({"prompts": ("a cat a cat a cat a cat a cat",)}, "10 tokens, and this model reads at most 8"),
    ],
)
def test_bad_input_is_named_before_weights_are_read(folder, options, message, monkeypatch):
    monkeypatch.setattr(InfinityPipeline, "from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        check_inputs(GenerateConfig(**{"model": folder, "prompts": ("a",), "pixels": "0.06M"} | options))


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no saved pipeline"):
        check_inputs(GenerateConfig(model=tmp_path, prompts=("a",)))
