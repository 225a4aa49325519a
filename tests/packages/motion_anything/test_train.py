import json
from dataclasses import replace

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_motion_anything.config import TrainHostConfig
from hone_motion_anything.data import fake_batch
from hone_motion_anything.host import Host, load_host
from hone_motion_anything.train import Making, contrast, train_host, transformer_loss


@pytest.fixture(scope="module")
def config(small):
    return TrainHostConfig(
        host=small, steps=8, batch=4, clips=8, eval_clips=4, log_every=1, tokenizer_share=0.4, evaluator_share=0.2
    )


def test_a_host_is_trained_graded_and_loads(config, tmp_path):
    run = Run.start(
        config=config, package="hone-motion-anything", verb="train-host", out=tmp_path / "run", seed=0, device="cpu",
        quiet=True, command="hone-motion-anything train-host",
    )  # fmt: skip
    with run:
        report = train_host(config, run)
    assert report.steps == 8
    assert not report.passed
    assert {"reconstructed", "events", "dance_events", "mask_recall", "frechet"} <= set(report.result)
    assert load_host(path=report.checkpoint).config == config.host
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [0, 0, 0, 0, 1, 2, 2, 2]


def test_a_stopped_training_goes_on_as_if_it_had_not(config, tmp_path):
    whole = Making(config, torch.device("cpu"), tmp_path / "whole.pt")
    for _ in whole.train():
        pass
    cut = Making(config, torch.device("cpu"), tmp_path / "cut.pt")
    for at, _ in enumerate(cut.train()):
        if at == 6:
            break
    cut.training.save()
    again = Making(config, torch.device("cpu"), tmp_path / "cut.pt")
    assert again.training.resume()
    for _ in again.train():
        pass
    for name, module in whole.result().modules.items():
        for first, second in zip(
            module.state_dict().values(), again.result().modules[name].state_dict().values(), strict=True
        ):
            assert torch.equal(first, second), name
    other = Making(replace(config, steps=9), torch.device("cpu"), tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match=r"differs in .*steps"):
        other.training.resume()


def test_contrast_is_least_where_pairs_meet():
    text = torch.tensor([[0.0, 0], [9, 0], [0, 0]])
    same = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    # Rows that say the same share their target: half each, log 2 by row.
    assert contrast(text, text.clone(), same).item() == pytest.approx(2 / 3 * torch.tensor(2.0).log().item(), abs=1e-6)
    assert contrast(text, text.roll(1, 0), same) > 10


def test_dropped_texts_are_not_seen_by_the_loss(small):
    host = Host.untrained(small, seed=1)
    host.transformer.eval()
    clips = fake_batch(4)
    other = replace(clips, words=clips.words.roll(1, 0))
    tokens, at = host.tokenizer.encode(clips.features), torch.arange(4)

    def loss(clips, drop):
        return transformer_loss(host, clips, tokens, at, torch.Generator().manual_seed(0), drop=drop, corrupt=0.0)[0]

    assert torch.equal(loss(clips, 1.0), loss(other, 1.0))
    assert not torch.equal(loss(clips, 0.0), loss(other, 0.0))
