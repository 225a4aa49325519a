"""Engines on pages against the loop without an engine, in float64, where rounding decides nothing."""

import pytest
import torch
from hone_core.testing import requires_gpu
from hone_rstitch.config import EngineConfig, SamplingConfig, StitchConfig
from hone_rstitch.decoder import Decoder, unsupported
from hone_rstitch.engine import Engine, warp
from hone_rstitch.generation import stitch_generate
from hone_rstitch.method import choose
from hone_rstitch.models import Pair, tiny
from hone_rstitch.paged import CHUNK, Draw, PagedModel, draw, packing
from hone_rstitch.vocabulary import Vocabulary

FAMILIES = ("qwen2", "qwen3", "llama")


def make(pairs, family):
    small, large = pairs(family)
    return Pair(small, large, None, None, Vocabulary.shared(96, 112, (2,)))


def prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]


def alone(pair, small, large, stitch, tokens, seed=0, **sampling):
    options = dict(do_sample=bool(sampling), top_k=0) | sampling
    output = stitch_generate(
        pair.large, pair.small, torch.tensor([large]), small_input_ids=torch.tensor([small]), stitch=stitch,
        vocabulary=pair.vocabulary, seed=seed, max_new_tokens=tokens, return_dict_in_generate=True, pad_token_id=0,
        **options,
    )  # fmt: skip
    return output.sequences[0, len(large) :].tolist(), output.models[0].tolist(), output.entropy[0], output.usage[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_rows_at_two_models_are_rows_alone(pairs, family):
    pair = make(pairs, family)
    # Prompts below and above what is packed with others, of unlike lengths for the two models.
    asked = list(zip(prompts([3, 70, 40, 1, 90]), prompts([5, 20, 130, 1, 80], 1), strict=True))
    doubts = alone(pair, *asked[0], StitchConfig(policy="small"), 24)[2].sort().values
    tau = (doubts[11] + doubts[12]) / 2
    stitches = [
        StitchConfig(tau=float(tau)),
        StitchConfig(policy="random", share=0.5, run_length=5.0),
        StitchConfig(policy="large"),
        StitchConfig(tau=float(tau), prefill="both"),
        StitchConfig(policy="random", share=0.2, run_length=20.0),
    ]
    engine = Engine(pair, EngineConfig(cache="paged", page=16, max_batch=4, max_tokens=1024))
    jobs = [
        engine.submit(ids, stitch, SamplingConfig(max_new_tokens=60), seed=at)
        for at, (ids, stitch) in enumerate(zip(asked, stitches, strict=True))
    ]
    while engine.step():
        pass
    for at, (job, ids, stitch) in enumerate(zip(jobs, asked, stitches, strict=True)):
        tokens, models, entropy, usage = alone(pair, *ids, stitch, 60, at)
        assert [token.token for token in job.tokens] == tokens
        assert [token.model for token in job.tokens] == models
        assert torch.allclose(torch.tensor([token.entropy for token in job.tokens]), entropy, atol=1e-5)
        assert (job.usage.calls, job.usage.gaps) == (usage.calls, usage.gaps)
    switched = [job for job in jobs if 0 < job.usage.share < 1]
    assert len(switched) >= 3
    # Gaps of both models were longer than a tile, and packed with others.
    assert max(max(job.usage.gaps[0], default=0) for job in switched) > 4
    assert max(max(job.usage.gaps[1], default=0) for job in switched) > 4


def test_draws_are_those_of_the_loop(pairs):
    pair = make(pairs, "qwen2")
    small, large = prompts([6]) + prompts([9], 1)
    engine = Engine(pair, EngineConfig(cache="paged", max_tokens=512))
    stitch = StitchConfig(policy="random", share=0.5)
    ways = [
        dict(temperature=1.3, top_p=0.9),
        {},
        dict(temperature=2.0, top_k=5),
        dict(temperature=1.5, top_k=30, top_p=0.8),
        dict(temperature=1.7),
    ]
    jobs = [
        engine.submit((small, large), stitch, SamplingConfig(max_new_tokens=30, **way), seed=at)
        for at, way in enumerate(ways)
    ]
    processed = StitchConfig(tau=0.5, entropy_on="processed")
    jobs.append(engine.submit((small, large), processed, SamplingConfig(max_new_tokens=30, **ways[0]), seed=5))
    while engine.step():
        pass
    for at, (job, way) in enumerate(zip(jobs, [*ways, ways[0]], strict=True)):
        tokens, models, *_ = alone(pair, small, large, job.stitch, 30, at, **way)
        assert [token.token for token in job.tokens] == tokens
        assert [token.model for token in job.tokens] == models


def test_a_draw_is_the_loops_own():
    torch.manual_seed(0)
    logits = torch.randn(64, 50)
    logits[:, 3] = -torch.inf
    logits[:, 8] = logits[:, 9]  # as likely as another
    ways = [(0.0, 1.0, 0), (1.0, 1.0, 0), (0.6, 0.95, 0), (1.5, 0.5, 7), (0.8, 1.0, 60), (1.2, 1.0, 1), (2.0, 0.05, 0)]
    draws = [Draw(at / 64, *ways[at % len(ways)]) for at in range(64)]
    got = draw(logits, logits.argmax(-1), torch.tensor(draws, dtype=torch.float64).T).tolist()
    for at, (number, temperature, top_p, top_k) in enumerate(draws):
        row = logits[at]
        if temperature:
            row = warp(row, SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k))
        assert [got[at]] == choose(row[None], [number] if temperature else None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_gap_is_its_tokens_one_by_one(family):
    model = tiny(family)[1].double()
    (ids,) = prompts([CHUNK + 90])
    model.config.max_position_embeddings = 2048
    sizes = dict(rows=2, pages=2 * (2048 // 64), page=64, positions=2048, graphs=False)
    paged = PagedModel(model, 1, Vocabulary.shared(112, 112, ()), **sizes)
    paged.admit(1, range(40, 40 + 32))
    together = paged.read([(1, 0, ids)]).logits.clone()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(together[0], want, atol=1e-9)
    paged.admit(0, range(5))
    start = 0
    for step in (1, 3, 64, 2, 20, 1):
        found = paged.read([(0, start, ids[start : start + step])])
        start += step
        with torch.no_grad():
            want = model(torch.tensor([ids[:start]])).logits[0, -1]
        assert torch.allclose(found.logits[0], want, atol=1e-9)
        assert found.tokens == [int(want.argmax())]
    plain = paged.step(1, fused=False).run([(0, start - 1, ids[start - 1 : start])])
    assert torch.allclose(plain.logits, found.logits, atol=1e-9)


def test_the_models_own_forward_is_what_it_was():
    small, _ = tiny("qwen3")
    ids = torch.arange(3, 20)[None]
    before = small(ids).logits
    first = Decoder(small, pages=1, page=16, positions=16)
    second = Decoder(small, pages=1, page=16, positions=16)
    assert torch.equal(small(ids).logits, before)
    # The projections lie in one piece of memory, which a second engine finds and shares.
    weight = small.model.layers[0].self_attn.k_proj.weight
    for decoder in (first, second):
        assert weight.untyped_storage().data_ptr() == decoder.layers[0].qkv[0].untyped_storage().data_ptr()
    assert torch.equal(first.layers[0].qkv[0], second.layers[0].qkv[0])


def test_bytes_of_a_step():
    model = tiny("qwen2")[0]
    decoder = Decoder(model, pages=1, page=16, positions=16)
    weights = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert decoder.step_bytes == 4 * (weights + (model.lm_head.weight.numel() if tied else 0))
    assert decoder.token_bytes == 4 * 2 * 1 * 1 * 16


def test_packing():
    assert packing([1, 1, 1]) == (1, 3)
    assert packing([64]) == (16, 4)
    assert packing([5]) == (4, 2)
    assert packing([3, 4, 2, 4]) == (4, 4)
    # One long gap among many steps does not make each of them a tile.
    assert packing([20, *[1] * 31]) == (1, 51)


def test_what_cannot_run_on_pages_is_named(pairs):
    assert unsupported(tiny("qwen2")[0]) is None
    moe = make(pairs, "qwen3_moe")
    with pytest.raises(ValueError, match=r"Qwen3MoeForCausalLM is none of .*; leave cache at auto"):
        Engine(moe, EngineConfig(cache="paged"))
    assert not Engine(moe).paged
    small, _ = tiny("qwen2")
    small.config.layer_types = ["sliding_attention"]
    assert "sliding windows" in unsupported(small)
    small, _ = tiny("llama")
    small.model.layers[0].self_attn.q_proj = torch.nn.Sequential(small.model.layers[0].self_attn.q_proj)
    assert unsupported(small) == "its q_proj is a Sequential, not a plain linear layer"
    with pytest.raises(ValueError, match="for dense decoders: its q_proj"):
        Decoder(small, pages=1, page=16, positions=16)
    with pytest.raises(ValueError, match="page must be 16, 32 or a multiple of 64; got 48"):
        EngineConfig(page=48)


@requires_gpu(min_sm=80)
def test_captured_calls_are_calls():
    """Greedy and drawn rows at both models, with graphs and without."""
    small, large = (model.to("cuda") for model in tiny("qwen3"))
    pair = Pair(small, large, None, None, Vocabulary.shared(96, 112, (2,)))
    asked = list(zip(prompts([3, 70, 40]), prompts([5, 20, 130], 1), strict=True))
    ways = [SamplingConfig(max_new_tokens=60), SamplingConfig(max_new_tokens=60, temperature=0.8, top_p=0.9)]
    found = []
    for graphs in (True, False):
        config = EngineConfig(cache="paged", page=16, max_batch=4, max_tokens=1024, graphs=graphs)
        engine = Engine(pair, config).prepare()
        stitch = StitchConfig(policy="random", share=0.4, run_length=4.0)
        jobs = [engine.submit(asked[at % 3], stitch, ways[at % 2], seed=at) for at in range(6)]
        while engine.step():
            pass
        assert engine._sides[0].paged.graphs == graphs
        found.append([[token.token for token in job.wait(0).tokens] for job in jobs])
    assert found[0] == found[1]
    assert any(len(set(tokens)) > 5 for tokens in found[0])
