from types import SimpleNamespace

import pytest
import torch
from hone_lm.decoders import cache_keyword, cache_of, find_decoder
from hone_lm.tiny import FAMILIES, tiny, tiny_inputs
from torch import nn


@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_has_its_decoder(family):
    model, _ = tiny(family, layers=3)
    decoder = find_decoder(model)
    assert decoder.num_layers == 3
    assert decoder.head is model.lm_head
    assert decoder.layers is decoder.model.layers
    assert decoder.layers[1].self_attn.config is decoder.config
    assert decoder.deepstack_layers == (3 if family.startswith("qwen3_vl") else 0)


class Hybrid(nn.Module):
    def __init__(self, types):
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in types)
        for layer, kind in zip(self.layers, types, strict=True):
            if kind == "full_attention":
                layer.self_attn = nn.Linear(1, 1)
        self.config = SimpleNamespace(layer_types=types)

    def get_decoder(self):
        return self


def test_hybrid_decoder_is_refused():
    with pytest.raises(ValueError, match=r"hybrid decoder \(linear_attention\)"):
        find_decoder(Hybrid(["full_attention", "linear_attention"]))


def test_layer_without_attention_is_refused_where_the_config_is_silent():
    model = Hybrid(["full_attention", "other"])
    model.config.layer_types = None
    with pytest.raises(ValueError, match=r"layers \[1\] without self_attn"):
        find_decoder(model)


def test_real_hybrid_class_is_refused():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    small = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 2}
    small |= {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    small |= {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    small |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**small))
    with pytest.raises(ValueError, match="hybrid decoder"):
        find_decoder(model)


def test_model_without_decoder_is_refused():
    with pytest.raises(TypeError, match="Linear has no decoder"):
        find_decoder(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "forward"),
    [("cache", lambda ids, cache=None: None), ("past_key_values", lambda ids, past_key_values=None: None)],
)
def test_cache_under_either_name(name, forward):
    model = nn.Module()
    model.forward = forward
    assert cache_keyword(model) == name
    assert cache_of({"input_ids": 1, name: "full"}) == "full"
    assert cache_of({"input_ids": 1, name: None}) is None
    assert cache_of({"input_ids": 1}) is None


def test_forward_without_a_cache():
    with pytest.raises(TypeError, match=r"Identity.forward takes no cache"):
        cache_keyword(nn.Identity())


def test_cache_that_a_model_returns_is_one_that_it_takes():
    model, processor = tiny("qwen2_vl", layers=1)
    cache = cache_of(model(**tiny_inputs("qwen2_vl", processor), use_cache=True))
    before = cache.get_seq_length()
    again = model(input_ids=torch.tensor([[5]]), **{cache_keyword(model): cache})
    assert cache_of(again).get_seq_length() == before + 1
