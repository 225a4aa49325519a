import dataclasses
import importlib.util
from pathlib import Path

import pytest
from hone_core.hosts import HostFacts, write_facts
from hone_core.runs import Run
from hone_zpressor.config import HostConfig, ZPressorConfig
from hone_zpressor.host import PACKAGE, save_untrained

SMALL = HostConfig(
    channels=(8, 8, 32),
    layers=2,
    candidates=16,
    zpressor=ZPressorConfig(anchors=3, layers=2, precision="float32"),
    size=32,
)
FACTS = HostFacts(
    command="hone-zpressor train-host",
    seed=0,
    steps=1,
    seconds=1.0,
    result={"host": 20.0, "zpressor": 20.0, "anchors": 20.0},
    gates={},
    passed=True,
    train_config={},
    environment={},
)


@pytest.fixture(scope="session")
def small():
    """A host that takes milliseconds."""
    return SMALL


@pytest.fixture(scope="session")
def hostref():
    """The oracle."""
    path = Path(__file__).parents[2] / "shared" / "splat" / "hostref.py"
    spec = importlib.util.spec_from_file_location("hostref", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """Files of untrained hosts."""

    def make(seed=0, *, passed=True, cfg=SMALL):
        path = save_untrained(tmp_path_factory.mktemp(f"host-{seed}") / "host.safetensors", cfg)
        write_facts(path, dataclasses.replace(FACTS, passed=passed), package=PACKAGE)
        return path

    return make


@pytest.fixture
def start(tmp_path):
    """Open the run of a verb."""

    def open_run(cfg, verb="demo"):
        return Run.start(package=PACKAGE, verb=verb, config=cfg, out=tmp_path / verb, device="cpu", quiet=True)

    return open_run
