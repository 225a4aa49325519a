import pytest
import torch
from hone_core.errors import CheckpointError
from hone_fpsattention.config import PRESETS
from hone_fpsattention.host import load_host, save_host
from hone_fpsattention.models import attach
from hone_video import host as dense_host

TINY = PRESETS["tiny"].config


def test_a_tuned_host_keeps_its_weights_and_its_attention(tiny_host, tmp_path):
    dense = dense_host.load_host(path=tiny_host)
    tuned = load_host(path=save_host(dense, TINY, tmp_path / "tuned.safetensors"))
    assert tuned.attention == TINY
    assert tuned.config == dense.config
    text, noise = dense.encode_prompt("a red 7 moving left, slow"), dense.noise(1, 0)
    assert torch.equal(tuned.sample(text, noise), dense.sample(text, noise))
    with attach(tuned.transformer, tuned.attention):
        assert not torch.equal(tuned.sample(text, noise), dense.sample(text, noise))


def test_hosts_of_another_kind_are_refused(tiny_host, tmp_path):
    with pytest.raises(CheckpointError, match="is a host of hone-blade"):
        load_host(path=tiny_host)
    tuned = save_host(dense_host.load_host(path=tiny_host), TINY, tmp_path / "tuned.safetensors")
    with pytest.raises(CheckpointError, match="is a host of hone-fpsattention"):
        dense_host.load_host(path=tuned)
