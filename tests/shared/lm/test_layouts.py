"""Layouts against the decoded prompt, for every class, through its real processor."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hone_lm.layouts import RULES, TokenLayout, find_layouts, locate_spans
from hone_lm.tiny import FAMILIES, PROMPTS, random_video, tiny, tiny_inputs

# Tokens per frame and decoder frames of a 4-frame, 56 x 56 video, worked out by hand from each class's patch sizes:
# Qwen: 56 / 14 = 4 patches, merged 2 x 2 = 4 tokens, two frames fused; LLaVA-OneVision: 7 x 7 pooled to 4 x 4;
# LLaVA-NeXT-Video: 4 x 4 / 4; InternVL, SmolVLM: 4 by construction; VideoLLaMA3: 4 x 4 merged; Video-LLaVA: 16 + CLS.
EXPECTED = {
    "qwen2_vl": (4, 2),
    "qwen2_5_vl": (4, 2),
    "qwen3_vl": (4, 2),
    "qwen3_vl_moe": (4, 2),
    "llava_onevision": (16, 4),
    "llava_next_video": (4, 4),
    "internvl": (4, 4),
    "smolvlm": (4, 4),
    "video_llama_3": (4, 4),
    "video_llava": (17, 4),
}
QUESTIONS = ["What moves?", "Which of the two is first, the red or the blue?"]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    model, processor = tiny(request.param)
    inputs = tiny_inputs(request.param, processor, QUESTIONS)
    return request.param, model, processor, inputs, find_layouts(model, inputs)


def test_frames_and_tokens(case):
    family, _, _, inputs, layouts = case
    each, frames = EXPECTED[family]
    for layout in layouts:
        assert layout.num_frames == frames
        assert layout.tokens_per_frame == (each,) * frames
        assert layout.source_frames == (2 if family.startswith("qwen") else 1)
        # Frames come in order, and all of a frame is one piece.
        values = layout.frame[layout.frame >= 0]
        assert values.tolist() == sorted(values.tolist())
        assert len(layout.frame) == inputs["input_ids"].shape[1]
    assert {layout.frame.shape for layout in layouts} == {inputs["input_ids"].shape[1:]}


def test_every_placeholder_is_visual_or_a_separator(case):
    family, _, processor, inputs, layouts = case
    name = {"internvl": "<IMG_CONTEXT>", "smolvlm": "<image>"}.get(family)
    name = name or ("<video>" if family.startswith("llava") or family == "video_llava" else "<|video_pad|>")
    placeholder = processor.tokenizer.convert_tokens_to_ids(name)
    for ids, layout in zip(inputs["input_ids"], layouts, strict=True):
        marked = layout.frame >= 0
        marked[list(layout.separators)] = True
        assert torch.equal(marked, ids == placeholder)
    assert all(len(layout.separators) == (family == "llava_onevision") for layout in layouts)


def test_text_around_the_video_is_found(case):
    family, _, processor, inputs, layouts = case
    for ids, layout, question in zip(inputs["input_ids"], layouts, QUESTIONS, strict=True):
        decode = processor.tokenizer.decode
        start, stop = layout.spans["prefix"]
        assert decode(ids[start:stop]).startswith("You are helpful.\nUser: ")
        start, stop = layout.spans["suffix"]
        assert decode(ids[start:stop]).endswith(question)
        (begin, end) = locate_spans(processor.tokenizer, ids, {"question": question}, start=start)["question"]
        assert decode(ids[begin:end]).strip() == question
        between = decode(ids[list(layout.between)])
        pattern = {
            "qwen3_vl": r"<\|vision_end\|><1.2 seconds><\|vision_start\|>",
            "qwen3_vl_moe": r"<\|vision_end\|><1.2 seconds><\|vision_start\|>",
            "internvl": r"(</img>\nFrame\d: <img>){3}",
            "smolvlm": r"(<fake_token_around_image>\nFrame from 00:0\d:<fake_token_around_image><global-img>){3}",
            "video_llama_3": r"(,Time \d.\ds:){3}",
        }.get(family, "")
        assert re.fullmatch(pattern, between), between


def test_every_class_has_a_rule_of_its_own():
    assert set(RULES) == set(FAMILIES) == set(EXPECTED)
    # Timestamps stand between frames of both, although their grids tell of all frames at once.
    assert RULES["qwen3_vl_moe"] is RULES["qwen3_vl"]


def test_padding_is_no_text(case):
    _, _, _, inputs, layouts = case
    short, long = layouts
    assert torch.equal(short.real, inputs["attention_mask"][0].bool())
    assert not short.real.all()
    assert long.real.all()
    assert short.num_text + short.num_visual == int(short.real.sum())
    assert short.spans["prefix"][0] == int((~short.real).sum())


def test_round_trip_and_text(case, tmp_path):
    layout = case[-1][0]
    again = TokenLayout.load(layout.save(tmp_path / "layout.json"))
    assert torch.equal(again.frame, layout.frame)
    assert torch.equal(again.real, layout.real)
    assert str(again) == str(layout)
    assert again.to_dict() == layout.to_dict()
    assert f"{layout.num_frames} frames of {layout.tokens_per_frame[0]} tokens" in str(layout)


def test_a_prompt_without_a_video_is_refused(case):
    _, model, processor, _, _ = case
    inputs = processor.tokenizer(["no video here"], return_tensors="pt")
    with pytest.raises(ValueError, match="no visual token in a prompt"):
        find_layouts(model, inputs)


def test_frames_of_unequal_size():
    # VideoLLaMA3 drops the tokens that repeat the previous frame: a still video keeps all of its first frame only.
    model, processor = tiny("video_llama_3")
    video = random_video(4)
    video[1] = video[0]
    video[1, :, 28:, 28:] = 255 - video[1, :, 28:, 28:]
    prompt = PROMPTS["video_llama_3"].format(question="?")
    inputs = processor(
        text=[prompt],
        videos=[video],
        return_tensors="pt",
        video_metadata=[{"fps": 1.0, "total_num_frames": 4, "duration": 4.0, "frames_indices": [0, 1, 2, 3]}],
    )
    (layout,) = find_layouts(model, inputs)
    assert layout.tokens_per_frame == (4, 1, 4, 4)


def test_several_videos_count_on():
    model, processor = tiny("qwen2_5_vl")
    prompt = "<|vision_start|><|video_pad|><|vision_end|> and <|vision_start|><|video_pad|><|vision_end|>?"
    inputs = processor(text=[prompt], videos=[random_video(4), random_video(6, size=84)], return_tensors="pt")
    (layout,) = find_layouts(model, inputs)
    assert layout.tokens_per_frame == (4, 4, 9, 9, 9)


def test_grid_that_does_not_fit_is_refused():
    model, processor = tiny("qwen2_5_vl")
    inputs = tiny_inputs("qwen2_5_vl", processor)
    inputs["video_grid_thw"] = torch.tensor([[3, 4, 4]])
    with pytest.raises(ValueError, match="takes 12 tokens; the prompt has a run of 8"):
        find_layouts(model, inputs)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_frames_from_positions_where_no_grid_comes(family):
    """As in the prefill of newer generate, which encodes the video before and drops its grid."""
    model, processor = tiny(family, layers=1)
    inputs = tiny_inputs(family, processor, QUESTIONS, frames=6, size=84)
    expected = find_layouts(model, inputs)
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    bare = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = find_layouts(model, bare | {"position_ids": seen["position_ids"]})
    assert [layout.to_dict() for layout in found] == [layout.to_dict() for layout in expected]
    if family != "qwen3_vl":
        with pytest.raises(ValueError, match="fewer rows than the prompt has videos"):
            find_layouts(model, bare)
        cut = {name: value[..., :-20] for name, value in (bare | {"position_ids": seen["position_ids"]}).items()}
        with pytest.raises(ValueError, match="fewer rows than the prompt has videos"):
            find_layouts(model, cut)


def test_frame_count_that_does_not_divide_is_refused():
    model, _ = tiny("llava_onevision")
    ids = torch.full((1, 20), 5)
    ids[0, 2:12] = model.config.video_token_index
    with pytest.raises(ValueError, match="16 tokens per frame; a run of 9 is no multiple"):
        find_layouts(model, {"input_ids": ids})


class TestGeneric:
    CONFIG = SimpleNamespace(model_type="new", video_token_id=9)

    def ids(self, *runs):
        return torch.tensor([[1, *[token for run in runs for token in [9] * run + [2]]]])

    def test_runs_between_text_are_frames(self):
        (layout,) = find_layouts(self.CONFIG, {"input_ids": self.ids(3, 2)})
        assert layout.frame.tolist() == [-1, 0, 0, 0, -1, 1, 1, -1]
        assert layout.between == (4,)

    def test_one_run_is_split_by_tokens_per_frame(self):
        (layout,) = find_layouts(self.CONFIG, {"input_ids": self.ids(6)}, tokens_per_frame=2)
        assert layout.frame.tolist() == [-1, 0, 0, 1, 1, 2, 2, -1]

    def test_one_run_of_unknown_frames_is_refused(self):
        with pytest.raises(ValueError, match="pass tokens_per_frame"):
            find_layouts(self.CONFIG, {"input_ids": self.ids(6)})
        with pytest.raises(ValueError, match="tokens_per_frame=4 does not divide a run of 6 video tokens"):
            find_layouts(self.CONFIG, {"input_ids": self.ids(6)}, tokens_per_frame=4)
        with pytest.raises(ValueError, match="must be positive; got 0"):
            find_layouts(self.CONFIG, {"input_ids": self.ids(6)}, tokens_per_frame=0)

    def test_an_image_id_stands_for_frames_where_there_is_no_other(self):
        config = SimpleNamespace(model_type="new", image_token_id=9)
        (layout,) = find_layouts(config, {"input_ids": self.ids(6)}, tokens_per_frame=2)
        assert layout.frame.tolist() == [-1, 0, 0, 1, 1, 2, 2, -1]
        with pytest.raises(ValueError, match="its 6 image tokens follow each other"):
            find_layouts(config, {"input_ids": self.ids(6)})
        with pytest.raises(ValueError, match="tokens_per_frame=4 does not divide a run of 6 image tokens"):
            find_layouts(config, {"input_ids": self.ids(6)}, tokens_per_frame=4)
        # Also where the class has an id for video, which this prompt does not hold; beside one an image is left whole.
        both = SimpleNamespace(model_type="new", image_token_id=9, video_token_id=8)
        (layout,) = find_layouts(both, {"input_ids": self.ids(6)}, tokens_per_frame=3)
        assert layout.tokens_per_frame == (3, 3)
        ids = torch.tensor([[1, 9, 9, 9, 2, 8, 8, 8, 8, 2]])
        (layout,) = find_layouts(both, {"input_ids": ids}, tokens_per_frame=2)
        assert layout.tokens_per_frame == (3, 2, 2)

    @pytest.mark.parametrize("runs", [(12,), (4, 4, 4)], ids=["one run", "a run per frame"])
    def test_grid_of_one_run_or_of_a_run_per_frame(self, runs):
        config = SimpleNamespace(
            model_type="new", video_token_id=9, vision_config=SimpleNamespace(spatial_merge_size=2)
        )
        grid = torch.tensor([[3, 4, 4], [1, 2, 2]])
        (layout,) = find_layouts(config, {"input_ids": self.ids(*runs, 1), "video_grid_thw": grid})
        assert layout.tokens_per_frame == (4, 4, 4, 1)
        with pytest.raises(ValueError, match="takes 12 tokens, 4 per frame; the prompt has a run of 6"):
            find_layouts(config, {"input_ids": self.ids(6), "video_grid_thw": grid})
        (layout,) = find_layouts(config, {"input_ids": self.ids(1), "video_grid_thw": grid[1:]})
        assert layout.num_frames == 1

    def test_config_without_placeholder_is_refused(self):
        with pytest.raises(ValueError, match="names no image or video token"):
            find_layouts(SimpleNamespace(model_type="gpt2"), {"input_ids": self.ids(6)})


def test_tokens_per_frame_comes_before_the_rule_of_the_class():
    for family, each, frames in (("llava_onevision", 8, 8), ("internvl", 2, 8), ("qwen2_5_vl", 8, 1)):
        model, processor = tiny(family, layers=1)
        (layout,) = find_layouts(model, tiny_inputs(family, processor), tokens_per_frame=each)
        assert layout.tokens_per_frame == (each,) * frames
        # The newline after a video stays a separator.
        assert len(layout.separators) == (family == "llava_onevision")
    model, processor = tiny("llava_onevision", layers=1)
    with pytest.raises(ValueError, match="does not divide a run of 64 video tokens and 1 separator"):
        find_layouts(model, tiny_inputs("llava_onevision", processor), tokens_per_frame=5)


def test_sampled_and_fused_frames_are_told_apart(tmp_path):
    model, processor = tiny("qwen2_5_vl", layers=1)
    (layout,) = find_layouts(model, tiny_inputs("qwen2_5_vl", processor))
    assert "each frame is 2 sampled ones" in str(layout)
    known = replace(layout, sampled=4)
    assert "4 frames sampled, 2 fused into each of the 2 that the decoder sees" in str(known)
    assert known.to_dict()["sampled"] == 4
    assert TokenLayout.load(known.save(tmp_path / "l.json")).sampled == 4
    assert "expected" not in str(replace(layout, sampled=3))
    assert "expected 4 in the layout, the processor made 2" in str(replace(layout, sampled=8))


def test_spans():
    layout = find_layouts(TestGeneric.CONFIG, {"input_ids": TestGeneric().ids(3, 2)})[0]
    layout = layout.with_spans({"question": (7, 8)})
    assert layout.mask("question").nonzero().flatten().tolist() == [7]
    assert layout.mask("visual").sum() == 5
    assert layout.mask("text").nonzero().flatten().tolist() == [4, 7]
    with pytest.raises(ValueError, match="span 'options' is not known"):
        layout.mask("options")
    with pytest.raises(ValueError, match="must lie in"):
        layout.with_spans({"x": (3, 99)})


def test_locating_what_is_not_there():
    _, processor = tiny("qwen2_vl")
    with pytest.raises(ValueError, match="does not occur"):
        locate_spans(processor.tokenizer, [5, 6, 7], {"question": "where?"})


def test_a_layout_is_cut_after_its_video_only():
    model, processor = tiny("llava_onevision", layers=1)
    (layout,) = find_layouts(model, tiny_inputs("llava_onevision", processor))
    size = len(layout.frame)
    shorter = layout.cut(size - 3)
    assert shorter.spans["last"] == (size - 4, size - 3)
    assert shorter.spans["suffix"] == (layout.spans["suffix"][0], size - 3)
    assert torch.equal(shorter.frame, layout.frame[:-3])
    assert layout.cut(size) is layout
    with pytest.raises(ValueError, match="it cannot be cut at 40"):
        layout.cut(40)


def side_by_side(sizes, run):
    """Two images of LLaVA-OneVision that a template puts beside each other."""
    model, _ = tiny("llava_onevision", layers=1)
    image, video = model.config.image_token_id, model.config.video_token_id
    ids = torch.tensor([[40, *[image] * run, 41, *[video] * 33, 42, 43]])
    return find_layouts(model, {"input_ids": ids, "image_sizes": torch.tensor(sizes)})[0]


def test_images_side_by_side_are_several_and_are_told_from_frames():
    layout = side_by_side([[56, 56], [56, 56]], 14)
    assert layout.tokens_per_frame == (7, 7, 16, 16)
    assert layout.images == (0, 1)
    assert "images, no frames of a video: 0, 1" in str(layout)
    assert TokenLayout.from_dict(layout.to_dict()).images == (0, 1)
    assert side_by_side([[56, 56]], 14).tokens_per_frame == (14, 16, 16)
    with pytest.raises(ValueError, match="2 images of different sizes stand in 1 runs"):
        side_by_side([[56, 56], [56, 28]], 14)


def test_an_image_of_mistral3_is_one_frame_of_several_rows():
    config = SimpleNamespace(
        model_type="mistral3",
        image_token_id=10,
        spatial_merge_size=2,
        vision_config=SimpleNamespace(patch_size=14),
    )

    def image(rows, columns):
        found = []
        for row in range(rows):
            found += [10] * columns + [12 if row == rows - 1 else 11]
        return found

    ids = torch.tensor([[1, *image(3, 2), 50, *image(1, 4), 51, 52]])
    inputs = {"input_ids": ids, "image_sizes": torch.tensor([[84, 56], [28, 112]])}
    (layout,) = find_layouts(config, inputs)
    assert layout.tokens_per_frame == (6, 4)
    assert layout.separators == (3, 6)
    assert layout.between == (9, 10)
    with pytest.raises(ValueError, match="takes 2 rows of 3 tokens"):
        find_layouts(config, inputs | {"image_sizes": torch.tensor([[56, 84], [28, 112]])})
    with pytest.raises(ValueError, match="must hold image_sizes"):
        find_layouts(config, {"input_ids": ids})


def test_named_positions():
    model, processor = tiny("llava_onevision", layers=1)
    (layout,) = find_layouts(model, tiny_inputs("llava_onevision", processor))
    named = layout.with_positions({"low": [30, 28, 30]})
    assert named.mask("low").nonzero().flatten().tolist() == [28, 30]
    assert layout.with_positions({"low": named.mask("low")}).positions == named.positions == {"low": (28, 30)}
    assert TokenLayout.from_dict(named.to_dict()).positions == named.positions
    assert layout.images == ()
    for given in ([], [len(layout.frame)], [-1], torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="positions low"):
            layout.with_positions({"low": given})
