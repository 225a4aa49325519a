import dataclasses
import json

import pytest
from hone_core.config import from_dict, to_dict
from hone_rstitch import config
from hone_rstitch.config import PRESETS, StitchConfig


def test_presets_are_the_published_rows_and_say_so():
    found = {name: (preset.config.gate, preset.config.tau) for name, preset in PRESETS.items()}
    assert found["accurate"] == ("entropy", 0.001)
    assert found["balanced"] == ("entropy", 0.02)
    assert found["fast"] == ("entropy", 0.03)
    assert found["v1-fast"] == ("confidence", 0.6)
    assert found["v1-accurate"] == ("confidence", 0.8)
    assert all("Table 1" in PRESETS[name].provenance for name in list(found)[:5])


def test_a_gate_by_confidence_wants_a_threshold_of_its_own():
    for kind in (config.GenerateConfig, config.ServeConfig):
        given = {"ask": "1*1"} if kind is config.GenerateConfig else {}
        with pytest.raises(
            ValueError, match=r"tau 0\.02 is a threshold of the entropy; the gate 'confidence' wants one"
        ):
            kind(stitch=StitchConfig(gate="confidence"), **given)
        kind(stitch=StitchConfig(gate="confidence", tau=0.6), **given)
        kind(stitch=StitchConfig(gate="confidence", policy="small"), **given)
    with pytest.raises(ValueError, match="are of the entropy; the gate 'confidence' wants others"):
        config.EvalConfig(stitch=StitchConfig(gate="confidence"))
    config.EvalConfig(stitch=StitchConfig(gate="confidence"), taus=(0.6, 0.8))
    config.CalibrateConfig(stitch=StitchConfig(gate="confidence"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    preset = PRESETS[name].config
    assert from_dict(StitchConfig, json.loads(json.dumps(to_dict(preset)))) == preset


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({}, "tau 0.02"),
        ({"gate": "confidence", "tau": 0.7}, "confidence 0.7"),
        ({"tau": 0.1, "tau_back": 0.05, "window": 8, "min_large_run": 2}, "tau 0.1, back 0.05, window 8, runs from 2"),
        ({"policy": "one-token"}, "one-token tau 0.02"),
        ({"policy": "random", "share": 0.25, "run_length": 2.0}, "random 0.25, runs of 2"),
        ({"policy": "large"}, "large"),
    ],
)
def test_labels(values, label):
    assert StitchConfig(**values).label == label


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"policy": "both"}, "policy"),
        ({"gate": "margin"}, "gate"),
        ({"tau": float("nan")}, "finite"),
        ({"tau": 0.1, "tau_back": 0.2}, "at most tau"),
        ({"gate": "confidence", "tau": 0.7, "tau_back": 0.6}, "at least tau"),
        ({"window": 0}, "window"),
        ({"policy": "random"}, "share"),
        ({"share": 0.3}, "share"),
        ({"run_length": 2.0}, "run_length"),
        ({"discards": True}, "discards"),
        ({"policy": "random", "share": 1.2}, "share"),
        ({"policy": "random", "share": 0.9, "run_length": 2.0}, "at least 9"),
    ],
)
def test_bad_gates_are_named(values, match):
    with pytest.raises(ValueError, match=match):
        StitchConfig(**values)


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("DecoderConfig", {"width": 30}, "multiple"),
        ("DemoConfig", {"shown": 0}, "shown"),
        ("DemoConfig", {"taus": ()}, "taus"),
        ("ModelsConfig", {"small": "a"}, "small and large"),
        ("ModelsConfig", {"small": "a", "large": "b", "small_prompt": "x"}, "question"),
        ("ModelsConfig", {"small_prompt": "Solve {question}"}, "^small_prompt is of models that small and large name"),
        ("ModelsConfig", {"large_prompt": "{question}?", "chat": False}, "^large_prompt, chat is of models that"),
        ("ModelsConfig", {"top": 30}, "^top is what servers give of each token; got 30 without servers"),
        (
            "ModelsConfig",
            {"small": "a", "large": "b", "servers": ("http://a", "http://b"), "dtype": "float32"},
            "^dtype is of weights, which servers hold; got float32",
        ),
        ("ModelsConfig", {"dtype": "bfloat16"}, "^dtype is of models that small and large name; .* in float32"),
        ("ModelsConfig", {"small": "a", "large": "b", "pair": 1}, "pair is of the packaged ones; got 1 beside"),
        ("SamplingConfig", {"top_p": 0.9}, "temperature"),
        ("SamplingConfig", {"max_new_tokens": 0}, "max_new_tokens"),
        ("SamplingConfig", {"temperature": 1e-38}, r"0 \(greedy\) or at least 0.001; got 1e-38"),
        ("SamplingConfig", {"temperature": float("nan")}, "at least 0.001; got nan"),
        ("SamplingConfig", {"temperature": float("inf")}, "at least 0.001; got inf"),
        ("StitchConfig", {"window": 2**21}, "must lie in 1 .. 1048576"),
        ("EngineConfig", {"timeout": float("inf")}, "timeout must be positive and finite"),
        ("GenerateConfig", {}, "--ask"),
        ("EvalConfig", {"samples": 3}, "temperature"),
        ("EvalConfig", {"taus": (0.1, 0.1)}, "distinct"),
        ("EvalConfig", {"stitch": StitchConfig(policy="small")}, "gated"),
        ("CalibrateConfig", {"time": 3.0}, "multiple"),
        ("BenchConfig", {"gaps": (0,)}, "at least 1"),
        ("BenchConfig", {"context": 250}, "256 positions"),
        ("CalibrateConfig", {"share": 1.5}, "share"),
        ("ReproduceConfig", {"judged": 0.5, "taus": (0.1,)}, "judged"),
        ("ReproduceConfig", {"pairs": (1, 1)}, "twice"),
        ("SimulateConfig", {"q": 0.0}, "q"),
        ("SimulateConfig", {"requests": (0,)}, "requests"),
        ("TrainHostConfig", {"small_steps": 0}, "small_steps must be positive; got 0"),
        ("TrainHostConfig", {"decay": 0.0}, "share"),
    ],
)
def test_bad_settings_of_verbs_are_named(name, values, match):
    with pytest.raises(ValueError, match=match):
        getattr(config, name)(**values)


def test_every_field_of_a_gate_says_what_it_is():
    from hone_core.flags import field_docs

    assert field_docs(StitchConfig).keys() == {field.name for field in dataclasses.fields(StitchConfig)}
