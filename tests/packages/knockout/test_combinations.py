"""What people do beside a knockout: other attention, prompts in turn, threads, training, other ways to generate.

The README's table "works together with" names these tests.
"""

import copy
import threading

import pytest
import torch
from hone_core.testing import assert_close
from hone_knockout.config import Knockout, KnockoutConfig
from hone_knockout.models import attach
from hone_knockout.prefix import PrefixRunner
from hone_knockout.prompts import Pass, Prompt
from hone_lm.decoders import cache_keyword, cache_of, find_decoder
from hone_lm.layouts import find_layouts, locate_spans
from hone_lm.tiny import tiny, tiny_inputs

LAYERS = 6
FAMILY = "llava_onevision"
EXIT = KnockoutConfig(exit=3)


def lv(*layers, **options):
    return Knockout(kind="LV", layers=layers, **options)


EVERYWHERE = lv(*range(LAYERS))
CONFIGS = pytest.mark.parametrize("config", [lv(1, 2, 3), EXIT], ids=["knockout", "exit"])


@pytest.fixture
def model():
    return tiny(FAMILY, layers=LAYERS)[0]


@pytest.fixture(scope="module")
def processor():
    return tiny(FAMILY, layers=1)[1]


@pytest.fixture
def first(processor):
    return tiny_inputs(FAMILY, processor)


@pytest.fixture
def second(processor):
    return tiny_inputs(FAMILY, processor, frames=8, seed=5)


def written(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)


def step(model, cache, rows=1):
    ids = torch.full((rows, 2), 70)
    return model(input_ids=ids, use_cache=True, **{cache_keyword(model): cache}).logits


class TestAttentionImplementation:
    @torch.no_grad()
    @pytest.mark.parametrize("config", [EVERYWHERE, EXIT], ids=["knockout", "exit"])
    def test_another_one_is_followed(self, model, first, config):
        before = model(**first).logits
        with attach(model, config):
            knocked = model(**first).logits
            for base in ("eager", "sdpa", "eager"):
                model.set_attn_implementation(base)
                got = model(**first).logits
                assert_close(got, knocked, atol=1e-5)
        assert find_decoder(model).config._attn_implementation == "eager"
        assert_close(model(**first).logits, before, atol=1e-5)
        assert knocked.shape != before.shape or not torch.allclose(knocked, before)

    @torch.no_grad()
    def test_one_that_takes_no_mask_is_refused(self, model, first):
        with attach(model, EVERYWHERE):
            find_decoder(model).config._attn_implementation_internal = "flash_attention_2"
            with pytest.raises(ValueError, match=r"'flash_attention_2' while something is attached"):
                model(**first)

    @torch.no_grad()
    def test_a_replaced_attention_is_refused(self, model, first):
        decoder = find_decoder(model)
        with attach(model, EVERYWHERE):
            decoder.layers[2].self_attn = copy.deepcopy(decoder.layers[2].self_attn)
            with pytest.raises(RuntimeError, match="attention of layer 2 was replaced"):
                model(**first)

    @torch.no_grad()
    def test_a_copy_of_the_model_is_refused(self, model, first):
        before = model(**first).logits
        with attach(model, EVERYWHERE):
            for part in (model, find_decoder(model).model, [model]):
                with pytest.raises(TypeError, match=r"cannot be copied .* handle\.detach\(\), copy, then attach\(\)"):
                    copy.deepcopy(part)
            knocked = model(**first).logits
        assert torch.equal(model(**first).logits, before)
        with attach(copy.deepcopy(model), EVERYWHERE) as handle:
            assert torch.equal(handle.models[0](**first).logits, knocked)

    @torch.no_grad()
    def test_a_model_made_of_its_config_is_refused(self, model, first):
        with attach(model, EVERYWHERE):
            twin = type(model)(copy.deepcopy(model.config)).eval()
            with pytest.raises(RuntimeError, match=r"copy of one .*detach\(\), copy the model, then attach\(\)"):
                twin(**first)
            with pytest.raises(ValueError, match="copy of one"):
                attach(twin, EVERYWHERE)

    @torch.no_grad()
    @CONFIGS
    def test_pickling_is_refused_and_saving_holds_nothing_of_it(self, model, first, config, tmp_path):
        twin = copy.deepcopy(model)
        before = model(**first).logits
        with attach(model, config):
            knocked = model(**first).logits
            with pytest.raises(TypeError, match=r"model\.save_pretrained\(folder\) or torch\.save\(model\.state_dict"):
                torch.save(model, tmp_path / "model.pt")
            model.save_pretrained(tmp_path / "folder")
            torch.save(model.state_dict(), tmp_path / "state.pt")
        loaded = type(model).from_pretrained(tmp_path / "folder").eval()
        assert torch.equal(loaded(**first).logits, before)
        with attach(loaded, config):
            assert torch.equal(loaded(**first).logits, knocked)
        # transformers' own hooks keep a model that has run from being pickled; one that has not, and is detached, is.
        attach(twin, config).detach()
        torch.save(twin, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(loaded(**first).logits, before)
        loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        with attach(loaded, config):
            assert torch.equal(loaded(**first).logits, knocked)

    @torch.no_grad()
    def test_offloading_after_attach_is_refused(self, model, first):
        """As accelerate leaves a layer between its calls: without weights."""
        with attach(model, EVERYWHERE):
            find_decoder(model).layers[3].to("meta")
            with pytest.raises(ValueError, match=r"weights are all on one device; .*meta: layers 3\)"):
                model(**first)

    @torch.no_grad()
    def test_layers_that_do_not_run_are_refused(self, model, first):
        with attach(model, EVERYWHERE):
            find_decoder(model).config.num_hidden_layers = 4
            with pytest.raises(RuntimeError, match="layers 4-5 did not come through"):
                model(**first)


class TestPromptsInTurn:
    @torch.no_grad()
    @CONFIGS
    def test_two_caches(self, model, first, second, config):
        with attach(model, config):
            wanted = []
            for inputs in (first, second):
                cache = cache_of(model(**inputs, use_cache=True))
                wanted.append([step(model, cache), step(model, cache)])
            caches = [cache_of(model(**inputs, use_cache=True)) for inputs in (first, second)]
            for turn in range(2):
                for prompt, cache in enumerate(caches):
                    assert torch.equal(step(model, cache), wanted[prompt][turn])

    @torch.no_grad()
    @CONFIGS
    def test_a_copied_cache(self, model, first, second, config):
        with attach(model, config):
            cache = cache_of(model(**first, use_cache=True))
            twin = copy.deepcopy(cache)
            model(**second)
            assert torch.equal(step(model, cache), step(model, twin))

    @torch.no_grad()
    @pytest.mark.parametrize("config", [lv(1, 2, 3), EXIT, lv(2, control="random")], ids=["LV", "exit", "random"])
    def test_a_cache_repeated_over_the_batch(self, model, first, config):
        with attach(model, config):
            cache = cache_of(model(**first, use_cache=True))
            alone = step(model, copy.deepcopy(cache))
            cache.batch_repeat_interleave(3)
            assert_close(step(model, cache, rows=3), alone.expand(3, -1, -1), atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize("order", [[1, 0], [1], [0], [0, 0, 1], [1, 1, 0, 0]], ids=str)
    @pytest.mark.parametrize("kind", ["LV", "exit", "random", "some leave"])
    def test_rows_of_a_cache_that_are_moved_keep_their_prompts(self, model, processor, kind, order):
        inputs = tiny_inputs(FAMILY, processor, ["What moves?", "Which of the two is first?"])
        config = {"LV": lv(1, 2, 3), "exit": EXIT, "random": lv(2, control="random")}.get(kind)
        spans = None
        if kind == "some leave":
            # Fewer in the shorter prompt, so that what is left of the two differs in length.
            config = KnockoutConfig(exit=3, leave="low")

            def spans(layout, ids):
                visual = (layout.frame >= 0).nonzero().flatten()
                return {"low": visual[:: 2 if bool(layout.real.all()) else 3]}

        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
        ids = torch.tensor([[70, 71]])

        def go_on(cache, rows):
            more = {"attention_mask": mask[rows], "use_cache": True, cache_keyword(model): cache}
            return model(input_ids=ids.expand(len(rows), -1), **more).logits

        with attach(model, config, spans=spans):
            cache = cache_of(model(**inputs, use_cache=True))
            moved = copy.deepcopy(cache)
            moved.batch_select_indices(torch.tensor(order))
            wanted = go_on(cache, [0, 1])
            assert_close(go_on(moved, order), wanted[order], atol=1e-5)
        assert not torch.allclose(wanted[0], wanted[1], atol=1e-2)

    @torch.no_grad()
    def test_rows_of_a_cache_that_nothing_tells_apart_are_refused(self, model, processor):
        inputs = tiny_inputs(FAMILY, processor, ["What moves?", "Which of the two is first?"])
        with attach(model, lv(1)):
            cache = cache_of(model(**inputs, use_cache=True))
            for layer in cache.layers:
                layer.is_sliding = True  # whose keys may be gone
            cache.batch_repeat_interleave(2)
            with pytest.raises(ValueError, match="which row is which prompt cannot be told"):
                step(model, cache, rows=4)
            cache = cache_of(model(**inputs, use_cache=True))
            cache.layers[0].keys.zero_()
            with pytest.raises(ValueError, match="holds none of the 2 prompts"):
                step(model, cache, rows=2)

    @torch.no_grad()
    def test_a_cache_cut_alike_before_and_after_the_exit_is_refused(self, model, first):
        with attach(model, EXIT):
            cache = cache_of(model(**first, use_cache=True))
            wanted = step(model, copy.deepcopy(cache))
            step(model, cache)
            shorter = copy.deepcopy(cache)
            shorter.crop(-2)
            assert torch.equal(step(model, shorter), wanted)
            for layer in cache.layers[:3]:
                layer.crop(-2)
            with pytest.raises(ValueError, match=r"those after the exit hold .* cache\.crop\(-2\)"):
                step(model, cache)

    @torch.no_grad()
    def test_a_cache_of_other_settings_or_cut_inside_its_prompt_is_refused(self, model, first):
        with attach(model, lv(1)) as handle:
            with handle.disabled():
                plain = cache_of(model(**first, use_cache=True))
            cache = cache_of(model(**first, use_cache=True))
            with pytest.raises(ValueError, match="filled before this was attached, or under other settings"):
                step(model, plain)
        with attach(model, lv(2)), pytest.raises(ValueError, match="under other settings"):
            step(model, cache)
        with attach(model, lv(1)):
            step(model, cache)
            cache.crop(-5)
            with pytest.raises(ValueError, match="inside its prompt"):
                step(model, cache)

    @torch.no_grad()
    def test_a_decoder_without_the_model_around_it_is_refused(self, model, first):
        with attach(model, lv(1)):
            model(**first)
            with pytest.raises(RuntimeError, match="run the model that this is attached to"):
                model.model(**first)


@CONFIGS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_forwards_before_one_backward(model, first, second, config, reentrant):
    with attach(model, config):
        loss = sum(model(**inputs, use_cache=False).logits[:, -1].square().mean() for inputs in (first, second))
        loss.backward()
        wanted = [parameter.grad.clone() for parameter in find_decoder(model).model.parameters()]
        model.zero_grad()
        # Newer transformers has another name for it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        model.train()
        loss = sum(model(**inputs, use_cache=False).logits[:, -1].square().mean() for inputs in (first, second))
        loss.backward()
    for parameter, grad in zip(find_decoder(model).model.parameters(), wanted, strict=True):
        assert_close(parameter.grad, grad, atol=1e-5)


@CONFIGS
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_checkpointed_backward_after_detach_says_so(model, first, config, reentrant, again):
    handle = attach(model, config)
    loss = model(**first, use_cache=False).logits[:, -1].square().mean()
    handle.detach()
    loss.backward()  # without checkpointing nothing runs again
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.train()
    handle = attach(model, config)
    loss = model(**first, use_cache=False).logits[:, -1].square().mean()
    handle.detach()
    if again:
        attach(model, lv(0))
    with pytest.raises(RuntimeError, match=r"run again without it\. Call backward before detach"):
        loss.backward()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("config", [lv(1), KnockoutConfig(exit=1)], ids=["knockout", "exit"])
def test_a_compiled_model_is_right_and_compiles_again_for_a_new_cache(first, config):
    from torch._dynamo.utils import counters

    model = tiny(FAMILY, layers=2)[0]
    plain = model(**first).logits
    with attach(model, config):
        out = model(**first, use_cache=True)
        wanted = [out.logits, step(model, cache_of(out))]
        torch._dynamo.reset()
        counters.clear()
        model.compile(backend="eager")
        graphs = []
        for _ in range(3):
            out = model(**first, use_cache=True)
            assert torch.equal(out.logits, wanted[0])
            assert torch.equal(step(model, cache_of(out)), wanted[1])
            graphs.append(counters["stats"]["unique_graphs"])
    # As the README says: new graphs for a prompt of the same size.
    assert graphs[0] < graphs[1] < graphs[2]
    assert torch.equal(model(**first).logits, plain)


@CONFIGS
def test_threads(model, first, second, config):
    with attach(model, config), torch.no_grad():
        wanted = [written(model, inputs) for inputs in (first, second)]
        results: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        ready = threading.Barrier(2)

        def work(index, inputs):
            ready.wait()
            with torch.no_grad():
                for _ in range(4):
                    results[index].append(written(model, inputs))

        threads = [threading.Thread(target=work, args=pair) for pair in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, want in enumerate(wanted):
        assert len(results[index]) == 4
        assert all(torch.equal(got, want) for got in results[index])


class TestLogitsAndAssistance:
    @torch.no_grad()
    def test_an_exit_answers_from_the_newline_after_the_frames(self, model, first):
        stop = int((first["input_ids"][0] == model.config.video_token_id).nonzero()[-1]) + 1
        # Of the video's placeholders the last is that newline, which shows no frame and stays.
        cut = first | {name: first[name][:, :stop] for name in ("input_ids", "attention_mask")}
        with attach(model, lv(3, 4, 5)):
            wanted = model(**cut).logits[:, -1]
        with attach(model, EXIT) as handle:
            assert_close(model(**cut).logits[:, -1], wanted, atol=1e-5)
            assert int(handle.rows[0, -1]) == stop - 1

    @torch.no_grad()
    def test_an_exit_where_the_prompt_ends_in_the_video_is_refused(self):
        model, processor = tiny("llava_next_video", layers=LAYERS)
        inputs = tiny_inputs("llava_next_video", processor)
        stop = int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[-1]) + 1
        cut = inputs | {name: inputs[name][:, :stop] for name in ("input_ids", "attention_mask")}
        with attach(model, EXIT), pytest.raises(ValueError, match="prompt 0 ends in the video"):
            model(**cut)

    @torch.no_grad()
    def test_logits_to_keep_means_positions_of_the_prompt(self, model, first):
        tokens = first["input_ids"].shape[1]
        with attach(model, lv(3, 4, 5)):
            whole = model(**first).logits
        with attach(model, EXIT):
            for keep in (torch.tensor([2, tokens - 3, tokens - 1]), torch.tensor([-1, 0])):
                assert_close(model(**first, logits_to_keep=keep).logits, whole[:, keep], atol=1e-5)
            assert_close(model(**first, logits_to_keep=4).logits, whole[:, -4:], atol=1e-5)
            for keep in (torch.tensor([tokens // 2]), tokens - 2):
                with pytest.raises(ValueError, match="asks for rows of the video"):
                    model(**first, logits_to_keep=keep)

    @torch.no_grad()
    def test_logits_to_keep_in_a_padded_batch(self, model, processor):
        inputs = tiny_inputs(FAMILY, processor, ["What moves?", "Which of the two is first?"])
        with attach(model, lv(3, 4, 5)):
            whole = model(**inputs).logits
        tokens = inputs["input_ids"].shape[1]
        with attach(model, EXIT):
            keep = torch.tensor([tokens - 2, tokens - 1])
            assert_close(model(**inputs, logits_to_keep=keep).logits, whole[:, keep], atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize(
        "config",
        [
            lv(1, 2, 3),
            Knockout(kind="VT", layers=(1, 2)),
            Knockout(kind="span", source="visual", target="last", layers=(2, 3, 4)),
            lv(2, 3, control="random"),
            EXIT,
        ],
        ids=["LV", "VT", "span", "random", "exit"],
    )
    @pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
    def test_assisted_decoding_writes_what_plain_decoding_writes(self, model, processor, config, how):
        inputs = tiny_inputs(FAMILY, processor, ["it is it is it"])
        more = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
        if how == "assistant":
            more = {"assistant_model": tiny(FAMILY, layers=1)[0]}
        with attach(model, config) as handle:
            plain = written(model, inputs)
            layout = handle.layouts[0]
            lengths = []
            spy = model.register_forward_pre_hook(
                lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
            )
            assert torch.equal(written(model, inputs, **more), plain)
            spy.remove()
            assert lengths[0] > inputs["input_ids"].shape[1]
            assert torch.equal(handle.layouts[0].frame, layout.frame)


def windowed(width, tokens):
    at = torch.arange(tokens)
    return (at[None, :] <= at[:, None]) & (at[:, None] - at[None, :] < width)


class TestControlsOverTheModelsOwnMask:
    MASKS = pytest.mark.parametrize(
        "own",
        [lambda layout: windowed(12, len(layout.frame)), lambda layout: both_ways(layout)],
        ids=["sliding", "bidirectional"],
    )

    @MASKS
    @pytest.mark.parametrize("additive", [False, True])
    @pytest.mark.parametrize("kind", ["LV", "VT", "VV"])
    def test_a_random_control_counts_and_draws_among_its_pairs(self, model, first, own, additive, kind):
        layouts = find_layouts(model, first)
        base = own(layouts[0])[None, None]
        tokens, query = base.shape[-1], torch.zeros(1, 1, base.shape[-1], 1)

        def removed(control):
            item = Knockout(kind=kind, layers=(1,), control=control)
            prompt = Prompt.of(layouts, KnockoutConfig(knockouts=(item,)), torch.device("cpu"), first["input_ids"])
            mask = torch.zeros(base.shape).masked_fill(~base, torch.finfo(torch.float32).min) if additive else base
            left = Pass(prompt, 0, tokens).knocked(mask, (item,), query, tokens)
            return base & ~(left > -1 if additive else left)

        plain, random = removed("none"), removed("random")
        assert 0 < plain.sum() == random.sum()
        assert not torch.equal(plain, random)
        assert not random[0, 0].diagonal().any()

    @torch.no_grad()
    def test_layers_of_both_kinds_while_generating(self, processor):
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

        data = tiny(FAMILY, layers=4)[0].config.to_dict()
        data["text_config"] |= {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 24,
            "use_sliding_window": True,
        }
        torch.manual_seed(0)
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**data)).eval()
        for weight in find_decoder(model).model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=1.2 / weight[0].numel() ** 0.5)
        questions = ["What moves?", "Which of the two is first?"]

        def logits(inputs, **more):
            out = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, **more
            )
            return torch.stack(out.logits, 1)

        batch = tiny_inputs(FAMILY, processor, questions)
        plain = logits(batch)
        for control in ("none", "random"):
            with attach(model, Knockout(kind="VV", layers=(0, 1), control=control)):
                knocked = logits(batch)
                for row, question in enumerate(questions):
                    alone = tiny_inputs(FAMILY, processor, [question], seed=row)
                    assert_close(knocked[row : row + 1], logits(alone), atol=1e-4)
                if control == "none":
                    assert_close(knocked, logits(batch, use_cache=False), atol=1e-4)
            assert not torch.allclose(knocked, plain, atol=1e-3)


def both_ways(layout):
    """Causal, and open in both directions within a frame."""
    frame = layout.frame
    return windowed(len(frame), len(frame)) | ((frame[:, None] == frame[None, :]) & (frame >= 0)[:, None])


TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
PROMPT = torch.tensor([[1, 50, 51, 281, *[280] * 4, 282, 52, 281, *[280] * 4, 282, 60, 61, 62]])


def gemma3(**text):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    ids = {"image_token_index": 280, "boi_token_index": 281, "eoi_token_index": 282}
    config = Gemma3Config(
        text_config=TEXT | {"sliding_window": 8} | text, vision_config=VISION, mm_tokens_per_image=4, **ids
    )
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    return Gemma3ForConditionalGeneration(config), {"pixel_values": pixels, "token_type_ids": (PROMPT == 280).long()}


def gemma4(**text):
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300, "sliding_window": 8}
    config = Gemma4Config(
        text_config=TEXT | per_layer | {"layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 0} | text,
        vision_config=VISION | {"head_dim": 16, "num_key_value_heads": 2},
        audio_config=None,
        image_token_id=280,
        boi_token_id=281,
        eoi_token_id=282,
        video_token_id=283,
    )
    return Gemma4ForConditionalGeneration(config), {"mm_token_type_ids": (PROMPT == 280).long()}


def ernie():
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    experts = {"moe_intermediate_size": [32, 16], "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    config = Ernie4_5_VLMoeConfig(
        text_config=TEXT | experts | {"mlp_layer_types": ["dense"] + ["sparse"] * 3, "rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14},
        image_token_id=280,
        image_start_token_id=281,
        image_end_token_id=282,
        video_token_id=283,
        video_start_token_id=284,
        video_end_token_id=285,
    )
    visual = PROMPT == 280
    model = Ernie4_5_VLMoeForConditionalGeneration(config)
    return model, {"mm_token_type_ids": visual.long(), "moe_mm_token_type_ids": visual.int()}


MIXED = ["sliding_attention", "full_attention"] * 2
CLASSES = {
    "gemma3": gemma3,
    "gemma3, sliding": lambda: gemma3(layer_types=MIXED),
    "gemma3, full": lambda: gemma3(layer_types=["full_attention"] * 4),
    "gemma4": gemma4,
    "gemma4, shared caches": lambda: gemma4(num_kv_shared_layers=1),
    "ernie": ernie,
}


def of_class(name, base="sdpa"):
    model, inputs = CLASSES[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if weight.dim() > 1 and "norm" not in parameter:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * 1.2 / weight[0].numel() ** 0.5)
    model.eval().set_attn_implementation(base)
    return model, {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)} | inputs


class TestArgumentsPerToken:
    """Layers that take more than hidden states and positions: per-layer inputs, token types, shared caches."""

    @torch.no_grad()
    @pytest.mark.parametrize("base", ["sdpa", "eager"])
    @pytest.mark.parametrize("name", ["gemma3, full", "gemma4", "ernie"])
    def test_an_exit_is_lv_after_it(self, name, base):
        model, inputs = of_class(name, base)
        plain = model(**inputs).logits[:, -1]
        for exit in (1, 2, 3):
            with attach(model, lv(*range(exit, 4))):
                blocked = model(**inputs).logits[:, -1]
            with attach(model, KnockoutConfig(exit=exit)):
                assert_close(model(**inputs).logits[:, -1], blocked, atol=1e-5)
            assert not torch.allclose(blocked, plain, atol=1e-3)

    @torch.no_grad()
    @pytest.mark.parametrize("base", ["sdpa", "eager"])
    @pytest.mark.parametrize("name", CLASSES)
    def test_prefix_reuse_is_a_run_from_the_start(self, name, base):
        model, inputs = of_class(name, base)
        runner = PrefixRunner(model, inputs)
        for layers in ((1, 2), (3,), (2, 3), (0,), (3,), (1,)):
            config = KnockoutConfig(knockouts=(lv(*layers),))
            with attach(model, config):
                wanted = model(**inputs).logits[:, -1]
            assert_close(runner.run(config), wanted, atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize("base", ["sdpa", "eager"])
    @pytest.mark.parametrize("name", CLASSES)
    def test_logits_of_few_rows_are_those_of_all(self, name, base):
        model, inputs = of_class(name, base)
        with attach(model, lv(2, 3)):
            every = model(**inputs).logits
            for keep in (1, 3):
                assert_close(model(**inputs, logits_to_keep=keep).logits, every[:, -keep:], atol=1e-5)

    def test_an_exit_before_layers_that_read_earlier_caches_is_refused(self):
        model, _ = of_class("gemma4, shared caches")
        with pytest.raises(ValueError, match="layer 3 reads keys of an earlier layer"):
            attach(model, KnockoutConfig(exit=2))
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_an_exit_before_layers_that_take_what_is_not_known_is_refused(self, model, monkeypatch):
        layer = type(find_decoder(model).layers[0])
        forward = layer.forward
        monkeypatch.setattr(layer, "forward", lambda self, hidden_states, depth=None, **kw: forward(self, depth, **kw))
        with pytest.raises(ValueError, match="takes depth, kw, of which it is not known"):
            attach(model, EXIT)

    @torch.no_grad()
    def test_reuse_is_refused_where_the_class_changes_its_logits_after_the_head(self):
        model, inputs = gemma4(final_logit_softcapping=0.5)
        inputs = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)} | inputs
        with pytest.raises(ValueError, match="--no-reuse"):
            PrefixRunner(model.eval(), inputs).run(KnockoutConfig(knockouts=(lv(1),)))


class TestNamedPositions:
    """Subsets of visual tokens, as pruning methods choose them, and spans of text."""

    @torch.no_grad()
    @pytest.mark.parametrize("cached", [True, False])
    def test_an_exit_of_some_is_that_nothing_reads_them(self, model, processor, cached):
        questions = ["What moves?", "Which of the two is first?"]
        inputs = tiny_inputs(FAMILY, processor, questions)
        (start, stop) = find_layouts(model, tiny_inputs(FAMILY, processor, questions[:1]))[0].spans["video"]
        low = list(range(start + 1, stop, 3))
        rest = [at for at in range(500) if at not in low]

        def spans(layout, ids):
            begin = int(layout.real.nonzero()[0])
            end = len(layout.frame)
            return {"low": [at + begin for at in low], "rest": [at + begin for at in rest if at + begin < end]}

        layers = tuple(range(3, LAYERS))
        knockouts = [Knockout(kind="span", source="low", target=target, layers=layers) for target in ("rest", "text")]

        def logits(**more):
            out = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, **more
            )
            return torch.stack(out.logits, 1)

        plain = logits()
        with attach(model, knockouts, spans=spans):
            blocked = logits(use_cache=cached)
        with attach(model, KnockoutConfig(exit=3, leave="low"), spans={"low": low}) as handle:
            assert_close(logits(use_cache=cached), blocked, atol=1e-5)
            assert handle.rows.shape[1] == len(handle.layouts[0].frame) - len(low)
        assert not torch.allclose(blocked, plain, atol=1e-3)

    @torch.no_grad()
    def test_spans_of_attach_are_those_of_using(self, model, processor):
        inputs = tiny_inputs(FAMILY, processor, ["Which? (A) red (B) blue. Answer: ("])
        (layout,) = find_layouts(model, inputs)

        def find(layout, ids):
            return locate_spans(processor.tokenizer, ids, {"question": "Which?", "options": "(A) red (B) blue"})

        knockout = Knockout(kind="span", source="question", target="last", layers=(0, 1))
        with attach(model, knockout) as handle, handle.using([layout.with_spans(find(layout, inputs["input_ids"][0]))]):
            wanted = model(**inputs).logits
        with attach(model, knockout, spans=find):
            assert torch.equal(model(**inputs).logits, wanted)
        with attach(model, knockout, spans=find(layout, inputs["input_ids"][0])):
            assert torch.equal(model(**inputs).logits, wanted)

    @torch.no_grad()
    def test_what_leaves_must_be_visual(self, model, first):
        with (
            attach(model, KnockoutConfig(exit=3, leave="low"), spans={"low": [0, 30]}),
            pytest.raises(ValueError, match=r"must name visual tokens, and at least one; .* 1 of them text"),
        ):
            model(**first)
        with attach(model, KnockoutConfig(exit=3, leave="other")), pytest.raises(ValueError, match="not known here"):
            model(**first)
        with pytest.raises(ValueError, match="leave='low' says what leaves at an exit"):
            KnockoutConfig(leave="low")
        with pytest.raises(ValueError, match=r"layers \[4\] have no low tokens after the exit"):
            KnockoutConfig(exit=3, leave="low", knockouts=(lv(4),))
