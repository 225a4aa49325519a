import json
import subprocess

import pytest
import tables

ENVIRONMENT = {"gpu": "NVIDIA H200", "commit": "0123456789abcdef", "dirty": False, "torch": "2.11.0"}
ROWS = [
    {"metric": "psnr", "value": 31.239, "unit": "dB", "better": "higher", "spread": 0.5, "variant": "asa"},
    {"metric": "time", "value": 0.25, "unit": "s", "better": "lower", "variant": "asa"},
    {"metric": "time", "value": 1.0, "unit": "s", "better": "lower", "variant": "dense"},
    {"metric": "ms", "value": 3.0, "unit": "ms", "variant": "asa", "labels": {"shape": "480p"}},
]

README = """# T

<!-- table: quality
files = ["results/a/*.json"]
where = { metric = ["psnr", "time"] }
rows = [{ field = "variant", title = "mask", names = { asa = "ASA" } }]

[[columns]]
title = "PSNR"
where = { metric = "psnr" }
digits = 1
spread = true

[[columns]]
title = "time"
where = { metric = "time" }
scale = 1000
unit = "ms"
digits = 0
-->
<!-- /table -->

End.
"""


@pytest.fixture
def repo(tmp_path):
    (tmp_path / "results" / "a").mkdir(parents=True)
    (tmp_path / "results" / "a" / "x.json").write_text(json.dumps({"environment": ENVIRONMENT, "rows": ROWS}))
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def spec(**changes):
    base = {
        "files": ["results/a/x.json"],
        "rows": ["variant"],
        "columns": [{"title": "t", "where": {"metric": "time"}}],
    }
    return base | {"caption": False} | changes


def test_renders_groups_units_spread_scale_and_caption(repo):
    assert tables.update(README, repo).splitlines()[-9:] == [
        "| mask | PSNR | time |",
        "| --- | ---: | ---: |",
        "| ASA | 31.2 ± 0.5 dB | 250 ms |",
        "| dense | - | 1000 ms |",
        "",
        "*Measured on NVIDIA H200, torch 2.11.0, commit 0123456789; from `results/a/x.json`.*",
        "<!-- /table -->",
        "",
        "End.",
    ]


def test_update_is_stable(repo):
    once = tables.update(README, repo)
    assert tables.update(once, repo) == once


def test_speedup_is_baseline_over_method(repo):
    column = {
        "title": "speed-up",
        "where": {"metric": "time"},
        "speedup": {"baseline": {"variant": "dense"}, "method": {"variant": "asa"}},
    }
    text = tables.render(spec(rows=["metric"], columns=[column]), repo)
    assert text.splitlines()[2:] == ["| time | 4.00x |"]


def test_interval_is_shown_on_request(repo):
    row = {"metric": "acc", "value": 0.5, "interval": [0.4, 0.625], "variant": "asa"}
    (repo / "results/a/x.json").write_text(json.dumps({"rows": [row]}))
    columns = [{"title": "accuracy", "scale": 100, "unit": "%", "digits": 1, "interval": True}]
    assert tables.render(spec(columns=columns), repo).splitlines()[2:] == ["| asa | 50.0 [40.0, 62.5]% |"]


def test_rows_with_fields_of_their_own(repo):
    wide = [
        {"shape": "480p", "density": density, "provider": provider, "ms_p50": ms, "tflops": 400}
        for density, provider, ms in [(0.5, "hone", 2.0), (0.5, "cudnn", 3.0), (0.1, "hone", 0.5), (0.1, "cudnn", 3.0)]
    ]
    (repo / "results/a/x.json").write_text(json.dumps({"rows": wide}))
    columns = [
        {"title": "ours", "where": {"provider": "hone"}, "value": "ms_p50", "unit": "ms"},
        {"title": "rate", "where": {"provider": "hone"}, "value": "tflops", "digits": 0},
        {
            "title": "speed-up",
            "value": "ms_p50",
            "speedup": {"baseline": {"provider": "cudnn"}, "method": {"provider": "hone"}},
        },
    ]
    text = tables.render(spec(rows=["shape", "density"], columns=columns), repo)
    assert text.splitlines()[2:] == ["| 480p | 0.5 | 2.00 ms | 400 | 1.50x |", "| 480p | 0.1 | 0.50 ms | 400 | 6.00x |"]


def test_labels_are_fields_and_empty_groups_are_left_out(repo):
    text = tables.render(spec(rows=["shape"], columns=[{"title": "t", "where": {"metric": "ms"}}]), repo)
    assert text.splitlines()[2:] == ["| 480p | 3.00 ms |"]


def test_local_changes_and_missing_environment_are_said(repo):
    (repo / "results/a/y.json").write_text(json.dumps({"environment": ENVIRONMENT | {"dirty": True}, "rows": []}))
    (repo / "results/a/z.json").write_text(json.dumps({"rows": []}))
    text = tables.render(spec(files=["results/a/*.json"], caption=True), repo)
    assert "commit 0123456789 with local changes; from `results/a/y.json`" in text
    assert "Measured on hardware not recorded, commit not recorded; from `results/a/z.json`" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ["results/none.json"]}, "there is no file results/none.json"),
        ({"where": {"metric": "none"}}, "no result fits"),
        ({"colums": []}, "unknown colums; expected"),
        ({"columns": [{"titel": "x"}]}, "unknown titel"),
        ({"columns": []}, "columns is missing"),
        ({"columns": [{"title": "t"}]}, r"asa, column 't': 3 results fit"),
    ],
)
def test_bad_spec(repo, changes, message):
    with pytest.raises(tables.TableError, match=message):
        tables.render(spec(**changes), repo)


def test_unfinished_run_and_unclosed_marker(repo):
    (repo / "results/a/x.json").write_text(json.dumps({"status": "failed", "rows": ROWS}))
    with pytest.raises(tables.TableError, match=r"table quality: results/a/x\.json: its run is failed"):
        tables.update(README, repo)
    with pytest.raises(tables.TableError, match="1 tables are opened and 0 are closed"):
        tables.update(README.replace("<!-- /table -->", ""), repo)


def test_examples_in_fences_stay(repo):
    text = "```\n" + README.replace("results/a", "results/none") + "\n```\n"
    assert tables.update(text, repo) == text


def test_check_fails_on_a_difference_and_writing_mends_it(repo, monkeypatch, capsys):
    (repo / "README.md").write_text(README)
    monkeypatch.setattr("sys.argv", ["tables.py", "--check", "--root", str(repo)])
    assert tables.main() == 1
    assert "README.md: differs from results/" in capsys.readouterr().out
    assert (repo / "README.md").read_text() == README
    monkeypatch.setattr("sys.argv", ["tables.py", "--root", str(repo)])
    assert tables.main() == 0
    monkeypatch.setattr("sys.argv", ["tables.py", "--check", "--root", str(repo)])
    assert tables.main() == 0
