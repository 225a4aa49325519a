import json

import pytest
from hone_core.runs import Run
from hone_knockout.evaluate import SweepConfig, configurations
from hone_knockout.reproduce import ReproduceConfig, ReproduceReport, judge, reproduce

LAYERS = 10
FOUND = configurations(SweepConfig(settings=("global1", "global2", "window"), stride=1, step=1), LAYERS)


def rows(share_right, count=200):
    made = []
    for index in range(count):
        results = {
            label: {"p": [1.0, 0.0] if index < share_right.get(label, 1.0) * count else [0.0, 1.0]} for label in FOUND
        }
        made.append({"answer": 0, "category": "shape", "results": results})
    return made


def test_rules_hold_and_fail():
    good = {f"global1 LV {i}-9": 0.5 for i in range(1, 5)} | {"global1 LV 0-9": 0.3}
    good |= {"global2 LV 0-9": 0.3, "global2 VT 0-9": 0.9, "global2 VS 0-9": 0.99}
    good |= {"window LV 2-5": 0.5, "window LV 3-6": 0.8}
    found = judge(rows(good), FOUND, num_layers=LAYERS)
    assert found["finding_1"]["layer_ratio"] == 0.5
    assert all(numbers["holds"] for numbers in found.values())
    assert found["finding_3"]["worst_window"] == pytest.approx(50)
    late = judge(rows(good | {"global1 LV 8-9": 0.9}), FOUND, num_layers=LAYERS)
    assert late["finding_1"] == {"layer_ratio": 0.9, "performance_at_0": pytest.approx(0.3), "holds": False}
    temporal = judge(rows(good | {"global2 VT 0-9": 0.6}), FOUND, num_layers=LAYERS)
    assert not temporal["finding_2"]["holds"]
    flat = judge(rows(good | {f"window LV {i}-{i + 3}": 0.6 for i in range(7)}), FOUND, num_layers=LAYERS)
    assert not flat["finding_3"]["holds"]
    nothing = judge(rows({}), FOUND, num_layers=LAYERS)
    assert not nothing["finding_2"]["holds"]
    assert not nothing["finding_3"]["holds"]


def test_a_host_that_has_not_learned_is_refused(host_file, tmp_path):
    cfg = ReproduceConfig(items=16, gate_clips=8, hosts=(str(host_file),))
    with (
        pytest.raises(ValueError, match="misses its gates"),
        Run.start(package="hone-knockout", verb="reproduce", config=cfg, out=tmp_path / "run") as run,
    ):
        reproduce(cfg, run, quiet=True)


def test_the_whole_of_it(host_file, tmp_path, monkeypatch):
    # Untrained hosts pass no gate, and this is about the machinery.
    monkeypatch.setattr("hone_knockout.reproduce.GATES", dict.fromkeys(("shape", "place"), 0.0))
    cfg = ReproduceConfig(items=16, batch=8, gate_clips=8, hosts=(str(host_file), str(host_file)))

    def start():
        return Run.start(package="hone-knockout", verb="reproduce", config=cfg, out=tmp_path / "run")

    with start() as run:
        report = reproduce(cfg, run, quiet=True)
    assert len(report.verdict["hosts"]) == 2
    assert set(report.verdict["findings"]) == {"finding_1", "finding_2", "finding_3"}
    assert report.verdict["notes"] == ["2 host(s); a verdict wants 3 seeds (--host, several times)"]
    assert "VT-K in all layers costs" in report.verdict["disagreement"]
    assert set(report.verdict["hosts"][0]["mixes"]) == {"all", "static only", "temporal only", "order only"}
    assert "finding_2" in str(report)
    json.dumps(report.verdict)
    with start() as run:
        assert run.done
        assert ReproduceReport.of(run).verdict == json.loads(json.dumps(report.verdict))
