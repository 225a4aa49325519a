import pytest
import torch
from hone_core.hosts import HostFacts
from hone_core.runs import Run
from hone_nar.config import HostConfig
from hone_nar.host import Host, save_host

FACTS = HostFacts(
    command="hone-nar train-host",
    seed=0,
    steps=1,
    seconds=1.0,
    result={"nar_accuracy": 0.9},
    gates={},
    passed=True,
    train_config={},
    environment={},
)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """An untrained host on disk, small enough to draw with in a moment."""
    host = Host.untrained(HostConfig(dim=32, layers=1, heads=2), seed=1)
    with torch.no_grad():
        for module in host.modules.values():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return save_host(host, tmp_path_factory.mktemp("host") / "host.safetensors", FACTS)


@pytest.fixture
def start():
    """Begins a run of a verb on the CPU."""

    def begin(cfg, verb, out):
        return Run.start(
            config=cfg, package="hone-nar", verb=verb, out=out, seed=0, device="cpu", quiet=True,
            command=f"hone-nar {verb}",
        )  # fmt: skip

    return begin
