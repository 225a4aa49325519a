import importlib.util
from pathlib import Path

import pytest
import torch
from hone_core.config import to_dict
from hone_core.hosts import HostFacts, write_facts
from hone_core.runs import Run
from hone_pmloss.config import HostConfig
from hone_pmloss.host import PACKAGE, save_untrained
from hone_splat.cameras import quat_to_matrix


@pytest.fixture(scope="session")
def pmref():
    """The oracle."""
    spec = importlib.util.spec_from_file_location("pmref", Path(__file__).with_name("pmref.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clouds():
    """Noisy pairs of clouds: a prediction, and a teacher in a frame and scale of its own."""

    def make(seed=0, batch=2, count=40, noise=0.1):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        means = normal(batch, count, 3) * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64) + normal(batch, 1, 3)
        turn = quat_to_matrix(normal(batch, 4))
        teacher = 0.3 * (means + noise * normal(batch, count, 3)) @ turn.mT + normal(batch, 1, 3)
        return means, teacher

    return make


@pytest.fixture
def start(tmp_path):
    """Open the run of a verb."""

    def open_run(cfg, verb="demo"):
        return Run.start(package="hone-pmloss", verb=verb, config=cfg, out=tmp_path / verb, device="cpu", quiet=True)

    return open_run


@pytest.fixture
def stored(tmp_path):
    """Write a small host that was not trained, with facts that claim that it passed or missed its gates."""

    def make(name="host", *, passed=True, offset="bounded", seed=0, **trained):
        config = HostConfig(channels=(8, 8, 32), layers=1, candidates=8, size=32, offset=offset)
        path = save_untrained(tmp_path / name / "host.safetensors", config)
        facts = HostFacts(
            command="none", seed=seed, steps=0, seconds=0.0, result={}, gates={}, passed=passed,
            train_config={"host": to_dict(config), **trained}, environment={},
        )  # fmt: skip
        write_facts(path, facts, package=PACKAGE)
        return path

    return make
