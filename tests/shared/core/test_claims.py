import numpy as np
import pytest
from hone_core.claims import ClaimsReport, decided, decided_over, verdict_over_margins, verdict_over_seeds, write_claims
from hone_core.runs import Run


@pytest.mark.parametrize(("shift", "holds"), [(1.0, "yes"), (0.0, "undecided"), (-1.0, "no")])
def test_an_interval_decides(shift, holds):
    found = decided(np.linspace(-1, 1, 41) + shift)
    assert found["holds"] == holds
    assert found["margin"] == pytest.approx(shift, abs=1e-6)


@pytest.mark.parametrize(("shift", "holds"), [(0.5, "yes"), (0.0, "undecided"), (-0.5, "no")])
def test_draws_decide_of_what_is_no_mean(shift, holds):
    found = decided_over(shift, np.linspace(-0.1, 0.1, 2001) + shift)
    assert found["holds"] == holds
    assert found["margin"] == shift
    assert found["interval"] == pytest.approx([shift - 0.095, shift + 0.095])


def test_no_difference_at_all_is_none_above_zero():
    assert decided(np.zeros(100))["holds"] == decided_over(0.0, np.zeros(100))["holds"] == "no"


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [
        (["yes"] * 3, "CONFIRMED (yes on 3)"),
        (["no"] * 3, "REFUTED (no on 3)"),
        (["yes", "no", "yes"], "MIXED (yes on 2, no on 1)"),
        (["yes", "undecided", "yes"], "UNDECIDED (yes on 2, undecided on 1)"),
        (["undecided"] * 3, "UNDECIDED (undecided on 3)"),
        (["yes", "yes"], "UNDECIDED, 2 of 3 seeds (yes on 2)"),
        ([], "NOT TESTED"),
    ],
)
def test_verdicts_need_all_of_three_seeds(holds, verdict):
    assert verdict_over_seeds(holds) == verdict


def test_margins_speak_by_their_sign():
    assert verdict_over_margins([0.1, 0.2, 0.3]) == "CONFIRMED"
    assert verdict_over_margins([-0.1, 0.0, -0.3]) == "REFUTED"
    assert verdict_over_margins([0.1, 0.0, 0.3]) == "MIXED, 2 of 3"
    assert verdict_over_margins([0.1, 0.2]) == "UNDECIDED, 2 of 3 seeds"


def test_a_report_says_what_was_written(tmp_path):
    hosts = [
        {"name": "host 0", "claims": {"better": decided([1.0, 2.0, 3.0]), "whole": decided([-1.0, -1.0])}},
        {"name": "host 1", "claims": {"better": decided([-1.0, 1.0])}},
    ]
    rules = {"better": "score above", "whole": "all of it above"}
    with Run.start(package="hone-core", verb="reproduce", config=None, out=tmp_path, device="cpu", quiet=True) as run:
        report = write_claims(run, "two hosts", rules, hosts, unit={"better": "dB", "whole": ""}, items=3)
    assert str(report) == str(ClaimsReport.of(run))
    lines = str(report).splitlines()
    assert lines[0] == "two hosts"
    assert lines[1] == "better: UNDECIDED, 2 of 3 seeds (yes on 1, undecided on 1) (score above)"
    assert lines[2] == "  host 0: +2 [+1, +3] dB"
    assert lines[5] == "  host 0: -1 [-1, -1]"
    assert [(row.variant, row.split, row.labels["holds"]) for row in report.rows] == [
        ("better", "host 0", "yes"), ("whole", "host 0", "no"), ("better", "host 1", "undecided")
    ]  # fmt: skip
