import copy
import inspect
from dataclasses import replace

import pytest
import torch
from hone_rstitch import generation
from hone_rstitch.config import LARGE, SMALL, StitchConfig
from hone_rstitch.generation import _Row, _Side, stitch_decoding, stitch_generate
from hone_rstitch.method import Gate, entropy_nats, stitch
from hone_rstitch.models import tiny
from hone_rstitch.vocabulary import Vocabulary
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MaxTimeCriteria,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    TopKLogitsWarper,
)

EOS = 2

POLICIES = {
    "stitch": StitchConfig(tau=0.55),
    "eager": StitchConfig(tau=0.2),
    "lenient": StitchConfig(tau=0.7),
    "confidence": StitchConfig(gate="confidence", tau=0.4),
    "one-token": StitchConfig(policy="one-token", tau=0.5),
    "hysteresis": StitchConfig(tau=0.6, tau_back=0.45),
    "runs": StitchConfig(tau=0.5, min_large_run=3),
    "window": StitchConfig(tau=0.5, window=4),
    "random": StitchConfig(policy="random", share=0.4),
    "random-runs": StitchConfig(policy="random", share=0.4, run_length=3.0),
    "small": StitchConfig(policy="small"),
    "large": StitchConfig(policy="large"),
    "both": StitchConfig(tau=0.55, prefill="both"),
}


def prompts(rows=3, width=7, *, seed=0, ragged=True):
    """Ids and mask, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows if ragged else 0):
        mask[row, : row % (width - 1)] = 0
        ids[row, : row % (width - 1)] = 0
    return ids, mask


def generate(pair, ids, mask, config, **options):
    small, large = pair
    options = {"max_new_tokens": 24, "return_dict_in_generate": True} | options
    return stitch_generate(large, small, ids, attention_mask=mask, stitch=config, **options)


@torch.no_grad()
def reference(pair, ids, mask, config, *, budget=24, seed=None, warp=lambda logits: logits):
    """The paper's loop without caches on one row."""
    small, large = pair
    vocabulary = Vocabulary.shared(96, 112, [EOS])
    prompt = ids[mask.bool()]

    def of(model, who):
        def logits(tokens):
            full = torch.cat([prompt, torch.tensor(tokens, dtype=torch.long)])[None]
            return vocabulary.read(model(full, use_cache=False).logits[:, -1], who)[0].float()

        return logits

    models = [of(small, 0), of(large, 1)]
    return stitch(models, config, size=vocabulary.size, budget=budget, stop=(EOS,), seed=seed, warp=warp)


def new(output, row):
    """Tokens that a row wrote."""
    start = output.sequences.shape[1] - output.models.shape[1]
    return output.sequences[row, start : start + sum(output.usage[row].tokens)].tolist()


def same(output, row, steps):
    count = len(steps)
    assert new(output, row) == [step.token for step in steps]
    assert output.models[row, :count].tolist() == [step.model for step in steps]
    assert (output.models[row, count:] == -1).all()
    assert output.entropy[row, :count].tolist() == pytest.approx([step.entropy for step in steps], abs=1e-5)
    assert (~output.discarded_entropy[row, :count].isnan()).tolist() == [step.discarded for step in steps]


# Equal to the loop without caches


@pytest.mark.parametrize("policy", POLICIES)
def test_ragged_batch_equals_the_loop_without_caches(pairs, policy):
    ids, mask = prompts(4)
    config = POLICIES[policy]
    output = generate(pairs(), ids, mask, config, seed=[5, 6, 7, 8])
    for row in range(4):
        steps = reference(pairs(), ids[row], mask[row], _seeded(config), seed=None, budget=24)
        if config.policy == "random":
            # Greedy tokens, drawn routes: the reference takes its seed for both, so it is asked for routes alone.
            steps = _random_reference(pairs(), ids[row], mask[row], config, 5 + row)
        same(output, row, steps)


def _seeded(config):
    return config if config.policy != "random" else StitchConfig(policy="small")


@torch.no_grad()
def _random_reference(pair, ids, mask, config, seed):
    """Random routing written out: a gate says who is next, that model is asked without a cache."""
    from hone_rstitch.method import Step, read_logits

    vocabulary, gate, steps, tokens = Vocabulary.shared(96, 112, [EOS]), Gate(config, seed), [], []
    while len(tokens) < 24 and EOS not in tokens:
        who = gate.active
        full = torch.cat([ids[mask.bool()], torch.tensor(tokens, dtype=torch.long)])[None]
        logits = vocabulary.read(pair[who](full, use_cache=False).logits[:, -1], who).float()
        signals = read_logits(logits, 96)
        tokens.append(int(logits.argmax()))
        steps.append(Step(tokens[-1], who, float(signals.entropy), False))
        gate.step(float(signals.entropy))
    return steps


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("policy", ["stitch", "one-token"])
def test_every_family_equals_the_loop_without_caches(pairs, family, policy):
    ids, mask = prompts(3)
    config = POLICIES[policy]
    output = generate(pairs(family), ids, mask, config)
    shares = [usage.share for usage in output.usage]
    assert 0 < sum(shares) < 3, "both models must have written, or this shows nothing"
    for row in range(3):
        same(output, row, reference(pairs(family), ids[row], mask[row], config))


@pytest.mark.parametrize("entropy_on", ["raw", "processed"])
def test_sampling_equals_the_loop_without_caches(pairs, entropy_on):
    ids, mask = prompts(3)
    config = StitchConfig(tau=0.4, entropy_on=entropy_on)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 1.0}
    output = generate(pairs(), ids, mask, config, seed=[3, 1, 4], **options)
    top = TopKLogitsWarper(20)
    for row, seed in enumerate((3, 1, 4)):
        steps = reference(
            pairs(), ids[row], mask[row], config, seed=seed, warp=lambda logits: top(None, logits[None] / 0.7)[0]
        )
        same(output, row, steps)


@torch.no_grad()
def test_algorithm_1_written_out(pairs):
    # Without anything of the package but the models' vocabulary: the paper's lines, without caches.
    small, large = pairs()
    ids, mask = prompts(1, ragged=False)
    tau, text, active, written = 0.55, ids[0].tolist(), small, []
    while len(written) < 24:
        logits = active(torch.tensor([text]), use_cache=False).logits[0, -1, :96]
        p = logits.softmax(-1)
        entropy = -(p * p.log()).sum() / torch.tensor(96.0).log()
        if active is small and entropy > tau:
            active = large
            continue
        token = int(logits.argmax())
        text.append(token)
        written.append(token)
        if token == EOS:
            break
        if active is large and entropy <= tau:
            active = small
    assert new(generate(pairs(), ids, mask, StitchConfig(tau=tau)), 0) == written


# One model alone is transformers' own loop


def test_tau_1_is_the_small_model(pairs):
    small, _ = pairs()
    ids, mask = prompts(3)
    output = generate(pairs(), ids, mask, StitchConfig(tau=1.0))
    wanted = small.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    assert torch.equal(output.sequences, wanted)
    assert all(usage.calls[LARGE] == 0 and usage.discarded == 0 for usage in output.usage)


def test_tau_minus_1_is_the_large_model_after_one_small_step(pairs):
    _, large = pairs()
    ids, mask = prompts(3)
    output = generate(pairs(), ids, mask, StitchConfig(tau=-1.0))
    wanted = large.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, suppress_tokens=list(range(96, 112))
    )
    assert torch.equal(output.sequences, wanted)
    for usage in output.usage:
        assert usage.discarded == usage.calls[SMALL] == usage.switches == 1


def _even_only(batch, ids):
    return [token for token in range(3, 90) if token % 3 == (len(ids) + batch) % 3]


class Ban(LogitsProcessor):
    """Knows nothing of batches, as most of users' own."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7, 9], [11]]},
        {"min_new_tokens": 9, "eos_token_id": [2, 17, 40, 33, 21]},
        {"eos_token_id": [17, 40, 33, 21, 60, 61, 62, 63, 64]},
        {"forced_eos_token_id": 2},
        {"begin_suppress_tokens": [4, 8, 15, 16, 23, 42]},
        {"prefix_allowed_tokens_fn": _even_only},
        {"exponential_decay_length_penalty": (4, 1.5)},
        {"do_sample": True, "top_k": 1},
        {"sequence_bias": [[[12], 9.0]]},
        {"max_length": 12, "max_new_tokens": None},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_generate_hold(pairs, options):
    _, large = pairs()
    ids, mask = prompts(4)
    common = {"suppress_tokens": list(range(96, 112)), "max_new_tokens": 16} | options
    wanted = large.generate(ids, attention_mask=mask, **{"do_sample": False} | common)
    output = generate(pairs(), ids, mask, StitchConfig(policy="large"), **common)
    assert torch.equal(output.sequences, wanted)


def test_users_own_processors_and_several_sequences(pairs):
    _, large = pairs()
    ids, mask = prompts(1, ragged=False)
    options = {"logits_processor": [Ban()], "max_new_tokens": 12, "suppress_tokens": list(range(96, 112))}
    wanted = large.generate(ids, attention_mask=mask, do_sample=False, **options)
    found = generate(pairs(), ids, mask, StitchConfig(policy="large"), **options)
    assert torch.equal(found.sequences, wanted)
    sampled = generate(
        pairs(), ids, mask, StitchConfig(tau=0.4), do_sample=True, num_return_sequences=3, seed=9, top_k=0
    )
    rows = [new(sampled, row) for row in range(3)]
    assert len({tuple(row) for row in rows}) == 3
    alone = generate(pairs(), ids, mask, StitchConfig(tau=0.4), do_sample=True, seed=10, top_k=0)
    assert new(alone, 0) == rows[1]


# Batches


@pytest.mark.parametrize("policy", ["stitch", "eager", "random"])
def test_rows_of_a_batch_are_each_row_alone(pairs, policy):
    ids, mask = prompts(6, 9, seed=4)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 40}
    together = generate(pairs(), ids, mask, POLICIES[policy], seed=50, **options)
    for row in range(6):
        alone = generate(pairs(), ids[row : row + 1], mask[row : row + 1], POLICIES[policy], seed=50 + row, **options)
        assert new(alone, 0) == new(together, row)
        one, many = alone.usage[0], together.usage[row]
        assert (one.tokens, one.calls, one.gaps, one.discarded) == (many.tokens, many.calls, many.gaps, many.discarded)


def test_holes_are_closed(pairs, monkeypatch):
    widths = []
    shrink = _Side.shrink

    def watched(side, live):
        shrink(side, live)
        if live:
            longest = int(side.valid.sum(1).max()) if side.valid.numel() else 0
            widths.append((side.valid.shape[1], longest, side.cache.get_seq_length()))

    monkeypatch.setattr(_Side, "shrink", watched)
    ids, mask = prompts(8, seed=2)
    config = StitchConfig(policy="random", share=0.5, run_length=6.0)
    options = {"max_new_tokens": 120, "eos_token_id": None, "do_sample": True, "top_k": 0}
    together = generate(pairs(), ids, mask, config, seed=1, **options)
    assert all(width <= 2 * longest + 32 and width == held for width, longest, held in widths)
    assert any(after[0] < before[0] for before, after in zip(widths, widths[2:], strict=False)), "none was closed"
    for row in (0, 5):
        alone = generate(pairs(), ids[row : row + 1], mask[row : row + 1], config, seed=1 + row, **options)
        assert new(alone, 0) == new(together, row)


def test_draws_do_not_shift_when_a_token_is_thrown_away(pairs):
    # With one model in both places, who writes cannot matter: a draw belongs to its position.
    _, large = pairs()
    ids, mask = prompts(2)
    options = {"do_sample": True, "top_k": 0, "seed": 3}
    texts = [
        generate((large, large), ids, mask, StitchConfig(tau=tau), **options).sequences for tau in (-1.0, 0.4, 0.5, 1.0)
    ]
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_without_a_seed_torch_decides(pairs):
    ids, mask = prompts(1, ragged=False)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(new(generate(pairs(), ids, mask, StitchConfig(), do_sample=True, top_k=0), 0))
    assert texts[0] == texts[1] != texts[2]


def test_sliding_windows_run_row_by_row():
    small, large = tiny("qwen2")
    config = copy.deepcopy(large.config)
    config.use_sliding_window, config.sliding_window = True, 4
    config.layer_types = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    sliding = type(large)(config).eval().double()
    pair = small.double(), sliding
    ids, mask = prompts(3)
    together = generate(pair, ids, mask, StitchConfig(tau=0.5))
    for row in range(3):
        same(together, row, reference(pair, ids[row], mask[row], StitchConfig(tau=0.5)))
    assert any(0 < usage.share < 1 for usage in together.usage)


# Caches


@torch.no_grad()
def test_reading_a_gap_at_once_is_reading_it_token_by_token(pairs):
    _, large = pairs()
    logits = []
    for cut in ([9], [4, 1, 1, 1, 1, 1], [1] * 9, [3, 6]):
        row = _Row(0, 0, Gate(StitchConfig()), ([], list(range(10, 19))))
        side = _Side(large, DynamicCache(config=large.config), [row])
        for length in cut:
            read = side.read[0]
            found, _, _ = side.extend([(row, row.gap(LARGE, read)[:length])])
        logits.append(found)
    for found in logits[1:]:
        torch.testing.assert_close(found, logits[0], atol=1e-10, rtol=0)


def test_counters_add_up(pairs):
    ids, mask = prompts(4)
    output = generate(pairs(), ids, mask, StitchConfig(tau=0.55), max_new_tokens=40)
    for row, usage in enumerate(output.usage):
        count = sum(usage.tokens)
        assert usage.calls == [usage.tokens[SMALL] + usage.discarded, usage.tokens[LARGE]]
        assert usage.tokens == [int((output.models[row] == who).sum()) for who in (SMALL, LARGE)]
        assert usage.discarded == int((~output.discarded_entropy[row].isnan()).sum()) == usage.switches
        assert usage.prompt_tokens == [int(mask[row].sum())] * 2
        for who in (SMALL, LARGE):
            assert len(usage.gaps[who]) == usage.calls[who] - 1
            assert all(gap >= 1 for gap in usage.gaps[who])
            # Prompt and gaps are what was read: the text up to the model's last step.
            assert sum(usage.gaps[who]) <= count - 1
        assert usage.seconds[SMALL] > 0
        assert usage.seconds[LARGE] > 0
        seconds = output.seconds[row, :count]
        assert (seconds.diff() > 0).all()


def test_the_large_model_may_read_the_prompt_at_the_start(pairs):
    ids, mask = prompts(3)
    lazy = generate(pairs(), ids, mask, StitchConfig(tau=0.55))
    both = generate(pairs(), ids, mask, StitchConfig(tau=0.55, prefill="both"))
    assert torch.equal(lazy.sequences, both.sequences)
    for early, late in zip(both.usage, lazy.usage, strict=True):
        assert early.calls == late.calls
        # Its first step reads what was written since and the prompt's last token.
        assert len(early.gaps[LARGE]) == len(late.gaps[LARGE]) + 1
    never = generate(pairs(), ids, mask, StitchConfig(tau=1.0, prefill="both"))
    assert all(usage.prompt_tokens[LARGE] and usage.calls[LARGE] == 0 for usage in never.usage)


def test_a_cache_that_holds_part_of_the_prompt(pairs):
    _, large = pairs()
    ids, mask = prompts(1, 9, ragged=False)
    wanted = generate(pairs(), ids, mask, StitchConfig(tau=0.5))
    cache = DynamicCache(config=large.config)
    name = next(name for name in generation.CACHES if name in inspect.signature(large.forward).parameters)
    with torch.no_grad():
        large(ids[:, :5], use_cache=True, **{name: cache})
    found = generate(pairs(), ids, mask, StitchConfig(tau=0.5), **{name: cache})
    assert torch.equal(found.sequences, wanted.sequences)
    with pytest.raises(ValueError, match="one row"):
        generate(pairs(), ids.repeat(2, 1), mask.repeat(2, 1), StitchConfig(), **{name: cache})


@pytest.mark.parametrize("policy", ["stitch", "large"])
def test_a_cache_that_holds_all_of_the_prompt_or_more(pairs, policy):
    _, large = pairs()
    config = replace(StitchConfig(tau=0.5), policy=policy)
    ids, mask = prompts(1, 9, ragged=False)
    wanted = generate(pairs(), ids, mask, config)
    name = next(name for name in generation.CACHES if name in inspect.signature(large.forward).parameters)
    caches = [DynamicCache(config=large.config) for _ in range(2)]
    with torch.no_grad():
        for cache, held in zip(caches, (ids, torch.cat([ids, ids], 1)), strict=True):
            large(held, use_cache=True, **{name: cache})
    found = generate(pairs(), ids, mask, config, **{name: caches[0]})
    assert torch.equal(found.sequences, wanted.sequences)
    with pytest.raises(ValueError, match=r"the cache holds 18 tokens, and the prompt, .* has 9"):
        generate(pairs(), ids, mask, config, **{name: caches[1]})


def test_a_gate_has_a_name_or_settings(pairs):
    ids, mask = prompts(2)
    found, wanted = (generate(pairs(), ids, mask, config) for config in ("fast", StitchConfig(tau=0.03)))
    assert torch.equal(found.sequences, wanted.sequences)
    with pytest.raises(TypeError, match="a preset's name or a StitchConfig; got float"):
        generate(pairs(), ids, mask, 0.02)


# The gate sees hard masks only


def test_constraints_come_before_the_gate_and_warpers_after(pairs):
    small, _ = pairs()
    ids, mask = prompts(1, ragged=False)
    banned = [[token] for token in range(3, 60)]
    with torch.no_grad():
        logits = small(ids).logits[0, -1, :96].float()
    free = float(entropy_nats(logits[None])) / torch.tensor(96.0).log()
    logits[3:60] = -torch.inf
    bound = float(entropy_nats(logits[None])) / torch.tensor(96.0).log()
    config = StitchConfig(policy="small")
    plain = generate(pairs(), ids, mask, config, do_sample=True, temperature=0.3, top_k=2, repetition_penalty=2.0)
    assert float(plain.entropy[0, 0]) == pytest.approx(float(free), abs=1e-5)
    fenced = generate(pairs(), ids, mask, config, bad_words_ids=banned)
    assert float(fenced.entropy[0, 0]) == pytest.approx(float(bound), abs=1e-5)


def test_an_entropy_of_processed_logits_under_top_k_1_never_calls(pairs):
    ids, mask = prompts(2)
    options = {"do_sample": True, "top_k": 1}
    processed = generate(pairs(), ids, mask, StitchConfig(tau=0.01, entropy_on="processed"), **options)
    assert all(usage.share == 0 for usage in processed.usage)
    raw = generate(pairs(), ids, mask, StitchConfig(tau=0.01), **options)
    assert all(usage.share > 0.5 for usage in raw.usage)


def test_a_grammar_forces_without_calling_or_handing_back(pairs):
    ids, mask = prompts(1, ragged=False)

    def spell(batch, seen):
        return [20 + len(seen) % 5]

    output = generate(pairs(), ids, mask, StitchConfig(tau=-1.0), prefix_allowed_tokens_fn=spell, max_new_tokens=8)
    assert output.usage[0].calls == [8, 0]
    assert new(output, 0) == [20 + at % 5 for at in range(7, 15)]


def test_a_grammar_may_want_what_only_the_large_model_has(pairs):
    # Ids from 80 on are no tokens of this small model.
    to_small = torch.arange(112).where(torch.arange(112) < 80, -1)
    vocabulary = Vocabulary(to_small, (EOS, 100))
    ids, mask = prompts(2, ragged=False)
    ids = ids.clamp(max=79)

    def spell(batch, seen):
        return [100] if len(seen) == 12 else [30 + len(seen)]

    options = {"vocabulary": vocabulary, "prefix_allowed_tokens_fn": spell, "eos_token_id": [EOS, 100]}
    for sampling in ({}, {"do_sample": True, "top_k": 0}):
        output = generate(pairs(), ids, mask, StitchConfig(tau=1.0), **options, **sampling)
        for row in range(2):
            assert new(output, row) == [37, 38, 39, 40, 41, 100]
            assert output.usage[row].calls == [6, 1]
            assert output.usage[row].discarded == 1
    with pytest.raises(ValueError, match="cannot write alone"):
        generate(pairs(), ids, mask, StitchConfig(policy="small"), **options)
    options["prefix_allowed_tokens_fn"] = lambda batch, seen: [90]
    with pytest.raises(ValueError, match="no token is allowed at position 0"):
        generate(pairs(), ids, mask, StitchConfig(tau=1.0), **options)


def test_logits_that_are_no_numbers_do_not_pass_for_certain_ones(pairs):
    small, large = (copy.deepcopy(model) for model in pairs())
    ids, mask = prompts(1, ragged=False)
    with torch.no_grad():
        large.lm_head.weight[5, 0] = torch.nan
    with pytest.raises(ValueError, match="large model's logits are not numbers"):
        generate((small, large), ids, mask, StitchConfig(tau=0.2))
    # None of them is a number: the small model does not hand over as if a grammar had closed all its tokens.
    with torch.no_grad():
        small.model.norm.weight[0] = torch.nan
    for sampling in ({}, {"do_sample": True, "top_k": 0}):
        with pytest.raises(ValueError, match="small model's logits are not numbers"):
            generate((small, large), ids, mask, StitchConfig(tau=0.2), **sampling)


def test_a_users_constraint_says_so(pairs):
    class Fence(Ban):
        is_constraint = True

    ids, mask = prompts(1, ragged=False)
    config = StitchConfig(policy="small")
    soft, hard = (
        generate(pairs(), ids, mask, config, logits_processor=[processor]).entropy for processor in (Ban(), Fence())
    )
    assert not torch.equal(soft[0, :1], hard[0, :1])


# What comes out as it runs


def test_tokens_are_told_as_they_stay(pairs):
    ids, mask = prompts(3)
    told = []
    output = generate(pairs(), ids, mask, StitchConfig(tau=0.5), on_token=told.append)
    for row in range(3):
        own = [token for token in told if token.row == row]
        assert [token.token for token in own] == new(output, row)
        assert [token.position for token in own] == list(range(len(own)))
        assert [token.model for token in own] == output.models[row, : len(own)].tolist()
        assert [token.last for token in own] == [False] * (len(own) - 1) + [True]
        assert [token.logprob for token in own] == pytest.approx(output.logprobs[row, : len(own)].tolist())
        assert all(token.logprob <= 0 and 0 < token.confidence <= 1 for token in own)
    greedy = [token for token in told if token.confidence != pytest.approx(2.718281828**token.logprob, rel=1e-4)]
    assert not greedy


def test_streamers_show_one_row(pairs):
    class Kept:
        def __init__(self):
            self.parts = []

        def put(self, value):
            self.parts.append(value)

        def end(self):
            self.parts.append("end")

    ids, mask = prompts(1, ragged=False)
    streamer, told = Kept(), []
    output = generate(pairs(), ids, mask, StitchConfig(tau=0.5), streamer=streamer, on_token=told.append)
    assert torch.equal(streamer.parts[0], ids)
    assert [int(part) for part in streamer.parts[1:-1]] == new(output, 0) == [token.token for token in told]
    assert streamer.parts[-1] == "end"
    ids, mask = prompts(2)
    with pytest.raises(ValueError, match="on_token"):
        generate(pairs(), ids, mask, StitchConfig(), streamer=streamer)


def test_stopping_criteria_see_each_row(pairs):
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            # Rows stop apart from each other: at the first token that can be divided by five.
            return (input_ids[:, -1] % 5 == 0) & (input_ids.shape[1] > 7)

    ids, mask = prompts(4)
    free = generate(pairs(), ids, mask, StitchConfig(tau=0.5))
    output = generate(pairs(), ids, mask, StitchConfig(tau=0.5), stopping_criteria=[After()])
    lengths = set()
    for row in range(4):
        whole = new(free, row)
        stop = next((at for at, token in enumerate(whole) if token % 5 == 0), len(whole) - 1)
        assert new(output, row) == whole[: stop + 1]
        lengths.add(stop)
    assert len(lengths) > 1
    ended = generate(pairs(), ids, mask, StitchConfig(), stopping_criteria=[MaxTimeCriteria(0.0)])
    assert all(sum(usage.tokens) == 1 for usage in ended.usage)


def test_stop_strings(pairs):
    from hone_rstitch.host import build_tokenizer

    tokenizer = build_tokenizer("large")
    ids, mask = prompts(1, ragged=False)
    keep = {"suppress_tokens": list(range(10, 96)), "eos_token_id": None}
    whole = tokenizer.decode(new(generate(pairs(), ids, mask, StitchConfig(tau=0.5), **keep), 0))
    stop = whole[3:5]
    assert whole.index(stop) == 3
    output = generate(pairs(), ids, mask, StitchConfig(tau=0.5), stop_strings=stop, tokenizer=tokenizer, **keep)
    assert tokenizer.decode(new(output, 0)) == whole[: whole.index(stop) + len(stop)]
    with pytest.raises(ValueError, match="tokenizer"):
        generate(pairs(), ids, mask, StitchConfig(), stop_strings=stop)


def test_a_tensor_comes_back_unless_more_is_asked_for(pairs):
    small, large = pairs()
    ids, mask = prompts(2)
    found = large.generate(
        ids, attention_mask=mask, custom_generate=stitch_decoding, slm=small, stitch=StitchConfig(tau=0.5),
        max_new_tokens=6,
    )  # fmt: skip
    assert torch.equal(found, generate(pairs(), ids, mask, StitchConfig(tau=0.5), max_new_tokens=6).sequences)


def test_prompts_of_the_small_model(pairs):
    small, large = pairs()
    ids, mask = prompts(2)
    other, other_mask = prompts(2, 11, seed=8)
    output = stitch_generate(
        large, small, ids, attention_mask=mask, small_input_ids=other, small_attention_mask=other_mask,
        stitch=StitchConfig(tau=1.0), max_new_tokens=12, return_dict_in_generate=True,
    )  # fmt: skip
    wanted = small.generate(other, attention_mask=other_mask, max_new_tokens=12, do_sample=False)
    for row in range(2):
        count = len(new(output, row))
        assert new(output, row) == wanted[row, 11 : 11 + count].tolist()
    assert output.usage[0].prompt_tokens[SMALL] == int(other_mask[0].sum())


def test_ids_are_translated_for_the_small_model(pairs):
    # The small model numbers its tokens backwards; a vocabulary that says so gives the text of the plain pair.
    small, large = pairs()
    turned = copy.deepcopy(small)
    order = torch.arange(95, -1, -1)
    with torch.no_grad():
        turned.model.embed_tokens.weight.copy_(small.model.embed_tokens.weight[order])
        turned.lm_head.weight.copy_(small.lm_head.weight[order])
    turned.generation_config.eos_token_id = 95 - EOS
    to_small = torch.full((112,), -1)
    to_small[:96] = order
    ids, mask = prompts(3)
    config = StitchConfig(tau=0.55)
    found = generate((turned, large), ids, mask, config, vocabulary=Vocabulary(to_small, (EOS,)))
    wanted = generate(pairs(), ids, mask, config)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.models, wanted.models)
    with pytest.raises(ValueError, match=r"Vocabulary\.of"):
        generate((turned, large), ids, mask, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    small, large = (model.to(dtype) for model in tiny("qwen2"))
    ids, mask = prompts(2)
    output = generate((small, large), ids, mask, StitchConfig(tau=0.5))
    assert all(sum(usage.tokens) >= 1 for usage in output.usage)
    assert not output.entropy[output.models >= 0].isnan().any()


# What cannot be


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_beams": 2}, "beams"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"output_scores": True}, "output_scores"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidance"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=2, keys=[1, 2])}, "SynthID"),
        ({"seed": [1, 2]}, "per row"),
        ({"seed": -4}, "seed"),
        ({"position_ids": torch.arange(7)[None].repeat(3, 1) + 1}, "position_ids"),
        ({"vocabulary": Vocabulary.shared(96, 100, [EOS])}, "logits"),
        ({"vocabulary": Vocabulary.shared(112, 112, [EOS])}, "logits"),
        ({"small_input_ids": torch.ones(2, 4, dtype=torch.long)}, "per row"),
        ({"small_input_ids": torch.ones(1, 4, dtype=torch.long)}, "per row; got 1 for 3 rows"),
        ({"assistant_model": tiny("qwen2")[0]}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 3}, "not by assisted generation"),
        ({"dola_layers": "low"}, "not by dola generation"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_hold_are_refused(pairs, options, match):
    ids, mask = prompts(3)
    with pytest.raises(ValueError, match=match):
        generate(pairs(), ids, mask, StitchConfig(), **options)


def test_padding_on_the_right_is_refused(pairs):
    ids, mask = prompts(3)
    with pytest.raises(ValueError, match="left"):
        generate(pairs(), ids, mask.flip(1), StitchConfig())
    with pytest.raises(ValueError, match="empty"):
        generate(pairs(), ids, mask * torch.tensor([[1], [0], [1]]), StitchConfig())


def test_a_small_model_with_too_few_positions_is_named(pairs, caplog):
    ids, mask = prompts(1, ragged=False)
    generate(
        pairs(), ids, mask, StitchConfig(tau=1.0), max_length=600, max_new_tokens=None, eos_token_id=list(range(96))
    )
    assert "positions for 512 tokens" in caplog.text
