import pytest
import torch
from hone_lm.choices import choice_inputs, choice_prompt, option_token_ids, read_choices, to_model
from hone_lm.tiny import FAMILIES, PROMPTS, build_tokenizer, random_video, tiny, tiny_inputs
from hone_lm.video import Clip


def test_probabilities_by_hand():
    choices = read_choices(torch.tensor([0.0, 1.0, 2.0, 3.0]).log(), [1, 3])
    assert choices.probability == pytest.approx((0.25, 0.75))
    assert choices.mass == pytest.approx(4 / 6)
    assert choices.best == 1


def test_letters_are_continuations():
    tokenizer = build_tokenizer()
    tokens = option_token_ids(tokenizer, "Best option: (", ["x", "y", "z"])
    assert tokenizer.convert_ids_to_tokens(tokens) == ["A", "B", "C"]


def test_a_letter_that_merges_with_its_prefix_is_found():
    # Here "(A" is one token: neither the prefix's last token nor a lone letter stands for the option.
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["(A", "(B"])
    tokens = option_token_ids(tokenizer, "Best option: (", ["x", "y"])
    assert tokenizer.convert_ids_to_tokens(tokens) == ["(A", "(B"]


def test_options_as_text():
    tokenizer = build_tokenizer(words=["left", "right"])
    tokens = option_token_ids(tokenizer, "where? ", ["left", "right"], style="text")
    assert tokenizer.convert_ids_to_tokens(tokens) == ["left", "right"]
    with pytest.raises(ValueError, match="begin with the same token"):
        option_token_ids(tokenizer, "where? ", ["up", "under"], style="text")
    with pytest.raises(ValueError, match="adds no token"):
        option_token_ids(tokenizer, "where? ", ["up", " "], style="text")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_class_answers(family):
    model, processor = tiny(family, layers=1)
    clips = [Clip(random_video(4, seed=seed), (0.0, 0.5, 1.0, 1.5), 2.0, 2.0) for seed in (0, 1)]
    if family.startswith("qwen"):
        processor.chat_template = (
            "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'video' %}"
            "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
            "{% endfor %}{% endfor %}{{ '\\n' }}"
        )
    prompts = [choice_prompt(processor, q, ["a dog", "a cat"]) for q in ("What is it?", "And?")]
    assert all(
        p.endswith("(A) a dog\n(B) a cat\nAnswer with the letter of the best option.\nBest option: (") for p in prompts
    )
    inputs = choice_inputs(processor, prompts, clips)
    logits = model(**inputs).logits[:, -1]
    tokens = option_token_ids(processor.tokenizer, prompts[0], ["a dog", "a cat"])
    choices = read_choices(logits[0], tokens)
    assert sum(choices.probability) == pytest.approx(1)
    assert 0 < choices.mass < 1


def test_options_are_needed():
    _, processor = tiny("llava_onevision", layers=1)
    with pytest.raises(ValueError, match="at least two options; got 1"):
        choice_prompt(processor, "?", ["a"])
    with pytest.raises(ValueError, match="letters for 26 options"):
        choice_prompt(processor, "?", list("abcdefghijklmnopqrstuvwxyz1"))


def test_only_pixels_take_the_model_s_dtype():
    model, processor = tiny("qwen2_5_vl", layers=1)
    inputs = to_model(tiny_inputs("qwen2_5_vl", processor), model.bfloat16())
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16
    # In 16 bits the seconds of a frame, and with them its position, would be others.
    assert inputs["second_per_grid_ts"].dtype == torch.float32
    assert model(**inputs).logits.dtype == torch.bfloat16


def test_times_of_a_part_of_a_video():
    """Eight frames of the seconds from 40 to 48 of a video of 100 s."""
    times = tuple(40.5 + index for index in range(8))
    clip = Clip(random_video(8), times, 100.0, 25.0)
    _, processor = tiny("qwen2_5_vl", layers=1)
    prompt = PROMPTS["qwen2_5_vl"].format(question="What?")
    inputs = choice_inputs(processor, [prompt], [clip])
    # A grid step is two frames.
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2.0])
    whole = Clip(clip.frames, tuple(100 / 8 * (index + 0.5) for index in range(8)), 100.0, 25.0)
    assert choice_inputs(processor, [prompt], [whole])["second_per_grid_ts"].tolist() == pytest.approx([25.0])
    for family, shown in (
        ("qwen3_vl", ["<41.0 seconds>", "<47.0 seconds>"]),
        ("smolvlm", ["00:40", "00:47", "0:01:40"]),
    ):
        _, processor = tiny(family, layers=1)
        inputs = choice_inputs(processor, [PROMPTS[family].format(question="What?")], [clip])
        text = processor.tokenizer.decode(inputs["input_ids"][0]).replace(" ", "")
        assert all(part.replace(" ", "") in text for part in shown), text


@pytest.mark.parametrize(("family", "token"), [("llava_onevision", "<video>"), ("qwen2_vl", "<|image_pad|>")])
def test_a_text_that_holds_a_placeholder_is_refused(family, token):
    _, processor = tiny(family, layers=1)
    for question, options in ((f"What is {token}?", ["x", "y"]), ("What?", ["x", f"a {token}"])):
        with pytest.raises(ValueError, match="takes for the place of a video or image"):
            choice_prompt(processor, question, options)
