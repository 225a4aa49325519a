"""The claim over densities and seeds, on a tiny untrained host."""

import json

import pytest
from hone_blade import reproduce as module
from hone_blade.config import Comparison, ReproduceConfig
from hone_blade.reproduce import above, holds
from hone_core.runs import Row, Run
from hone_video.host import Host, save_host
from hone_video.host_config import HostConfig

TINY = HostConfig(
    frames=4,
    height=16,
    width=16,
    layers=1,
    heads=1,
    head_dim=32,
    ffn_dim=32,
    text_dim=16,
    steps=2,
    solver="euler",
    guidance=1.0,
)
HALF = Comparison(block=16, density=0.5, pool=4, samples=4)


@pytest.fixture
def run_once(tmp_path):
    save_host(Host.untrained(TINY), tmp_path / "host.safetensors")
    settings = {"half": HALF, "half, first dense": HALF}
    cfg = ReproduceConfig(settings=settings, prompts=2, seeds=2, batch=2, host=tmp_path / "host.safetensors")

    def start():
        with Run.start(package="hone-blade", verb="reproduce", config=cfg, out=tmp_path / "run") as run:
            run.device, run.quiet = "cpu", True
            return module.reproduce(cfg, run)

    return start


def test_a_setting_is_kept_when_a_later_one_is_cut_off(run_once, tmp_path, monkeypatch):
    real, calls = module.compare, []

    def compare(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        run_once()
    # What a killed process leaves: the rows of a finished setting are in its own file.
    results = tmp_path / "run" / "results.json"
    data = json.loads(results.read_text())
    results.write_text(json.dumps(data | {"rows": [], "status": "running"}))
    report = run_once()
    assert len(calls) == 5
    first = [row for row in report.rows if row.labels.get("setting") == "half"]
    second = [row for row in report.rows if row.labels.get("setting") == "half, first dense"]
    dense = [row for row in report.rows if not row.labels]
    for rows in (first, second):
        assert {row.variant for row in rows} == {"asa", "asa_g", "psa", "window", "random"}
    assert {row.variant for row in dense} == {"dense"}
    assert len(first) == len(second) == 5 * len(dense) == len(report.rows) * 5 / 11
    assert {row.n for row in report.rows if row.metric == "accuracy"} == {4}
    text = str(report)
    assert "half, first dense                   random" in text
    assert text.count("\n  half") == 4


def accuracy(low, high):
    return Row(metric="accuracy", value=(low + high) / 2, better="higher", interval=(low, high))


@pytest.mark.parametrize(
    ("asa", "asa_g", "window", "random", "expected"),
    [
        ((0.7, 0.8), (0.6, 0.7), (0.1, 0.2), (0.4, 0.5), True),
        ((0.7, 0.8), (0.4, 0.6), (0.1, 0.2), (0.4, 0.5), False),
        ((0.7, 0.8), (0.6, 0.7), (0.5, 0.65), (0.4, 0.5), False),
    ],
)
def test_the_claim_needs_every_interval_apart(asa, asa_g, window, random, expected):
    found = {"asa": asa, "asa_g": asa_g, "window": window, "random": random}
    assert holds({name: accuracy(*ends) for name, ends in found.items()}) is expected


def test_the_pyramid_needs_its_interval_above():
    assert above(accuracy(0.61, 0.7), accuracy(0.5, 0.6))
    assert not above(accuracy(0.59, 0.7), accuracy(0.5, 0.6))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="at least one comparison"):
        ReproduceConfig(settings={})
    with pytest.raises(ValueError, match="seeds must be at least 1; got 0"):
        ReproduceConfig(seeds=0)
