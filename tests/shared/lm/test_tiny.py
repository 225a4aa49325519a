import pytest
import torch
from hone_lm.tiny import FAMILIES, build_tokenizer, tiny, tiny_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_of_the_real_class_and_repeat(family):
    model, processor = tiny(family, layers=1, seed=3)
    again, _ = tiny(family, layers=1, seed=3)
    assert model.config.model_type == family
    assert type(model).__module__.startswith("transformers.models.")
    assert type(processor).__module__.startswith("transformers.models.")
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_unknown_family():
    with pytest.raises(ValueError, match="family must be one of qwen2_vl"):
        tiny("gpt2")
    with pytest.raises(ValueError, match=r"family must be one of qwen2_vl.*got 'gpt2'"):
        tiny_inputs("gpt2", None)


@pytest.mark.parametrize("text", ["Was läuft, und wann?", "  two  spaces\n", "数字 42"])
def test_any_text_survives_the_tokenizer(text):
    tokenizer = build_tokenizer(("<video>",))
    ids = tokenizer("<video>" + text)["input_ids"]
    assert tokenizer.decode(ids) == "<video>" + text
    assert ids[0] == 3


def test_words_are_tokens():
    tokenizer = build_tokenizer(words=["red", "?"])
    assert tokenizer.convert_ids_to_tokens(tokenizer("is red ?")["input_ids"]) == ["i", "s", "red", "?"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("tired")["input_ids"]) == list("tired")
