import pytest
from hone_pmloss import bench as module
from hone_pmloss.config import BenchConfig


def test_backends_agree_and_a_step_is_split(start):
    cfg = BenchConfig(size=(32, 32), views=(2,), targets=1, rounds=1)
    with start(cfg, "bench") as run:
        report = module.bench(cfg, run)
    times = {(row.split, row.variant): row.value for row in report.rows if row.metric == "time"}
    assert {variant for split, variant in times if split == "random predictions"} == {"tree", "all pairs, torch"}
    assert {variant for split, variant in times if split == "step"} == {
        "with the term", "pictures alone", "part: network", "part: pictures", "part: term"
    }  # fmt: skip
    (share,) = [row for row in report.rows if row.metric == "share"]
    assert share.value == pytest.approx(times["step", "part: term"] / times["step", "with the term"], rel=1e-3)
    assert share.labels == {"views": 2, "points": 2048}
    assert "term over step" in str(report)
    again = start(cfg, "bench")
    assert again.done
    assert str(module.BenchReport.of(again)) == str(report)


def test_a_wrong_backend_gets_no_time(start, monkeypatch):
    true = module.nearest
    monkeypatch.setattr(module, "nearest", lambda a, b, backend: true(a, b, backend=backend) * (backend == "torch"))
    cfg = BenchConfig(size=(32, 32), views=(2,), targets=1, rounds=1)
    with pytest.raises(RuntimeError, match="distances by"), start(cfg, "bench") as run:
        module.bench(cfg, run)
    assert not [row for row in run.rows if row.metric == "time"]
