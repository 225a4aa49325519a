import pytest
import torch
from hone_core.testing import assert_close
from hone_sparsevar.peers import EarlyStop, FastVARStyle, SkipUncond, high_frequency
from hone_visual_ar import Policy, Sampling, generate


def draw(model, policy, **options):
    transformer, tokenizer, condition, schedule = model
    options = {"sampling": Sampling(guidance=2.0)} | options
    return generate(transformer, tokenizer, condition, schedule, seeds=[3, 4], policy=policy, **options)


def test_stopping_early_is_the_latent_without_the_last_scales(model):
    dense = draw(model, Policy())
    stopped = draw(model, EarlyStop(2))
    latent = torch.zeros_like(dense.latent)
    for scale, indices in enumerate(dense.indices[:-2]):
        grid = dense.embed_indices(indices).transpose(1, 2).unflatten(2, dense.schedule.grids[scale])
        latent = latent + dense.tokenizer.spread(grid, (10, 9), scale=scale, scales=5)
    assert torch.equal(stopped.latent, latent)


def test_a_scale_without_guidance_is_that_of_guidance_one(model):
    some = draw(model, SkipUncond(1))
    one = draw(model, Policy(), sampling=Sampling(guidance=(2.0, 2.0, 2.0, 2.0, 1.0)))
    assert_close(some.latent, one.latent)


def test_fastvar_style_at_a_ratio_of_zero_is_dense(model):
    assert torch.equal(draw(model, FastVARStyle(ratio=0.0, start_scale=-2)).latent, draw(model, Policy()).latent)


def test_fastvar_style_leaves_out_and_keeps_its_state_to_itself(model):
    policy = FastVARStyle(ratio=0.5, start_scale=-2, first_block=1)
    first, second = draw(model, policy), draw(model, policy)
    assert torch.equal(first.latent, second.latent)
    assert [record.kept for record in first.records] == [1, 6, 20, 21, 45]
    # The first block has all keys of the sparse scale before the last, the others half of them.
    assert first.cache.lengths == [69, 48, 48]
    assert first.state.keys() == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)}


def test_what_does_not_fit(model):
    with pytest.raises(ValueError, match="at least one scale to leave out; got 0"):
        EarlyStop(0)
    with pytest.raises(ValueError, match="has 5 scales; got 5 to leave out"):
        draw(model, EarlyStop(5))
    with pytest.raises(ValueError, match="at least one scale without guidance"):
        SkipUncond(0)
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\); got 1"):
        FastVARStyle(ratio=1)
    with pytest.raises(ValueError, match="must leave a scale before it"):
        draw(model, FastVARStyle(start_scale=0))


def test_high_frequencies_of_a_wave():
    x = torch.arange(32.0)
    slow = torch.sin(2 * torch.pi * x / 16).expand(1, 3, 32, 32)
    fast = torch.sin(2 * torch.pi * x / 4).expand(1, 3, 32, 32)
    assert high_frequency(slow) < 0.01
    assert high_frequency(fast) > 0.99
