import json

import pytest


@pytest.fixture(scope="module")
def run(stored, tmp_path_factory):
    from hone_core.runs import Run
    from hone_zipr1.config import DemoConfig
    from hone_zipr1.demo import demo

    cfg = DemoConfig(items=20, ps=(0.5, 0.9), shown=2, batch=16, host=stored)
    folder = tmp_path_factory.mktemp("demo") / "run"
    with Run.start(package="hone-zipr1", verb="demo", config=cfg, out=folder, device="cpu", quiet=True) as run:
        report = demo(cfg, run)
    return run, report


def test_the_table_has_every_way_to_choose_and_the_uniform_ratio(run):
    run, report = run
    found = {row.variant for row in run.rows if row.metric == "accuracy"}
    assert {
        "dense",
        "top-p 0.5",
        "top-p 0.9",
        "random as top-p 0.5",
        "top-k as top-p 0.9",
        "VisionZip as top-p 0.9",
    } <= found
    values = {(row.metric, row.variant): row.value for row in run.rows}
    assert values["token_ratio", "dense"] == 1
    assert values["token_ratio", "top-p 0.5"] < values["token_ratio", "top-p 0.9"] < 1
    assert values["uniform_ratio", "top-p 0.5"] < values["uniform_ratio", "top-p 0.9"]
    assert values["token_ratio", "top-k as top-p 0.9"] == pytest.approx(values["token_ratio", "top-p 0.9"], abs=0.05)
    assert "uniform attention" in str(report)


def test_what_was_kept_is_drawn(run):
    run, report = run
    assert report.chart.is_file()
    assert report.maps.is_file()
    shown = json.loads((run.artifacts / "shown.json").read_text())
    assert len(shown) == 2
    for row in shown:
        assert len(row["keep"]) == 3
        for keep in row["keep"]:
            assert len(keep) == len(keep[0]) == 4
            assert {value for line in keep for value in line} <= {0, 1}
        assert row["answers"].keys() == {"dense", "top-p 0.5", "top-p 0.9"}


def test_fastv_has_the_budget_of_the_others(small_host):
    from hone_zipr1.config import SparseConfig
    from hone_zipr1.grading import ask, at_budget, held_out

    # Of three layers, the first two keep everything: (0.8 x 3 - 2) / 1.
    fastv = at_budget(SparseConfig(rows="all"), 0.8, small_host.model.config)["FastV"]
    assert (fastv.ratio, fastv.fastv_layer) == (pytest.approx(0.4), 2)
    assert ask(small_host, held_out(small_host, 6, 0), fastv, batch=6).tau == pytest.approx(0.8, abs=0.02)
