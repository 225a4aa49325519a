from dataclasses import replace

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.testing import assert_close
from hone_nar.checkpoints import load_published
from hone_nar.codes import open_codes, write_class, write_index, write_texts
from hone_nar.config import EvalConfig, TrainConfig
from hone_nar.evaluate import evaluate
from hone_nar.finetune import TINY, draw, options_of, rate, train
from hone_nar.flashar import FlashARForImageGeneration
from hone_nar.inputs import find_graded, find_trained
from hone_nar.transformer import LlamaGenForImageGeneration, NARForImageGeneration, NARForVideoGeneration
from hone_video.training import Group, Loop, Part
from hone_video.training_config import LoopConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

LOOP = LoopConfig(
    steps=4, batch=4, micro_batch=2, lr=1e-3, warmup_steps=1, weight_decay=0.05, ema=0.5, log_every=1,
    checkpoint_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("codes")
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        write_class(path, number, torch.randint(16, (3, 2, 9), generator=generator))
    write_index(path, grid=(3, 3), choices=16, classes=["a", "b"])
    return path


@pytest.fixture
def cfg(data):
    return TrainConfig(data=data, model="tiny", grid=(3, 3), codebook=16, classes=2, loop=LOOP, dropout=0.2)


def weights(report):
    return NARForImageGeneration.from_pretrained(report.model).state_dict()


def run_train(start, cfg, out):
    with start(cfg, "train", out) as run:
        return train(cfg, run)


def test_a_stopped_training_goes_on_as_if_it_had_not(cfg, start, tmp_path, monkeypatch):
    whole = run_train(start, cfg, tmp_path / "whole")
    save = Loop.save

    def stop(self):
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_train(start, cfg, tmp_path / "cut")
    torch.rand(5)
    again = run_train(start, cfg, tmp_path / "cut")
    first, second = weights(whole), weights(again)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert "nats per token" in str(whole)


def test_attention_over_prefixes_trains_the_same_weights(cfg, start, tmp_path):
    cfg = replace(cfg, loop=replace(LOOP, steps=2))
    first, second = (weights(run_train(start, replace(cfg, prefixes=on), tmp_path / str(on))) for on in (False, True))
    for name, value in first.items():
        assert_close(second[name], value, atol=1e-5)


def test_the_trained_model_has_exact_likelihoods_of_codes(cfg, start, tmp_path):
    report = run_train(start, cfg, tmp_path / "run")
    asked = EvalConfig(model=report.model, data=cfg.data, nll=True)
    with start(asked, "eval", tmp_path / "eval") as run:
        (row,) = evaluate(asked, run).rows
    assert row.n == 6
    assert 3 < row.value < 5  # near log2 of 16


def test_training_begins_with_weights_that_are_given(cfg, start, tmp_path):
    options = {**TINY, "grid": (3, 3), "vocab_size": 16, "num_classes": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        raster, nar = LlamaGenForImageGeneration(**options), NARForImageGeneration(**options)
        torch.nn.init.normal_(raster.output.weight)
    torch.save({"model": raster.state_dict()}, tmp_path / "raster.pt")
    torch.save({"model": nar.state_dict()}, tmp_path / "nar.pt")
    still = replace(cfg, loop=replace(LOOP, steps=1, lr=1e-12, ema=0.0, weight_decay=0.0))
    warm = weights(run_train(start, replace(still, raster=tmp_path / "raster.pt"), tmp_path / "a"))
    assert torch.allclose(warm["medusa_output.weight"], raster.output.weight)
    assert torch.allclose(warm["layers.2.attention.wo.weight"], raster.state_dict()["layers.1.attention.wo.weight"])
    same = weights(run_train(start, replace(still, start=tmp_path / "nar.pt"), tmp_path / "b"))
    assert all(torch.allclose(value, same[name]) for name, value in nar.state_dict().items())
    with pytest.raises(CheckpointError, match="would stay random"):
        load_published(NARForImageGeneration(**options), tmp_path / "raster.pt")


def test_vectors_are_spared_from_weight_decay(cfg, start, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("hone_nar.finetune.Group", lambda **options: made.append(Group(**options)) or made[0])
    run_train(start, replace(cfg, loop=replace(LOOP, steps=1)), tmp_path)
    found = {(p.ndim > 1, part["weight_decay"]) for part in made[0].optimizer.param_groups for p in part["params"]}
    assert found == {(True, 0.05), (False, 0.0)}


def test_the_rate_falls_at_milestones_or_as_a_cosine(cfg):
    shares = [rate(done, cfg) for done in (0.0, 0.49, 0.5, 0.7, 0.9)]
    assert shares == pytest.approx([1, 1, 0.2, 0.04, 0.008])
    wave = replace(cfg, schedule="cosine", least=0.01)
    assert [rate(done, wave) for done in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.505, 0.01])


def test_a_share_of_the_conditions_is_dropped_and_views_are_drawn_evenly(cfg):
    codes = open_codes(cfg.data)
    part = Part(samples=tuple(range(2000)), share=1.0, last=True, seed=0)
    tokens, labels, drop = draw(replace(cfg, drop=0.3), codes, part)
    assert float(drop.float().mean()) == pytest.approx(0.3, abs=0.04)
    views = [codes.item(index)[0] for index in part.items(len(codes))]
    second = [torch.equal(row, each[1]) for row, each in zip(tokens, views, strict=True)]
    assert sum(second) / 2000 == pytest.approx(0.5, abs=0.05)
    assert labels == [codes.item(index)[1] for index in part.items(len(codes))]


def test_a_model_may_have_more_classes_than_the_codes(cfg):
    assert options_of(replace(cfg, classes=7), open_codes(cfg.data))[1]["num_classes"] == 7


def raster_file(path):
    options = {**TINY, "grid": (3, 3), "vocab_size": 16, "num_classes": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        raster = LlamaGenForImageGeneration(**options)
        torch.nn.init.normal_(raster.output.weight, std=0.02)
    torch.save({"model": raster.state_dict()}, path)
    return raster.state_dict()


def test_flashars_new_parts_learn_first(cfg, start, tmp_path):
    raster = raster_file(tmp_path / "raster.pt")
    loop = replace(LOOP, ema=0.0, weight_decay=0.0, lr=1e-2)
    whole = replace(
        cfg, model="tiny-flashar", raster=tmp_path / "raster.pt", loss="flashar", first_stage=0.5, loop=loop
    )
    first = replace(whole, first_stage=0.99)
    states = []
    for at, asked in enumerate((first, whole)):
        report = run_train(start, asked, tmp_path / str(at))
        states.append(FlashARForImageGeneration.from_pretrained(report.model).state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in raster.items())
    assert not torch.equal(states[0]["medusa_output.weight"], raster["output.weight"])
    assert states[0]["hv_gate_mlp.2.weight"].abs().sum() > 0
    moved = {name: float((states[1][name] - value).abs().max()) for name, value in raster.items()}
    # Two steps of AdamW at a fifth of the rate, and of the rate's fifth from half on.
    assert 1.2 < moved["output.weight"] / (1e-2 * 0.2 * 0.2) < 2 * 1.01


def test_a_stopped_post_training_goes_on_as_if_it_had_not(cfg, start, tmp_path, monkeypatch):
    raster_file(tmp_path / "raster.pt")
    cfg = replace(cfg, model="tiny-flashar", raster=tmp_path / "raster.pt", loss="flashar", first_stage=0.3)
    whole = run_train(start, cfg, tmp_path / "whole")
    save = Loop.save

    def stop(self):
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_train(start, cfg, tmp_path / "cut")
    again = run_train(start, cfg, tmp_path / "cut")
    first, second = (FlashARForImageGeneration.from_pretrained(each.model).state_dict() for each in (whole, again))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        write_class(path, number, torch.randint(16, (3, 1, 12), generator=generator))
    write_index(path, grid=(2, 2, 3), choices=16, classes=["a", "b"])
    return path


def test_a_model_of_clips_is_trained_and_measured(cfg, clips, start, tmp_path, monkeypatch):
    cfg = replace(cfg, data=clips, grid=(2, 2, 3), schedule="cosine", decayed="linear", loop=replace(LOOP, steps=2))
    made = []
    monkeypatch.setattr("hone_nar.finetune.Group", lambda **options: made.append(Group(**options)) or made[0])
    report = run_train(start, cfg, tmp_path / "run")
    model = NARForVideoGeneration.from_pretrained(report.model)
    assert model.grid == (2, 2, 3)
    spared = {id(p) for part in made[0].optimizer.param_groups if not part["weight_decay"] for p in part["params"]}
    names = {name for name, p in made[0].parameters.items() if id(p) in spared}
    assert {"abs_pe", "tok_embeddings.weight", "cls_embedding.embedding_table.weight"} < names
    assert not {name for name in names if "attention.w" in name or "output_" in name}
    asked = EvalConfig(model=report.model, data=clips, nll=True)
    with start(asked, "eval", tmp_path / "eval") as run:
        (row,) = evaluate(asked, run).rows
    assert row.n == 6
    with pytest.raises(ValueError, match="no raster model of clips"):
        find_trained(replace(cfg, raster=clips / "codes.json"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Codes with texts, and a T5 that reads them."""
    path = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "cat"]
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        path / "t5"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5EncoderModel(T5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(
            path / "t5"
        )
    write_texts(path, 0, torch.randint(16, (4, 1, 9), generator=generator), ["a cat", "A red cat", "red", 200 * "cat "])
    write_index(path, grid=(3, 3), choices=16, shards=1)
    return path


def test_a_model_of_texts_is_trained_and_measured(cfg, texts, start, tmp_path):
    name = str(texts / "t5")
    cfg = replace(cfg, data=texts, text_encoder=name, loop=replace(LOOP, steps=2))
    report = run_train(start, cfg, tmp_path / "run")
    model = NARForImageGeneration.from_pretrained(report.model)
    assert (model.num_classes, model.cls_token_num, model.config.caption_dim) == (None, 120, 24)
    # What stands for no text is the same in training and after.
    assert float(model.cls_embedding.uncond_embedding.std()) == pytest.approx(24**-0.5, rel=0.1)
    asked = EvalConfig(model=report.model, data=texts, nll=True, text_encoder=name)
    with start(asked, "eval", tmp_path / "eval") as run:
        (row,) = evaluate(asked, run).rows
    assert row.n == 4
    for wrong, message in (
        (replace(cfg, text_encoder=None), "name --text-encoder"),
        (replace(cfg, model="nar_xl_t2i"), "nar_xl_t2i reads texts of 2048 channels; .* gives 24"),
        (replace(cfg, model="nar_b"), "model must be of tiny, tiny-raster, tiny-flashar, nar_xl_t2i, llamagen_xl_t2i"),
    ):
        with pytest.raises(ValueError, match=message):
            find_trained(wrong)
    with pytest.raises(CheckpointError, match="is no T5 that can be read"):
        find_trained(replace(cfg, text_encoder=str(texts)))
    with pytest.raises(ValueError, match="--text-encoder belongs to codes of texts"):
        find_graded(replace(asked, text_encoder=None))


def test_codes_out_of_range_stop_before_a_weight_is_made(cfg, start, tmp_path, monkeypatch):
    path = tmp_path / "codes"
    path.mkdir()
    write_class(path, 0, torch.full((2, 1, 9), 16))
    write_class(path, 1, torch.zeros(1, 1, 9))
    write_index(path, grid=(3, 3), choices=16, classes=["a", "b"])
    monkeypatch.setattr("hone_nar.finetune.begin_with", lambda *args: pytest.fail("a model was made"))
    with pytest.raises(CheckpointError, match=r"00000.safetensors, image 0: codes must lie in 0 to 15; got 16"):
        run_train(start, replace(cfg, data=path), tmp_path / "run")


def test_what_does_not_fit_a_saved_model_is_named_before_work(cfg, clips, start, tmp_path):
    report = run_train(start, replace(cfg, loop=replace(LOOP, steps=1)), tmp_path / "run")
    asked = EvalConfig(model=report.model, data=cfg.data, nll=True)
    find_graded(asked)
    with pytest.raises(ValueError, match=r"codes are of a grid of \(2, 2, 3\), and the model draws \(3, 3\)"):
        find_graded(replace(asked, data=clips))
    path = tmp_path / "codes"
    path.mkdir()
    write_class(path, 0, torch.full((2, 1, 9), 16))
    write_index(path, grid=(3, 3), choices=17, classes=["a"])
    with pytest.raises(CheckpointError, match="codes must lie in 0 to 15; got 16"):
        find_graded(replace(asked, data=path))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grid": (4, 4)}, ValueError, "codes are of a grid of 3 x 3; got --grid 4 4"),
        ({"codebook": 32}, ValueError, "codebook of 16 entries; got --codebook 32"),
        ({"classes": 1}, ValueError, "codes are of 2 classes; got --classes 1"),
        ({"model": "nar_s"}, ValueError, "model must be of tiny, tiny-raster, tiny-flashar, nar_b"),
        ({"model": "nar_video_l"}, ValueError, "as the codes are; got 'nar_video_l'"),
        ({"model": "llamagen_b", "loss": "separate"}, ValueError, "a raster model has one head"),
        ({"model": "flashar_b"}, ValueError, "FlashAR is trained after a raster model"),
        ({"loss": "flashar"}, ValueError, "--loss flashar is FlashAR's"),
        ({"text_encoder": "x"}, ValueError, "leave --text-encoder out"),
    ],
)
def test_what_does_not_fit_is_named_before_work(cfg, options, error, message):
    with pytest.raises(error, match=message):
        find_trained(replace(cfg, **options))


def test_missing_files_are_named_before_work(cfg, tmp_path):
    with pytest.raises(CheckpointError, match="there are no weights at"):
        find_trained(replace(cfg, raster=tmp_path / "none.pt"))
    with pytest.raises(CheckpointError, match="there is no folder of codes"):
        find_trained(replace(cfg, data=tmp_path / "none"))
    with pytest.raises(CheckpointError, match="holds no codes"):
        find_trained(replace(cfg, data=tmp_path))
