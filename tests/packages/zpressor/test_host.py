import pytest
import torch
from hone_core.errors import CheckpointError
from hone_zpressor.config import ARMS, HostConfig
from hone_zpressor.host import PACKAGED, arm_config, build_arm, load_host, open_tiny


def test_arms_come_back_as_stored(stored, small):
    path = stored()
    for arm in ARMS:
        found = load_host(arm, path=path)
        want = build_arm(small, arm).host.state_dict()
        assert found.config == small
        assert (found.handle is None) == (arm == "host")
        assert not any(value.requires_grad for value in found.host.parameters())
        assert not any(part.training for part in found.host.modules())
        for name, value in found.host.state_dict().items():
            assert torch.allclose(value, want[name], atol=1e-3), name
    with pytest.raises(ValueError, match="no arm 'none'; the arms are host, zpressor, anchors"):
        load_host("none", path=path)
    with pytest.raises(ValueError, match="no arm"):
        arm_config(small, "none")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="train-host"):
        open_tiny(tmp_path / "host.safetensors")


def test_three_arms_fit_into_a_package():
    with torch.device("meta"):
        weights = sum(part.numel() for arm in ARMS for part in build_arm(HostConfig(), arm).host.state_dict().values())
    assert 2 * weights < 8 * 2**20
    assert PACKAGED.name == "host.safetensors"
