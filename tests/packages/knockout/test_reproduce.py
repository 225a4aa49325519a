import json

import pytest
from hone_core.claims import verdict_over_seeds
from hone_core.runs import Run, load_results
from hone_knockout.config import EvalConfig, ReproduceConfig
from hone_knockout.evaluate import configurations
from hone_knockout.reproduce import (
    RULES,
    ReproduceReport,
    judge,
    reproduce,
)

LAYERS = 10


FOUND = configurations(EvalConfig(settings=("global1", "global2", "window"), stride=1, step=1), LAYERS)


def rows(share_right, count=200):
    """Answers of which the first so many are right, under each configuration."""
    made = []
    for index in range(count):
        results = {
            label: {"p": [1.0, 0.0] if index < share_right.get(label, 1.0) * count else [0.0, 1.0]} for label in FOUND
        }
        made.append({"answer": 0, "category": "shape", "results": results})
    return made


GOOD = {f"global1 LV {i}-9": 0.5 for i in range(1, 5)} | {"global1 LV 0-9": 0.3}
GOOD |= {"global2 LV 0-9": 0.3, "global2 VT 0-9": 0.9, "global2 VS 0-9": 0.99}
GOOD |= {"window LV 2-5": 0.5, "window LV 3-6": 0.8}


def holds(share_right, finding, count=200):
    return judge(rows(share_right, count), FOUND, num_layers=LAYERS)[finding]["holds"]


def test_rules_hold_and_fail():
    found = judge(rows(GOOD), FOUND, num_layers=LAYERS)
    assert found["finding_1"]["layer_ratio"] == 0.5
    assert found["finding_1"]["margin"] == pytest.approx(2)
    assert all((numbers["rule"], numbers["holds"]) == ("yes", "yes") for numbers in found.values())
    assert found["finding_2"]["margin"] == pytest.approx(70 - 3 * 10)
    assert found["finding_3"]["worst_window"] == pytest.approx(50)
    late = judge(rows(GOOD | {"global1 LV 8-9": 0.9}), FOUND, num_layers=LAYERS)["finding_1"]
    assert (late["layer_ratio"], late["margin"], late["holds"]) == (0.9, pytest.approx(-8), "no")
    assert holds(GOOD | {"global2 VT 0-9": 0.6}, "finding_2") == "no"
    assert holds(GOOD | {f"window LV {i}-{i + 3}": 0.6 for i in range(7)}, "finding_3") == "no"
    nothing = judge(rows({}), FOUND, num_layers=LAYERS)
    for word in ("rule", "holds"):
        assert [nothing[name][word] for name in RULES] == ["yes", "no", "no"]


def test_layer_ratio_of_seventy_percent_is_the_last_that_counts():
    assert holds(GOOD | {"global1 LV 6-9": 0.5}, "finding_1") == "yes"
    assert holds(GOOD | {"global1 LV 7-9": 0.5}, "finding_1") == "no"


@pytest.mark.parametrize(("vt", "count", "want"), [(0.78, 200, "undecided"), (0.78, 6_000, "yes")])
def test_few_questions_decide_less(vt, count, want):
    # 70 points lost by LV and 22 by VT: a margin of 4 points.
    found = judge(rows(GOOD | {"global2 VT 0-9": vt}, count), FOUND, num_layers=LAYERS)["finding_2"]
    assert found["margin"] == pytest.approx(4, abs=0.1)
    assert found["interval"][0] < found["margin"] < found["interval"][1]
    assert (found["rule"], found["holds"]) == ("yes", want)


def test_interval_is_of_the_margin():
    """Against the closed form: LV loses what VT does not, so the margin is a sum over questions of 1 or -2."""
    found = judge(rows({"global2 LV 0-9": 0.4, "global2 VT 0-9": 0.9}, 1000), FOUND, num_layers=LAYERS)["finding_2"]
    # 600 questions lost by LV, 100 of them by VT too: 500 at +1, 100 at -2, 400 at 0.
    mean, square = (500 - 200) / 1000, (500 + 400) / 1000
    half = 100 * 1.96 * ((square - mean**2) / 1000) ** 0.5
    assert found["margin"] == pytest.approx(100 * mean)
    assert found["interval"] == pytest.approx([100 * mean - half, 100 * mean + half], abs=0.5)


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        (["yes"], "UNDECIDED, 1 of 3 seeds (yes on 1)"),
        (["yes"] * 3, "CONFIRMED (yes on 3)"),
        (["no"] * 3, "REFUTED (no on 3)"),
        (["yes", "no", "undecided"], "MIXED (yes on 1, no on 1, undecided on 1)"),
        (["yes", "yes", "undecided"], "UNDECIDED (yes on 2, undecided on 1)"),
        (["undecided"] * 3, "UNDECIDED (undecided on 3)"),
    ],
)
def test_verdict_over_seeds(words, verdict):
    assert verdict_over_seeds(words) == verdict


def test_one_host_is_not_three_seeds():
    with pytest.raises(ValueError, match="one is named twice: a, b, a"):
        ReproduceConfig(hosts=("a", "b", "a"))


def test_a_host_that_has_not_learned_is_refused(host_file, tmp_path):
    cfg = ReproduceConfig(items=16, gate_clips=8, hosts=(host_file,))
    with (
        pytest.raises(ValueError, match="misses its gates"),
        Run.start(package="hone-knockout", verb="reproduce", config=cfg, out=tmp_path / "run", quiet=True) as run,
    ):
        reproduce(cfg, run)


@pytest.mark.parametrize("second", ["unlearned", "missing"])
def test_every_host_is_looked_at_before_the_first_sweep(host_file, copy_host, tmp_path, monkeypatch, second):
    graded = []

    def grade(host, **_):
        graded.append(host)
        return dict.fromkeys(("shape", "place"), 1.0 if len(graded) == 1 else 0.5)

    monkeypatch.setattr("hone_knockout.reproduce.GATES", dict.fromkeys(("shape", "place"), 0.9))
    monkeypatch.setattr("hone_knockout.reproduce.grade_host", grade)
    monkeypatch.setattr("hone_knockout.reproduce.sweep", lambda *_, **__: pytest.fail("a sweep began"))
    other = tmp_path / "other.safetensors"
    if second == "unlearned":
        copy_host(other)
    cfg = ReproduceConfig(items=16, gate_clips=8, hosts=(host_file, other))
    message = "host 1 .* misses its gates" if second == "unlearned" else "there is no tiny host"
    with (
        pytest.raises(ValueError, match=message),
        Run.start(package="hone-knockout", verb="reproduce", config=cfg, out=tmp_path / "run", quiet=True) as run,
    ):
        reproduce(cfg, run)


def test_the_whole_of_it(host_file, copy_host, tmp_path, monkeypatch):
    # Untrained hosts pass no gate, and this is about the machinery.
    monkeypatch.setattr("hone_knockout.reproduce.GATES", dict.fromkeys(("shape", "place"), 0.0))
    twin = copy_host(tmp_path / "twin.safetensors")
    cfg = ReproduceConfig(items=16, batch=8, gate_clips=8, hosts=(host_file, twin))

    def start():
        return Run.start(package="hone-knockout", verb="reproduce", config=cfg, out=tmp_path / "run", quiet=True)

    with start() as run:
        report = reproduce(cfg, run)
    assert len(report.verdict["hosts"]) == 2
    assert set(report.verdict["findings"]) == {"finding_1", "finding_2", "finding_3"}
    assert report.verdict["notes"] == ["2 host(s); a verdict wants 3 seeds (--hosts A B C)"]
    assert "VT-K in all layers costs" in report.verdict["disagreement"]
    assert set(report.verdict["hosts"][0]["mixes"]) == {"all", "static only", "temporal only", "order only"}
    assert "finding_2: UNDECIDED, 2 of 3 seeds" in str(report)
    rule = report.verdict["hosts"][0]["mixes"]["all"]["finding_2"]["rule"]
    assert f"rule {rule}, interval [" in str(report)
    margins = [row for row in load_results(tmp_path / "run")["rows"] if row["metric"] == "margin"]
    assert len(margins) == 2 * len(RULES) * len(report.verdict["hosts"][0]["mixes"])
    for row in margins:
        mix = report.verdict["hosts"][int(row["variant"][-1])]["mixes"][row["split"]]
        assert row["interval"] == mix[row["labels"]["finding"]]["interval"]
        assert row["labels"]["holds"] == mix[row["labels"]["finding"]]["holds"]
    json.dumps(report.verdict)
    with start() as run:
        assert run.done
        assert ReproduceReport.of(run).verdict == json.loads(json.dumps(report.verdict))
