"""Token selection inside real classes: equal to the dense model whose dropped keys and values are masked."""

import copy
import threading
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hone_core.testing import assert_close, requires_gpu
from hone_lm.attention import tap_attention
from hone_lm.decoders import cache_keyword, find_decoder
from hone_lm.layouts import RULES
from hone_lm.tiny import tiny, tiny_inputs
from hone_zipr1 import models
from hone_zipr1.cache import Chosen, Kept, SparseLayer
from hone_zipr1.config import TESTED, SparseConfig
from hone_zipr1.models import (
    attach,
    check_config,
    packed_attention,
    packs,
    selected_attention,
    sparse,
    visual_ids,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, QuantizedCache, StaticCache

FAMILIES = TESTED
MIXED = "qwen3_vl_moe"
OTHERS = tuple(family for family in RULES if family not in FAMILIES)
ONE, TWO = ["What moves?"], ["What moves?", "Which of the two is first, and where?"]
MODELS = {}
LAYERS = 3
ROUNDED = {"atol": 1e-6, "rtol": 2e-7}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def get(family, questions=ONE, **options):
    """A model in float64, so that equal means equal to its rounding."""
    if family not in MODELS:
        model, processor = tiny(family, layers=LAYERS)
        # Torch has no products of experts in float64.
        MODELS[family] = model if family == MIXED else model.double(), processor
    model, processor = MODELS[family]
    inputs = tiny_inputs(family, processor, questions, **options)
    return model, {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def written(model, inputs, **options):
    """Answers and the logits that made them, which generate rounds to float32."""
    # A model with random weights may well write a placeholder, which another forward would take for a picture.
    options |= {"suppress_tokens": list(visual_ids(model.config))}
    out = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences, torch.stack(out.logits, 1)


def masked_dense(model, inputs, keep):
    """Logits of the dense model whose layer l reads only what ``keep[l]`` says, and writes nothing elsewhere.

    ``[batch, tokens]``, or ``[batch, tokens, tokens]`` where rows differ in what they read.
    """
    decoder = find_decoder(model)

    def attend(base, module, query, key, value, attention_mask, **kwargs):
        kept = keep[module.layer_idx]
        tokens = query.shape[2]
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        logits = torch.einsum("bhid,bhjd->bhij", query, key) * kwargs["scaling"]
        pairs = kept if kept.dim() == 3 else kept[:, None, :].expand(-1, tokens, -1)
        there = pairs.diagonal(dim1=1, dim2=2)
        pairs = torch.ones(tokens, tokens).tril().bool() & pairs[:, None]
        weights = torch.where(pairs, logits, -1e30).softmax(-1) * there[:, None, :, None]
        return torch.einsum("bhij,bhjd->bihd", weights, value), None

    tap = tap_attention(decoder, attend)
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        tap.remove()


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_p_of_one_is_the_dense_model_bit_for_bit(family):
    model, inputs = get(family, TWO)
    logits, text = model(**inputs).logits, written(model, inputs)
    with sparse(model, 1.0) as handle:
        assert torch.equal(model(**inputs).logits, logits)
        assert all(map(torch.equal, written(model, inputs), text))
        assert handle.stats.ratio.tolist() == [1.0, 1.0]
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize(
    ("family", "cache"),
    [*((family, cache) for family in FAMILIES for cache in ("evict", "retrieve")), *((one, "evict") for one in OTHERS)],
)
def test_a_sparse_run_is_the_dense_run_with_dropped_keys_and_values_masked(family, cache):
    model, inputs = get(family, TWO)
    real = inputs["attention_mask"].bool()
    with sparse(model, 0.4, rows="all", protect="none", cache=cache) as handle:
        prefill = model(**inputs).logits
        keep = handle.stats.keep
        ids, logits = written(model, inputs)
    ratio = torch.stack([k.sum(-1) / real.sum(-1) for k in keep.values()])
    assert ratio.max() < 0.9
    assert all((k[:, -1]).all() and not (k & ~real).any() for k in keep.values())
    single = family == MIXED
    assert_close(prefill[real], masked_dense(model, inputs, keep)[real], atol=1e-4 if single else 1e-9, rtol=0)
    # Without a cache: the prompt and all that was written in one forward, what was written being kept.
    new = ids.shape[1] - real.shape[1]
    longer = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    longer |= {"input_ids": ids, "attention_mask": torch.cat([real.long(), torch.ones(2, new, dtype=torch.long)], 1)}
    if "mm_token_type_ids" in longer:
        types = longer["mm_token_type_ids"]
        longer["mm_token_type_ids"] = torch.cat([types, types.new_zeros(2, new)], 1)
    else:
        # generate counts positions from the first real token; this class by itself does not.
        longer["position_ids"] = (longer["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    grown = {layer: torch.cat([k, torch.ones(2, new, dtype=torch.bool)], 1) for layer, k in keep.items()}
    expected = masked_dense(model, longer, grown)[:, -new - 1 : -1]
    assert_close(logits, expected.float(), **{"atol": 1e-4, "rtol": 0} if single else ROUNDED)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sample_of_a_batch_is_as_alone(family):
    model, inputs = get(family, TWO)
    _, alone = get(family, TWO[:1])
    for rows in ("all", "probe"):
        settings = {"rows": rows, "recent": 8, "random": 8}
        with sparse(model, 0.5, **settings) as handle:
            _, logits = written(model, inputs)
            together = handle.stats
            _, single = written(model, alone)
            assert_close(together.ratio[:1], handle.stats.ratio, atol=0, rtol=0)
        padding = int((~together.real[0]).sum())
        assert padding > 0
        for layer in range(LAYERS):
            assert torch.equal(together.keep[layer][0, padding:], handle.stats.keep[layer][0])
        assert_close(logits[:1], single, **ROUNDED)


def test_text_is_protected_and_a_ratio_for_each_sample():
    model, inputs = get("qwen2_5_vl", TWO)
    text = ~torch.isin(inputs["input_ids"], torch.tensor(visual_ids(model.config))) & inputs["attention_mask"].bool()
    with sparse(model, torch.tensor([0.1, 0.9]), rows="all") as handle:
        model(**inputs)
        assert all((k | ~text).all() for k in handle.stats.keep.values())
        low, high = handle.stats.ratio
        assert low < high
        shares = text.sum(-1) / inputs["attention_mask"].sum(-1)
        assert low == pytest.approx(float(shares[0]))
        assert float(handle.stats.uniform(0.9)[1]) >= float(shares[1])
        assert handle.stats.ratio_without_sink[1] <= high
        # With budget and choice of one score, at least p would be kept.
        assert all(0 < float(m[1]) <= 1 for m in handle.stats.mass.values())


def test_more_of_the_mass_keeps_more():
    model, inputs = get("llava_onevision")
    found = []
    for p in (0.2, 0.5, 0.8, 0.975):
        with sparse(model, p, rows="all", dense_layers=(1,)) as handle:
            model(**inputs)
            # The first layer sees the same states at every p.
            found.append(float(handle.stats.layer_ratio[0, 0]))
            assert handle.stats.layer_ratio[1, 0] == 1
    assert found == sorted(found)
    assert found[0] < found[-1]


@pytest.mark.parametrize("policy", ["top-k", "random", "fastv"])
def test_peers(policy):
    model, inputs = get("llava_onevision")
    ratio = {} if policy == "random" else {"ratio": 0.6}
    with sparse(model, 0.6, rows="all", protect="none", policy=policy, **ratio) as handle:
        out = model(**inputs).logits
        stats = handle.stats
    tokens = inputs["input_ids"].shape[1]
    counts = [int(k.sum()) for k in stats.keep.values()]
    if policy == "top-k":
        assert counts == [-(-6 * tokens // 10)] * LAYERS
    elif policy == "fastv":
        assert counts == [tokens, tokens, -(-6 * tokens // 10)]
    else:
        with sparse(model, 0.6, rows="all", protect="none") as handle:
            model(**inputs)
            assert counts[0] == int(handle.stats.keep[0].sum())
            assert not torch.equal(stats.keep[0], handle.stats.keep[0])
    assert_close(out, masked_dense(model, inputs, stats.keep), atol=1e-9, rtol=0)


def test_an_answer_in_the_same_forward_does_not_change_the_selection():
    model, inputs = get("qwen3_vl")
    prompt = inputs["input_ids"].shape[1]
    with sparse(model, 0.5, rows="all", protect="none") as handle:
        ids, logits = written(model, inputs)
        keep = handle.stats.keep
        new = ids.shape[1] - prompt
        types = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, new, dtype=torch.int)], 1)
        longer = inputs | {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": torch.ones_like(ids)}
        with handle.using(prompt_tokens=prompt):
            forced = model(**longer, use_cache=False).logits[:, prompt - 1 : -1]
        assert all(torch.equal(keep[layer], handle.stats.keep[layer]) for layer in keep)
    assert_close(forced.float(), logits, **ROUNDED)


@pytest.mark.parametrize("cache", ["evict", "retrieve"])
def test_beams_are_those_of_the_masked_model_and_returned_sequences_of_one_prompt(cache):
    model, inputs = get("qwen2_5_vl", TWO)
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    with sparse(model, 0.4, rows="all", protect="none", cache=cache) as handle:
        cached = model.generate(**inputs, **settings)
        assert handle.stats.ratio.shape == (6,)
        assert handle.stats.ratio[0] == handle.stats.ratio[2] != handle.stats.ratio[3]
    with sparse(model, 0.4, rows="all", protect="none", compute="mask", cache="retrieve"):
        masked = model.generate(**inputs, **settings)
    with sparse(model, 1.0):
        dense = model.generate(**inputs, **settings)
    assert torch.equal(cached.sequences, masked.sequences)
    assert_close(cached.sequences_scores, masked.sequences_scores, **ROUNDED)
    assert not torch.allclose(cached.sequences_scores, dense.sequences_scores)


def test_a_later_turn_reads_what_is_left(caplog):
    model, inputs = get("llava_onevision")
    more = torch.tensor([[40, 50, 60]])
    both = torch.cat([inputs["input_ids"], more], 1)
    with sparse(model, 0.3, rows="all") as handle:
        cache = DynamicCache()
        model(**inputs, use_cache=True, **{cache_keyword(model): cache})
        keep = handle.stats.keep
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        stored = [layer.keys.shape[-2] for layer in cache.layers]
        assert stored == [int(k.sum()) for k in keep.values()]
        assert not caplog.records
        later = model(
            input_ids=more, attention_mask=torch.ones_like(both), use_cache=True, **{cache_keyword(model): cache}
        ).logits
    assert "a later turn of 3 tokens reads a prompt of which tokens are gone for good" in caplog.text
    grown = {layer: torch.cat([k, torch.ones(1, 3, dtype=torch.bool)], 1) for layer, k in keep.items()}
    longer = inputs | {"input_ids": both, "attention_mask": torch.ones_like(both)}
    assert_close(later, masked_dense(model, longer, grown)[:, -3:], atol=1e-9, rtol=0)


def test_a_later_turn_after_text_alone_has_nothing_to_warn_of(caplog):
    model, _ = get("llava_onevision")
    found = []
    for p in (None, 0.3):
        cache = {cache_keyword(model): DynamicCache()}
        with nullcontext() if p is None else sparse(model, p, rows="all"):
            model(input_ids=torch.full((1, 20), 40), use_cache=True, **cache)
            found.append(model(input_ids=torch.tensor([[40, 50, 60]]), use_cache=True, **cache).logits)
    # All text is kept.
    assert_close(found[1], found[0], atol=1e-9, rtol=0)
    assert not caplog.records


@pytest.mark.parametrize("rows", ["all", "probe"])
def test_a_later_turn_on_a_full_cache_chooses_anew(rows):
    model, inputs = get("llava_onevision", TWO)
    real, keyword = inputs["attention_mask"].bool(), cache_keyword(model)
    said, more = torch.tensor([[30], [31]]), torch.tensor([[40, 50, 60], [61, 51, 41]])
    first, new = real.shape[1], 4
    whole = torch.cat([real, torch.ones(2, new, dtype=torch.bool)], 1)
    # generate counts positions from the first real token; this class by itself does not.
    places = (whole.long().cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache()
    with sparse(model, 0.6, rows=rows, recent=2, random=1, cache="retrieve", protect="none") as handle:
        model(**inputs, use_cache=True, position_ids=places[:, :first], **{keyword: cache})
        before = handle.stats
        step = {"attention_mask": whole[:, : first + 1].long(), "position_ids": places[:, first : first + 1]}
        model(input_ids=said, use_cache=True, **step, **{keyword: cache})
        assert handle.stats is before
        step = {"attention_mask": whole.long(), "position_ids": places[:, first + 1 :]}
        later = model(input_ids=more, use_cache=True, **step, **{keyword: cache}).logits
        now = handle.stats
    assert now.real.shape[1] == first + new
    assert now.protected[:, first:].tolist() == [[True, False, False, True]] * 2
    assert torch.equal(now.protected[:, :first], before.protected)
    assert any((now.keep[layer][:, :first] & ~before.keep[layer]).any() for layer in range(LAYERS))
    assert all((now.keep[layer] & ~whole).sum() == 0 for layer in range(LAYERS))
    # Each row of the whole read what was chosen in its turn; a prompt's dropped tokens stay without output.
    keep = {}
    for layer in range(LAYERS):
        pairs = torch.cat([before.keep[layer], torch.ones(2, new, dtype=torch.bool)], 1)[:, None].repeat(
            1, first + new, 1
        )
        pairs[:, first + 1 :] = now.keep[layer][:, None]
        keep[layer] = pairs
    longer = inputs | {"input_ids": torch.cat([inputs["input_ids"], said, more], 1), "attention_mask": whole.long()}
    expected = masked_dense(model, longer | {"position_ids": places}, keep)[:, -3:]
    assert_close(later, expected, atol=1e-9, rtol=0)
    assert 0 < float(now.uniform(0.6)[0]) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_two_turns_of_generate(family):
    model, inputs = get(family)
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(visual_ids(model.config))}
    found, ratios = [], []
    for p, cache_kind in ((None, "evict"), (1.0, "retrieve"), (0.5, "retrieve"), (0.5, "evict")):
        cache = DynamicCache()
        with nullcontext() if p is None else sparse(model, p, rows="all", cache=cache_kind) as handle:
            said = model.generate(**inputs, **settings, **{cache_keyword(model): cache})
            first = handle.stats if handle else None
            ids = torch.cat([said, torch.tensor([[40, 50, 60]])], 1)
            later = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if "mm_token_type_ids" in inputs:
                types = inputs["mm_token_type_ids"]
                later["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, ids.shape[1] - types.shape[1])], 1)
            found.append(model.generate(**later, **settings, **{cache_keyword(model): cache}))
            ratios.append((first, handle.stats) if handle else None)
    assert torch.equal(found[0], found[1])
    _, whole, (before, anew), (evicted, same) = ratios
    assert whole[1].ratio.tolist() == [1.0]
    # Chosen anew over both turns on a full cache, not again where the rest is gone.
    assert anew.real.shape[1] == found[2].shape[1] - 4
    assert before.real.shape[1] == inputs["input_ids"].shape[1]
    assert evicted is same


def test_later_turns_at_p_of_one_are_the_dense_model_bit_for_bit():
    model, inputs = get("llava_onevision")
    more = torch.tensor([[40, 50, 60]])
    found = []
    for p in (None, 1.0):
        cache = DynamicCache()
        with nullcontext() if p is None else sparse(model, p, cache="retrieve"):
            model(**inputs, use_cache=True, **{cache_keyword(model): cache})
            found.append(model(input_ids=more, use_cache=True, **{cache_keyword(model): cache}).logits)
    assert torch.equal(*found)


def test_prompt_lookup_writes_what_plain_decoding_does():
    model, inputs = get("llava_onevision")
    with sparse(model, 0.3, rows="all") as handle:
        plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        kept = handle.stats.keep
        looked = model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(kept[0], handle.stats.keep[0])
    assert torch.equal(plain, looked)


def test_an_assistant_writes_what_plain_decoding_does():
    model, inputs = get("qwen2_5_vl")
    assistant = tiny("qwen2_5_vl", layers=LAYERS)[0].double()
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": list(visual_ids(model.config))}
    for cache in ("evict", "retrieve"):
        with sparse(model, 0.3, rows="all", cache=cache):
            plain = model.generate(**inputs, **settings)
            assert torch.equal(plain, model.generate(**inputs, **settings, assistant_model=assistant))


@pytest.mark.parametrize("cache_kind", ["evict", "retrieve"])
def test_guesses_behind_padded_prompts_are_taken_back(cache_kind):
    model, inputs = get("llava_onevision", TWO)
    keyword, real = cache_keyword(model), inputs["attention_mask"]
    guesses = torch.tensor([[40, 50], [61, 51]])
    longer = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], guesses], 1),
        "attention_mask": torch.cat([real, torch.ones_like(guesses)], 1),
    }
    found = []
    for guessed in (False, True):
        cache = DynamicCache()
        with sparse(model, 0.4, rows="all", protect="none", cache=cache_kind) as handle:
            if guessed:
                model(**longer, logits_to_keep=3, use_cache=True, **{keyword: cache})
                cache.crop(-2)
            else:
                model(**inputs, use_cache=True, **{keyword: cache})
            counts = handle.stats.keep[0].sum(-1)
            said = []
            for step in range(2):
                mask = torch.cat([real, real.new_ones(2, step + 1)], 1)
                token = torch.tensor([[7 + step], [9 + step]])
                call = {"position_ids": (mask.cumsum(-1) - 1)[:, -1:], "attention_mask": mask, "use_cache": True}
                said.append(model(input_ids=token, **call, **{keyword: cache}).logits)
            found.append(torch.stack(said))
    assert counts[0] != counts[1]
    assert_close(found[1], found[0], atol=1e-9, rtol=0)


def test_the_last_token_stays_whatever_is_protected():
    model, inputs = get("llava_onevision", TWO)
    nothing = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
    with sparse(model, 0.1, rows="all") as handle, handle.using(protected=nothing):
        model(**inputs)
        assert handle.stats.protected.sum(-1).tolist() == [1, 1]
        assert all(keep[:, -1].all() for keep in handle.stats.keep.values())


@pytest.mark.parametrize("questions", [ONE, TWO])
def test_padding_of_a_later_turn_is_not_read(questions):
    model, inputs = get("llava_onevision", questions)
    keyword, count = cache_keyword(model), len(questions)
    found = []
    for padded in (0, 1):
        cache, whole = DynamicCache(), inputs["attention_mask"]
        with sparse(model, 0.4, rows="all", protect="none"):
            model(**inputs, use_cache=True, **{keyword: cache})
            for ids, mask in (([40, 50, 9][: 2 + padded], [1, 1, 0][: 2 + padded]), ([7], [1])):
                whole = torch.cat([whole, torch.tensor([mask] * count)], 1)
                call = {"attention_mask": whole, "position_ids": (whole.cumsum(-1) - 1)[:, -len(ids) :]}
                said = model(input_ids=torch.tensor([ids] * count), use_cache=True, **call, **{keyword: cache})
        found.append(said.logits)
    assert_close(*found, atol=1e-9, rtol=0)


def test_a_peft_model_is_taken_as_what_is_inside():
    from peft import LoraConfig, get_peft_model

    model, inputs = get("qwen2_5_vl")
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(model), lora).double()
    found = []
    for one in (wrapped, wrapped.get_base_model()):
        with sparse(one, 0.4, rows="all") as handle:
            found.append(written(wrapped, inputs)[1])
            assert handle.stats.ratio < 1
    assert torch.equal(*found)


def test_lora_before_and_after_attach():
    from peft import LoraConfig, inject_adapter_in_model

    source, inputs = get("llava_onevision", TWO)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    found = []
    for first in (True, False):
        model = copy.deepcopy(source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if first:
                inject_adapter_in_model(lora, model.double())
            with sparse(model, 0.4, rows="all") as handle:
                if not first:
                    inject_adapter_in_model(lora, model.double())
                found.append(written(model.double().eval(), inputs)[1])
                assert (handle.stats.ratio < 1).all()
    assert torch.equal(*found)
    with sparse(source, 0.4, rows="all"):
        assert not torch.allclose(written(source, inputs)[1], found[0])


@pytest.mark.parametrize("cache", ["evict", "retrieve"])
def test_several_threads_on_one_model(cache):
    model, first = get("qwen2_5_vl")
    asked = (first, get("qwen2_5_vl", TWO)[1])
    ready, found = threading.Barrier(2), {0: [], 1: []}

    def work(index):
        ready.wait()
        with torch.no_grad():
            found[index] += [written(model, asked[index])[1] for _ in range(4)]

    with sparse(model, 0.4, rows="all", cache=cache):
        wanted = [written(model, inputs)[1] for inputs in asked]
        threads = [threading.Thread(target=work, args=(index,)) for index in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, want in enumerate(wanted):
        assert len(found[index]) == 4
        assert all(torch.equal(one, want) for one in found[index])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_chooses_the_same_tokens(reentrant):
    source, inputs = get("qwen2_5_vl")
    grads = []
    for checkpointed in (False, True):
        model = copy.deepcopy(source)
        if checkpointed:
            # Newer transformers has another name for it.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.train()
        with torch.enable_grad(), sparse(model, 0.4, rows="all", compute="mask") as handle:
            model(**inputs, use_cache=False).logits[:, -1].square().mean().backward()
            assert handle.stats.ratio < 1
        grads.append({name: weight.grad for name, weight in find_decoder(model).model.named_parameters()})
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, atol=1e-12)
    assert any(float(grad.abs().max()) > 0 for grad in grads[0].values())


def test_a_layer_that_stands_for_another_is_named():
    # What torch.compile makes of layers that differ in their number alone.
    model, inputs = get("qwen2_vl")
    layers = find_decoder(model).layers
    with sparse(model, 0.4, rows="all"):
        own, layers[1].self_attn.layer_idx = layers[1].self_attn.layer_idx, 0
        try:
            with pytest.raises(RuntimeError, match="layer 0 came twice in one forward"):
                model(**inputs)
        finally:
            layers[1].self_attn.layer_idx = own


def test_cache_layer_counts_what_was_seen_and_takes_back_only_what_is_whole():
    layer = SparseLayer()
    states = torch.arange(6.0).view(1, 1, 6, 1).expand(2, 1, 6, 1)
    layer.update(states, states)
    keep = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1]]).bool()
    layer.evict(Kept.of(keep), 6)
    assert layer.get_seq_length() == 6
    assert layer.get_mask_sizes(2) == (8, 0)
    assert layer.keys[0, 0, :, 0].tolist() == [0, 2, 5]
    assert layer.keys[1, 0, :2, 0].tolist() == [3, 5]
    assert layer.valid.tolist() == [[True] * 3, [True, True, False]]
    layer.update(states[:, :, :2], states[:, :, :2])
    assert layer.positions[:, -2:].tolist() == [[6, 7]] * 2
    layer.crop(-1)
    assert (layer.get_seq_length(), layer.keys.shape[-2]) == (7, 4)
    with pytest.raises(ValueError, match="of the first 6, some are evicted"):
        layer.crop(-2)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0]))
    assert layer.positions[:, :2].tolist() == [[3, 5], [0, 2]]
    layer.protected = torch.tensor([[True] * 7, [False] * 7])
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.positions[:, :2].tolist() == [[0, 2]]
    assert layer.keys[0, 0, :2, 0].tolist() == [0, 2]
    assert layer.protected.tolist() == [[False] * 7]
    layer.crop(6)
    assert (layer.get_seq_length(), layer.protected.shape[1]) == (6, 6)
    layer.reset()
    assert layer.get_seq_length() == 0


def test_later_tokens_are_noted_when_they_are_asked_for():
    states = torch.arange(9.0).view(1, 1, 9, 1).expand(2, 1, 9, 1)
    keep = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1]]).bool()
    rooms = []
    for asked in (False, True):
        layer = SparseLayer()
        layer.update(states[:, :, :6], states[:, :, :6])
        layer.evict(Kept.of(keep), 4)
        assert layer.dropped
        assert not layer.whole
        for _ in range(3):
            layer.update(states[:, :, :1], states[:, :, :1])
            if asked:
                assert layer.valid.shape == layer.positions.shape == (2, layer.keys.shape[2])
                rooms.append(layer.valid.data_ptr())
        layer.crop(-2)
        layer.update(states[:, :, :1], states[:, :, :1])
        assert layer.positions.tolist() == [[0, 2, 5, 6, 7], [*layer.positions[1, :3].tolist(), 6, 7]]
        assert layer.positions[1, :2].tolist() == [3, 5]
        assert layer.valid.tolist() == [[True] * 5, [True, True, False, True, True]]
        # Token 5 is a guess, and stands in another column in each sample.
        layer.crop(5)
        assert layer.positions.tolist()[0] == [0, 2]
        assert layer.valid.tolist() == [[True, True], [True, False]]
        layer.update(states[:, :, :1], states[:, :, :1])
        assert layer.positions[:, 2:].tolist() == [[5], [5]]
        assert layer.valid.tolist() == [[True] * 3, [True, False, True]]
    assert len(set(rooms)) == 1


class Work(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(alias.alias_info and not alias.alias_info.is_write for alias in func._schema.arguments):
            self.found[str(func)] += 1
        return out


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_step_after_one_prompt_does_no_more_than_the_dense_one(implementation):
    model, inputs = get("qwen2_5_vl")
    found = []
    model.set_attn_implementation(implementation)
    try:
        for p in (None, 0.4):
            with nullcontext() if p is None else sparse(model, p) as handle:
                cache = DynamicCache()
                model(**inputs, **{cache_keyword(model): cache})
                assert p is None or handle.stats.ratio < 1
                for _ in range(2):
                    with Work() as work:
                        at = torch.full((3, 1, 1), cache.get_seq_length())
                        model(torch.tensor([[10]]), position_ids=at, **{cache_keyword(model): cache})
                    found.append(work.found)
    finally:
        model.set_attn_implementation("sdpa")
    assert found[0].total() > 30 * LAYERS
    assert not found[2] - found[0]
    assert not found[3] - found[1]


def test_what_a_kernel_knows_of_its_choice_is_where_the_tokens_are():
    from hone_kernels.token_select import select_tokens

    rank, real = torch.rand(3, 17), torch.ones(3, 17, dtype=torch.bool)
    for budget in ([4, 9, 17], [5, 5, 5]):
        found = Chosen(*select_tokens(rank, real=real, protected=~real, budget=torch.tensor(budget)))
        own, known = Kept.of(found.keep), Kept.of(found)
        assert torch.equal(own.keep, known.keep)
        assert (own.valid is None) == (known.valid is None) == (budget[0] == 5)
        valid = torch.ones_like(own.places, dtype=torch.bool) if own.valid is None else own.valid
        assert torch.equal(own.places[valid], known.places[valid])
        assert own.valid is None or torch.equal(own.valid, known.valid)
        states = torch.randn(3, 2, 17, 4)
        assert torch.equal(own.spread(*own.take(states)), known.spread(*known.take(states)))


def test_gathered_and_masked_attention_agree_with_gradients():
    with torch.enable_grad():
        states = torch.randn(3, 3, 4, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        keep = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 1, 1], [1] * 7]).bool()
        found = []
        for masked in (False, True):
            query, key, value = (s.clone().requires_grad_() for s in states)
            out = selected_attention(query, key[:, :2], value[:, :2], keep, masked=masked)
            out.square().sum().backward()
            found.append((out.detach(), query.grad, key.grad, value.grad))
        for one, other in zip(*found, strict=True):
            assert_close(one, other, atol=1e-12, rtol=0)
        assert not found[0][0][0, :, 1].any()


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("cache", ["evict", "retrieve"])
@pytest.mark.parametrize("rows", ["all", "probe"])
def test_kernels_choose_and_answer_as_the_formulas_do(cache, rows):
    model, inputs = get("qwen2_5_vl", TWO)
    settings = {"rows": rows, "recent": 8, "random": 8, "cache": cache}
    model = copy.deepcopy(model).float()
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    with sparse(model, 0.6, **settings) as handle:
        ids, logits = written(model, inputs)
        keep = handle.stats.keep
    model.cuda()
    with sparse(model, 0.6, **settings) as handle:
        found, again = written(model, {k: v.cuda() for k, v in inputs.items()})
        assert all(torch.equal(keep[layer], handle.stats.keep[layer].cpu()) for layer in keep)
    assert torch.equal(found.cpu(), ids)
    assert_close(again.cpu(), logits, atol=2e-3, rtol=2e-3)


def one_by_one(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """Attention of unequal lengths by its definition."""
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k >= int(cu_seq_q.diff().max())
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == torch.int32
    out = torch.empty_like(query)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    for start, stop in pairwise(cu_seq_q):
        logits = torch.einsum("ihd,jhd->hij", query[start:stop], key[start:stop]) * scale
        logits = logits.masked_fill(~torch.ones_like(logits[0]).bool().tril(), -torch.inf)
        out[start:stop] = torch.einsum("hij,jhd->ihd", logits.softmax(-1), value[start:stop])
    return out


@pytest.fixture
def unequal(monkeypatch):
    """Torch's attention of unequal lengths on a CPU."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", one_by_one)
    monkeypatch.setattr(models, "_packable", lambda query, dropout: True)


def test_packed_attention_lays_samples_one_after_the_other(unequal):
    query, key, value = (torch.randn(3, heads, 11, 8, dtype=torch.float64) for heads in (4, 2, 2))
    keep = torch.rand(3, 11) < torch.tensor([0.3, 0.6, 0.9])[:, None]
    keep[:, -1] = True
    assert len(set(keep.sum(-1).tolist())) == 3
    found = packed_attention(query, key, value, Chosen(keep), 0.3)
    assert_close(found, selected_attention(query, key, value, keep, scaling=0.3, masked=True), atol=1e-12, rtol=0)


def test_packed_attention_is_refused_where_torch_has_none():
    query, key, value = (torch.randn(1, 2, 11, 8, dtype=torch.float64) for _ in range(3))
    keep = torch.ones(1, 11, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"compute='varlen' is of float16 and bfloat16 on a GPU.*got torch.float64"):
        selected_attention(query, key, value, keep, packed=True)
    assert not packs(query, Chosen(keep, *Chosen(keep).located()))


@pytest.mark.parametrize("cache", ["evict", "retrieve"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_a_layer_that_does_not_wait_drops_the_same_a_layer_later(family, cache, unequal, monkeypatch):
    model, inputs = get(family, TWO)
    settings = {"rows": "all", "protect": "none", "cache": cache}
    layers = find_decoder(model).layers
    found, widths = [], []

    def look(module, args, kwargs):
        stored = kwargs[cache_keyword(module)].layers
        widths.append([layer.keys.shape[2] for layer in stored if layer.seen])

    for late in (False, True):
        monkeypatch.setattr(models, "packs", lambda *args, late=late: late)
        hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
        widths.clear()
        with sparse(model, 0.4, **settings) as handle:
            full, stored = model(**inputs), DynamicCache()
            seen = list(widths)
            model(**inputs, **{cache_keyword(model): stored})
            keep = handle.stats.keep
            found.append((full.logits, stored, keep, *written(model, inputs, num_beams=2)))
        for hook in hooks:
            hook.remove()
        tokens = inputs["input_ids"].shape[1]
        if cache == "evict":
            # What a layer keeps it has alone; the layer before has it whole no longer than until the next one attends.
            assert [[width < tokens for width in row] for row in seen] == [
                [at < layer - late for at in range(layer)] for layer in range(LAYERS)
            ]
    real = inputs["attention_mask"].bool()
    (one, before, keep, ids, logits), (other, after, kept, again, same) = found
    assert all(torch.equal(keep[layer], kept[layer]) for layer in range(LAYERS))
    assert_close(other[real], one[real], atol=1e-9, rtol=0)
    assert torch.equal(again, ids)
    assert_close(same, logits, **ROUNDED)
    for first, second in zip(before.layers, after.layers, strict=True):
        assert torch.equal(first.positions[first.valid], second.positions[second.valid])
        assert torch.equal(first.valid, second.valid)
        assert_close(second.keys, first.keys, atol=1e-9, rtol=0)
        assert (first.seen, first.prompt, first.whole) == (second.seen, second.prompt, second.whole)


@requires_gpu(min_sm=80)
def test_packed_attention_on_a_gpu():
    query, key, value = (torch.randn(3, heads, 300, 64, device="cuda").bfloat16() for heads in (6, 2, 2))
    keep = torch.rand(3, 300, device="cuda") < torch.tensor([0.2, 0.5, 0.9], device="cuda")[:, None]
    keep[:, -1] = True
    found = selected_attention(query, key, value, keep, packed=True)
    want = selected_attention(query.float(), key.float(), value.float(), keep, masked=True)
    assert_close(found.float(), want, atol=2e-2, rtol=2e-2)
    assert not found[~keep[:, None].expand(-1, 6, -1)].any()


@requires_gpu(min_sm=80)
def test_nothing_of_ours_waits_before_the_layers(monkeypatch):
    from hone_core.testing import no_host_sync

    for name in ("_before_model", "_before_decoder"):
        whole = getattr(models.SparseHandle, name)

        def quiet(self, *args, whole=whole):
            with no_host_sync():
                return whole(self, *args)

        monkeypatch.setattr(models.SparseHandle, name, quiet)
    model = copy.deepcopy(get("qwen2_5_vl")[0]).half().cuda()
    ids = torch.full((2, 40), 7, device="cuda")
    with sparse(model, 0.5, recent=8, random=8) as handle:
        model(input_ids=ids)
        assert handle.stats.rows.tolist()[0] == handle.stats.rows.tolist()[1]
        assert handle.stats.rows.shape == (2, 16)
        with pytest.raises(ValueError, match="visual tokens came without pixels"):
            model(input_ids=ids.index_fill(1, ids.new_tensor([3]), visual_ids(model.config)[0]))


@requires_gpu(min_sm=80)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_no_layer_waits_for_the_device_on_a_gpu(family, monkeypatch):
    model, inputs = get(family, TWO)
    model = copy.deepcopy(model).half().cuda()
    inputs = {k: v.half().cuda() if v.is_floating_point() else v.cuda() for k, v in inputs.items()}
    decoder = find_decoder(model)
    layers, tokens = decoder.layers, inputs["input_ids"].shape[1]
    real, late = inputs["attention_mask"].bool(), models.packs
    for layer in layers[1:]:
        # Rounding may change what later layers choose, not what the first one does: they say nothing.
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model(**inputs)  # what torch does once
    hooks = [
        layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error")),
        layers[-1].register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")),
    ]
    found = []
    for way in (late, lambda *_: False):
        monkeypatch.setattr(models, "packs", way)
        with sparse(model, 0.4, rows="all", protect="none") as handle:
            try:
                for _ in range(2):
                    stored = DynamicCache()
                    logits = model(**inputs, **{cache_keyword(model): stored}).logits
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found.append((logits, stored.layers, handle.stats.keep))
        for hook in hooks:
            hook.remove()
    (one, before, keep), (other, after, kept) = found
    assert torch.equal(keep[0], kept[0])
    assert torch.equal(before[0].keys, after[0].keys)
    assert torch.equal(before[0].valid, after[0].valid)
    assert all(layer.keys.shape[2] < tokens for layer in before)
    assert_close(one[real].float(), other[real].float(), atol=2e-2, rtol=2e-2)


def test_eager_runs_the_same():
    model, inputs = get("qwen2_5_vl", TWO)
    with sparse(model, 0.4, rows="all"):
        expected = written(model, inputs)[1]
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    try:
        with sparse(model, 0.4, rows="all"):
            assert_close(written(model, inputs)[1], expected, **ROUNDED)
    finally:
        model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})


def test_disabled_and_detached():
    model, inputs = get("qwen2_vl")
    dense = model(**inputs).logits
    with sparse(model, 0.2, rows="all") as handle:
        changed = model(**inputs).logits
        with handle.disabled():
            assert torch.equal(model(**inputs).logits, dense)
    assert not torch.equal(changed, dense)
    assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("kind", ["evict", "retrieve"])
def test_a_cache_that_dropped_tokens_is_not_read_without_the_selection(kind, monkeypatch):
    model, inputs = get("llava_onevision")
    ids, name = inputs["input_ids"][:, -1:], cache_keyword(model)

    def step(cache):
        mask = torch.ones(1, int(cache.get_seq_length()) + 1, dtype=torch.long)
        return model(input_ids=ids, attention_mask=mask, use_cache=True, **{name: cache}).logits

    def fail(*args, **kwargs):
        raise MemoryError

    whole, cache = DynamicCache(), DynamicCache()
    with sparse(model, 1.0):
        model(**inputs, use_cache=True, **{name: whole})
    with sparse(model, 0.2, rows="all", cache=kind) as handle:
        model(**inputs, use_cache=True, **{name: cache})
        want = step(copy.deepcopy(cache))
        with handle.disabled(), pytest.raises(ValueError, match="this forward has no selection"):
            step(copy.deepcopy(cache))
        assert torch.equal(step(copy.deepcopy(cache)), want)
        halted = copy.deepcopy(cache)
        with monkeypatch.context() as patch:
            patch.setattr(SparseLayer, "update", fail)
            with pytest.raises(MemoryError):
                step(halted)
    with pytest.raises(ValueError, match="this forward has no selection"):
        step(halted)
    with pytest.raises(ValueError, match="Attach for as long as the cache is used, or read the prompt anew"):
        step(copy.deepcopy(cache))
    step(whole)  # nothing is gone from it
    with sparse(model, 0.2, rows="all", cache=kind):
        assert torch.equal(step(cache), want)


def small_config(**changes):
    config = copy.deepcopy(get("qwen2_5_vl")[0].config)
    for name, value in changes.items():
        setattr(config.text_config if hasattr(config.text_config, name) else config, name, value)
    return config


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, {}, "layers of sliding_attention"),
        ({}, {"dense_layers": (9,)}, r"layers are 0 .. 2; dense_layers names \[9\]"),
        ({}, {"policy": "fastv", "ratio": 0.5, "fastv_layer": 3}, "fastv_layer must be below the 3 layers"),
    ],
)
def test_what_a_model_cannot_take_is_known_by_its_config(config, settings, message):
    with pytest.raises(ValueError, match=message):
        check_config(small_config(**config), SparseConfig(**settings))


def test_a_class_without_layout_and_one_without_pictures():
    from transformers import GotOcr2Config, Qwen2Config

    assert "got_ocr2" not in RULES
    with pytest.raises(ValueError, match="got_ocr2 has no rule"):
        check_config(GotOcr2Config(), SparseConfig())
    with pytest.raises(ValueError, match="qwen2 has no visual tokens"):
        visual_ids(Qwen2Config())


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_that_cannot_be_cut_is_refused(implementation):
    model, _ = get("qwen2_vl")
    config = find_decoder(model).config
    before, config._attn_implementation = config._attn_implementation, implementation
    try:
        with pytest.raises(ValueError, match="set_attn_implementation"):
            attach(model, "tiny")
    finally:
        config._attn_implementation = before


def test_a_policy_without_a_threshold_is_given_none():
    model, inputs = get("llava_onevision", TWO)
    p = torch.tensor([0.5, 0.6])
    with sparse(model, p, policy="top-k", ratio=0.5), pytest.raises(ValueError, match="leave p out"):
        model(**inputs)


def test_bad_inputs_are_named():
    model, inputs = get("llava_onevision", TWO)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    filled = model(**inputs, use_cache=True).past_key_values
    token = torch.tensor([[5], [6]])
    with sparse(model, 0.5) as handle:
        with pytest.raises(ValueError, match="tapped already"):
            attach(model, "tiny")
        with handle.using(p=torch.tensor([0.5])), pytest.raises(ValueError, match="p must be 2 numbers"):
            model(**inputs)
        with handle.using(p=torch.tensor([0.5, 1.5])), pytest.raises(ValueError, match=r"in \(0, 1\]"):
            model(**inputs)
        for count in (-3, 0, inputs["input_ids"].shape[1] + 1):
            with (
                handle.using(prompt_tokens=count),
                pytest.raises(ValueError, match=f"prompt_tokens must lie in 1 .. .*{count}"),
            ):
                model(**inputs)
        real = inputs["attention_mask"].bool()
        for wrong in (real[:, 1:], real[:1], real.float()):
            with handle.using(protected=wrong), pytest.raises(ValueError, match="protected must be bool"):
                model(**inputs)
        with handle.using(protected=real), pytest.raises(ValueError, match="each beam and returned sequence has a row"):
            model.generate(**inputs, max_new_tokens=2, num_beams=2)
        with pytest.raises(ValueError, match="without pixels"):
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        stored = DynamicCache()
        with pytest.raises(ValueError, match="without pixels"):
            model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **{cache_keyword(model): stored}
            )
        # It is heard of behind the layers, which have filled the cache by then.
        again = model(**inputs, **{cache_keyword(model): stored}).logits
        assert torch.equal(again, model(**inputs).logits)
        with pytest.raises(ValueError, match="does not say what is text"):
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        with pytest.raises(ValueError, match="output_attentions"):
            model(**inputs, output_attentions=True)
        with pytest.raises(ValueError, match="before this was attached"):
            model(input_ids=token, **{cache_keyword(model): filled})
        with pytest.raises(RuntimeError, match="not its decoder alone"):
            find_decoder(model).model(inputs_embeds=embeds)
        text = model.config.get_text_config()
        static = StaticCache(config=text, max_cache_len=300)
        with pytest.raises(ValueError, match=r"needs a DynamicCache.*StaticLayer"):
            model(**inputs, use_cache=True, **{cache_keyword(model): static})
        with pytest.raises(ValueError, match="Leave cache_implementation out"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        offloaded = DynamicCache(config=text, offloading=True) if torch.cuda.is_available() else None
        if offloaded is not None:
            with pytest.raises(ValueError, match="not offloaded"):
                model(**inputs, use_cache=True, **{cache_keyword(model): offloaded})


def test_a_quantised_cache_is_refused():
    from hone_zipr1.cache import sparse_layers

    cache = QuantizedCache.__new__(QuantizedCache)
    cache.layers, cache.offloading = [], False
    with pytest.raises(ValueError, match="got QuantizedCache"):
        sparse_layers(cache, 2)


def test_stats_by_hand():
    real, keep = torch.tensor([[0, 1, 1, 1, 1]]).bool(), {0: [0, 1, 1, 0, 0], 1: [0, 0, 1, 1, 1]}
    stats = models.Stats(
        real,
        torch.zeros_like(real),
        keep={layer: torch.tensor([kept]).bool() for layer, kept in keep.items()},
        columns={0: torch.tensor([[0.0, 6.0, 1.0, 2.0, 1.0]])},
    )
    assert stats.layer_ratio.tolist() == [[0.5], [0.75]]
    assert stats.ratio.tolist() == [0.625]
    # Of the three tokens after the first, one and all three.
    assert stats.ratio_without_sink.tolist() == pytest.approx([2 / 3])
    assert stats.sink[0].tolist() == pytest.approx([0.6])
    assert stats.mass[0].tolist() == pytest.approx([0.7])
