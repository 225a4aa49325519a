import copy
import gc

import pytest
import torch
from hone_lm.attention import tap_attention
from hone_lm.decoders import find_decoder
from hone_lm.tiny import FAMILIES, tiny, tiny_inputs


def passing(base, module, query, key, value, mask, **kwargs):
    return base(module, query, key, value, mask, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["sdpa", "eager"])
@torch.no_grad()
def test_a_tap_that_does_nothing_changes_no_bit(family, base):
    model, processor = tiny(family, layers=2)
    model.set_attn_implementation(base)
    inputs = tiny_inputs(family, processor, ["What?", "And which of them?"])
    before = model(**inputs).logits
    calls = []

    def attend(fn, module, *args, **kwargs):
        calls.append(module.layer_idx)
        return fn(module, *args, **kwargs)

    decoder = find_decoder(model)
    tap = tap_attention(decoder, attend)
    assert tap.base == base
    assert torch.equal(model(**inputs).logits, before)
    assert calls == [0, 1]
    tap.remove()
    assert decoder.config._attn_implementation == base
    assert torch.equal(model(**inputs).logits, before)
    assert calls == [0, 1]
    tap.remove()


def test_only_one_tap_and_only_bases_that_take_masks():
    model, _ = tiny("qwen2_5_vl", layers=1)
    decoder = find_decoder(model)
    tap = tap_attention(decoder, passing)
    with pytest.raises(ValueError, match="tapped already"):
        tap_attention(decoder, passing)
    tap.remove()
    decoder.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no arbitrary mask"):
        tap_attention(decoder, passing)


@torch.no_grad()
def test_a_copy_does_not_run_as_if_nothing_were_attached():
    model, processor = tiny("qwen2_vl", layers=1)
    inputs = tiny_inputs("qwen2_vl", processor)
    tap = tap_attention(find_decoder(model), passing)
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="copy of one"):
        twin(**inputs)
    tap.remove()
    with pytest.raises(ValueError, match=r"copy of one .*detach\(\), copy the model, then attach\(\) to the copy"):
        tap_attention(find_decoder(twin), passing)


@torch.no_grad()
def test_other_models_are_left_alone():
    tapped, processor = tiny("qwen2_vl", layers=1)
    other, _ = tiny("qwen2_vl", layers=1, seed=1)
    inputs = tiny_inputs("qwen2_vl", processor)
    before = other(**inputs).logits

    def refuse(*args, **kwargs):
        raise AssertionError("not mine")

    tap = tap_attention(find_decoder(tapped), refuse)
    assert torch.equal(other(**inputs).logits, before)
    tap.remove()
    del tapped, tap
    gc.collect()
