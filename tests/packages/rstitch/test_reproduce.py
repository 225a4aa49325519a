import pytest
import torch
from hone_rstitch.config import ReproduceConfig
from hone_rstitch.inputs import find_pairs
from hone_rstitch.reproduce import RULES, ReproduceReport, reproduce
from hone_rstitch.router import Router, save_router


def test_a_pair_that_missed_its_gates_is_refused(trained_host):
    good, bad = trained_host(1), trained_host(2, passed=False)
    assert find_pairs(ReproduceConfig(hosts=(good,))).hosts[0].is_absolute()
    with pytest.raises(ValueError, match="pair 1 misses its gates"):
        find_pairs(ReproduceConfig(hosts=(good, bad)))


@pytest.fixture
def routers(tmp_path):
    files = []
    for at in range(2):
        router = Router(16, 8)
        # One hands every doubtful token over, the other none.
        torch.nn.init.constant_(router.out.bias[0], (-9.0, 9.0)[at])
        files.append(tmp_path / f"router-{at}.safetensors")
        save_router(files[-1], router)
    return tuple(files)


def test_a_router_is_of_its_pair(trained_host, routers, tmp_path):
    with pytest.raises(ValueError, match="a router for each of the 3 pairs, or none; got 2"):
        ReproduceConfig(routers=routers)
    save_router(tmp_path / "other.safetensors", Router(32, 8))
    with pytest.raises(ValueError, match="is for a small model of 32 channels; this one has 16"):
        find_pairs(ReproduceConfig(hosts=(trained_host(1),), routers=(tmp_path / "other.safetensors",)))


def test_every_claim_gets_its_verdict(trained_host, start, routers):
    pairs = (trained_host(1), trained_host(3))
    cfg = find_pairs(ReproduceConfig(hosts=pairs, routers=routers, items=8, taus=(0.03, 0.5), window=3))
    with start(cfg) as run:
        report = reproduce(cfg, run)
    assert report.verdict["claims"].keys() == RULES.keys()
    for pair in report.verdict["pairs"]:
        for claim in RULES:
            numbers = pair["claims"][claim]
            low, high = numbers["interval"]
            assert low <= numbers["margin"] <= high
    text = str(report)
    assert "2 pair(s); a verdict wants 3 seeds" in text
    assert all(f"\n{claim}: UNDECIDED, 2 of 3 seeds" in text for claim in RULES)
    # A router that hands everything over, or nothing, is a threshold: its margin over them is none.
    share = {
        row.split: row.value for row in run.rows if (row.metric, row.variant) == ("large_share", "router tau 0.001")
    }
    assert share["pair 1"] == 0 < share["pair 0"]
    margins = {row.split: row.value for row in run.rows if (row.metric, row.variant) == ("margin", "router")}
    assert margins["pair 1"] == 0
    assert (run.figures / "curve-1.png").is_file()
    again = start(cfg)
    assert again.done
    assert str(ReproduceReport.of(again)) == text
