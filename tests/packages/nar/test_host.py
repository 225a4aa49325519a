import pytest
import torch
from hone_core.errors import CheckpointError
from hone_nar.config import HostConfig
from hone_nar.host import Host, digit_model, draw_digits, load_host


def test_a_host_comes_back_as_it_was_saved(untrained):
    host, again = load_host(path=untrained), load_host(path=untrained)
    assert host.config == HostConfig(dim=32, layers=1, heads=2)
    assert host.facts.command == "hone-nar train-host"
    labels = torch.tensor([3, 4])
    for first, second in ((host.nar, again.nar), (host.raster, again.raster)):
        drawn = draw_digits(first, labels, [1, 2], guidance=2.0)
        assert drawn.shape == (2, 64)
        assert torch.equal(drawn, draw_digits(second, labels, [1, 2], guidance=2.0))


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


def test_models_that_are_compared_have_as_many_blocks():
    config = HostConfig()
    blocks = {kind: len(digit_model(kind, config).layers) for kind in ("nar", "raster", "one-head")}
    assert len(set(blocks.values())) == 1
    assert digit_model("one-head", config).order == digit_model("nar", config).order
    with pytest.raises(ValueError, match="kind must be nar, raster or one-head"):
        digit_model("var", config)


def test_the_host_that_ships_fits_into_eight_mebibytes():
    host = Host.untrained()
    numbers = sum(v.numel() for module in host.modules.values() for v in module.state_dict().values())
    assert 2 * numbers < 7.9 * 2**20
