import shutil

import pytest
import torch
from hone_rstitch.config import GenerateConfig, ModelsConfig, SamplingConfig, StitchConfig
from hone_rstitch.generation import stitch_generate
from hone_rstitch.host import build_tokenizer, load_host
from hone_rstitch.inputs import find_asked
from hone_rstitch.models import Pair, attach, check_models, tiny

QUESTIONS = ["123*45", "7*6"]
SAMPLING = SamplingConfig(max_new_tokens=10)


@pytest.fixture(scope="module")
def saved(untrained, tmp_path_factory):
    """The untrained pair as two checkpoints of transformers."""
    pair = load_host(path=untrained)
    folders = {}
    for name, model, tokenizer in (
        ("small", pair.small, pair.small_tokenizer),
        ("large", pair.large, pair.tokenizer),
    ):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return pair, folders


def test_a_pair_from_folders_answers_as_the_models_do(saved):
    pair, folders = saved
    cfg = ModelsConfig(**folders, small_prompt="{question}=", large_prompt="{question}=")
    check_models(cfg)
    loaded = Pair.load(cfg)
    for stitch in (StitchConfig(policy="small"), StitchConfig(tau=0.5)):
        texts, output = loaded.answer(QUESTIONS, stitch, SAMPLING)
        wanted, expected = pair.answer(QUESTIONS, stitch, SAMPLING)
        assert texts == wanted
        assert torch.equal(output.models, expected.models)


def test_a_pair_that_does_not_fit_is_refused_before_its_weights(saved, tmp_path):
    _, folders = saved
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    tokenizer = tmp_path / "large" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"*": 10', '"x": 10'))
    cfg = ModelsConfig(small=str(tmp_path / "small"), large=str(tmp_path / "large"))
    with pytest.raises(ValueError, match="one family"):
        Pair.load(cfg)


def test_a_question_that_cannot_be_read_is_refused_before_weights(tmp_path, monkeypatch):
    tokenizers = (build_tokenizer("small"), build_tokenizer("large"))
    monkeypatch.setattr("hone_rstitch.host.read_pair", lambda small, large: (tokenizers, None))
    for models in (ModelsConfig(), ModelsConfig(small=str(tmp_path), large=str(tmp_path))):
        find_asked(GenerateConfig(models=models, ask="12*3"))
        with pytest.raises(ValueError, match="it would read 'x' as <unk>"):
            find_asked(GenerateConfig(models=models, ask="12x3"))


def test_a_missing_checkpoint_is_named(saved):
    _, folders = saved
    with pytest.raises(OSError, match="no folder nowhere/at-all"):
        check_models(ModelsConfig(small=folders["small"], large="nowhere/at-all"))


def test_each_model_is_asked_in_its_own_words(saved):
    pair, _ = saved
    own = Pair(
        pair.small, pair.large, pair.small_tokenizer, pair.tokenizer, pair.vocabulary, "1+{question}=", "{question}="
    )
    small, large = own.prompts(["2*3"])
    assert pair.small_tokenizer.decode(small[0]) == "1+2*3="
    assert pair.tokenizer.decode(large[0]) == "2*3="
    alone, _ = own.answer(["2*3"], StitchConfig(policy="small"), SAMPLING)
    wanted, _ = pair.answer(["1+2*3"], StitchConfig(policy="small"), SAMPLING)
    assert alone == wanted


def test_chat_templates_are_each_models_own(saved):
    pair, _ = saved
    small, large = build_tokenizer("small"), build_tokenizer("large")
    small.chat_template = "{% for m in messages %}1{{ m.content }}={% endfor %}"
    large.chat_template = "{% for m in messages %}22{{ m.content }}={% endfor %}"
    own = Pair(pair.small, pair.large, small, large, pair.vocabulary)
    prompts = own.prompts(["3*4"])
    assert [small.decode(prompts[0][0]), large.decode(prompts[1][0])] == ["13*4=", "223*4="]
    # The template's own words are its maker's; what is asked has to be read as it stands.
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "3*4"}]
    for refused in (lambda: own.prompts(["3x4"]), lambda: own.chat_prompts(turns)):
        with pytest.raises(ValueError, match="it would read 'x' as <unk>"):
            refused()
    plain = Pair(pair.small, pair.large, small, large, pair.vocabulary, chat=False)
    assert small.decode(plain.prompts(["3*4"])[0][0]) == "3*4"


def test_answers_stop_at_a_string(saved):
    pair, _ = saved
    (whole,), _ = pair.answer(QUESTIONS[:1], StitchConfig(tau=0.5), SAMPLING)
    stop = whole[2:4]
    (text,), _ = pair.answer(QUESTIONS[:1], StitchConfig(tau=0.5), SAMPLING, stop=[stop])
    assert text == whole[: whole.index(stop) + 2]


def test_tiny_families():
    small, large = tiny("llama")
    assert small.config.vocab_size == 96
    assert large.config.vocab_size == 112
    with pytest.raises(ValueError, match="family"):
        tiny("gpt")


def test_attached_models_write_together_when_asked_as_always(pairs):
    small, large = pairs()
    ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(3))
    plain = large.generate(ids, max_new_tokens=16, do_sample=False)
    gate = StitchConfig(tau=0.55)
    wanted = stitch_generate(large, small, ids, stitch=gate, max_new_tokens=16)
    assert not torch.equal(plain, wanted)
    told = []
    with attach(large, gate, small=small) as handle:
        assert torch.equal(large.generate(input_ids=ids, max_new_tokens=16), wanted)
        assert torch.equal(large.generate(ids, max_new_tokens=16, on_token=told.append), wanted)
        alone = large.generate(inputs=ids, max_new_tokens=16, stitch=StitchConfig(policy="small"))
        assert torch.equal(alone, small.generate(ids, max_new_tokens=16, do_sample=False))
        with handle.disabled():
            assert torch.equal(large.generate(ids, max_new_tokens=16, do_sample=False), plain)
        with pytest.raises(ValueError, match="replaced already"):
            attach(large, gate, small=small)
        with pytest.raises(ValueError, match="ids of the prompt"):
            large.generate(max_new_tokens=16)
    assert len(told) == wanted.shape[1] - 7
    assert torch.equal(large.generate(ids, max_new_tokens=16, do_sample=False), plain)
    with pytest.raises(ValueError, match="no preset"):
        attach(large, "none", small=small)


def test_a_template_that_refuses_messages_is_quoted(saved):
    pair, _ = saved
    small = build_tokenizer("small")
    small.chat_template = "{{ raise_exception('roles must alternate') }}"
    picky = Pair(pair.small, pair.large, small, pair.tokenizer, pair.vocabulary)
    with pytest.raises(ValueError, match="the chat template refuses these messages: roles must alternate"):
        picky.chat_prompts([{"role": "user", "content": "1*1"}])
