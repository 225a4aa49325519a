import json
from pathlib import Path

import pytest
import torch
from hone_core.hosts import HostFacts
from hone_motion_anything.config import EvaluatorConfig, HostConfig, TokenizerConfig, TransformerConfig
from hone_motion_anything.host import Host, save_host

FACTS = HostFacts(
    command="hone-motion-anything train-host",
    seed=0,
    steps=1,
    seconds=1.0,
    result={"events": 0.9},
    gates={},
    passed=True,
    train_config={},
    environment={},
)
SMALL = HostConfig(
    tokenizer=TokenizerConfig(width=8, depth=1, codes=16, code_dim=4),
    transformer=TransformerConfig(
        width=16, heads=2, hidden=16, layers=2, dropout=0.1, codes=16, max_tokens=24, text_width=8
    ),
    evaluator=EvaluatorConfig(movement=8, motion=8, text=8, out=8, word=8),
)


@pytest.fixture(scope="session")
def small():
    """Architecture of a host that runs in a moment."""
    return SMALL


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """Such a host, untrained, on disk."""
    return save_host(Host.untrained(SMALL, seed=1), tmp_path_factory.mktemp("host") / "host.safetensors", FACTS)


@pytest.fixture(scope="session")
def golden():
    """A few numbers read off the releases of HumanML3D, MoMask and MoGenTS, on inputs that the tests make again."""
    return json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A small CLIP with random weights and a tokenizer of the bytes."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    letters = [*map(chr, range(33, 127))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(path)
    tokenizer.save_pretrained(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, projection_dim=8, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        )  # fmt: skip
        CLIPTextModelWithProjection(config).save_pretrained(path)
    return path
