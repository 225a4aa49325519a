import pytest
import torch
from hone_video.host import Host, save_host
from hone_video.host_config import HostConfig

# 4 x 8 x 8 tokens, so 1 x 2 x 2 tiles of 64.
TINY = HostConfig(
    frames=4,
    height=16,
    width=16,
    patch=2,
    layers=1,
    heads=1,
    head_dim=32,
    ffn_dim=32,
    text_dim=16,
    freq_dim=16,
    classifier_channels=8,
    steps=2,
    guidance=1.0,
)


@pytest.fixture
def tiny_host(tmp_path):
    """The file of an untrained host whose output depends on its attention."""
    host = Host.untrained(TINY)
    with torch.no_grad():
        for module in (host.transformer.proj_out, host.transformer.blocks[0].attn1.to_out[0]):
            torch.nn.init.normal_(module.weight, std=0.3)
        host.transformer.blocks[0].scale_shift_table[:, 2] = 1.0
    return save_host(host, tmp_path / "dense" / "host.safetensors")
