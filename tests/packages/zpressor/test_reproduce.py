from dataclasses import replace

import pytest
from hone_core.claims import ClaimsReport
from hone_zpressor.config import ReproduceConfig
from hone_zpressor.inputs import find_hosts
from hone_zpressor.reproduce import RULES, reproduce


def test_a_host_that_missed_its_gates_is_refused(stored):
    with pytest.raises(ValueError, match="misses its gates"):
        find_hosts(ReproduceConfig(hosts=(stored(passed=False),)))


def test_views_that_a_host_keeps_all_of_are_refused(stored, small):
    six = replace(small, zpressor=replace(small.zpressor, anchors=6))
    with pytest.raises(ValueError, match=r"keeps 6 views: expected a number of views above that; got \(6,\)"):
        find_hosts(ReproduceConfig(hosts=(stored(cfg=six),), views=(6,), judged=(6,), anchor_counts=()))


def test_quality_is_not_held_against_itself(stored, start):
    cfg = ReproduceConfig(hosts=(stored(),), rooms=2, views=(6,), judged=(6,), anchor_counts=(), targets=1)
    with start(find_hosts(cfg), "reproduce") as run:
        report = reproduce(cfg, run)
    assert report.verdict["claims"]["held"] == "NOT TESTED"
    assert report.verdict["hosts"][0]["claims"].keys() == RULES.keys() - {"held"}


def test_every_claim_gets_its_verdict(stored, start):
    cfg = find_hosts(
        ReproduceConfig(hosts=(stored(),), rooms=2, views=(6, 8), judged=(8,), anchor_counts=(), targets=1)
    )
    with start(cfg, "reproduce") as run:
        report = reproduce(cfg, run)
    assert report.verdict["claims"].keys() == RULES.keys()
    for claim in RULES:
        numbers = report.verdict["hosts"][0]["claims"][claim]
        assert numbers["interval"][0] <= numbers["margin"] <= numbers["interval"][1]
    rows = {(row.variant, row.labels["views"]): row for row in run.rows if row.metric == "psnr"}
    assert rows.keys() == {
        (arm, views) for arm in ("host", "zpressor", "anchors", "overlap", "random") for views in (6, 8)
    }
    assert rows["host", 8].labels["anchors"] == 8
    assert rows["zpressor", 8].labels["anchors"] == 3
    margin = rows["zpressor", 8].value - rows["host", 8].value
    assert report.verdict["hosts"][0]["claims"]["host"]["margin"] == pytest.approx(margin, abs=1e-4)
    held = rows["zpressor", 8].value - rows["zpressor", 6].value + 0.5
    assert report.verdict["hosts"][0]["claims"]["held"]["margin"] == pytest.approx(held, abs=1e-4)
    assert [path.name for path in run.figures.iterdir()] == ["views.png"]
    again = start(cfg, "reproduce")
    assert again.done
    assert str(ClaimsReport.of(again)) == str(report)
