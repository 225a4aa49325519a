import math

import pytest
from hone_rstitch.calibrate import calibrate, find_tau
from hone_rstitch.config import CalibrateConfig, ModelsConfig, SamplingConfig, StitchConfig
from hone_rstitch.data import products
from hone_rstitch.evaluate import Answers
from hone_rstitch.inputs import find_calibrated


def falling(tau):
    """Share of large tokens as it falls over factors of tau."""
    return 1 / (1 + (tau / 0.02) ** 0.8)


@pytest.mark.parametrize("wanted", [0.05, 0.3, 0.8])
def test_a_threshold_is_found(wanted):
    found = find_tau(falling, wanted, tolerance=0.005, rounds=30)
    assert found.reached
    assert abs(falling(found.tau) - wanted) <= 0.005
    exact = 0.02 * (1 / wanted - 1) ** 1.25
    assert abs(math.log(found.tau / exact)) < 0.2


def test_confidence_runs_the_other_way():
    found = find_tau(lambda tau: falling(1 - tau), 0.3, gate="confidence", tolerance=0.005, rounds=30)
    assert found.reached
    assert 0.5 < found.tau < 1


def test_what_no_threshold_reaches_is_said():
    found = find_tau(lambda tau: 0.5 * falling(tau), 0.9, tolerance=0.01, rounds=30)
    assert not found.reached
    assert len(found.tried) == 2
    assert found.value == pytest.approx(0.5, abs=0.01)


def test_rounds_are_a_bound():
    found = find_tau(falling, 0.31, tolerance=1e-9, rounds=5)
    assert len(found.tried) == 5
    assert not found.reached


def test_generated_problems_are_not_those_of_eval(packaged, start, monkeypatch):
    asked = []
    ask = Answers.ask

    def noted(self, *args, **options):
        asked.append({problem.id for problem in self.problems})
        return ask(self, *args, **options)

    monkeypatch.setattr(Answers, "ask", noted)
    cfg = CalibrateConfig(limit=40, share=0.5, rounds=2, sampling=SamplingConfig(max_new_tokens=2))
    with start(cfg) as run:
        calibrate(cfg, run)
    reported = {problem.id for problem in products(40, seed=cfg.seed)}
    assert len(asked[0] & reported) < 4


@pytest.mark.parametrize("target", [{"share": 0.5}, {"time": 0.9}])
def test_the_verb_reports_the_nearest(packaged, start, target):
    cfg = CalibrateConfig(limit=12, tolerance=0.05, rounds=6, stitch=StitchConfig(), **target)
    with start(cfg) as run:
        report = calibrate(cfg, run)
    text = str(report)
    rows = {row.metric: row.value for row in report.rows if row.metric != "tried"}
    tried = {float(row.variant): row.value for row in report.rows if row.metric == "tried"}
    assert tried[rows["tau"]] == rows["found"]
    assert rows["found"] == min(tried.values(), key=lambda value: abs(value - rows["wanted"]))
    assert ("NOT REACHED" in text) == (abs(rows["found"] - rows["wanted"]) > 0.05)


def test_inputs_are_looked_for_first(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("hone_rstitch.models.check_models", looked.append)
    file = tmp_path / "set.jsonl"
    file.write_text('{"question": "1+1", "answer": 2}\n')
    models = ModelsConfig(small=str(tmp_path), large=str(tmp_path))
    assert find_calibrated(CalibrateConfig(share=0.1, data=str(file), models=models)).data == str(file.resolve())
    assert looked == [models]
    with pytest.raises(ValueError, match="multiplies"):
        find_calibrated(CalibrateConfig(share=0.1, data=str(file)))
    with pytest.raises(ValueError, match="which problems"):
        find_calibrated(CalibrateConfig(share=0.1, models=models))
    with pytest.raises(FileNotFoundError):
        find_calibrated(CalibrateConfig(share=0.1, data=str(tmp_path / "no.jsonl"), models=models))
