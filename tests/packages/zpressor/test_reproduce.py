import pytest
import torch
from hone_zpressor.config import ReproduceConfig
from hone_zpressor.reproduce import RULES, ReproduceReport, decided, prepare, reproduce, verdict_over_seeds


@pytest.mark.parametrize(("shift", "holds"), [(1.0, "yes"), (0.0, "undecided"), (-1.0, "no")])
def test_an_interval_decides(shift, holds):
    found = decided(torch.linspace(-1, 1, 41) + shift)
    assert found["holds"] == holds
    assert found["margin"] == pytest.approx(shift, abs=1e-6)


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [
        (["yes"] * 3, "CONFIRMED (yes on 3)"),
        (["no"] * 3, "REFUTED (no on 3)"),
        (["yes", "no", "yes"], "MIXED (yes on 2, no on 1)"),
        (["yes", "yes"], "UNDECIDED, 2 of 3 seeds (yes on 2)"),
    ],
)
def test_verdicts_need_all_of_three_seeds(holds, verdict):
    assert verdict_over_seeds(holds) == verdict


def test_a_host_that_missed_its_gates_is_refused(stored):
    with pytest.raises(ValueError, match="misses its gates"):
        prepare(ReproduceConfig(hosts=(stored(passed=False),)))


def test_every_claim_gets_its_verdict(stored, start):
    cfg = prepare(ReproduceConfig(hosts=(stored(),), rooms=2, views=(6, 8), judged=(8,), anchor_counts=(), targets=1))
    with start(cfg, "reproduce") as run:
        report = reproduce(cfg, run)
    assert report.verdict["claims"].keys() == RULES.keys()
    for claim in RULES:
        numbers = report.verdict["hosts"][0]["claims"][claim]
        assert numbers["interval"][0] <= numbers["margin"] <= numbers["interval"][1]
    rows = {(row.variant, row.labels["views"]): row for row in run.rows if row.metric == "psnr"}
    assert rows.keys() == {(arm, views) for arm in ("host", "zpressor", "anchors", "random") for views in (6, 8)}
    assert rows["host", 8].labels["anchors"] == 8
    assert rows["zpressor", 8].labels["anchors"] == 3
    margin = rows["zpressor", 8].value - rows["host", 8].value
    assert report.verdict["hosts"][0]["claims"]["host"]["margin"] == pytest.approx(margin, abs=1e-4)
    again = start(cfg, "reproduce")
    assert again.done
    assert str(ReproduceReport.of(again)) == str(report)
