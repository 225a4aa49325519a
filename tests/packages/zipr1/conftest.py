"""Shared by the tests of hone-zipr1: an untrained host on disk, runs and the command line."""

import sys

import pytest
from hone_core.hosts import HostFacts
from hone_core.runs import Run
from hone_zipr1.config import HostConfig
from hone_zipr1.host import PACKAGE, build_host, save_host

SMALL = HostConfig(cells=2, layers=3, width=32, heads=2, heads_k=1, intermediate=32, vision_width=16)
FACTS = HostFacts(
    command="hone-zipr1 train-host", seed=0, steps=1, seconds=1.0, result={"digit": 1.0, "sum": 1.0},
    gates={"digit": 0.5, "sum": 0.5}, passed=True, train_config={}, environment={},
)  # fmt: skip


@pytest.fixture(scope="session")
def small_host():
    """A small host with random weights, large enough for its answers to differ."""
    import torch

    host = build_host(SMALL, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in host.model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
    return host


@pytest.fixture(scope="session")
def stored(small_host, tmp_path_factory):
    """Its file."""
    return save_host(small_host, tmp_path_factory.mktemp("host") / "host.safetensors", FACTS)


@pytest.fixture
def start(tmp_path):
    """Open a run as the command line does."""

    def open_run(cfg, name="run", verb="test"):
        return Run.start(package=PACKAGE, verb=verb, config=cfg, out=tmp_path / name, device="cpu", quiet=True)

    return open_run


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process: exit code, stdout, stderr."""
    from hone_zipr1.cli import main

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["hone-zipr1", *map(str, argv)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return call
