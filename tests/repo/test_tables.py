import json
import subprocess
import tomllib

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

<!-- table: quality -->
<!-- /table -->

End.
"""

SPECS = """
[quality]
files = ["*.json"]
where = { metric = ["psnr", "time"] }
rows = [{ field = "variant", title = "mask", names = { asa = "ASA" } }]
each = { digits = 1 }
columns = [
  { title = "PSNR", where = { metric = "psnr" }, spread = true },
  { title = "time", where = { metric = "time" }, scale = 1000, unit = "ms", digits = 0 },
]
"""


@pytest.fixture
def repo(tmp_path):
    (tmp_path / "results" / "a").mkdir(parents=True)
    (tmp_path / "results" / "a" / "x.json").write_text(json.dumps({"environment": ENVIRONMENT, "rows": ROWS}))
    (tmp_path / "results" / "a" / "tables.toml").write_text(SPECS)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def render(repo, **changes):
    return tables.render(spec(**changes), repo / "results" / "a", repo)


def update(repo, text=README):
    return tables.update(text, tomllib.loads(SPECS), repo / "results" / "a", repo)


def spec(**changes):
    base = {
        "files": ["x.json"],
        "rows": ["variant"],
        "columns": [{"title": "t", "where": {"metric": "time"}}],
    }
    return base | {"caption": False} | changes


def test_renders_groups_units_spread_scale_and_caption(repo):
    assert update(repo).splitlines()[-9:] == [
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
    once = update(repo)
    assert update(repo, once) == once


def test_speedup_is_baseline_over_method(repo):
    column = {
        "title": "speed-up",
        "where": {"metric": "time"},
        "speedup": {"baseline": {"variant": "dense"}, "method": {"variant": "asa"}},
    }
    text = render(repo, rows=["metric"], columns=[column])
    assert text.splitlines()[2:] == ["| time | 4.00x |"]


def test_speedup_over_the_best_of_several_baselines(repo):
    rows = [{"metric": "time", "value": v, "variant": name} for name, v in [("a", 8.0), ("b", 6.0), ("asa", 2.0)]]
    (repo / "results/a/x.json").write_text(json.dumps({"rows": rows}))
    speedup = {"baseline": {"variant": ["a", "b", "absent"]}, "method": {"variant": "asa"}}
    columns = [{"title": "speed-up", "speedup": speedup | {"best": True}}]
    assert render(repo, rows=["metric"], columns=columns).splitlines()[2:] == ["| time | 3.00x |"]
    with pytest.raises(tables.TableError, match="2 results fit"):
        render(repo, rows=["metric"], columns=[{"title": "speed-up", "speedup": speedup}])


def test_interval_is_shown_on_request(repo):
    row = {"metric": "acc", "value": 0.5, "interval": [0.4, 0.625], "variant": "asa"}
    (repo / "results/a/x.json").write_text(json.dumps({"rows": [row]}))
    columns = [{"title": "accuracy", "scale": 100, "unit": "%", "digits": 1, "interval": True}]
    assert render(repo, columns=columns).splitlines()[2:] == ["| asa | 50.0 [40.0, 62.5]% |"]


def test_pivot_makes_a_column_of_each_value(repo):
    column = {"title": "{}, time", "pivot": "variant", "where": {"metric": "time"}, "unit": "s"}
    text = render(repo, rows=["metric"], columns=[column])
    assert text.splitlines()[::2] == ["| metric | asa, time | dense, time |", "| time | 0.25 s | 1.00 s |"]
    column = {"pivot": "variant", "values": {"dense": "all pairs"}}
    text = render(repo, rows=["metric"], where={"metric": "time"}, columns=[column])
    assert text.splitlines()[::2] == ["| metric | all pairs |", "| time | 1.00 s |"]
    with pytest.raises(
        tables.TableError, match=r"no result has variant = 'sparse'; expected some of \['asa', 'dense'\]"
    ):
        render(repo, rows=["metric"], columns=[{"pivot": "variant", "values": ["sparse"]}])


def test_what_each_column_is_unless_it_says_otherwise(repo):
    columns = [{"title": "a"}, {"title": "b", "digits": 3, "unit": "second"}]
    text = render(repo, where={"metric": "time"}, each={"digits": 0, "unit": "s", "scale": 10}, columns=columns)
    assert text.splitlines()[2:] == ["| asa | 2 s | 2.500 second |", "| dense | 10 s | 10.000 second |"]


@pytest.mark.parametrize(
    ("value", "shown"), [(4e-5, "< 0.0001"), (6e-5, "0.0001"), (0.0, "0.0000"), (-4e-5, "-0.0000"), (1.0, "1.0000")]
)
def test_a_small_value_is_never_shown_as_zero(repo, value, shown):
    (repo / "results/a/x.json").write_text(json.dumps({"rows": [{"metric": "p", "value": value, "variant": "asa"}]}))
    assert render(repo, columns=[{"title": "p", "digits": 4}]).splitlines()[2:] == [f"| asa | {shown} |"]


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
    text = render(repo, rows=["shape", "density"], columns=columns)
    assert text.splitlines()[2:] == ["| 480p | 0.5 | 2.00 ms | 400 | 1.50x |", "| 480p | 0.1 | 0.50 ms | 400 | 6.00x |"]


def test_labels_are_fields_and_empty_groups_are_left_out(repo):
    text = render(repo, rows=["shape"], columns=[{"title": "t", "where": {"metric": "ms"}}])
    assert text.splitlines()[2:] == ["| 480p | 3.00 ms |"]


def test_results_are_told_apart_by_their_file(repo):
    other = [row | {"value": 2 * row["value"]} for row in ROWS]
    (repo / "results" / "a" / "y.json").write_text(json.dumps({"environment": ENVIRONMENT, "rows": other}))
    columns = [{"title": "t", "where": {"metric": "psnr"}, "digits": 1}]
    found = render(repo, files=["*.json"], rows=[{"field": "file", "names": {"y.json": "twice"}}], columns=columns)
    assert [line.split(" | ") for line in found.splitlines()[2:4]] == [
        ["| x.json", "31.2 dB |"],
        ["| twice", "62.5 dB |"],
    ]


def test_local_changes_and_missing_environment_are_said(repo):
    (repo / "results/a/y.json").write_text(json.dumps({"environment": ENVIRONMENT | {"dirty": True}, "rows": []}))
    (repo / "results/a/z.json").write_text(json.dumps({"rows": []}))
    text = render(repo, files=["*.json"], caption=True)
    assert "commit 0123456789 with local changes; from `results/a/y.json`" in text
    assert "Measured on hardware not recorded, commit not recorded; from `results/a/z.json`" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ["none.json"]}, "there is no file results/a/none.json"),
        ({"where": {"metric": "none"}}, "no result fits"),
        ({"colums": []}, "unknown colums; expected"),
        ({"columns": [{"titel": "x"}]}, "unknown titel"),
        ({"columns": []}, "columns is missing"),
        ({"columns": [{"title": "t"}]}, r"asa, column 't': 3 results fit"),
    ],
)
def test_bad_spec(repo, changes, message):
    with pytest.raises(tables.TableError, match=message):
        render(repo, **changes)


def test_unfinished_run_unclosed_marker_and_unknown_table(repo):
    with pytest.raises(tables.TableError, match="1 tables are opened and 0 are closed"):
        update(repo, README.replace("<!-- /table -->", ""))
    with pytest.raises(tables.TableError, match=r"results/a/tables\.toml has no table qualities; it has quality"):
        update(repo, README.replace("quality", "qualities"))
    (repo / "results/a/x.json").write_text(json.dumps({"status": "failed", "rows": ROWS}))
    with pytest.raises(tables.TableError, match=r"table quality: results/a/x\.json: its run is failed"):
        update(repo)


def test_examples_in_fences_stay(repo):
    text = "```\n" + README.replace("quality", "none") + "\n```\n"
    assert update(repo, text) == text


def test_check_fails_on_a_difference_and_writing_mends_it(repo, monkeypatch, capsys):
    readme = repo / "packages" / "a" / "README.md"
    readme.parent.mkdir(parents=True)
    readme.write_text(README)

    def main(*options):
        monkeypatch.setattr("sys.argv", ["tables.py", *options, "--root", str(repo)])
        return tables.main(), capsys.readouterr().out

    code, out = main("--check")
    assert code == 1
    assert "packages/a/README.md: differs from results/" in out
    assert readme.read_text() == README
    assert main()[0] == 0
    assert main("--check")[0] == 0
    readme.write_text(readme.read_text().replace("31.2", "31.3"))
    assert main("--check")[0] == 1


def test_a_table_that_no_readme_shows_is_a_problem(repo):
    (repo / "README.md").write_text("# T\n")
    assert tables.run(repo, write=False) == ["results/a/tables.toml: no README shows quality"]
    (repo / "b").mkdir()
    (repo / "b" / "README.md").write_text(README)
    (problem, _) = tables.run(repo, write=False)
    assert problem.startswith("b/README.md: ")
    assert "results/b/tables.toml" in problem
