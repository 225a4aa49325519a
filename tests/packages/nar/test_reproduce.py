import pytest
from hone_core.claims import verdict_over_margins
from hone_nar.config import HostConfig, ReproduceConfig
from hone_nar.reproduce import CLAIMS, reproduce


def test_every_claim_is_judged_and_trainings_are_kept(start, tmp_path):
    cfg = ReproduceConfig(host=HostConfig(dim=16, layers=1, heads=2), seeds=(3,), steps=2, batch=4, limit=20)
    with start(cfg, "reproduce", tmp_path / "run") as run:
        report = reproduce(cfg, run)
    assert set(report.verdicts) == set(CLAIMS)
    assert set(report.verdicts.values()) == {"UNDECIDED, 1 of 3 seeds"}
    variants = {row.variant for row in report.rows if row.metric == "bits_per_token" and row.split == "mean"}
    assert variants == {
        "raster", "nar", "nar, right", "nar, below", "separate", "separate, right", "separate, below", "one-head"
    }  # fmt: skip
    assert len([row for row in report.rows if row.metric == "excess_bits" and row.split == "seed 3"]) == 8
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "artifacts").glob("*.pt")}
    assert len(files) == 4
    assert "heads" in str(report)
    assert "less raster's, 1 at once: " in str(report)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1.0, 2.0], "UNDECIDED, 2 of 3 seeds"),
        ([1.0, 2.0, 0.1], "CONFIRMED"),
        ([-1.0, 0.0, -2.0], "REFUTED"),
        ([1.0, -1.0, 1.0], "MIXED, 2 of 3"),
    ],
)
def test_verdicts(values, wanted):
    assert verdict_over_margins(values) == wanted
