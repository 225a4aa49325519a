"""Knockouts and the exit inside real classes: the exact equivalences, decoding, padding, restoration."""

import inspect
import warnings

import pytest
import torch
from hone_core.testing import assert_close, requires_gpu
from hone_knockout.config import KINDS, Knockout, KnockoutConfig
from hone_knockout.local_attention import RegularFrames, frame_local_attention, regular_frames
from hone_knockout.method import blocked_pairs, causal_pairs
from hone_knockout.models import attach, check_model
from hone_knockout.prefix import PrefixRunner
from hone_knockout.prompts import Prompt
from hone_lm.decoders import cache_keyword, cache_of
from hone_lm.layouts import RULES, find_layouts, locate_spans
from hone_lm.tiny import FAMILIES, tiny, tiny_inputs

# transformers' masking_utils.flex_attention_mask passes _compile=True, which torch is about to drop.
FLEX_MASKS_OF_TRANSFORMERS = "ignore:_compile flag on create_block_mask was:DeprecationWarning"
# Which torch.compile then meets inside vmap, and torch.autograd instantiates a Function there.
VMAP = "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning"
# Which imports inductor, whose parts are of torch.jit.
INDUCTOR = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
LAYERS = 6
ONE, TWO = ["What moves?"], ["What moves?", "Which of the two is first?"]
MODELS = {}
EAGER = ("qwen2_5_vl", "llava_onevision")
CLASSES_AND_BASES = pytest.mark.parametrize(
    ("family", "base"),
    [(family, "sdpa") for family in FAMILIES]
    + [pytest.param(family, "eager", marks=[] if family in EAGER else pytest.mark.slow) for family in FAMILIES],
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def get(family, questions=ONE, base="sdpa", **options):
    if family not in MODELS:
        MODELS[family] = tiny(family, layers=LAYERS)
    model, processor = MODELS[family]
    model.set_attn_implementation({"text_config": base, "vision_config": "sdpa"})
    return model, tiny_inputs(family, processor, questions, **options)


def lv(*layers, **options):
    return Knockout(kind="LV", layers=layers, **options)


def generated(model, inputs, **options):
    out = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("questions", [ONE, TWO], ids=["one", "padded batch"])
def test_exit_equals_lv_after_it_for_every_text_row(family, questions):
    """The claim of the exit (2.5): text cannot tell tokens that left from tokens it may not read."""
    model, inputs = get(family, questions)
    first = 3 if family.startswith("qwen3_vl") else 1
    for exit in range(first, LAYERS):
        with attach(model, lv(*range(exit, LAYERS))):
            blocked = model(**inputs).logits
        with attach(model, KnockoutConfig(exit=exit)) as handle:
            left = model(**inputs).logits
            rows, layouts = handle.rows, handle.layouts
        for row, layout in enumerate(layouts):
            stays = (layout.frame < 0) & layout.real
            where = stays[rows[row]] & (rows[row] > 0)
            got, want = left[row][where], blocked[row][rows[row]][where]
            assert len(got) >= layout.num_text - 1
            assert float((got - want).abs().max()) < 1e-5


@CLASSES_AND_BASES
def test_exit_and_lv_agree_while_generating(family, base):
    model, inputs = get(family, TWO, base)
    with attach(model, lv(*range(3, LAYERS))):
        blocked = generated(model, inputs)
    with attach(model, KnockoutConfig(exit=3)):
        left = generated(model, inputs)
        assert float((left - blocked).abs().max()) < 1e-5
        assert float((generated(model, inputs, num_beams=2)).isfinite().all())
    assert float((blocked - generated(model, inputs)).abs().max()) > 0.01


def test_caches_are_shorter_after_the_exit():
    model, inputs = get("llava_onevision")
    with attach(model, KnockoutConfig(exit=2)) as handle:
        cache = cache_of(model(**inputs, use_cache=True))
        layout = handle.layouts[0]
    lengths = [cache.get_seq_length(layer) for layer in range(LAYERS)]
    assert lengths == [len(layout.frame)] * 2 + [layout.num_text] * (LAYERS - 2)


def test_exit_with_rows_that_keep_different_numbers_of_tokens():
    # Two prompts of one padded length with different frame counts: the shorter list of survivors is filled up.
    model, processor = MODELS.get("qwen2_5_vl") or tiny("qwen2_5_vl", layers=LAYERS)
    model.set_attn_implementation("sdpa")
    from hone_lm.tiny import PROMPTS, random_video

    texts = [PROMPTS["qwen2_5_vl"].format(question=q) for q in ("What is it?", "And?")]
    videos = [random_video(4), random_video(8, seed=1)]
    inputs = dict(processor(text=texts, videos=videos, padding=True, return_tensors="pt"))
    with attach(model, lv(*range(2, LAYERS))):
        blocked = generated(model, inputs)
    with attach(model, KnockoutConfig(exit=2)) as handle:
        left = generated(model, inputs)
        kept = [int((layout.frame < 0).sum()) for layout in handle.layouts]
        assert kept[0] != kept[1]
        assert handle.rows.shape == (2, max(kept))
    assert float((left - blocked).abs().max()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_lv_everywhere_is_one_dense_mask(family):
    model, inputs = get(family)
    (layout,) = find_layouts(model, inputs)
    allowed = causal_pairs(len(layout.frame)) & ~blocked_pairs("LV", layout.frame)
    with attach(model, lv(*range(LAYERS))):
        knocked = model(**inputs).logits
    mask = {**inputs, "attention_mask": allowed[None, None]}
    if family.startswith("qwen"):
        # Their position code wants a 2-D mask, so positions are given.
        mask["position_ids"], _ = model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            video_grid_thw=inputs["video_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
    assert_close(knocked, model(**mask).logits)


@pytest.mark.parametrize("kind", ["VT", "VS", "VV", "VT-strict"])
@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_each_kind_is_its_dense_mask_in_its_layers_only(family, kind):
    model, inputs = get(family)
    (layout,) = find_layouts(model, inputs)
    seen = {}

    def spy(module, args, kwargs):
        seen[module.layer_idx] = kwargs["attention_mask"]

    hooks = [
        layer.self_attn.register_forward_pre_hook(spy, with_kwargs=True) for layer in model.model.language_model.layers
    ]
    baseline = model(**inputs, output_hidden_states=True).hidden_states
    with attach(model, Knockout(kind=kind, layers=(2, 3))):
        knocked = model(**inputs, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert torch.equal(baseline[2], knocked[2])
    assert not torch.allclose(baseline[3], knocked[3])
    # One layer by hand: the third, from the same hidden states, under the dense mask.
    layer = model.model.language_model.layers[2]
    position = model.model.language_model.rotary_emb(baseline[2], torch.arange(len(layout.frame))[None])
    allowed = (causal_pairs(len(layout.frame)) & ~blocked_pairs(kind, layout.frame))[None, None]
    assert_close(knocked[3], layer(baseline[2], attention_mask=allowed, position_embeddings=position))


def test_vt_and_vs_together_are_vv():
    model, inputs = get("internvl", TWO)
    with attach(model, [Knockout(kind="VT", layers=(1, 2)), Knockout(kind="VS", layers=(1, 2))]):
        together = model(**inputs).logits
    with attach(model, Knockout(kind="VV", layers=(1, 2))):
        assert torch.equal(model(**inputs).logits, together)


@CLASSES_AND_BASES
def test_detach_restores_every_bit(family, base):
    model, inputs = get(family, TWO, base)
    before, tokens = model(**inputs).logits, generated(model, inputs)
    config = KnockoutConfig(knockouts=(Knockout(kind="VT", layers=(0, 1)), lv(2)), exit=4)
    handle = attach(model, config)
    changed = model(**inputs).logits
    assert changed.shape != before.shape
    handle.detach()
    handle.detach()
    assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(generated(model, inputs), tokens)
    assert not model._forward_pre_hooks
    assert all(not layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize(
    ("knockout", "frames", "suffix"),
    [
        (Knockout(kind="VT", layers=(0, 1)), 1, True),
        (Knockout(kind="LV", layers=(0, 1)), 2, False),
    ],
    ids=["VT of one frame", "LV without text after"],
)
def test_knockouts_that_block_nothing_change_no_bit_and_are_refused(knockout, frames, suffix):
    model, inputs = get("llava_next_video", frames=frames)
    if not suffix:
        (layout,) = find_layouts(model, inputs)
        stop = layout.spans["video"][1]
        inputs = inputs | {name: inputs[name][:, :stop] for name in ("input_ids", "attention_mask")}
    before = model(**inputs).logits
    with attach(model, KnockoutConfig(knockouts=(knockout,), allow_empty=True)):
        assert_close(model(**inputs).logits, before)
    with attach(model, knockout), pytest.raises(ValueError, match="blocks no pair of prompt 0"):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, before)


def test_nothing_attached_changes_no_bit():
    model, inputs = get("qwen2_vl", TWO)
    before = model(**inputs).logits
    with attach(model, KnockoutConfig()):
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_decoding_with_a_cache_is_decoding_without(base):
    model, inputs = get("qwen2_5_vl", TWO, base)
    knockouts = [
        lv(1, 2),
        Knockout(kind="span", source="visual", target="suffix", layers=(3,)),
        Knockout(kind="LV", layers=(4,), frames=(1,)),
    ]
    for knockout in knockouts:
        with attach(model, knockout):
            cached, whole = generated(model, inputs), generated(model, inputs, use_cache=False)
        assert_close(cached, whole)


def test_padding_changes_nothing():
    model, inputs = get("internvl", TWO)
    _, alone = get("internvl", TWO[:1])
    for config in (lv(2, 3), Knockout(kind="VT-strict", layers=(1, 2)), KnockoutConfig(exit=2)):
        with attach(model, config):
            batch, single = generated(model, inputs), generated(model, alone)
        assert_close(batch[:1], single, atol=1e-4)


@pytest.mark.filterwarnings(FLEX_MASKS_OF_TRANSFORMERS, VMAP, INDUCTOR)
def test_bases_agree():
    questions, results = TWO, {}
    configs = {
        "LV": lv(2, 3),
        "VT": Knockout(kind="VT", layers=(0, 1)),
        "random": lv(1, control="random"),
        "opposite": Knockout(kind="VT", layers=(1,), control="opposite"),
        "exit": KnockoutConfig(exit=3, knockouts=(Knockout(kind="VT", layers=(0,)),)),
    }
    # Compiled flex attention needs a GPU; the stance runs the same call uncompiled.
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for base in ("sdpa", "eager", "flex_attention"):
            model, inputs = get("llava_onevision", questions, base)
            for name, config in configs.items():
                with attach(model, config):
                    logits = generated(model, inputs)
                assert_close(logits, results.setdefault(name, logits), what=f"{name}, {base}", atol=1e-4)


def pairs(model, inputs, knockout):
    """Pairs that a knockout blocks in each prompt, ``[batch, tokens, tokens]``."""
    config = KnockoutConfig(knockouts=(knockout,))
    prompt = Prompt.of(find_layouts(model, inputs), config, torch.device("cpu"), inputs["input_ids"])
    b, at = torch.arange(len(prompt.layouts)), torch.arange(prompt.tokens)
    return prompt.rule(knockout, prompt.tokens)(b[:, None, None], at[None, :, None], at[None, None, :])


def test_random_control_blocks_as_much_and_somewhere_else():
    model, inputs = get("llava_onevision")
    outputs = []
    for seed in (0, 0, 1):
        with attach(model, lv(2, 3, control="random", seed=seed)):
            outputs.append(model(**inputs).logits)
    frame = find_layouts(model, inputs)[0].frame
    (drawn,) = pairs(model, inputs, lv(2, 3, control="random"))
    assert drawn.sum() == blocked_pairs("LV", frame).sum()
    assert not torch.equal(drawn, blocked_pairs("LV", frame))
    assert not (drawn & ~causal_pairs(len(frame))).any()
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("family", ["llava_onevision", "video_llama_3"])
def test_random_control_of_a_prompt_is_the_same_in_any_batch(family):
    """Padded, in another row, and while generating, where rows are drawn as they come."""
    prompts = ["What moves?", "Which of the two is first?", "What is it?"]
    for knockout in (lv(2, 3, control="random"), Knockout(kind="VT", layers=(1,), control="random", seed=4)):
        model, inputs = get(family, prompts)
        with attach(model, knockout):
            batch = generated(model, inputs)
        for row, prompt in enumerate(prompts):
            # Each row of a batch has a video of its own.
            model, alone = get(family, [prompt], seed=row)
            with attach(model, knockout):
                assert_close(batch[row : row + 1], generated(model, alone), what=prompt, atol=1e-4)


def test_random_controls_of_two_prompts_differ_also_where_their_layouts_do_not():
    model, inputs = get("llava_onevision", ["What moves?", "What turns?", "What moves?"])
    tables = pairs(model, inputs, lv(2, control="random"))
    assert int(tables[0].sum()) == int(tables[1].sum())
    assert torch.equal(tables[0], tables[2])
    assert not torch.equal(tables[0], tables[1])


def test_located_spans():
    model, processor = tiny("qwen2_5_vl", layers=2)
    inputs = tiny_inputs("qwen2_5_vl", processor, ["Which? (A) red (B) blue. Answer: ("])
    (layout,) = find_layouts(model, inputs)
    spans = locate_spans(
        processor.tokenizer, inputs["input_ids"][0], {"question": "Which?", "options": "(A) red (B) blue"}
    )
    with attach(model, Knockout(kind="span", source="question", target="last", layers=(0,))) as handle:
        with handle.using([layout.with_spans(spans)]):
            knocked = model(**inputs).logits
        with pytest.raises(ValueError, match="span 'question' is not known"):
            model(**inputs)
    baseline = model(**inputs).logits
    assert torch.equal(knocked[:, :-1], baseline[:, :-1])
    assert not torch.allclose(knocked[:, -1], baseline[:, -1])


class TestLocalAttention:
    def test_is_vt_exactly(self):
        where = RegularFrames(3, 4, 5)
        frame = torch.tensor([-1] * 3 + [f for f in range(4) for _ in range(5)] + [-1] * 2)
        q = torch.randn(2, 6, 25, 8, dtype=torch.float64)
        k, v = torch.randn(2, 2, 2, 25, 8, dtype=torch.float64)
        mask = causal_pairs(25) & ~blocked_pairs("VT", frame)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.3)
        assert_close(frame_local_attention(q, k, v, where, scale=0.3), want)

    @pytest.mark.parametrize("where", [RegularFrames(0, 5, 5), RegularFrames(0, 1, 25), RegularFrames(24, 1, 1)])
    def test_without_text_around(self, where):
        frame = torch.full((25,), -1)
        size = where.frames * where.tokens
        frame[where.prefix : where.prefix + size] = torch.arange(where.frames).repeat_interleave(where.tokens)
        q, k, v = torch.randn(3, 1, 2, 25, 8)
        mask = causal_pairs(25) & ~blocked_pairs("VT", frame)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert_close(frame_local_attention(q, k, v, where), want)

    @pytest.mark.parametrize(
        ("keys", "heads_k", "where", "message"),
        [
            (30, 2, RegularFrames(5, 4, 5), "Cut a cache to the prompt"),
            (25, 3, RegularFrames(5, 4, 5), "a multiple of theirs"),
            (25, 2, RegularFrames(6, 4, 5), "end at 26; there are 25"),
        ],
    )
    def test_keys_that_are_not_those_of_the_prompt(self, keys, heads_k, where, message):
        q, k = torch.randn(1, 4, 25, 8), torch.randn(1, heads_k, keys, 8)
        with pytest.raises(ValueError, match=message):
            frame_local_attention(q, k, k, where)

    def test_which_layouts_are_regular(self):
        model, inputs = get("llava_onevision")
        (layout,) = find_layouts(model, inputs)
        assert regular_frames([layout]) == RegularFrames(layout.spans["video"][0], 4, 16)
        model, inputs = get("internvl")
        assert regular_frames(find_layouts(model, inputs)) is None
        model, inputs = get("llava_onevision", TWO)
        assert regular_frames(find_layouts(model, inputs)) is None

    def test_the_model_takes_it_and_gets_the_same(self, monkeypatch):
        model, inputs = get("llava_onevision")
        calls = []

        def noted(*args, **more):
            calls.append(args)
            return frame_local_attention(*args, **more)

        monkeypatch.setattr("hone_knockout.models.frame_local_attention", noted)
        with attach(model, Knockout(kind="VT", layers=(0, 1))) as handle:
            fast, taken = model(**inputs).logits, len(calls)
            handle.frame_local = False
            assert_close(fast, model(**inputs).logits)
        assert (taken, len(calls)) == (2, 2)

    def test_a_mask_in_its_place_is_said_once(self, monkeypatch, caplog):
        monkeypatch.setattr("hone_knockout.models._LONG", 8)
        model, inputs = get("internvl")
        with attach(model, Knockout(kind="VT", layers=(0, 1))):
            model(**inputs)
            model(**inputs)
        assert [record.message[:31] for record in caplog.records] == ["attention within a frame runs u"]
        caplog.clear()
        model, inputs = get("llava_onevision")
        with attach(model, Knockout(kind="VT", layers=(0, 1))):
            model(**inputs)
        with attach(model, lv(0, 1)):
            model(**inputs)
        assert not caplog.records


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_tokens_per_frame_reaches_the_masks(family):
    """InternVL has an image id only: its video is found by that."""
    model, inputs = get(family)
    (layout,) = find_layouts(model, inputs, tokens_per_frame=2)
    assert layout.num_frames == layout.num_visual // 2
    allowed = causal_pairs(len(layout.frame)) & ~blocked_pairs("VT", layout.frame)
    with attach(model, Knockout(kind="VT", layers=tuple(range(LAYERS))), tokens_per_frame=2) as handle:
        knocked = model(**inputs).logits
        assert handle.layouts[0].num_frames == layout.num_frames
    assert_close(knocked, model(**inputs | {"attention_mask": allowed[None, None]}).logits)
    with (
        attach(model, lv(1), tokens_per_frame=3),
        pytest.raises(ValueError, match="tokens_per_frame=3 does not divide"),
    ):
        model(**inputs)


def test_a_class_without_a_rule_is_taken_by_tokens_per_frame(monkeypatch):
    model, inputs = get("llava_next_video")
    with attach(model, Knockout(kind="VT", layers=(1, 2))):
        known = model(**inputs).logits
    monkeypatch.delitem(RULES, "llava_next_video")
    with attach(model, Knockout(kind="VT", layers=(1, 2))), pytest.raises(ValueError, match="pass tokens_per_frame"):
        model(**inputs)
    with attach(model, Knockout(kind="VT", layers=(1, 2)), tokens_per_frame=4):
        assert torch.equal(model(**inputs).logits, known)


class TestRefusals:
    def test_layers_out_of_range(self):
        model, _ = get("qwen2_vl")
        with pytest.raises(ValueError, match=r"layers are 0 \.\. 5"):
            attach(model, lv(6))
        assert not model._forward_pre_hooks

    def test_exit_after_the_last_layer(self):
        """It would change nothing, and ``rows`` would tell of rows that are all still there."""
        model, _ = get("qwen2_vl")
        with pytest.raises(ValueError, match="exit must be at most 5"):
            attach(model, KnockoutConfig(exit=6))

    def test_exit_before_deepstack(self):
        model, _ = get("qwen3_vl")
        with pytest.raises(ValueError, match="exit must be at least 3; got 2"):
            attach(model, KnockoutConfig(exit=2))

    def test_no_video(self):
        model, _ = get("qwen2_vl")
        with attach(model, lv(1)), pytest.raises(ValueError, match="no visual token"):
            model(input_ids=torch.tensor([[50, 60, 70]]))

    def test_row_without_keys(self):
        model, inputs = get("llava_next_video")
        (layout,) = find_layouts(model, inputs)
        start = layout.spans["video"][0]
        cut = inputs | {name: inputs[name][:, start:] for name in ("input_ids", "attention_mask")}
        knockout = Knockout(kind="VS", layers=(0,), keep_self=False)
        with attach(model, knockout), pytest.raises(ValueError, match="leaves position 0 of prompt 0 without any key"):
            model(**cut)
        with attach(model, knockout):
            assert model(**inputs).logits.isfinite().all()

    def test_filled_cache_and_late_video(self):
        model, inputs = get("qwen2_vl")
        cache = cache_of(model(**inputs, use_cache=True))
        with attach(model, lv(1)):
            with pytest.raises(ValueError, match="cache was filled before"):
                model(input_ids=torch.tensor([[5]]), **{cache_keyword(model): cache})
            own = cache_of(model(**inputs, use_cache=True))
            with pytest.raises(ValueError, match="pass the whole prompt in one forward"):
                model(**inputs, **{cache_keyword(model): own})

    @pytest.mark.parametrize("config", [KnockoutConfig(exit=3), lv(2)])
    def test_prefill_in_chunks(self, config):
        """Older generate drops the pixels of any piece; newer encodes them before, so that a whole video is right."""
        model, inputs = get("qwen3_vl")
        start, stop = find_layouts(model, inputs)[0].spans["video"]
        match = "generate without prefill_chunk_size"
        with attach(model, config):
            whole = generated(model, inputs)
            for size in (8, start + 6):
                with pytest.raises(ValueError, match=match):
                    generated(model, inputs, prefill_chunk_size=size)
            for size in (stop + 1, 200):
                if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
                    pieces = generated(model, inputs, prefill_chunk_size=size)
                    assert float((pieces - whole).abs().max()) < 1e-5
                else:
                    with pytest.raises(ValueError, match=match):
                        generated(model, inputs, prefill_chunk_size=size)

    def test_labels_and_static_cache(self):
        model, inputs = get("qwen2_vl")
        with attach(model, KnockoutConfig(exit=2)):
            with pytest.raises(ValueError, match="labels need logits of every row"):
                model(**inputs, labels=inputs["input_ids"])
            with pytest.raises(ValueError, match="static cache"):
                model.generate(**inputs, max_new_tokens=2, cache_implementation="static", disable_compile=True)

    @pytest.mark.parametrize("layer", [0, 3])
    def test_decoder_on_several_devices(self, layer):
        """As accelerate leaves it: a layer elsewhere, or its weights on meta."""
        model, processor = tiny("llava_onevision", layers=LAYERS)
        model.model.language_model.layers[layer].to("meta")
        model.hf_device_map = {"": 0, f"model.language_model.layers.{layer}": "disk"}
        others = "1-5" if layer == 0 else "0-2,4-5"
        match = rf"meta: layers {layer}.*device_map"
        with pytest.raises(ValueError, match=match) as error:
            attach(model, KnockoutConfig(exit=4))
        assert f"cpu: layers {others}" in str(error.value)
        assert not any(module._forward_pre_hooks for module in model.modules())
        with pytest.raises(ValueError, match=match):
            PrefixRunner(model, tiny_inputs("llava_onevision", processor))

    def test_vision_tower_elsewhere_is_no_matter(self):
        model, _ = tiny("llava_onevision", layers=2)
        model.model.vision_tower.to("meta")
        model.hf_device_map = {"model.vision_tower": "cpu", "model.language_model": 0, "lm_head": 0}
        attach(model, lv(1)).detach()

    def test_twice(self):
        model, _ = get("qwen2_vl")
        with attach(model, lv(1)), pytest.raises(ValueError, match="tapped already"):
            attach(model, lv(1))

    def test_unknown_preset(self):
        model, _ = get("qwen2_vl")
        with pytest.raises(ValueError, match="no preset"):
            attach(model, "exit-8b")

    def test_disabled_and_enabled_again(self):
        model, inputs = get("qwen2_vl")
        before = model(**inputs).logits
        with attach(model, KnockoutConfig(exit=3)) as handle:
            assert handle.attached
            knocked = model(**inputs).logits
            with handle.disabled():
                assert torch.equal(model(**inputs).logits, before)
            assert torch.equal(model(**inputs).logits, knocked)
        assert not handle.attached
        assert "KnockoutHandle on Qwen2VLForConditionalGeneration, detached" in repr(handle)

    def test_a_replaced_layer_is_seen(self):
        model, processor = tiny("qwen2_vl", layers=2)
        layers = model.model.language_model.layers
        with attach(model, KnockoutConfig(exit=1)):
            layers[1] = type(layers[1])(model.config.text_config, 1)
            with pytest.raises(RuntimeError, match=r"layers.1 was replaced after attach\(\)"):
                model(**tiny_inputs("qwen2_vl", processor))


STATIC = {kind: Knockout(kind=kind, layers=(2, 3)) for kind in KINDS if kind != "span"} | {
    "span": Knockout(kind="span", source="visual", target="last", layers=(2, 3)),
    "frames": Knockout(kind="LV", layers=(2, 3), frames=(0,)),
    "random": Knockout(kind="VT", layers=(2, 3), control="random"),
    "opposite": Knockout(kind="LV", layers=(2, 3), control="opposite"),
}


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("name", STATIC)
def test_static_cache_with_a_knockout(name, base):
    model, inputs = get("llava_next_video", base=base)
    with attach(model, STATIC[name]):
        dynamic = generated(model, inputs)
        static = generated(model, inputs, cache_implementation="static", disable_compile=True)
    assert_close(static, dynamic)


@requires_gpu(min_sm=80)
@pytest.mark.filterwarnings(FLEX_MASKS_OF_TRANSFORMERS, VMAP, INDUCTOR)
@pytest.mark.parametrize("base", ["sdpa", "eager", "flex_attention"])
def test_on_a_gpu(base):
    model, processor = tiny("llava_onevision", layers=LAYERS)
    # Eight frames make 128 tokens and more: below, torch 2.11's flex attention takes its decoding kernel, which has no
    # configuration for more than 128 rows, here twice the tokens, and fails on the untouched model too.
    inputs = tiny_inputs("llava_onevision", processor, TWO, frames=8)
    assert inputs["input_ids"].shape[1] >= 128
    configs = [lv(2, 3), Knockout(kind="VT", layers=(0, 1)), KnockoutConfig(exit=3), lv(1, control="random")]
    expected = []
    for config in configs:
        with attach(model, config):
            expected.append(model(**inputs, logits_to_keep=1).logits)
    model.cuda().set_attn_implementation({"text_config": base, "vision_config": "sdpa"})
    inputs = {name: value.cuda() for name, value in inputs.items()}
    for config, want in zip(configs, expected, strict=True):
        with attach(model, config):
            # Compiled flex attention rounds its products to TF32.
            assert_close(
                model(**inputs, logits_to_keep=1).logits, want, atol=2e-2 if base == "flex_attention" else 1e-3
            )


@requires_gpu(min_sm=80)
def test_exit_equals_lv_on_a_gpu():
    model, processor = tiny("qwen2_5_vl", layers=LAYERS)
    model.cuda()
    inputs = {name: value.cuda() for name, value in tiny_inputs("qwen2_5_vl", processor, TWO).items()}
    with attach(model, lv(*range(3, LAYERS))):
        blocked = generated(model, inputs)
    with attach(model, KnockoutConfig(exit=3)):
        assert float((generated(model, inputs) - blocked).abs().max()) < 1e-4


def test_layer_types_are_looked_at_before_the_weights(tmp_path):
    config = tiny("qwen2_vl", layers=3)[0].config
    config.text_config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    config.save_pretrained(tmp_path)
    assert check_model(str(tmp_path), KnockoutConfig(exit=2)) == 3
    with pytest.raises(ValueError, match="an exit before sliding-window layers"):
        check_model(str(tmp_path), KnockoutConfig(exit=1))
