import pytest
import torch
from hone_core.claims import ClaimsReport
from hone_pmloss import reproduce as module
from hone_pmloss.config import ReproduceConfig
from hone_pmloss.data import graded_rooms
from hone_pmloss.grading import METRICS, grade
from hone_pmloss.host import load_host
from hone_pmloss.inputs import find_hosts
from hone_pmloss.reproduce import RULES, UNITS, reproduce


def test_hosts_of_the_wrong_kind_are_refused(stored):
    with pytest.raises(ValueError, match="misses its gates"):
        find_hosts(ReproduceConfig(hosts=(stored(passed=False),)))
    with pytest.raises(ValueError, match="has bounded offsets; expected unconstrained ones"):
        find_hosts(ReproduceConfig(hosts=(stored("a"),), free=(stored("b"),)))
    with pytest.raises(ValueError, match="a file for each of hosts"):
        ReproduceConfig(hosts=(stored("a"), stored("b")), free=(stored("c"),))
    with pytest.raises(ValueError, match=r"expected hosts of different seeds; got \[0, 0\]"):
        find_hosts(ReproduceConfig(hosts=(stored("a"), stored("b"))))
    with pytest.raises(ValueError, match="is of seed 1; expected 0, that of"):
        find_hosts(ReproduceConfig(hosts=(stored("a"),), free=(stored("b", offset="unconstrained", seed=1),)))
    with pytest.raises(ValueError, match="were trained with another steps: see --sweep"):
        find_hosts(ReproduceConfig(hosts=(stored("a", steps=10), stored("b", seed=1, steps=20))))
    free = stored("b", offset="unconstrained", pm={"weight": 1.0})
    with pytest.raises(ValueError, match="were trained with another pm: see --sweep"):
        find_hosts(ReproduceConfig(hosts=(stored("a"),), free=(free,)))
    with pytest.raises(ValueError, match="misses its gates"):
        find_hosts(ReproduceConfig(hosts=(stored("a"),), sweep=(stored("b", passed=False),)))


def test_a_sweep_is_told_by_what_it_has_of_its_own_and_does_not_decide(stored, start):
    sweep = (
        stored("b", pm={"weight": 0.05, "direction": "paired"}, teacher_blur=2, offset="unconstrained"),
        stored("c", seed=1),
    )
    cfg = find_hosts(ReproduceConfig(hosts=(stored("a"),), sweep=sweep, rooms=2, targets=1))
    with start(cfg, "reproduce") as run:
        report = reproduce(cfg, run)
    gains = [row for row in run.rows if row.metric == "gain" and row.labels["of"] == "flying"]
    own = "offset unconstrained, weight 0.05, direction paired, teacher blur 2"
    assert [(row.variant, row.split) for row in gains] == [
        ("as in the paper", "seed 0"), (own, "seed 0"), ("as in the paper", "seed 1")
    ]  # fmt: skip
    assert len(report.verdict["hosts"]) == 1
    assert (run.figures / "gains.png").stat().st_size > 1000
    steps = {row.split: row.labels["sha256"] for row in run.rows if row.metric == "steps"}
    assert steps.keys() == {"host 0", f"sweep 0, {own}", "sweep 1, as in the paper"}


def test_a_gain_is_of_the_loss_over_pictures_alone(stored, start, monkeypatch):
    marks = {"photometric": torch.tensor([1.0, 2.0]), "pm": torch.tensor([4.0, 7.0])}
    asked = []

    def load(arm, *, path, device):
        asked.append(arm)
        return load_host(arm, path=path, device=device)

    monkeypatch.setattr(module, "load_host", load)
    monkeypatch.setattr(module, "grade", lambda host, scenes: dict.fromkeys(METRICS, marks[asked[-1]]))
    cfg = find_hosts(ReproduceConfig(hosts=(stored(),), rooms=2, targets=1))
    with start(cfg, "reproduce") as run:
        reproduce(cfg, run)
    rows = {row.labels["of"]: row for row in run.rows if row.metric == "gain"}
    assert rows.keys() == METRICS.keys()
    assert rows["flying"].value == 4.0
    assert tuple(rows["flying"].interval) == (3.0, 5.0)


def test_every_claim_gets_its_verdict(stored, start):
    cfg = ReproduceConfig(hosts=(stored("a"),), free=(stored("b", offset="unconstrained"),), rooms=2, targets=1)
    cfg = find_hosts(cfg)
    with start(cfg, "reproduce") as run:
        report = reproduce(cfg, run)
    assert report.verdict["claims"].keys() == RULES.keys() == UNITS.keys()
    (host,) = report.verdict["hosts"]
    means = {(row.metric, row.variant): row.value for row in run.rows if row.metric in METRICS}
    assert {variant for _, variant in means} == {"photometric", "pm", "photometric_free", "pm_free"}
    # Both arms of an untrained host are the same; the two kinds of offsets are not.
    assert host["claims"]["beyond"]["margin"] == host["claims"]["flying"]["margin"] == 0
    assert host["claims"]["between"]["margin"] == pytest.approx(0.25)
    gap = means["psnr_beyond", "photometric_free"] - means["psnr_beyond", "photometric"]
    assert gap != 0
    assert host["claims"]["offset alone"]["margin"] == pytest.approx(gap)
    assert host["claims"]["as released"]["margin"] == pytest.approx(gap)
    again = start(cfg, "reproduce")
    assert again.done
    assert str(ClaimsReport.of(again)) == str(report)


def test_every_host_is_graded_on_the_same_rooms_whichever_are_seen_at_once(stored, start, monkeypatch):
    cfg = find_hosts(ReproduceConfig(hosts=(stored("a"), stored("b", seed=1)), rooms=5, targets=1))
    draws = []
    monkeypatch.setattr(
        module, "graded_rooms", lambda *args, **rest: draws.append(args[0]) or graded_rooms(*args, **rest)
    )
    with start(cfg, "reproduce") as run:
        reproduce(cfg, run)
    assert [list(seeds) for seeds in draws] == [[1000, 1001, 1002, 1003], [1004]]
    alone = [graded_rooms([seed], 1, 32) for seed in range(1000, 1005)]
    want = grade(load_host("pm", path=cfg.hosts[1]).host, alone)
    means = {row.metric: row.value for row in run.rows if (row.variant, row.split) == ("pm", "host 1")}
    assert means == pytest.approx({name: float(values.mean()) for name, values in want.items()}, rel=1e-4)


def test_claims_on_free_offsets_stay_untested_without_such_hosts(stored, start):
    cfg = find_hosts(ReproduceConfig(hosts=(stored(),), rooms=2, targets=1))
    with start(cfg, "reproduce") as run:
        report = reproduce(cfg, run)
    assert report.verdict["claims"]["as released"] == "NOT TESTED"
    assert "bounded offsets" in str(report).splitlines()[0]
