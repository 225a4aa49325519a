import pytest
import torch
from hone_core.testing import assert_close
from hone_sparsevar.peers import EarlyStop, FastVARStyle, SkipUncond, SkipVARStyle, edge_change, high_frequency
from hone_visual_ar import Infinity, Policy, Sampling, generate
from hone_visual_ar.generation import Generation


def draw(model, policy, **options):
    transformer, tokenizer, condition, schedule = model
    options = {"sampling": Sampling(guidance=2.0)} | options
    return generate(transformer, tokenizer, condition, schedule, seeds=[3, 4], policy=policy, **options)


def one(model, policy):
    """One image, as SkipVARStyle draws."""
    transformer, tokenizer, _, schedule = model
    with torch.no_grad():
        condition = transformer.condition(torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0)), [5])
    sampling = Sampling(guidance=2.0)
    return generate(transformer, tokenizer, condition, schedule, seeds=[3], sampling=sampling, policy=policy)


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


def test_fastvar_style_leaves_an_eleventh_of_the_blocks_dense(model, monkeypatch):
    _, tokenizer, _, schedule = model
    seen, context = [], Generation.context

    def catch(run, scale, **options):
        seen.extend([options["positions"] is None] if scale == 4 else [])
        return context(run, scale, **options)

    deep = Infinity(depth=11, width=32, num_heads=2, chunks=1, code_dim=4, text_channels=128, text_maxlen=8).eval()
    with torch.no_grad():
        condition = deep.condition(torch.randn(2, 3, 128), [3, 3])
    monkeypatch.setattr(Generation, "context", catch)
    draw((deep, tokenizer, condition, schedule), FastVARStyle(ratio=0.5, start_scale=-1))
    assert seen == [True] + [False] * 10


def test_fastvar_style_runs_what_lies_farthest_from_the_mean(model, monkeypatch):
    seen, context = {}, Generation.context

    def catch(run, scale, **options):
        if scale == 4:
            seen.setdefault("first", (run.embed(scale), options["positions"]))
        return context(run, scale, **options)

    monkeypatch.setattr(Generation, "context", catch)
    draw(model, FastVARStyle(ratio=0.5, start_scale=-1, first_block=0))
    for tokens, kept in zip(*seen["first"], strict=True):
        away = (tokens - tokens.mean(0)).square().sum(1)
        rest = torch.ones(90, dtype=torch.bool).scatter(0, kept, False)
        assert rest.sum() == 45
        assert away[kept].min() >= away[rest].max()


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


def test_skipvar_style_does_what_was_decided_of_two_thumbnails(model):
    seen = []

    def decide(action, count):
        return lambda *features: seen.append(features) or (action, count)

    assert torch.equal(one(model, SkipVARStyle(decide("dense", 0), at=-3)).latent, one(model, Policy()).latent)
    assert torch.equal(one(model, SkipVARStyle(decide("stop", 1), at=-3)).latent, one(model, EarlyStop(1)).latent)
    assert torch.equal(one(model, SkipVARStyle(decide("unguided", 2), at=-3)).latent, one(model, SkipUncond(2)).latent)
    # An action for more scales than are left begins with the next one.
    assert torch.equal(one(model, SkipVARStyle(decide("stop", 4), at=-3)).latent, one(model, EarlyStop(2)).latent)
    halves = [one(model, EarlyStop(count)) for count in (3, 2)]
    with torch.no_grad():
        small = [run.tokenizer.decode(run.tokenizer.shrink(run.latent, (8, 8))) for run in halves]
    assert seen[0] == (float(edge_change(*small)[0]), float(high_frequency(small[1])[0]))
    assert len(set(seen)) == 1
    with pytest.raises(ValueError, match="decides for one image; got a batch of 2"):
        draw(model, SkipVARStyle(decide("dense", 0)))
    seen.clear()
    with pytest.raises(ValueError, match="must name stop, unguided or dense and a count; got 'halt', 1"):
        one(model, SkipVARStyle(decide("halt", 1), at=-3))
    assert len(seen) == 1
    with pytest.raises(ValueError, match="a scale before and one behind it; got -1"):
        one(model, SkipVARStyle(decide("dense", 0), at=-1))


def test_edges_change_by_hand():
    flat, dot = torch.zeros(1, 3, 3, 3), torch.zeros(1, 3, 3, 3)
    dot[..., 1, 1] = 1.0
    # Sobel of a dot: both axes 1 at the four corners, one axis 2 at the four sides, 0 in the middle.
    assert_close(edge_change(flat, dot), torch.tensor([(4 * 2**0.5 + 8) / 9]))
    assert edge_change(dot, dot) == 0
