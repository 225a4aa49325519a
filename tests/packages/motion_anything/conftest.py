import json
from pathlib import Path

import pytest
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
