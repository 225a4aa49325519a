import dataclasses

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.testing import assert_close
from hone_knockout.config import HostConfig
from hone_knockout.data import fake_batch, generated_items
from hone_knockout.host import build_host, host_config, load_host, pixel_values
from hone_lm.checkpoints import load_model
from hone_lm.choices import choice_inputs, choice_prompt
from hone_lm.layouts import find_layouts, locate_spans


def inputs_of(host, count=4):
    items = generated_items(count, host.config.clip)
    prompts = [choice_prompt(host.processor, item.question, item.options, style="text") for item in items]
    return items, choice_inputs(host.processor, prompts, [item.clip for item in items])


def test_config_of_a_host_without_its_weights(host_file, tmp_path, monkeypatch):
    monkeypatch.setattr("hone_knockout.host.build_host", lambda *_: pytest.fail("a model was built"))
    assert host_config(host_file).layers == 5
    with pytest.raises(CheckpointError, match="there is no tiny host"):
        host_config(tmp_path / "none.safetensors")


def test_default_host_is_small_and_of_the_real_class():
    host = build_host()
    size = sum(parameter.numel() for parameter in host.model.parameters()) * 2
    assert size < 8 * 2**20
    assert type(host.model).__name__ == "LlavaOnevisionForConditionalGeneration"
    prompt = choice_prompt(host.processor, "where is the white dot ?", ["a", "b"], style="text")
    inputs = choice_inputs(host.processor, [prompt], [fake_batch(1)[0].clip])
    (layout,) = find_layouts(host.model, inputs)
    assert layout.tokens_per_frame == (25,) * 8
    assert len(layout.separators) == 1
    # The question is six words, each a token.
    assert layout.spans["suffix"][1] - layout.spans["suffix"][0] == 6
    spans = locate_spans(host.processor.tokenizer, inputs["input_ids"][0], {"question": "where is the white dot ?"})
    assert spans["question"] == layout.spans["suffix"]


@torch.no_grad()
def test_round_trip(host, host_file):
    again = load_host(path=host_file)
    assert again.config == host.config
    _, inputs = inputs_of(host)
    half = build_host(host.config)
    half.model.load_state_dict({k: v.half().float() for k, v in host.model.state_dict().items()})
    assert torch.equal(again.model(**inputs).logits, half.model(**inputs).logits)


def test_pixels_are_the_processor_s(host):
    items, inputs = inputs_of(host)
    pixels = pixel_values(torch.stack([item.clip.frames for item in items]))
    assert_close(pixels, inputs["pixel_values_videos"], atol=1e-6)


def test_bad_files(host_file, tmp_path):
    with pytest.raises(CheckpointError, match="Train one with hone-knockout train-host"):
        load_host(path=tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="lacks its sidecar"):
        load_host(path=tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="multiple of heads"):
        HostConfig(width=30)
    with pytest.raises(ValueError, match="two vision patches"):
        HostConfig(clip=dataclasses.replace(HostConfig().clip, cell=7))


@torch.no_grad()
def test_a_host_is_a_model_folder_like_any_other(host, tmp_path):
    host.model.save_pretrained(tmp_path)
    host.processor.save_pretrained(tmp_path)
    model, processor = load_model(str(tmp_path))
    items, inputs = inputs_of(host)
    prompt = choice_prompt(processor, items[0].question, items[0].options, style="text")
    again = choice_inputs(processor, [prompt], [items[0].clip])
    assert_close(model(**again).logits[:, -1], host.model(**inputs).logits[:1, -1], atol=1e-4)


def test_packaged_host_has_learned_every_kind():
    from hone_knockout.train import GATES, grade_host

    grades = grade_host(load_host(), clips=64, seed=5)
    # 64 clips: two standard errors below the gate.
    assert all(grades[kind] >= gate - 0.08 for kind, gate in GATES.items()), grades
