import pytest
from hone_pmloss import bench as module
from hone_pmloss import vggt
from hone_pmloss.config import BenchConfig

from .test_vggt import TINY as TINY_VGGT


def test_backends_agree_and_a_step_is_split(start):
    cfg = BenchConfig(size=(32, 32), views=(2,), targets=1, rounds=1)
    with start(cfg, "bench") as run:
        report = module.bench(cfg, run)
    times = {(row.split, row.variant): row.value for row in report.rows if row.metric == "time"}
    assert {variant for split, variant in times if split == "random predictions"} == {
        "tree", "all pairs, torch", "all pairs, torch by products"
    }  # fmt: skip
    assert {variant for split, variant in times if split == "step"} == {
        "with the term", "pictures alone", "part: network", "part: pictures", "part: term", "of the term: alignment",
        "of the term: nearest points",
    }  # fmt: skip
    (share,) = [row for row in report.rows if row.metric == "share"]
    assert share.value == pytest.approx(times["step", "part: term"] / times["step", "with the term"], rel=1e-3)
    assert share.labels == {"views": 2, "points": 2048}
    assert "term over step" in str(report)
    again = start(cfg, "bench")
    assert again.done
    assert str(module.BenchReport.of(again)) == str(report)


def test_torch_is_asked_about_as_many_points_as_are_allowed(start):
    cfg = BenchConfig(size=(32, 32), views=(2,), rounds=1, only="neighbours", pairs=100 * 2048)
    with start(cfg, "bench") as run:
        module.bench(cfg, run)
    rows = {(row.metric, row.variant): row for row in run.rows if row.split == "near predictions"}
    assert {variant: row.labels["asked"] for (metric, variant), row in rows.items() if metric == "time"} == {
        "tree": 2048, "all pairs, torch": 98, "all pairs, torch by products": 98
    }  # fmt: skip
    time = {variant: row.value / row.labels["asked"] for (metric, variant), row in rows.items() if metric == "time"}
    assert rows["longer", "all pairs, torch"].value == pytest.approx(time["all pairs, torch"] / time["tree"], rel=1e-3)
    assert rows["error", "all pairs, torch by products"].value < 1e-2
    assert {row.split for row in run.rows} == {"near predictions", "random predictions"}


def test_the_teacher_is_timed_beside_a_step(start, monkeypatch):
    monkeypatch.setattr(vggt, "VGGT_1B", TINY_VGGT)
    cfg = BenchConfig(size=(32, 32), views=(2,), targets=1, rounds=1, only="step", vggt=True)
    with start(cfg, "bench") as run:
        report = module.bench(cfg, run)
    assert [row.split for row in report.rows if row.variant == "teacher: VGGT"] == ["step"]
    with pytest.raises(ValueError, match="beside a step"):
        BenchConfig(only="neighbours", vggt=True)


def test_a_wrong_backend_gets_no_time(start, monkeypatch):
    true = module.nearest
    monkeypatch.setattr(module, "nearest", lambda a, b, backend: true(a, b, backend=backend) * (backend == "torch"))
    cfg = BenchConfig(size=(32, 32), views=(2,), targets=1, rounds=1)
    with pytest.raises(RuntimeError, match="distances by"), start(cfg, "bench") as run:
        module.bench(cfg, run)
    assert not [row for row in run.rows if row.metric == "time"]
