"""What the adapter makes of lmms-eval's requests, which needs no more of lmms-eval than a base class."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hone_lm.tiny import tiny


@pytest.fixture
def adapter(monkeypatch):
    """The module, where modules stand in for lmms-eval's."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    for name in names:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["lmms_eval.api.model"].lmms = type("lmms", (), {"__init__": lambda self: None})
    monkeypatch.delitem(sys.modules, "hone_zipr1.lmms", raising=False)
    yield importlib.import_module("hone_zipr1.lmms")
    del sys.modules["hone_zipr1.lmms"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"max_new_tokens": 128, "do_sample": False, "num_beams": 1}),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["x"]},
            {"max_new_tokens": 16, "do_sample": False, "num_beams": 1},
        ),
        (
            {"temperature": 0.7, "top_p": 0.9, "top_k": None, "image_aspect_ratio": "original"},
            {"max_new_tokens": 128, "do_sample": True, "num_beams": 1, "temperature": 0.7, "top_p": 0.9},
        ),
        ({"temperature": 0.7, "do_sample": False, "num_beams": 3}, {"do_sample": False, "num_beams": 3}),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"do_sample": True, "temperature": 0}, {"do_sample": False}),
    ],
)
def test_what_generate_is_given(adapter, options, expected):
    assert adapter.generation_settings(options) == {"max_new_tokens": 128, "num_beams": 1} | expected


def test_what_a_request_may_not_say(adapter):
    with pytest.raises(ValueError, match=r"may say max_new_tokens, until.*got repetition_penalty\. Leave it out"):
        adapter.generation_settings({"repetition_penalty": 1.1, "until": "x"})


def test_answers_are_drawn_where_a_request_asks_for_it(adapter, tmp_path):
    from PIL import Image

    model, processor = tiny("qwen2_5_vl", layers=2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    asked = adapter.SparseModel(str(tmp_path), p=0.6, device="cpu")
    picture = Image.new("RGB", (56, 56), (200, 30, 90))
    asked.task_dict = {"task": {"test": [None]}}

    def answers(**options):
        torch.manual_seed(0)
        given = ("What?", {"max_new_tokens": 8} | options, lambda doc: [picture], 0, "task", "test")
        return asked.generate_until([SimpleNamespace(args=given)] * 3)

    greedy = answers()
    assert len(set(greedy)) == 1
    assert answers(temperature=0, top_p=1.0, num_beams=1, do_sample=False) == greedy
    drawn = answers(temperature=1.5)
    assert len(set(drawn)) > 1
    assert drawn == answers(temperature=1.5)
    assert len(asked.ratios) == 12
    with pytest.raises(ValueError, match="got repetition_penalty"):
        answers(repetition_penalty=1.1)
    assert len(asked.ratios) == 12
