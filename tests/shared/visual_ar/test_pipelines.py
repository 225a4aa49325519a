import copy

import pytest
import torch
from accelerate.hooks import CpuOffload
from hone_core.testing import requires_gpu
from hone_visual_ar import InfinityPipeline, VARPipeline
from hone_visual_ar.checkpoints import MANIFESTS
from hone_visual_ar.infinity import INFINITY_SIZES
from hone_visual_ar.pipelines import tokenizer_of
from hone_visual_ar.var import VAR_SIZES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "blue", "dog"]


@pytest.fixture(scope="module")
def pipe(small):
    words = Tokenizer(WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = T5EncoderModel(
            T5Config(vocab_size=len(WORDS), d_model=128, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        ).eval()
    model, vae, _, _ = small
    return InfinityPipeline(model, vae, text, tokenizer)


def draw(pipe, prompt, **options):
    return pipe(prompt, **{"pixels": "0.06M", "output_type": "pt", "temperature": 0.5} | options).images


def test_an_image_does_not_depend_on_its_batch(pipe):
    both = draw(pipe, ["a red cat", "a dog"], seeds=[3, 9])
    torch.testing.assert_close(draw(pipe, "a dog", seeds=9), both[1:], atol=1e-4, rtol=0)
    assert not torch.allclose(draw(pipe, "a dog", seeds=10), both[1:], atol=1e-2)
    assert both.shape == (2, 3, 32, 32)
    assert 0 <= both.min() <= both.max() <= 1


def test_padding_does_not_reach_the_text(pipe):
    text, lengths = pipe.encode_prompt(["a dog", "a red cat a red cat"])
    alone, _ = pipe.encode_prompt(["a dog"])
    assert lengths == [3, 7]
    torch.testing.assert_close(text[:1, :3], alone)


def test_images_of_a_prompt_take_seeds_in_turn(pipe):
    images = draw(pipe, ["a cat", "a dog"], num_images_per_prompt=2, seeds=5)
    torch.testing.assert_close(images[3:], draw(pipe, "a dog", seeds=8), atol=1e-4, rtol=0)


def test_guidance_of_one_is_the_conditional_rows(pipe):
    # c * cond + (1 - c) * uncond at c near 1, against rows that have no partner.
    one = draw(pipe, "a red cat", guidance_scale=1.0, greedy=True)
    torch.testing.assert_close(one, draw(pipe, "a red cat", guidance_scale=1 + 1e-7, greedy=True), atol=1e-4, rtol=0)


def test_a_negative_prompt_stands_in_for_the_learned_text(pipe):
    # Guidance away from the prompt itself is none.
    same = draw(pipe, "a red cat", negative_prompt="a red cat", guidance_scale=3.0, greedy=True)
    torch.testing.assert_close(same, draw(pipe, "a red cat", guidance_scale=1.0, greedy=True), atol=1e-4, rtol=0)


@pytest.fixture
def away(monkeypatch):
    """Parts that are offloaded, whose weights read as NaN until a hook brings them back."""
    kept = {}

    def leave(hook, module):
        kept.setdefault(module, [weight.clone() for weight in module.parameters()])
        for weight in module.parameters():
            weight.data.fill_(torch.nan)
        return module

    def come(hook, module, *args, **options):
        if hook.prev_module_hook is not None:
            hook.prev_module_hook.offload()
        for weight, value in zip(module.parameters(), kept.pop(module, ()), strict=False):
            weight.data.copy_(value)
        return args, options

    monkeypatch.setattr(CpuOffload, "init_hook", leave)
    monkeypatch.setattr(CpuOffload, "pre_forward", come)
    return kept


def test_parts_are_offloaded(pipe, var, away):
    """Each is back when it is used, and away when the image is done; the tokenizer of images stays."""
    classes = VARPipeline(*copy.deepcopy(var))
    pipe = InfinityPipeline(*copy.deepcopy([pipe.transformer, pipe.vae, pipe.text_encoder]), pipe.tokenizer)
    options = {"negative_prompt": "a dog", "seeds": 3}
    want, of_class = draw(pipe, "a red cat", **options), classes(3, output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")
    assert set(away) == {pipe.text_encoder, pipe.transformer}
    assert pipe.transformer.head.weight.isnan().all()
    for _ in range(2):
        assert torch.equal(draw(pipe, "a red cat", **options), want)
        assert set(away) == {pipe.text_encoder, pipe.transformer}
    classes.enable_model_cpu_offload(device="cpu")
    assert torch.equal(classes(3, output_type="pt").images, of_class)
    assert classes.transformer in away


@requires_gpu(min_sm=80)
def test_parts_are_offloaded_of_a_gpu(pipe):
    pipe = InfinityPipeline(*copy.deepcopy([pipe.transformer, pipe.vae, pipe.text_encoder]), pipe.tokenizer)
    want = draw(pipe.to("cuda"), "a red cat", seeds=3)
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        assert pipe.transformer.device.type == pipe.text_encoder.device.type == "cpu"
        assert torch.equal(draw(pipe, "a red cat", seeds=3), want)


def test_a_text_encoder_may_stay_elsewhere(pipe):
    """What it gives goes to the transformer's device."""
    text, lengths = pipe.encode_prompt(["a red cat"])
    on_meta = copy.deepcopy(pipe.transformer).to("meta")
    assert on_meta.condition(text, lengths, negative=(text, lengths)).vector.device.type == "meta"


@pytest.mark.parametrize("name", ["enable_sequential_cpu_offload", "enable_group_offload"])
def test_offloading_by_layers_is_refused(pipe, name):
    with pytest.raises(NotImplementedError, match="enable_model_cpu_offload"):
        getattr(pipe, name)()


def test_saved_and_loaded_draws_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert list(tmp_path.glob("transformer/*.safetensors"))
    loaded = InfinityPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded, "a cat"), draw(pipe, "a cat"))
    low = InfinityPipeline.from_pretrained(tmp_path, dtype={"transformer": torch.bfloat16})
    assert low.transformer.body_dtype == torch.bfloat16
    assert low.transformer.head.weight.dtype == low.transformer.pos_start.dtype == torch.float32
    assert draw(low, "a cat").isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a red cat a red cat a red cat"}, "10 tokens, and this model reads at most 8"),
        ({"prompt": []}, "at least one prompt"),
        ({"aspect": 1.1}, "no schedule of height / width 1.1"),
        ({"pixels": "2M"}, "pixels must be one of"),
        ({"seeds": [1, 2]}, "one for each of 1 images"),
        ({"negative_prompt": ["a", "b"]}, "one of each prompt"),
        ({"negative_prompt": "a", "guidance_scale": 1.0}, "needs guidance"),
        ({"output_type": "jpg"}, "output_type must be"),
        ({"num_images_per_prompt": 0}, "at least 1"),
    ],
)
def test_bad_input_is_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, **{"prompt": "a cat"} | options)


def test_a_text_encoder_of_another_width_is_refused(pipe, make_infinity):
    with pytest.raises(ValueError, match="text of 256 channels; the text encoder gives 128"):
        InfinityPipeline(make_infinity(), pipe.vae, pipe.text_encoder, pipe.tokenizer)


def test_var_draws_classes(var, tmp_path):
    pipe = VARPipeline(*var)
    options = {"output_type": "pt", "top_k": 5, "guidance_scale": 2.0}
    both = pipe([3, 7], seeds=[1, 2], **options).images
    torch.testing.assert_close(pipe(7, seeds=2, **options).images, both[1:], atol=1e-4, rtol=0)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(VARPipeline.from_pretrained(tmp_path)([3, 7], seeds=[1, 2], **options).images, both)
    with pytest.raises(ValueError, match="0 to 10"):
        pipe(11)


def test_every_published_model_has_a_published_tokenizer():
    assert {tokenizer_of(name) for name in (*INFINITY_SIZES, *VAR_SIZES)} <= set(MANIFESTS)
    assert tokenizer_of("infinity_2b") == "bsq_d32"
    with pytest.raises(ValueError, match="no published model"):
        tokenizer_of("magic")


def test_pixels_that_are_not_finite_are_no_black_image(pipe, var):
    broken = copy.deepcopy(pipe.vae)
    broken.decoder.conv_out.conv.bias.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"pixels are not finite in torch\.float32; put vae into float32"):
        draw(InfinityPipeline(pipe.transformer, broken, pipe.text_encoder, pipe.tokenizer), "a cat")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "at least one class; got none"),
        ([1.5], r"whole numbers, int64 or int32; got torch\.float32"),
        ([-1], "0 to"),
    ],
)
def test_classes_that_there_are_not_are_named(var, classes, message):
    with pytest.raises(ValueError, match=message):
        VARPipeline(*var)(classes, output_type="pt")
