import numpy as np
import pytest
import torch
from hone_core.claims import verdict_over_seeds
from hone_rstitch.config import ReproduceConfig
from hone_rstitch.reproduce import RULES, ReproduceReport, decided, prepare, reproduce
from hone_rstitch.router import Router, save_router


@pytest.mark.parametrize(("shift", "holds"), [(0.5, "yes"), (0.0, "undecided"), (-0.5, "no")])
def test_an_interval_decides(shift, holds):
    draws = np.linspace(-0.1, 0.1, 2001) + shift
    found = decided(np.asarray([shift, *draws]))
    assert found["holds"] == holds
    assert found["margin"] == shift
    assert found["interval"] == pytest.approx([shift - 0.095, shift + 0.095])


def test_no_difference_at_all_is_none_above_zero():
    assert decided(np.zeros(100))["holds"] == "no"


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [
        (["yes"] * 3, "CONFIRMED (yes on 3)"),
        (["no"] * 3, "REFUTED (no on 3)"),
        (["yes", "no", "yes"], "MIXED (yes on 2, no on 1)"),
        (["yes", "undecided", "yes"], "UNDECIDED (yes on 2, undecided on 1)"),
        (["yes", "yes"], "UNDECIDED, 2 of 3 seeds (yes on 2)"),
    ],
)
def test_verdicts_need_all_of_three_seeds(holds, verdict):
    assert verdict_over_seeds(holds) == verdict


def test_a_pair_that_missed_its_gates_is_refused(folder):
    good, bad = folder(1), folder(2, passed=False)
    assert prepare(ReproduceConfig(folders=(good,))).folders[0].is_absolute()
    with pytest.raises(ValueError, match="pair 1 misses its gates"):
        prepare(ReproduceConfig(folders=(good, bad)))


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


def test_a_router_is_of_its_pair(folder, routers, tmp_path):
    with pytest.raises(ValueError, match="a router for each of the 3 pairs, or none; got 2"):
        ReproduceConfig(routers=routers)
    save_router(tmp_path / "other.safetensors", Router(32, 8))
    with pytest.raises(ValueError, match="is for a small model of 32 channels; this one has 16"):
        prepare(ReproduceConfig(folders=(folder(1),), routers=(tmp_path / "other.safetensors",)))


def test_every_claim_gets_its_verdict(folder, start, routers):
    pairs = (folder(1), folder(3))
    cfg = prepare(ReproduceConfig(folders=pairs, routers=routers, items=8, taus=(0.03, 0.5), window=3))
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
