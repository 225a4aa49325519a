import copy
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from hone_core.errors import CheckpointError, UnsupportedHardwareError
from hone_core.testing import requires_gpu
from hone_nar import pipelines, sample
from hone_nar.config import GenerateConfig
from hone_nar.extract import clips_of
from hone_nar.flashar import FlashARForImageGeneration
from hone_nar.generation import graphed
from hone_nar.inputs import find_drawn
from hone_nar.larp import LARPTokenizer
from hone_nar.models import tiny, tiny_tokenizer
from hone_nar.pipelines import NARPipeline, NARVideoPipeline
from hone_nar.sample import generate
from hone_nar.texts import pad_left
from hone_video.videos import save_video
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "blue", "dog"]


@pytest.fixture(scope="module", params=["nar", "llamagen", "flashar"])
def classes(request):
    return NARPipeline(tiny(request.param), tiny_tokenizer())


@pytest.fixture(scope="module")
def texts():
    words = Tokenizer(WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = T5EncoderModel(T5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()
    return NARPipeline(
        tiny("nar", num_classes=None, cls_token_num=6, caption_dim=24), tiny_tokenizer(), encoder, tokenizer
    )


def test_images_of_classes(classes, tmp_path):
    both = classes([3, 7], seeds=[1, 5], output_type="pt").images
    assert both.shape == (2, 3, 24, 24)
    assert 0 <= both.min() <= both.max() <= 1
    torch.testing.assert_close(classes(7, seeds=5, output_type="pt").images, both[1:], atol=1e-5, rtol=0)
    classes.save_pretrained(tmp_path)
    again = NARPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(again([3, 7], seeds=[1, 5], output_type="pt").images, both)
    codes = classes([3, 7], seeds=[1, 5], output_type="codes").images
    assert codes.shape == (2, 6, 6)
    assert classes(3).images[0].size == (24, 24)


def test_images_of_texts(texts, tmp_path):
    both = texts(prompt=["a red cat", "A dog "], seeds=[1, 5], output_type="pt").images
    torch.testing.assert_close(texts(prompt="a dog", seeds=5, output_type="pt").images, both[1:], atol=1e-5, rtol=0)
    texts.save_pretrained(tmp_path)
    again = NARPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(again(prompt="a dog", seeds=5, output_type="pt").images, both[1:], atol=1e-5, rtol=0)


def test_graphs_draw_what_calls_draw(classes, texts, monkeypatch):
    """Of batches one after the other, by what a graph would replay."""
    monkeypatch.setattr(pipelines, "graphed", partial(graphed, capture=lambda work: work))
    settings = {"guidance_scale": 3.0, "temperature": 0.8, "top_k": 9, "guided_tokens": 12}
    run = classes.graphs(2, **settings)
    flash = isinstance(classes.transformer, FlashARForImageGeneration)
    assert (run.fused, run.few) == ((False, 0) if flash else (True, 64))
    for labels, seeds in (([3, 7], [1, 5]), ([0, 0], [2, 3])):
        found = classes(labels, seeds=seeds, decoding=run, output_type="codes").images
        assert torch.equal(found, classes(labels, seeds=seeds, output_type="codes", **settings).images)
    run = texts.graphs(1)
    steps = []
    found = texts(prompt="a dog", decoding=run, on_step=lambda _, step: steps.append(step), output_type="codes").images
    assert torch.equal(found, texts(prompt="a dog", output_type="codes").images)
    assert steps == list(range(11))
    with pytest.raises(ValueError, match="expected 2 images in 4 rows"):
        classes(1, decoding=classes.graphs(2))
    with pytest.raises(ValueError, match="give them to graphs"):
        classes(1, decoding=classes.graphs(1), top_k=3)
    with pytest.raises(ValueError, match="made of another model"):
        classes(1, decoding=run)
    assert not classes.graphs(1, greedy=True).fused


def test_words_are_moved_to_the_right_and_padding_is_nothing(texts):
    features = torch.arange(1.0, 13.0).view(2, 3, 2)
    words = torch.tensor([[True, False, False], [True, True, True]])
    moved, there = pad_left(features, words)
    assert moved[0].tolist() == [[0, 0], [0, 0], [1, 2]]
    assert there[0].tolist() == [False, False, True]
    assert torch.equal(moved[1], features[1])
    encoded, where = texts.encode_prompt(["a red cat", "a"])
    assert where.sum(1).tolist() == [4, 2]
    assert not encoded[1, :4].any()


def test_the_text_encoder_is_offloaded(texts, monkeypatch):
    """Its weights read as NaN but for its own forward; transformer and tokenizer stay."""
    pipe = NARPipeline(*copy.deepcopy([texts.transformer, texts.vae, texts.text_encoder]), texts.tokenizer)
    want, kept = texts(prompt="a dog", output_type="codes").images, {}

    def leave(hook, module):
        kept[module] = [weight.clone() for weight in module.parameters()]
        for weight in module.parameters():
            weight.data.fill_(torch.nan)
        return module

    def come(hook, module, *args, **options):
        for weight, value in zip(module.parameters(), kept.pop(module), strict=True):
            weight.data.copy_(value)
        return args, options

    monkeypatch.setattr(CpuOffload, "init_hook", leave)
    monkeypatch.setattr(CpuOffload, "pre_forward", come)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert set(kept) == {pipe.text_encoder}
        assert torch.equal(pipe(prompt="a dog", output_type="codes").images, want)
    for name in ("enable_sequential_cpu_offload", "enable_group_offload"):
        with pytest.raises(NotImplementedError, match="enable_model_cpu_offload"):
            getattr(pipe, name)()


@requires_gpu()
def test_the_text_encoder_is_offloaded_of_a_gpu(texts):
    """Before and after it is used; graphs, which read the transformer where it lies, go on."""
    pipe = NARPipeline(*copy.deepcopy([texts.transformer, texts.vae, texts.text_encoder]), texts.tokenizer)
    want = pipe.to("cuda")(prompt="a dog", output_type="codes").images
    pipe.enable_model_cpu_offload()
    graphs = pipe.graphs(1)
    found = []
    for decoding in (None, graphs, graphs):
        assert (pipe.text_encoder.device.type, pipe.transformer.device.type) == ("cpu", "cuda")
        found.append(pipe(prompt="a dog", decoding=decoding, output_type="codes").images)
    assert torch.equal(found[0], want)
    assert torch.equal(found[1], found[2])
    pipe.transformer.to("cpu")
    with pytest.raises(RuntimeError, match="replaced, wrapped or moved"):
        pipe(prompt="a dog", decoding=graphs)


def test_adapters_count_before_and_after_they_are_merged(monkeypatch):
    """peft's, put in after graphs were made, which are refused then; and merged, they are drawn with as they were."""
    monkeypatch.setattr(pipelines, "graphed", partial(graphed, capture=lambda work: work))
    pipe = NARPipeline(tiny(), tiny_tokenizer())

    def drawn(**options):
        return pipe([1, 2], output_type="codes", **options).images

    plain, graphs = drawn(), pipe.graphs(2)
    assert torch.equal(drawn(decoding=graphs), plain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["wqkv", "w2", "output"], init_lora_weights=False)
        inject_adapter_in_model(config, pipe.transformer)
    pipe.transformer.eval()
    adapted = drawn()
    assert not torch.equal(adapted, plain)
    with pytest.raises(RuntimeError, match="replaced, wrapped or moved"):
        drawn(decoding=graphs)
    graphs = pipe.graphs(2)
    assert graphs.few == 0
    assert torch.equal(drawn(decoding=graphs), adapted)
    for module in list(pipe.transformer.modules()):
        if hasattr(module, "merge"):
            module.merge()
    assert torch.equal(drawn(), adapted)


def test_numbers_of_other_libraries_are_taken(classes):
    want = classes([3, 7], seeds=[1, 2], output_type="codes").images
    for labels, seeds in ((np.array([3, 7]), np.array([1, 2])), (torch.tensor([3, 7]), np.int64(1))):
        assert torch.equal(classes(labels, seeds=seeds, output_type="codes").images, want)
    assert torch.equal(classes(np.int64(3), seeds=1, output_type="codes").images, want[:1])


def test_bad_input_is_named(classes, texts):
    for call, message in (
        (lambda: classes(10), "classes are 0 to 9; got 10"),
        (lambda: classes([]), "at least one class"),
        (lambda: classes(1.5), "labels must be integers"),
        (lambda: classes(True), "labels must be integers"),
        (lambda: classes(1, guidance_scale=float("nan")), "guidance must be finite"),
        (lambda: classes(1, prompt="a"), "draws classes; give class_labels and no prompt"),
        (lambda: classes([1, 2], seeds=[1]), "one for each of 2 images; got 1"),
        (lambda: classes(1, output_type="jpg"), "output_type must be"),
        (lambda: texts(1), "draws texts; give prompt"),
        (lambda: texts(prompt=" "), "prompt 0 holds no word"),
        (lambda: texts(prompt="a a a a a a a"), "8 tokens, and this model reads at most 6"),
        (lambda: NARPipeline(tiny("nar", vocab_size=16), tiny_tokenizer()), "do not belong together: 16 codes and 32"),
        (lambda: NARPipeline(texts.transformer, tiny_tokenizer()), "needs text_encoder and tokenizer"),
        (
            lambda: NARPipeline(tiny("nar"), tiny_tokenizer(), texts.text_encoder, texts.tokenizer),
            "reads no text; leave",
        ),
        (lambda: NARPipeline.from_published("vq_ds16", transformer="x", vae="y"), "no published image model"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_verb_writes_an_image_of_each_class_whatever_the_batch(classes, start, tmp_path, monkeypatch):
    classes.save_pretrained(tmp_path / "model")
    options = {"model": tmp_path / "model", "classes": (1, 2, 3), "seed": 4}
    files = []
    for batch in (1, 2):
        cfg = GenerateConfig(**options, batch=batch)
        with start(cfg, "generate", tmp_path / str(batch)) as run:
            files.append(generate(cfg, run).images)
    cfg = GenerateConfig(**options, batch=2, graphs=True)
    with start(cfg, "generate", tmp_path / "refused") as run, pytest.raises(UnsupportedHardwareError):
        generate(cfg, run)
    # Graphs are of one number of images: the last batch is filled up.
    monkeypatch.setattr(pipelines, "graphed", partial(graphed, capture=lambda work: work))
    monkeypatch.setattr(sample, "graph_device", lambda run, graphs: torch.device("cpu"))
    with start(cfg, "generate", tmp_path / "graphs") as run:
        graphs = generate(cfg, run).images
    assert [file.name for file in files[0]] == ["00000.png", "00001.png", "00002.png"]
    single, pairs, graphs = ([np.asarray(Image.open(file), dtype=int) for file in each] for each in (*files, graphs))
    for one, two, three in zip(single, pairs, graphs, strict=True):
        # The tokenizer's convolutions round otherwise in another batch, on some processors.
        assert max(np.abs(one - two).max(), np.abs(one - three).max()) <= 1
    for wrong, message in (({"classes": (10,)}, "classes are 0 to 9; got 10"), ({"top_p": 2.0}, "top_p")):
        with pytest.raises(ValueError, match=message):
            find_drawn(GenerateConfig(**(options | wrong)))
    with pytest.raises(ValueError, match="this model draws classes; got prompts"):
        find_drawn(GenerateConfig(model=tmp_path / "model", prompts=("a",)))
    with pytest.raises(CheckpointError, match="no saved pipeline"):
        find_drawn(GenerateConfig(model=tmp_path, classes=(1,)))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # imageio-ffmpeg's pipes
def test_the_verb_writes_a_clip_of_each_class(start, tmp_path):
    vae = LARPTokenizer(frames=4, size=16, tokens=24, dim=16, depth=1, heads=2, codebook_size=32).eval()
    NARVideoPipeline(tiny("video"), vae).save_pretrained(tmp_path / "model")
    cfg = GenerateConfig(model=tmp_path / "model", classes=(1, 2), seed=4, fps=8, batch=2)
    with start(cfg, "generate", tmp_path / "run") as run:
        files = generate(cfg, run).images
    assert [file.name for file in files] == ["00000.mp4", "00001.mp4"]
    clips = NARVideoPipeline.from_pretrained(tmp_path / "model")([1, 2], seeds=[4, 5])
    for number, (file, clip) in enumerate(zip(files, clips, strict=True)):
        wanted = save_video(clip, tmp_path / f"{number}.mp4", fps=8, what="", advice="")
        assert file.read_bytes() == wanted.read_bytes()
    assert not np.allclose(*clips)
    assert clips_of(files[1], 4, 16, "center").shape == (1, 1, 3, 4, 16, 16)


def test_a_prompt_without_a_word_and_a_guidance_that_is_no_number_are_found_before_weights_are_read(texts, tmp_path):
    texts.save_pretrained(tmp_path)
    for file in (*tmp_path.rglob("*.safetensors"),):
        file.write_bytes(b"")
    assert find_drawn(GenerateConfig(model=tmp_path, prompts=("A red cat",)))
    for wrong, message in (
        ({"prompts": ("a cat", " ")}, "prompt 1 holds no word"),
        ({"prompts": ("a cat a cat a cat",)}, "a prompt has 7 tokens"),
        ({"prompts": ("a cat",), "guidance": float("nan")}, "guidance must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            find_drawn(GenerateConfig(model=tmp_path, **wrong))
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no saved pipeline"):
        find_drawn(GenerateConfig(model=tmp_path, prompts=("a cat",)))


def test_pixels_that_are_not_finite_are_no_black_image():
    pipe = NARPipeline(tiny(), tiny_tokenizer())
    pipe.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"pixels are not finite in torch\.float32; put vae into float32"):
        pipe([1])
    assert pipe([1], output_type="codes").images.shape == (1, 6, 6)
