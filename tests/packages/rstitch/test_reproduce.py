import numpy as np
import pytest
from hone_core.claims import verdict_over_seeds
from hone_rstitch.config import ReproduceConfig
from hone_rstitch.reproduce import RULES, ReproduceReport, decided, prepare, reproduce


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


def test_every_claim_gets_its_verdict(folder, start):
    cfg = prepare(ReproduceConfig(folders=(folder(1), folder(3)), items=8, taus=(0.03, 0.5), window=3))
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
    assert (run.figures / "curve-1.png").is_file()
    again = start(cfg)
    assert again.done
    assert str(ReproduceReport.of(again)) == text
