import json
from dataclasses import replace

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_nar.config import DemoConfig, HostConfig, TrainHostConfig
from hone_nar.data import digits
from hone_nar.demo import demo
from hone_nar.flashar import post_train_start
from hone_nar.host import Host, digit_model, load_host, save_host
from hone_nar.train import Learner, Making, seeded_step, take_step, train_host

CONFIG = TrainHostConfig(
    host=HostConfig(dim=16, layers=1, heads=2), steps=8, batch=4, eval_images=20, log_every=1, dropout=0.2
)


def test_a_host_is_trained_graded_and_loads(start, tmp_path):
    with start(CONFIG, "train-host", tmp_path / "run") as run:
        report = train_host(CONFIG, run)
    assert report.steps == 8
    assert not report.passed
    names = {f"{model}_{grade}" for model in ("nar", "raster") for grade in ("bits", "accuracy", "distance")}
    assert set(report.result) == names
    assert load_host(path=report.checkpoint).config == CONFIG.host
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # In turns, so that both have as many updates.
    assert [line["raster"] for line in lines] == 4 * [0, 1]


def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path):
    whole = Making(CONFIG, torch.device("cpu"), tmp_path / "whole.pt")
    for _ in whole.train():
        pass
    cut = Making(CONFIG, torch.device("cpu"), tmp_path / "cut.pt")
    for at, _ in enumerate(cut.train()):
        if at == 4:
            break
    cut.training.save()
    torch.rand(7)  # other draws in between
    again = Making(CONFIG, torch.device("cpu"), tmp_path / "cut.pt")
    assert again.training.resume()
    for _ in again.train():
        pass
    for name, module in whole.result().modules.items():
        other = again.result().modules[name]
        for first, second in zip(module.parameters(), other.parameters(), strict=True):
            assert torch.equal(first, second)
    later = Making(TrainHostConfig(host=CONFIG.host, steps=10), torch.device("cpu"), tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match=r"differs in .*steps"):
        later.training.resume()


@pytest.mark.parametrize("loss", ["mixture", "separate"])
def test_a_few_steps_learn(loss):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = digit_model("nar", CONFIG.host)
    learner, train = Learner(model, lr=1e-2, ema=0.5, loss=loss), digits("train")
    losses = [float(take_step(learner, train, 32, step / 40, 0, step)) for step in range(40)]
    assert losses[0] == pytest.approx(2.83, abs=0.02)  # log 17: heads of zeros
    assert sum(losses[-5:]) / 5 < 2.2


def test_a_step_leaves_the_global_generator_alone():
    learner = Learner(digit_model("raster", CONFIG.host, dropout=0.5), lr=1e-3, ema=0.9)
    state = torch.random.get_rng_state()
    take_step(learner, digits("train"), 4, 0.5, 0, 0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_steps_numbers_are_the_same_in_every_python():
    def first(*numbers):
        with torch.random.fork_rng(devices=[]):
            return int(torch.randint(1000, (), generator=seeded_step(torch.device("cpu"), *numbers)))

    assert [first(0, 1, 5), first(-1, 0, 0), first(-2, 0, 0)] == [66, 979, 32]


def test_the_average_follows_slowly():
    learner = Learner(digit_model("nar", CONFIG.host), lr=1e-2, ema=0.75)
    for number, decay in ((0, 0.1), (1000, 0.75)):
        before = [p.clone() for p in learner.average.parameters()]
        take_step(learner, digits("train"), 4, 0.5, 0, number)
        for old, new, now in zip(before, learner.average.parameters(), learner.model.parameters(), strict=True):
            torch.testing.assert_close(new, decay * old + (1 - decay) * now)


def test_a_host_of_clips_is_trained(start, tmp_path):
    cfg = replace(CONFIG, data="shapes", steps=2)
    with start(cfg, "train-host", tmp_path / "run") as run:
        report = train_host(cfg, run)
    host = load_host(path=report.checkpoint)
    assert (host.config.data, host.nar.grid, host.raster.grid) == ("shapes", (4, 8, 8), (32, 8))
    assert len(host.nar.layers) == len(host.raster.layers)


@pytest.mark.slow
def test_a_host_of_clips_is_shown(start, tmp_path):
    path = save_host(Host.untrained(replace(CONFIG.host, data="shapes")), tmp_path / "host.safetensors")
    asked = DemoConfig(host=path, limit=2)
    with start(asked, "demo", tmp_path / "demo") as run:
        found = demo(asked, run)
    passes = {row.variant: row.value for row in found.rows if row.metric == "passes"}
    assert passes == {"nar": 18, "raster": 256, "right-only": 18, "below-only": 18, "back-only": 18}


def test_flashars_backbone_waits_and_learns_slowly():
    model = post_train_start(digit_model("raster", CONFIG.host))
    learner, train = Learner(model, lr=1e-2, ema=0.5, loss="flashar"), digits("train")
    before = {name: value.clone() for name, value in model.named_parameters()}
    take_step(learner, train, 4, 0.1, 0, 0)
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    # A gate's first layer has no gradient while the last is zero, and of a head of zeros the branch has none.
    assert {name for name in before if name not in model.new_names()} <= still
    assert "medusa_output.weight" not in still
    rates = {group["late"]: group["lr"] for group in learner.optimizer.param_groups}
    assert rates[True] == 0
    take_step(learner, train, 4, 0.3, 0, 1)
    rates = {group["late"]: group["lr"] for group in learner.optimizer.param_groups}
    assert rates[True] == pytest.approx(0.2 * rates[False])
    assert not torch.equal(model.output.weight, before["output.weight"])
