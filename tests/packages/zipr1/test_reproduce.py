import pytest
import torch
from hone_core.claims import verdict_over_seeds
from hone_zipr1 import reproduce as module
from hone_zipr1.config import ReproduceConfig
from hone_zipr1.host import load_host
from hone_zipr1.inputs import find_hosts
from hone_zipr1.plots import line_of
from hone_zipr1.reproduce import ARMS, RULES, judge, matching_p, reproduce, trainings


def result(right, ratio, items=1000):
    wrong = torch.arange(items) >= right * items
    return {"right": ~wrong, "ratio": torch.full((items,), ratio)}


def arm(tau, right=0.8, dense=0.8):
    return {"dense": result(dense, 1.0), "p 0.975": result(right, tau)}


@pytest.mark.parametrize(
    ("taus", "right", "expected"),
    [
        ((0.8, 0.5, 0.7, 0.7), 0.795, "yes"),
        ((0.8, 0.5, 0.7, 0.7), 0.78, "undecided"),  # 2 points lost
        ((0.8, 0.6, 0.75, 0.75), 0.8, "undecided"),  # falls by 20
        ((0.8, 0.5, 0.58, 0.7), 0.8, "undecided"),  # correctness alone 8 points above
        ((0.8, 0.76, 0.8, 0.8), 0.8, "no"),  # falls by 4
        ((0.8, 0.5, 0.51, 0.7), 0.8, "no"),  # correctness alone gets there
        ((0.8, 0.5, 0.7, 0.3), 0.8, "no"),  # sft gets there
    ],
)
def test_the_rule_of_the_claim(taus, right, expected):
    names = ("pretrained", "paper", "correctness", "sft")
    found = {name: arm(tau, right if name == "paper" else 0.8) for name, tau in zip(names, taus, strict=True)}
    assert judge("paper", found)[0] == expected


@pytest.mark.parametrize(("first", "second", "expected"), [(0.8, 0.7, "yes"), (0.7, 0.8, "no"), (0.7, 0.7, "no")])
def test_equal_ratio_compares_the_same_questions(first, second, expected):
    found = {"paper": {"p 0.8": result(first, 0.3), "pretrained as p 0.8": result(second, 0.3)}}
    assert judge("equal ratio", found)[0] == expected


def test_over_seeds():
    assert verdict_over_seeds(["yes"] * 3).startswith("CONFIRMED")
    assert verdict_over_seeds(["no"] * 3).startswith("REFUTED")
    assert verdict_over_seeds(["yes", "no", "yes"]).startswith("MIXED")
    assert verdict_over_seeds(["yes", "undecided", "yes"]).startswith("UNDECIDED")
    assert verdict_over_seeds(["yes"] * 2).startswith("UNDECIDED, 2 of 3")


def test_arms_differ_in_one_thing_each():
    arms = trainings(ReproduceConfig())
    assert set(ARMS) == {"untrained", "pretrained", *arms}
    paper = arms["paper"]
    assert (paper.performance, paper.efficiency, paper.gated, paper.beta) == (1.0, 1.0, True, 0.04)
    assert paper.ps == (0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975)
    assert (arms["correctness"].efficiency, arms["efficiency"].performance) == (0.0, 0.0)
    assert arms["entropy"].ps == arms["dense"].ps == (1.0,)


def test_a_matching_threshold_keeps_as_much(stored):
    from hone_zipr1.grading import ask, held_out

    host = load_host(path=stored)
    asked = held_out(host, 40, 0)
    config = module.SELECTION
    tau = ask(host, asked, module.replace(config, p=0.8), batch=16).tau
    p = matching_p(host, asked, tau, batch=16, tolerance=0.01)
    assert ask(host, asked, module.replace(config, p=p), batch=16).tau == pytest.approx(tau, abs=0.011)


@pytest.fixture
def cfg(stored, tmp_path):
    folder = tmp_path / "seed"
    (folder / "artifacts").mkdir(parents=True)
    for suffix in (".safetensors", ".json"):
        target = folder / "artifacts" / f"host{suffix}"
        target.write_bytes(stored.with_suffix(suffix).read_bytes())
    return ReproduceConfig(hosts=(folder / "artifacts" / "host.safetensors",), steps=2, prompts=2, items=20, batch=10)


def test_every_arm_is_run_and_a_stopped_run_goes_on(cfg, start, monkeypatch):
    cfg, trained = find_hosts(cfg), []
    work = module.work

    def halting(cfg, folder, job, device):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append(job)
        work(cfg, folder, job, device)

    monkeypatch.setattr(module, "work", halting)
    with pytest.raises(KeyboardInterrupt), start(cfg) as run:
        reproduce(cfg, run)
    monkeypatch.setattr(
        module, "work", lambda cfg, out, job, device: (trained.append(job), work(cfg, out, job, device))
    )
    with start(cfg) as run:
        report = reproduce(cfg, run)
    assert len(trained) == len(set(trained)) == len(ARMS)
    means = {(row.variant, row.split): row for row in run.rows if row.metric == "accuracy"}
    assert {arm for arm, _ in means} == set(ARMS)
    own = {(row.variant, row.split): row for row in run.rows if row.metric == "host_accuracy"}
    assert own.keys() == means.keys()
    for key, row in own.items():  # of one host
        assert (row.value, row.n, row.labels) == (means[key].value, 20, {"seed": 0})
    assert {row.variant for row in run.rows if row.metric == "host_token_ratio"} == set(ARMS)
    assert report.verdict["claims"].keys() == RULES.keys()
    assert report.verdict["claims"]["paper"]["verdict"].startswith("UNDECIDED, 1 of 3")
    assert (run.figures / "arms.png").is_file()
    assert not list(run.artifacts.glob("*.checkpoint"))
    for name in ARMS:
        assert name in str(report)


@pytest.mark.slow
def test_workers_find_what_one_process_does(cfg, start):
    from dataclasses import replace

    cfg = replace(find_hosts(cfg), arms=("paper", "sft"))
    rows = []
    for workers in (1, 2):
        with start(replace(cfg, workers=workers), f"run{workers}") as run:
            reproduce(replace(cfg, workers=workers), run)
        rows.append({(row.metric, row.variant, row.split): row.value for row in run.rows})
    assert rows[0] == rows[1]


def test_hosts_are_looked_at_first(cfg, tmp_path):
    from dataclasses import replace

    from hone_core.errors import CheckpointError

    with pytest.raises(CheckpointError, match="train-host"):
        find_hosts(replace(cfg, hosts=(tmp_path / "none",)))
    with pytest.raises(ValueError, match="same seed"):
        find_hosts(replace(cfg, hosts=cfg.hosts * 2))
    with pytest.raises(ValueError, match="arms are untrained"):
        find_hosts(replace(cfg, arms=("none",)))


def test_each_arm_of_the_chart_has_a_line_of_its_own():
    lines = [line_of(at) for at in range(len(ARMS))]
    assert len({line["marker"] for line in lines}) == len(lines)
    assert len({(line["color"], line["linestyle"]) for line in lines}) == len(lines)
