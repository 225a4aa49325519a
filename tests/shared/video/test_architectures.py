import pytest
import torch
from hone_video.architectures import tiny


@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_tiny_is_reproducible_and_leaves_the_global_generator_alone(kind):
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    a, b, other = tiny(kind, 3), tiny(kind, 3), tiny(kind, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(iter(a.parameters())), next(iter(other.parameters())))
    assert sum(p.numel() for p in a.parameters()) < 300_000
    with pytest.raises(ValueError, match=r"kind must be one of wan, cogvideox, .*; got 'svd'"):
        tiny("svd")
