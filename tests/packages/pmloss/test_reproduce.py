import pytest
from hone_core.claims import ClaimsReport
from hone_pmloss.config import ReproduceConfig
from hone_pmloss.reproduce import RULES, UNITS, prepare, reproduce


def test_hosts_of_the_wrong_kind_are_refused(stored):
    with pytest.raises(ValueError, match="misses its gates"):
        prepare(ReproduceConfig(hosts=(stored(passed=False),)))
    with pytest.raises(ValueError, match="has bounded offsets; expected unconstrained ones"):
        prepare(ReproduceConfig(hosts=(stored("a"),), free=(stored("b"),)))
    with pytest.raises(ValueError, match="a file for each of hosts"):
        ReproduceConfig(hosts=(stored("a"), stored("b")), free=(stored("c"),))


def test_every_claim_gets_its_verdict(stored, start):
    cfg = ReproduceConfig(hosts=(stored("a"),), free=(stored("b", offset="unconstrained"),), rooms=2, targets=1)
    cfg = prepare(cfg)
    with start(cfg, "reproduce") as run:
        report = reproduce(cfg, run)
    assert report.verdict["claims"].keys() == RULES.keys() == UNITS.keys()
    (host,) = report.verdict["hosts"]
    means = {(row.metric, row.variant): row.value for row in run.rows if row.metric != "margin"}
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


def test_claims_on_free_offsets_stay_untested_without_such_hosts(stored, start):
    cfg = prepare(ReproduceConfig(hosts=(stored(),), rooms=2, targets=1))
    with start(cfg, "reproduce") as run:
        report = reproduce(cfg, run)
    assert report.verdict["claims"]["as released"] == "NOT TESTED"
    assert "bounded offsets" in str(report).splitlines()[0]
