"""The host's own fast path is the model's, number for number; mosaics and their questions."""

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.testing import assert_close
from hone_zipr1 import data
from hone_zipr1.config import HostConfig, SparseConfig
from hone_zipr1.host import ANSWER_TOKENS, build_host, load_host
from hone_zipr1.models import attach
from hone_zipr1.rollouts import answer_logps, rollout

TRAINING = SparseConfig(p=0.6, rows="all", compute="mask", cache="retrieve")


@pytest.fixture
def batch(small_host):
    return data.mosaics(12, small_host.config.cells, 0)


def test_embedded_inputs_are_those_of_the_processor():
    host = build_host(HostConfig(layers=1), seed=1)
    asked = data.mosaics(5, 4, 3, split="test")
    inputs = host.inputs(asked)
    assert torch.equal(inputs["input_ids"], host.prompt_ids(asked))
    assert torch.equal(inputs["pixel_values"].view(5, -1, 24), host.pixel_values(asked))
    with torch.no_grad():
        assert_close(host.model(**host.embedded(asked)).logits, host.model(**inputs).logits, atol=5e-6, rtol=0)
    visual = inputs["input_ids"] == host.model.config.image_token_id
    assert torch.equal(host.protected(5), ~visual)


@pytest.mark.parametrize("config", [None, TRAINING, SparseConfig(p=0.6, rows="all")])
def test_rollouts_are_those_of_generate(small_host, batch, config):
    ids, found = None, None
    settings = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
    if config is None:
        ids = small_host.model.generate(**small_host.inputs(batch), **settings)
        found = rollout(small_host, batch)
        assert found.ratio.tolist() == [1.0] * 12
    else:
        with attach(small_host.model, config) as handle:
            ids = small_host.model.generate(**small_host.inputs(batch), **settings)
            ratio = handle.stats.ratio
            found = rollout(small_host, batch, handle)
            assert torch.equal(found.ratio, ratio)
            assert ratio.max() < 1
    new = ids[:, small_host.prompt_ids(batch).shape[1] :]
    assert torch.equal(new[found.mask[:, : new.shape[1]]], found.ids[found.mask])
    assert len(new.unique()) > 3


@pytest.mark.parametrize("config", [TRAINING, SparseConfig(p=0.6, rows="all"), SparseConfig(p=0.6, recent=4, random=4)])
def test_importance_ratios_are_one_before_an_update(small_host, batch, config):
    p = torch.linspace(0.4, 0.95, 12)
    with attach(small_host.model, config) as handle:
        drawn = rollout(small_host, batch, handle, p=p, temperature=1.3, generator=torch.Generator().manual_seed(0))
        assert len(drawn.ratio.unique()) > 4
        logps = answer_logps(small_host, batch, drawn.ids, handle, p=p, temperature=1.3).detach()
    logps = logps.gather(2, drawn.ids[..., None])[..., 0]
    rho = (logps - drawn.logps).exp()[drawn.mask]
    assert float((rho - 1).abs().max()) < 1e-5
    # And they would not be if the update ran dense.
    dense = answer_logps(small_host, batch, drawn.ids).detach().gather(2, drawn.ids[..., None])[..., 0]
    assert float(((dense - drawn.logps).exp()[drawn.mask] - 1).abs().max()) > 1e-2


def test_answers_and_their_grade(small_host):
    asked = data.mosaics(40, 2, 1)
    gold, counts = small_host.answer_ids(asked)
    texts = small_host.read(gold)
    for text, kind, answer in zip(texts, asked.kind.tolist(), asked.answer.tolist(), strict=True):
        assert text == (f"{answer:02d}" if kind else str(answer))
    assert small_host.grade(asked, gold).all()
    assert set(counts.sum(1).tolist()) == {2, 3}
    for at in range(ANSWER_TOKENS):
        other = gold.clone()
        other[:, at] += 1
        assert torch.equal(small_host.grade(asked, other), ~counts[:, at])


def test_mosaics_show_what_their_labels_say():
    asked = data.mosaics(30, 3, 5, split="test")
    pictures, shown = data.digits()
    for row in range(30):
        for cell in range(9):
            y, x = 8 * (cell // 3), 8 * (cell % 3)
            tile = asked.image_01[row, y : y + 8, x : x + 8]
            at = (pictures == tile).flatten(1).all(1).nonzero()[:, 0].tolist()
            assert min(at) >= data.TRAINED
            assert int(asked.labels[row, cell]) in shown[at].tolist()
        first, second = asked.asked[row].tolist()
        labels = asked.labels[row].tolist()
        assert int(asked.answer[row]) == (labels[first] + labels[second] if asked.kind[row] else labels[first])
        assert (first == second) == (int(asked.kind[row]) == 0)
    assert torch.equal(data.mosaics(30, 3, 5, split="test").image_01, asked.image_01)
    assert not torch.equal(data.mosaics(30, 3, 6, split="test").image_01, asked.image_01)


def test_questions_read_back():
    asked = data.mosaics(10, 4, 2)
    for text, kind, cells in zip(data.questions(asked), asked.kind.tolist(), asked.asked.tolist(), strict=True):
        short = text.rsplit(" ", 1)[0] if kind == 0 else text
        assert data.parse_question(short, 4) == (kind, tuple(cells))
    again = asked.asking(1, (0, 5))
    assert torch.equal(again.answer, asked.labels[:, 0] + asked.labels[:, 5])


@pytest.mark.parametrize("text", ["digit", "digit E1", "sum A1", "sum A1 A1", "digit A1 A2", "how many?"])
def test_other_questions_are_refused(text):
    with pytest.raises(ValueError, match=r'"digit B3" and "sum A1 C2"'):
        data.parse_question(text, 4)


def test_stored_host_comes_back(small_host, stored, batch):
    again = load_host(path=stored)
    assert again.config == small_host.config
    # Weights are stored in 16 bits.
    with torch.no_grad():
        first, second = (h.model(**h.embedded(batch)).logits for h in (small_host, again))
    assert_close(second, first, atol=0.1, rtol=0.05)


def test_a_missing_host(tmp_path):
    with pytest.raises(CheckpointError, match="train-host"):
        load_host(path=tmp_path / "host.safetensors")
