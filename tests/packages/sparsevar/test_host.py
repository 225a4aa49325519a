import pytest
import torch
from hone_core.errors import CheckpointError
from hone_sparsevar.config import HostConfig
from hone_sparsevar.data import random_labels
from hone_sparsevar.host import Host, load_host


def test_a_host_comes_back_as_it_was_saved(untrained):
    host, again = load_host(path=untrained), load_host(path=untrained)
    assert host.config == HostConfig(depth=2, width=32, heads=2, grader_channels=8)
    assert host.facts.command == "hone-sparsevar train-host"
    labels = random_labels(2, torch.Generator().manual_seed(0))
    first, second = host.draw(labels, [1, 2]).image(), again.draw(labels, [1, 2]).image()
    assert first.shape == (2, 3, 64, 64)
    assert torch.equal(first, second)
    assert not torch.equal(first, host.draw(labels, [1, 3]).image())


def test_greedy_does_not_draw(untrained):
    host = load_host(path=untrained)
    labels = random_labels(1, torch.Generator().manual_seed(0))
    first, second = (host.draw(labels, [seed], greedy=True).latent for seed in (1, 2))
    assert torch.equal(first, second)


def test_missing_and_damaged(untrained, tmp_path):
    with pytest.raises(CheckpointError, match="there is no tiny host at"):
        load_host(path=tmp_path / "host.safetensors")
    for name in ("host.safetensors", "host.json"):
        (tmp_path / name).write_bytes((untrained.parent / name).read_bytes())
    data = bytearray((tmp_path / "host.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "host.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="was replaced or cut short"):
        load_host(path=tmp_path / "host.safetensors")


def test_the_host_that_ships_fits_into_eight_mebibytes():
    host = Host.untrained()
    numbers = sum(v.numel() for module in host.modules.values() for v in module.state_dict().values())
    assert 2 * numbers < 7.9 * 2**20
