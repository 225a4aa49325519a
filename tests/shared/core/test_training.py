import dataclasses
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.hosts import HostFacts, open_host, save_host
from hone_core.runs import Run
from hone_core.training import (
    LogFile,
    SharedTraining,
    Training,
    TrainReport,
    average_into,
    check_budget,
    finish_host,
    matrix_optimizers,
    rate_at,
    stage_at,
)
from torch import nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0
    minutes: float = 1.0
    steps: int | None = 6
    log_every: int = 2
    checkpoint_seconds: float = 1000.0
    lr: float = 0.1
    sizes: tuple[int, ...] = (1, 2)


class Phase:
    """Numbers of a schedule that a resumed run needs."""

    def __init__(self):
        self.since = None

    def state_dict(self):
        return {"since": self.since}

    def load_state_dict(self, state):
        self.since = state["since"]


class Loop:
    """A regression on drawn numbers; noise in the data makes each step depend on the generator's state."""

    def __init__(self, cfg, path):
        self.generator = torch.Generator().manual_seed(cfg.seed)
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), cfg.lr)
        self.phase = Phase()
        parts = {"model": self.model, "optimizer": self.optimizer, "generator": self.generator, "phase": self.phase}
        self.training = Training(cfg, path, parts)

    def steps(self, *, broken_at=None):
        training = self.training
        training.start()
        while training.spent() < 1:
            x = torch.randn(4, 3, generator=self.generator)
            loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
            if training.step + 1 == broken_at:
                loss = loss * float("nan")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            training.step += 1
            if training.step == 3:
                self.phase.since = 3
            yield {"loss": loss.item(), "rate": 1.0} if training.due() else None


def start(path, cfg):
    return Run.start(
        package="hone-core", verb="train", config=cfg, out=path, seed=cfg.seed, quiet=True, command="hone-core train"
    )


def run_steps(loop, stop):
    for _ in loop.steps():
        if loop.training.step == stop:
            break
    loop.training.save()


def test_going_on_equals_going_through(tmp_path):
    cfg = Config()
    whole = Loop(cfg, tmp_path / "whole.pt")
    assert not whole.training.resume()
    run_steps(whole, 6)
    run_steps(Loop(cfg, tmp_path / "parts.pt"), 3)
    part = Loop(cfg, tmp_path / "parts.pt")
    assert part.training.resume()
    assert (part.training.step, part.phase.since) == (3, 3)
    assert part.training.elapsed() > 0
    run_steps(part, 6)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name])
    a, b = (loop.optimizer.state_dict()["state"][0] for loop in (whole, part))
    assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    assert torch.equal(whole.generator.get_state(), part.generator.get_state())


def test_follow_logs_saves_and_stops_the_clock(tmp_path):
    cfg = Config()
    loop = Loop(cfg, tmp_path / "state.pt")
    with start(tmp_path / "run", cfg) as run:
        loop.training.follow(loop.steps(), run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert set(lines[0]) == {"step", "loss", "rate"}
    assert loop.training.elapsed() == loop.training.elapsed() > 0
    again = Loop(cfg, tmp_path / "state.pt")
    assert again.training.resume()
    assert again.training.spent() == 1
    assert not list(again.steps())


def test_a_log_that_is_no_run_is_lines_of_a_file(tmp_path):
    for step in (1, 2):
        LogFile(tmp_path / "log.jsonl").log(step=step, loss=0.5 / step)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_checkpoints_are_written_on_the_way(tmp_path):
    cfg = Config(checkpoint_seconds=0.0)
    loop = Loop(cfg, tmp_path / "state.pt")

    def stopped():
        for values in loop.steps():
            yield values
            if loop.training.step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), start(tmp_path / "run", cfg) as run:
        loop.training.follow(stopped(), run)
    again = Loop(cfg, tmp_path / "state.pt")
    again.training.resume()
    assert again.training.step == 4


@pytest.mark.parametrize("kind", ["run", "file"])
def test_a_resumed_training_logs_and_counts_no_step_twice(tmp_path, kind, monkeypatch):
    cfg, path = Config(log_every=1), tmp_path / "run" / "metrics.jsonl"
    loop = Loop(cfg, tmp_path / "state.pt")

    def killed():
        for values in loop.steps():
            yield values
            if loop.training.step == 2:
                loop.training.save()
            if loop.training.step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), start(tmp_path / "run", cfg) as run:
        loop.training.follow(killed(), run if kind == "run" else LogFile(path))
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    again = Loop(cfg, tmp_path / "state.pt")
    again.training.resume()
    counted = []
    bar = SimpleNamespace(update=lambda n=1: counted.append(n), show=lambda **values: None)
    monkeypatch.setattr("hone_core.training.progress_bar", lambda *_, **__: nullcontext(bar))
    with start(tmp_path / "run", cfg) as run:
        again.training.follow(again.steps(), run if kind == "run" else LogFile(path))
    assert counted == [2, 1, 1, 1, 1]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(tmp_path):
    cfg = Config(checkpoint_seconds=0.0, log_every=1)
    loop = Loop(cfg, tmp_path / "state.pt")
    with pytest.raises(RuntimeError, match="the loss became nan at step 5"), start(tmp_path / "run", cfg) as run:
        loop.training.follow(loop.steps(broken_at=5), run)
    again = Loop(cfg, tmp_path / "state.pt")
    again.training.resume()
    assert again.training.step == 4
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == "nan"


def test_a_step_between_logged_ones_that_breaks_weights_spoils_no_checkpoint(tmp_path):
    cfg = Config(checkpoint_seconds=0.0, log_every=100)
    loop = Loop(cfg, tmp_path / "state.pt")
    with pytest.raises(
        RuntimeError, match=r"model\.weight holds NaN or infinity after step 5, .*lower the learning rate"
    ):
        loop.training.follow(loop.steps(broken_at=5), LogFile(tmp_path / "log.jsonl"))
    again = Loop(cfg, tmp_path / "state.pt")
    again.training.resume()
    assert again.training.step == 4
    last = Loop(Config(log_every=100), tmp_path / "none.pt")
    with pytest.raises(RuntimeError, match="after step 6"):
        last.training.follow(last.steps(broken_at=6), LogFile(tmp_path / "log.jsonl"))
    assert not (tmp_path / "none.pt").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    run_steps(Loop(Config(), path), 2)
    with pytest.raises(CheckpointError, match=r"another configuration: it differs in lr, steps\. Pass another --out"):
        Loop(Config(lr=0.5, steps=8), path).training.resume()
    loop = Loop(Config(), path)
    del loop.training.parts["phase"]
    with pytest.raises(CheckpointError, match=r"expected model, optimizer, generator\. It is of another version"):
        loop.training.resume()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is no checkpoint of a training run"):
        Loop(Config(), path).training.resume()


@pytest.mark.parametrize("main", [True, False])
def test_processes_stop_together_and_the_first_says_when_to_save(tmp_path, main):
    """The other process has spent its whole budget, and the first one's clock is due for a checkpoint or is not."""

    def reduce(clocks, how):
        assert how == "mean"
        return (clocks + torch.tensor([1.0, 0.0 if main else due])) / 2

    accelerator = SimpleNamespace(num_processes=2, is_main_process=main, device=torch.device("cpu"), reduce=reduce)
    for due in (0.0, 1.0):
        path = tmp_path / f"{due}.pt"
        asked = []
        part = SimpleNamespace(state_dict=lambda asked=asked: asked.append(1) or {})
        # By a process of its own, none or each step would be saved.
        seconds = 0.0 if due == main else 1000.0
        training = SharedTraining(Config(steps=4, checkpoint_seconds=seconds), path, {"part": part}, accelerator)

        def loop(training=training):
            training.start()
            for _ in range(3):
                training.step += 1
                assert training.spent() == (training.step / 4 + 1) / 2
                yield None

        training.follow(loop(), LogFile(tmp_path / "log.jsonl"))
        assert len(asked) == (4 if due else 1)
        assert path.is_file() == main


def test_budgets(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("hone_core.training.time.perf_counter", lambda: now[0])
    training = Training(Config(steps=None, minutes=2.0), tmp_path / "x.pt", {})
    now[0] += 50
    assert (training.elapsed(), training.spent()) == (0, 0)
    training.start()
    now[0] += 30
    assert (training.elapsed(), training.spent()) == (30, 0.25)
    now[0] += 1000
    assert training.spent() == 1
    training.stop()
    now[0] += 1000
    assert training.elapsed() == 1030
    counted = Training(Config(steps=8), tmp_path / "x.pt", {})
    counted.step = 2
    assert counted.spent() == 0.25
    assert counted.due()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"steps": None, "minutes": 0}, "minutes must be positive when steps is not given; got 0"),
        ({"steps": None, "minutes": math.nan}, "minutes must be positive when steps is not given; got nan"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"log_every": 0}, "log_every must be at least 1; got 0"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds must be at least 0; got -1.0"),
        ({"lr": 0.0}, "lr must be positive; got 0.0"),
        ({"lr": math.nan}, "lr must be positive; got nan"),
    ],
)
def test_a_budget_has_a_step_and_logs(bad, message):
    check_budget(Config(minutes=0, checkpoint_seconds=0), "lr")
    check_budget(Config(steps=None, minutes=0.1), "lr")
    with pytest.raises(ValueError, match=message):
        check_budget(Config(**bad), "lr")


@pytest.mark.parametrize("passed", [True, False])
def test_a_finished_host_reports_the_same_again(tmp_path, caplog, passed):
    cfg = Config()
    loop = Loop(cfg, tmp_path / "state.pt")
    gates = {"accuracy": 0.5 if passed else 0.9, "error": 0.1}
    with start(tmp_path / "run", cfg) as run:
        loop.training.follow(loop.steps(), run)
        exported = save_host(run.artifacts / "host.safetensors", cfg, {"": loop.model}, package="hone-core")
        run.row("accuracy", 0.81234, better="higher")
        result = {"accuracy": 0.81234, "error": 0.1}
        report = finish_host(run, loop.training, result, gates=gates, details={"clips": 3})
    assert ("were missed" in caplog.text) is not passed
    assert (report.checkpoint, report.steps, report.passed) == (exported, 6, passed)
    assert report.result == {"accuracy": 0.8123, "error": 0.1}
    assert f"accuracy 0.8123, error 0.1; {'every gate is passed' if passed else 'a gate is missed'}" in str(report)
    with start(tmp_path / "run", cfg) as run:
        assert run.done
        again = TrainReport.of(run)
    assert again == report
    facts = open_host(Config, "hone-core", exported).facts
    assert isinstance(facts, HostFacts)
    assert (facts.command, facts.gates, facts.details) == ("hone-core train", gates, {"clips": 3})
    assert facts.train_config == dataclasses.asdict(cfg) | {"sizes": [1, 2]}
    assert facts.environment["torch"] == torch.__version__


def test_a_host_without_facts_has_no_report(tmp_path):
    with start(tmp_path / "run", Config()) as run:
        save_host(run.artifacts / "host.safetensors", Config(), {}, package="hone-core")
        with pytest.raises(CheckpointError, match=r"does not say how the host was made: .*missing command"):
            TrainReport.of(run)


def test_matrices_of_layers_are_apart():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 3)]), "head": nn.Linear(3, 2)})
    muon, adamw = matrix_optimizers(model, "layers.", lr=0.5, adamw_lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model["layers"][0].weight)]
    rest = (model["layers"][0].bias, model["head"].weight, model["head"].bias)
    assert {id(p) for p in adamw.param_groups[0]["params"]} == {id(p) for p in rest}
    assert [muon.param_groups[0][key] for key in ("lr", "weight_decay", "adjust_lr_fn")] == [
        0.5,
        0.2,
        "match_rms_adamw",
    ]
    assert [adamw.param_groups[0][key] for key in ("lr", "weight_decay", "betas")] == [0.1, 0.0, (0.8, 0.9)]


def test_a_rate_rises_and_falls_by_a_cosine():
    assert rate_at(0.0) == pytest.approx(0.01)
    assert rate_at(0.015) == pytest.approx(0.51 * (0.02 + 0.49 * (1 + math.cos(math.pi * 0.015))))
    assert rate_at(0.5) == pytest.approx(0.51)
    assert rate_at(1.0) == pytest.approx(0.02)
    assert rate_at(0.1, rise=0.2, first=0.1, least=0.5) == pytest.approx(
        0.6 * (0.5 + 0.25 * (1 + math.cos(math.pi / 10)))
    )


def test_stages_share_a_budget():
    shares = {"a": 0.25, "b": 0.5}
    found = [stage_at(shares, "c", spent) for spent in (0.0, 0.125, 0.25, 0.5, 0.75, 0.875)]
    assert found == [("a", 0.0), ("a", 0.5), ("b", 0.0), ("b", 0.5), ("c", 0.0), ("c", 0.5)]


def test_an_average_follows_by_a_share():
    model, average = nn.Linear(1, 1), nn.Linear(1, 1)
    with torch.no_grad():
        for part, value in ((model, 2.0), (average, 1.0)):
            part.weight.fill_(value)
            part.bias.fill_(-value)
    average_into(average, model, 0.75)
    assert (average.weight.item(), average.bias.item()) == (1.25, -1.25)
    assert model.weight.item() == 2.0
