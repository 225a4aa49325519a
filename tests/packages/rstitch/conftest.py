import dataclasses
import sys

import pytest
import torch
from hone_core.hosts import HostFacts, save_host
from hone_core.runs import Run
from hone_rstitch.config import DecoderConfig, HostConfig
from hone_rstitch.host import PACKAGE, build_model
from hone_rstitch.models import tiny

SMALL = DecoderConfig(layers=1, width=16, heads=2, heads_k=1, intermediate=16)
FACTS = HostFacts(
    command="hone-rstitch train-host",
    seed=0,
    steps=1,
    seconds=1.0,
    result={"small": 0.5, "large": 0.95, "verbose": 0.95},
    gates={},
    passed=True,
    train_config={},
    environment={},
)


@pytest.fixture(scope="session")
def pairs():
    """Untrained pairs in float64, where rounding decides nothing, by family."""
    made = {}

    def get(family="qwen2"):
        if family not in made:
            small, large = tiny(family)
            made[family] = small.double(), large.double()
            if family == "qwen3_moe":
                # The grouped product of the default experts has no float64.
                for model in made[family]:
                    model.set_experts_implementation("eager")
        return made[family]

    return get


@pytest.fixture(scope="session")
def trained_host(tmp_path_factory):
    """Files as train-host leaves them, of untrained pairs whose weights are large enough for doubt to vary."""

    def make(seed, *, passed=True):
        path = tmp_path_factory.mktemp(f"pair-{seed}")
        models = {}
        for at, (name, role) in enumerate((("small", "small"), ("large", "large"), ("verbose", "large"))):
            model = build_model(SMALL, role)
            generator = torch.Generator().manual_seed(10 * seed + at)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
            models[f"{name}."] = model
        facts = dataclasses.replace(FACTS, passed=passed)
        file = path / "host.safetensors"
        save_host(file, HostConfig(small=SMALL, large=SMALL), models, package=PACKAGE, facts=facts)
        return file

    return make


@pytest.fixture(scope="session")
def untrained(trained_host):
    """One such file."""
    return trained_host(0)


@pytest.fixture
def packaged(untrained, monkeypatch):
    """The untrained pair in place of the packaged ones, which take longer to answer."""
    monkeypatch.setattr("hone_rstitch.pairs.packaged_pair", lambda seed: untrained)


@pytest.fixture
def start(tmp_path):
    """Open a run as the command line does."""

    def open_run(cfg, name="run", verb="test"):
        run = Run.start(package=PACKAGE, verb=verb, config=cfg, out=tmp_path / name, device="cpu", quiet=True)
        return run

    return open_run


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process: exit code, stdout, stderr."""
    from hone_rstitch.cli import main

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["hone-rstitch", *map(str, argv)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return call
