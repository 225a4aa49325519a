import hone_sparsevar.reproduce as module
import pytest
from hone_core.claims import verdict_over_margins
from hone_core.runs import Run
from hone_sparsevar.config import ReproduceConfig
from hone_sparsevar.reproduce import CLAIMS, NEEDED, answer, reproduce


def test_verdicts_need_three_seeds_that_agree():
    assert verdict_over_margins([1.0, 2.0]) == "UNDECIDED, 2 of 3 seeds"
    assert verdict_over_margins([0.1, 0.2, 0.3]) == "CONFIRMED"
    assert verdict_over_margins([-0.1, 0.0, -0.3]) == "REFUTED"
    assert verdict_over_margins([-0.1, 0.2, 0.3]) == "MIXED, 2 of 3"


def test_tokens_can_go_where_all_says_so():
    confirmed = dict.fromkeys(CLAIMS, "CONFIRMED")
    assert answer(confirmed) == "YES"
    assert answer(confirmed | {"C3 anchors": "REFUTED"}) == "YES"
    for claim in NEEDED:
        assert answer(confirmed | {claim: "MIXED, 2 of 3"}) == "UNDECIDED"
        assert answer(confirmed | {claim: "REFUTED", NEEDED[0]: "UNDECIDED, 1 of 3 seeds"}).startswith(
            "UNDECIDED" if claim == NEEDED[0] else f"NO, {claim}"
        )


def test_a_stopped_run_goes_on_with_the_seeds_that_are_missing(untrained, tmp_path, monkeypatch):
    cfg = ReproduceConfig(hosts=(untrained,), seeds=(0, 1), ratios=(0.2,), limit=2, batch=2)

    def result(name):
        out = tmp_path / name
        with Run.start(
            config=cfg, package="hone-sparsevar", verb="reproduce", out=out, seed=0, device="cpu", quiet=True,
            command="x",
        ) as run:  # fmt: skip
            return reproduce(cfg, run)

    whole, original, seeds = result("whole"), module.compare, []

    def compare(*args, seed, **options):
        if len(seeds) == 2:
            seeds.append(None)
            raise KeyboardInterrupt
        seeds.append(seed)
        return original(*args, seed=seed, **options)

    monkeypatch.setattr(module, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        result("run")
    again = result("run")
    assert seeds == [0, 500_000, None, 1_000_000, 1_500_000]
    assert again.rows == whole.rows


def test_every_claim_is_judged(untrained, tmp_path):
    cfg = ReproduceConfig(hosts=(untrained,), seeds=(0, 1), ratios=(0.2,), limit=2, batch=2)
    run = Run.start(
        config=cfg, package="hone-sparsevar", verb="reproduce", out=tmp_path / "run", seed=0, device="cpu", quiet=True,
        command="x",
    )  # fmt: skip
    with run:
        report = reproduce(cfg, run)
    assert report.verdicts.keys() == CLAIMS.keys()
    assert all(text.startswith("UNDECIDED, 2 of 3") for text in report.verdicts.values())
    margins = [row for row in report.rows if row.metric == "margin"]
    assert len(margins) == 2 * len(CLAIMS)
    means = {row.variant: row.labels for row in report.rows if row.metric == "margin_mean"}
    assert means == {claim: {"verdict": verdict} for claim, verdict in report.verdicts.items()}
    values = {(row.split, row.variant): row.value for row in report.rows if row.metric == "frechet" and row.split}
    for row in margins:
        if row.variant == "C2 random":
            assert row.value == values[row.split, "random"] - values[row.split, "sparse"]
    assert "C4 early stop" in str(report)
    assert "low-frequency tokens can go: UNDECIDED" in str(report)
    work = {row.variant: row.value for row in report.rows if row.metric == "gflops"}
    assert work["sparse"] < work["sparse 0.2"] < work["dense"]
    assert (tmp_path / "run" / "figures" / "frontier.png").stat().st_size > 1000
