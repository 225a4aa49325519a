"""Captured decoding: the plain loop's tokens and logits, from a cache that stays where it is."""

import copy
import gc
from functools import partial
from itertools import pairwise

import pytest
import torch
from hone_core.testing import assert_close, requires_gpu
from hone_lm.decoders import cache_keyword, find_decoder
from hone_lm.tiny import tiny, tiny_inputs
from hone_zipr1 import captured as module
from hone_zipr1.models import attach, sparse, visual_ids
from transformers import DynamicCache

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
ONE, TWO = ["What moves?"], ["What moves?", "Which of the two is first, and where?"]
MODELS = {}
LAYERS = 3
ROUNDED = {"atol": 1e-6, "rtol": 2e-7}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def get(family, questions=ONE, **options):
    if family not in MODELS:
        model, processor = tiny(family, layers=LAYERS)
        MODELS[family] = model.double().eval(), processor
    model, processor = MODELS[family]
    inputs = tiny_inputs(family, processor, questions, **options)
    return model, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def written(model, inputs, **options):
    """Tokens, the logits that made them, and the cache."""
    options = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": list(visual_ids(model.config))} | options
    out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits, 1), out.past_key_values


def compare(model, inputs, p=0.4, **settings):
    """Plain and captured answers, and the caches that they leave."""
    options = settings.pop("options", {})
    found = []
    for captured in (False, True):
        torch.manual_seed(0)
        with sparse(model, p, rows="all", captured=captured, **settings):
            found.append(written(model, inputs, **options))
    (plain, logits, cache), (ids, again, kept) = found
    assert torch.equal(plain, ids)
    assert_close(again, logits, **ROUNDED)
    for one, other in zip(cache.layers, kept.layers, strict=True):
        assert one.seen == other.seen
        assert (one.positions is None) == (other.positions is None)
        assert_close(other.keys, one.keys, atol=1e-9, rtol=0)
        assert_close(other.values, one.values, atol=1e-9, rtol=0)
        if one.positions is not None:
            assert torch.equal(one.positions, other.positions)
            assert torch.equal(one.valid, other.valid)
    return ids


@pytest.mark.parametrize("settings", [{}, {"p": 1.0}, {"cache": "retrieve"}, {"dense_layers": (1,)}])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_are_answered_as_by_the_plain_loop(family, settings):
    compare(*get(family, TWO), protect="none", **settings)


@pytest.mark.parametrize("policy", ["fastv", "visionzip", "random"])
def test_other_policies(policy):
    model, inputs = get("qwen2_5_vl", TWO)
    compare(model, inputs, policy=policy, **({} if policy == "random" else {"ratio": 0.6}))


def test_returned_sequences_and_draws():
    model, inputs = get("qwen2_5_vl", TWO)
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0}
    ids = compare(model, inputs, options=options)
    assert ids.shape[0] == 6
    assert not torch.equal(ids[0], ids[1])


def test_adapters_and_layers_that_take_the_place_of_linear_ones():
    from peft import LoraConfig, inject_adapter_in_model

    class Rounded(torch.nn.Module):
        """Whole numbers for weights, as quantised layers hold."""

        def __init__(self, linear):
            super().__init__()
            self.scale = linear.weight.abs().amax() / 127
            self.register_buffer("whole", (linear.weight / self.scale).round().to(torch.int8))

        def forward(self, states):
            return states @ (self.whole.to(states.dtype) * self.scale).T

    model, inputs = get("qwen2_5_vl", TWO)
    plain = compare(model, inputs)
    changed = copy.deepcopy(model)
    for layer in find_decoder(changed).layers:
        layer.mlp.down_proj = Rounded(layer.mlp.down_proj)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, changed)
    assert not torch.equal(compare(changed.double(), inputs), plain)


def test_a_step_is_kept_for_its_cache_and_no_longer():
    model, inputs = get("qwen2_5_vl")
    with sparse(model, 0.4, rows="all", captured=True) as handle:
        _, _, cache = written(model, inputs)
        step = handle._steps[cache]
        # The first of six tokens is the prefill's.
        assert step.left == module.ROOM - 5
        for layer, mine in zip(cache.layers, step.layers, strict=True):
            assert layer.keys.data_ptr() == mine.keys.data_ptr()
        _, _, other = written(model, inputs)
        assert handle._steps[other] is not step
        del cache, step
        gc.collect()
        assert list(handle._steps) == [other]


def test_room_that_is_full_is_made_again(monkeypatch):
    from hone_zipr1 import models

    monkeypatch.setattr(models, "ROOM", 2)
    rooms = []
    first = models.Step.__init__

    def counted(self, *given):
        rooms.append(given[-1])
        first(self, *given)

    monkeypatch.setattr(models.Step, "__init__", counted)
    compare(*get("qwen2_5_vl", TWO), options={"max_new_tokens": 10})
    assert rooms == [2, 4, 8]


def test_weights_that_move_are_read_where_they_are_now(monkeypatch):
    from hone_zipr1 import models

    model, inputs = get("qwen2_5_vl")
    model, made, found = copy.deepcopy(model), [], []
    first = models.Step.__init__
    monkeypatch.setattr(models.Step, "__init__", lambda *given: made.append(1) or first(*given))
    weight = find_decoder(model).layers[1].mlp.down_proj.weight
    keyword, token = cache_keyword(model), torch.tensor([[9]])
    for captured in (False, True):
        cache, before = DynamicCache(), weight.data.clone()
        with sparse(model, 0.4, rows="all", captured=captured):
            model(**inputs, use_cache=True, **{keyword: cache})

            def step(cache=cache):
                return model(input_ids=token, use_cache=True, **{keyword: cache}).logits

            said = [step(), step()]
            weight.data.mul_(1.1)  # where a graph reads it
            said.append(step())
            assert len(made) == captured
            weight.data = 1.1 * weight.data
            found.append(torch.stack([*said, step(), step()]))
            assert len(made) == 2 * captured
        weight.data = before
    assert_close(found[1], found[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("cache_kind", ["evict", "retrieve"])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_a_later_turn_and_tokens_taken_back(p, cache_kind):
    model, inputs = get("llava_onevision", TWO)
    keyword, more = cache_keyword(model), torch.tensor([[40, 50, 60], [61, 51, 41]])
    token = torch.tensor([[7], [8]])
    found = []
    for captured in (False, True):
        cache, said = DynamicCache(), []
        with sparse(model, p, rows="all", cache=cache_kind, captured=captured):
            mask = inputs["attention_mask"]

            def step(ids, cache=cache, said=said):
                nonlocal mask
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
                places = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
                call = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "use_cache": True}
                said.append(model(**call, **{keyword: cache}).logits[:, -1])

            model(**inputs, use_cache=True, **{keyword: cache})
            for ids in (token, token + 1):
                step(ids)
            step(more)
            step(token + 2)
            step(token + 3)
            cache.crop(-1)
            mask = mask[:, :-1]
            step(token + 4)
            step(token + 5)
            found.append(torch.stack(said))
    assert_close(*found, atol=1e-9, rtol=0)


def test_without_positions_they_go_on_from_what_was_seen():
    model, inputs = get("llava_onevision")
    found = []
    for captured in (False, True):
        cache = DynamicCache()
        with sparse(model, 0.4, rows="all", captured=captured):
            model(**inputs, use_cache=True, **{cache_keyword(model): cache})
            embeds = model.get_input_embeddings()(torch.tensor([[9]]))
            given = {"inputs_embeds": embeds, "use_cache": True, cache_keyword(model): cache}
            found.append([model(**given).logits for _ in range(3)])
    for one, other in zip(*found, strict=True):
        assert_close(other, one, atol=1e-9, rtol=0)
    assert not any(torch.allclose(one, other) for one, other in pairwise(found[0]))


def shared_out(weight):
    """As FSDP2 keeps a weight, of one process."""
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return distribute_tensor(weight, init_device_mesh("cpu", (1,)))


def test_what_it_cannot_follow_is_named():
    model, inputs = get("llava_onevision")
    token = {"input_ids": torch.tensor([[9]]), "use_cache": True}
    with sparse(model, 0.4, rows="all", captured=True):
        with pytest.raises(ValueError, match="or num_beams"):
            model.generate(**inputs, max_new_tokens=3, num_beams=2)
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
            model(**inputs, logits_to_keep=3, use_cache=True, **{cache_keyword(model): DynamicCache()})
        cache = DynamicCache()
        model(**inputs, use_cache=True, **{cache_keyword(model): cache})
        token[cache_keyword(model)] = cache
        with torch.enable_grad(), pytest.raises(ValueError, match=r"under torch.no_grad\(\)"):
            model(**token)
        model.train()
        try:
            with pytest.raises(ValueError, match=r"call model.eval\(\)"):
                model(**token)
        finally:
            model.eval()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="leave autocast"):
            model(**token)
        with pytest.raises(ValueError, match="got output_hidden_states"):
            model(**token, output_hidden_states=True)
        rotary = find_decoder(model).model.rotary_emb
        rotary.rope_type, before = "dynamic", rotary.rope_type
        try:
            with pytest.raises(ValueError, match=r"a rotation \(dynamic\)"):
                model(**token)
        finally:
            rotary.rope_type = before
        decoder = find_decoder(model)
        decoder.model.register_parameter("away", torch.nn.Parameter(torch.zeros(1, device="meta")))
        try:
            with pytest.raises(ValueError, match="on one device, cpu; some of it is on meta"):
                model(**token)
        finally:
            del decoder.model.away
        layer = decoder.layers[0].mlp.down_proj
        whole = layer.weight
        layer.weight = torch.nn.Parameter(shared_out(whole.data))
        try:
            with pytest.raises(ValueError, match="some of it is shared out over processes"):
                model(**token)
        finally:
            layer.weight = whole
            torch.distributed.destroy_process_group()
        # None of these has touched the cache.
        assert model(**token).logits.shape[1] == 1


def test_detached_the_forward_is_the_models_own():
    model, inputs = get("qwen2_vl")
    inside = find_decoder(model).model
    dense = written(model, inputs)[0]
    with sparse(model, 0.3, rows="all", captured=True) as handle:
        assert "forward" in vars(inside)
        with handle.disabled():
            assert torch.equal(written(model, inputs)[0], dense)
        twin = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="copy the model, then attach"):
            written(twin, inputs)
    assert "forward" not in vars(inside)
    assert torch.equal(written(model, inputs)[0], dense)
    # A device hook stands on the instance, too.
    inside.forward = own = partial(inside.forward)
    try:
        attach(model, "tiny").detach()
        with sparse(model, 0.3, captured=True):
            pass
        assert vars(inside)["forward"] is own
    finally:
        del inside.forward


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("settings", [{}, {"p": 1.0}, {"cache": "retrieve"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_answer_as_the_plain_loop_does(family, settings):
    model, inputs = get(family, TWO)
    model = copy.deepcopy(model).float().cuda()
    inputs = {k: (v.float() if v.is_floating_point() else v).cuda() for k, v in inputs.items()}
    settings = {"p": 0.4, "rows": "all", "protect": "none"} | settings
    for options in ({}, {"do_sample": True, "num_return_sequences": 3}, {"max_new_tokens": 2}):
        found = []
        for captured in (False, True):
            torch.manual_seed(0)
            with sparse(model, captured=captured, **settings) as handle:
                found.append(written(model, inputs, **{"max_new_tokens": 12} | options))
                steps = list(handle._steps.values())
                assert [step._graph is not None for step in steps] == [options != {"max_new_tokens": 2}] * captured
        (plain, logits, _), (ids, again, _) = found
        assert torch.equal(plain, ids)
        assert_close(again, logits, atol=2e-3, rtol=2e-3)


@requires_gpu(min_sm=80)
def test_graphs_of_two_caches_take_turns(monkeypatch):
    from hone_zipr1 import models

    monkeypatch.setattr(models, "ROOM", 6)
    model, inputs = get("qwen2_5_vl", TWO)
    model = copy.deepcopy(model).float().cuda()
    inputs = {k: (v.float() if v.is_floating_point() else v).cuda() for k, v in inputs.items()}
    keyword, found = cache_keyword(model), {}
    for captured in (False, True):
        caches = [DynamicCache(), DynamicCache()]
        with sparse(model, 0.4, rows="all", captured=captured):
            said = []
            for cache in caches:
                model(**inputs, use_cache=True, **{keyword: cache})
            for turn in range(10):
                for number, cache in enumerate(caches):
                    ids = torch.full((2, 1), 10 + 3 * turn + number, device="cuda")
                    said.append(model(input_ids=ids, use_cache=True, **{keyword: cache}).logits)
        found[captured] = torch.stack(said)
    assert_close(found[True], found[False], atol=2e-3, rtol=2e-3)
