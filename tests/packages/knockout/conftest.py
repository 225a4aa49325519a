import shutil

import pytest
import torch
from hone_knockout.config import ClipConfig, HostConfig
from hone_knockout.host import build_host, save_host

SMALL = HostConfig(
    clip=ClipConfig(frames=4, grid=3, cell=4),
    layers=5,
    width=32,
    heads=2,
    heads_k=1,
    intermediate=32,
    vision_width=16,
)


@pytest.fixture(scope="session")
def small():
    return SMALL


@pytest.fixture(scope="session")
def host():
    """Untrained, and large weights so that a knockout shows."""
    made = build_host(SMALL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 1.2 / parameter[0].numel() ** 0.5)
    return made


@pytest.fixture(scope="session")
def host_file(host, tmp_path_factory):
    return save_host(host, tmp_path_factory.mktemp("host") / "host.safetensors")


@pytest.fixture
def copy_host(host_file):
    """Put the host under another name: its weights, and the sidecar that says what they are."""

    def copy(to):
        for suffix in (".safetensors", ".json"):
            shutil.copy(host_file.with_suffix(suffix), to.with_suffix(suffix))
        return to

    return copy
