import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hone_core import runs
from hone_core.runs import Row, Run, export_results, load_results


@dataclass(frozen=True)
class Config:
    block: int = 128
    layers: tuple[int, ...] = (1, 2)


def start(out, config=None, **kwargs):
    return Run.start(
        **{"package": "hone-core", "verb": "demo", "out": out, "seed": 3} | kwargs, config=config or Config()
    )


def test_files_of_a_finished_run(tmp_path):
    with start(tmp_path / "run", preset="tiny") as run:
        assert load_results(run.path)["status"] == "running"
        run.log(step=1, loss=0.5)
        run.log(step=2, loss=float("nan"))
        run.row("psnr", 31.5, unit="dB", better="higher", n=4, spread=0.25, variant="asa", split="val", paper_value=30)
        (run.figures / "a.txt").write_text("x")
        (run.artifacts / "b.txt").write_text("x")
    results = json.loads((run.path / "results.json").read_text())
    assert {k: results[k] for k in ("schema", "package", "version", "verb", "preset", "seed", "status")} == {
        "schema": 1,
        "package": "hone-core",
        "version": "0.2.0",
        "verb": "demo",
        "preset": "tiny",
        "seed": 3,
        "status": "done",
    }
    assert results["seconds"] >= 0
    assert results["rows"] == [
        {
            "metric": "psnr",
            "value": 31.5,
            "unit": "dB",
            "better": "higher",
            "n": 4,
            "spread": 0.25,
            "variant": "asa",
            "split": "val",
            "paper_value": 30.0,
        }
    ]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": "nan"}]
    assert json.loads((run.path / "config.json").read_text()) == {"block": 128, "layers": [1, 2]}
    assert json.loads((run.path / "environment.json").read_text())["packages"]["hone-core"] == "0.2.0"
    assert {p.name for p in run.path.iterdir()} == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "results.json",
        "figures",
        "artifacts",
    }


def test_crash_leaves_status_and_message_then_resumes(tmp_path):
    def attempt(crash):
        with start(tmp_path) as run:
            first = not run.resumed
            run.log(step=1 if first else 2, loss=1.0)
            run.row("kept", 1.0, better="none") if first else None
            run.row("again", 1.0 if first else 2.0, better="none")
            if crash:
                raise RuntimeError("out of memory")
        return run

    with pytest.raises(RuntimeError, match="out of memory"):
        attempt(crash=True)
    failed = load_results(tmp_path)
    assert failed["status"] == "failed"
    assert failed["message"] == "RuntimeError: out of memory"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    (tmp_path / "results.json").write_text(json.dumps(failed | {"seconds": 100.0}))

    run = attempt(crash=False)
    assert run.resumed
    done = load_results(tmp_path)
    assert done["status"] == "done"
    assert "message" not in done
    assert done["started"] == failed["started"]
    assert done["seconds"] >= 100
    assert [(row["metric"], row["value"]) for row in done["rows"]] == [("kept", 1.0), ("again", 2.0)]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_rows_are_there_while_it_runs(tmp_path):
    with start(tmp_path) as run:
        run.row("kept", 1.0, better="none")
        assert load_results(tmp_path)["rows"] == []
        run.save()
        stored = load_results(tmp_path)
        assert stored["status"] == "running"
        assert [row["metric"] for row in stored["rows"]] == ["kept"]
    again = start(tmp_path)
    assert again.done
    with pytest.raises(RuntimeError, match="finished run"):
        again.save()


def test_lines_logged_after_later_steps_were_forgotten_are_kept(tmp_path):
    with start(tmp_path / "run") as run:
        for step in (1, 2, 3):
            run.log(step=step, loss=0.5)
        run.forget_after(1)
        run.log(step=2, loss=0.25)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.25)]


def test_a_log_that_is_damaged_is_named(tmp_path):
    with start(tmp_path / "run") as run:
        run.log(step=1, loss=0.5)
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write("\0\0\0\n")  # as a power failure leaves
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged .*; move it away to go on without it"):
            run.forget_after(1)


def test_row_of_the_end(tmp_path):
    with start(tmp_path) as run:
        run.log(step=1, loss=9.0)
        assert run.row_of_end("loss").value == 9  # of one line
        for step in range(2, 25):
            run.log(step=step, loss=step / 2)
        row = run.row_of_end("loss", unit="nats", variant="v")
    assert (row.value, row.n, row.better, row.unit, row.variant) == (11.75, 2, "lower", "nats", "v")


def test_finished_run_is_returned_untouched(tmp_path):
    with start(tmp_path) as run:
        run.row("psnr", 1.0, better="higher")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with start(tmp_path) as again:
        assert again.done
        assert not again.resumed
        assert again.rows == run.rows
        with pytest.raises(RuntimeError, match=r"check run\.done first"):
            again.row("psnr", 2.0, better="higher")
        with pytest.raises(RuntimeError, match="finished run"):
            again.log(step=1, loss=0.0)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_config_is_compared_as_a_file_gives_it_back(tmp_path):
    for done in (False, True):
        with start(tmp_path, config={"layers": (1, 2)}) as run:
            assert run.done is done


def test_finished_run_is_taken_up_again(tmp_path):
    with start(tmp_path / "run") as run:
        run.row("psnr", 30, better="higher")
        run.row("failed", 2, better="lower")
    again = start(tmp_path / "run")
    again.reopen()
    with again:
        assert load_results(again.path)["status"] == "running"
        again.row("failed", 0, better="lower")
        with pytest.raises(RuntimeError, match="holds no finished run"):
            again.reopen()
    results = load_results(again.path)
    assert results["status"] == "done"
    assert {row["metric"]: row["value"] for row in results["rows"]} == {"psnr": 30, "failed": 0}
    assert start(tmp_path / "run").done


def test_a_corrected_command_takes_over_what_failed_before_it_made_anything(tmp_path):
    def fail(out, make):
        with start(out) as run:
            assert run.artifacts.is_dir()
            make(run)
            raise RuntimeError("no such size")

    with pytest.raises(RuntimeError, match="no such size"):
        fail(tmp_path / "run", lambda run: None)
    with start(tmp_path / "run", Config(block=64)) as run:
        assert not run.resumed
    assert json.loads((tmp_path / "run" / "config.json").read_text())["block"] == 64
    assert load_results(run.path)["status"] == "done"
    assert "message" not in load_results(run.path)
    makes = {
        "log": lambda run: run.log(step=0, loss=1.0),
        "row": lambda run: run.row("psnr", 1.0, better="higher"),
        "file": lambda run: (run.artifacts / "a.txt").write_text("x"),
    }
    for made, make in makes.items():
        with pytest.raises(RuntimeError, match="no such size"):
            fail(tmp_path / made, make)
        with pytest.raises(FileExistsError, match=r"\(block 128 there, 64 here\)"):
            start(tmp_path / made, Config(block=64))


def test_a_place_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"no run folder can be made at .*file/run \(Not a directory\); choose another"):
        start(tmp_path / "file" / "run").__enter__()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": Config(block=64)}, r"\(block 128 there, 64 here\)"),
        ({"config": {"block": 128}}, r"\(layers 1 2 there, no such setting here\)"),
        ({"seed": 4}, r"\(seed 3 there, 4 here\)"),
        ({"verb": "bench"}, r"\(verb demo there, bench here\)"),
        ({"preset": "tiny"}, r"\(preset not given there, tiny here\)"),
        # The preset follows from the settings, and those of another verb are others anyway.
        ({"preset": "tiny", "config": Config(block=64)}, r"\(block 128 there, 64 here\)"),
        ({"verb": "bench", "config": {"rounds": 3}}, r"\(verb demo there, bench here\)"),
        ({"seed": 4, "config": Config(block=64)}, r"\(seed 3 there, 4 here, block 128 there, 64 here\)"),
        ({"config": Config(block=64), "flags": {"block": "--block"}}, r"\(--block 128 there, 64 here\)"),
    ],
)
def test_another_command_is_refused(tmp_path, change, message):
    with start(tmp_path):
        pass
    with pytest.raises(FileExistsError, match=message):
        start(tmp_path, **change)


@pytest.mark.parametrize(("count", "end"), [(5, r"here\)"), (7, r"here, and 2 more\)")])
def test_a_refusal_counts_the_differences_that_it_does_not_name(tmp_path, count, end):
    with start(tmp_path, config={f"k{index}": 0 for index in range(count)}):
        pass
    with pytest.raises(FileExistsError, match=rf"\(k0 0 there, 1 here, .*k4 0 there, 1 {end}"):
        start(tmp_path, config={f"k{index}": 1 for index in range(count)})


def test_foreign_folder_and_file_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty and holds no run"):
        start(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        start(tmp_path / "notes.txt")


def test_default_folders_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(2):
        with start(None, preset="tiny") as run:
            paths.append(run.path)
    assert paths[0] != paths[1]
    assert all(path.parent.as_posix() == "runs/hone-core/demo" for path in paths)
    assert paths[0].name.endswith("-tiny-3")


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = [start(None, Config(block=block)) for block in (64, 32)]
    assert both[0].path != both[1].path
    for run in both:
        with run:
            run.row("block", run._config["block"], better="none")
    for run in both:
        stored = json.loads((run.path / "config.json").read_text())["block"]
        assert [row["value"] for row in load_results(run.path)["rows"]] == [stored]


def test_a_folder_that_another_process_writes_is_refused_until_it_ends(tmp_path):
    with start(tmp_path) as run:
        run.log(step=1, loss=1.0)
        other = start(tmp_path)
        with pytest.raises(FileExistsError, match=r"another process is running in .*; wait until it has ended, or"):
            other.__enter__()
        assert load_results(tmp_path)["status"] == "running"
        run.row("kept", 1.0, better="none")
    assert [row.metric for row in start(tmp_path).rows] == ["kept"]


def test_a_process_that_was_killed_lets_its_folder_go(tmp_path):
    code = (
        "import os, sys; from hone_core.runs import Run; "
        "run = Run.start(package='hone-core', verb='demo', out=sys.argv[1], config={}); "
        "run.__enter__(); run.log(step=1, loss=1.0); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False).returncode == 9
    with Run.start(package="hone-core", verb="demo", out=tmp_path / "run", config={}) as run:
        assert run.resumed
    assert load_results(tmp_path / "run")["status"] == "done"


def test_what_is_stopped_as_it_begins_can_be_repeated(tmp_path, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "environment", stop)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "run").__enter__()
    assert not start(tmp_path / "run").resumed
    # Killed between two of its files, or within one.
    (tmp_path / "run").mkdir(exist_ok=True)
    for name in ("config.json", ".environment-ab12.json"):
        (tmp_path / "run" / name).write_text("{")
    with start(tmp_path / "run", Config(block=64)) as run:
        assert not run.resumed
    assert load_results(tmp_path / "run")["status"] == "done"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_row_refuses_values_that_are_not_finite(value):
    with pytest.raises(ValueError, match="psnr: value must be finite"):
        Row(metric="psnr", value=value, better="higher")


def test_row_refuses_unknown_direction_and_empty_count():
    with pytest.raises(ValueError, match="higher, lower, none; got 'up'"):
        Row(metric="psnr", value=1.0, better="up")
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        Row(metric="psnr", value=1.0, better="higher", n=0)


def test_interval_is_stored_and_checked(tmp_path):
    with start(tmp_path) as run:
        row = run.row("accuracy", 0.5, better="higher", n=64, interval=(0.4, 0.6))
    assert load_results(tmp_path)["rows"][0]["interval"] == [0.4, 0.6]
    assert start(tmp_path).rows == [row]
    for bad in [(0.6, 0.4), (0.1, 0.2, 0.3)]:
        with pytest.raises(ValueError, match=r"interval must be \(low, high\)"):
            Row(metric="accuracy", value=0.5, better="higher", interval=bad)
    with pytest.raises(ValueError, match="interval must be finite"):
        Row(metric="accuracy", value=0.5, better="higher", interval=(0.0, float("inf")))


def test_labels_tell_rows_apart(tmp_path):
    with start(tmp_path) as run:
        run.row("time", 1.0, unit="ms", better="lower", labels={"shape": "480p"})
        run.row("time", 2.0, unit="ms", better="lower", labels={"shape": "720p"})
        run.row("time", 3.0, unit="ms", better="lower", labels={"shape": "480p"})
    rows = load_results(tmp_path)["rows"]
    assert [(row["labels"]["shape"], row["value"]) for row in rows] == [("720p", 2.0), ("480p", 3.0)]


def test_export_refuses_uncommitted_code_unless_told(tmp_path, monkeypatch):
    real = runs.environment
    monkeypatch.setattr(runs, "environment", lambda: real() | {"commit": "0123456789abcdef", "dirty": True})
    with start(tmp_path / "run") as run:
        run.row("psnr", 1.0, better="higher")
    with pytest.raises(ValueError, match=r"expected a run of committed code.* on top of commit 0123456789, or"):
        export_results(run.path, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    data = json.loads(export_results(run.path, tmp_path / "out.json", allow_dirty=True).read_text())
    assert data["environment"]["dirty"] is True


@pytest.mark.parametrize(
    ("first", "last", "clean"),
    [(("a", False), ("a", False), True), (("a", True), ("a", False), False), (("a", False), ("b", False), False)],
)
def test_a_run_is_as_clean_as_its_first_part(tmp_path, monkeypatch, first, last, clean):
    made = [(first, "one"), (last, "two"), (last, "three")]
    for (commit, dirty), metric in made:
        code = {"commit": commit, "dirty": dirty}
        monkeypatch.setattr(runs, "environment", lambda code=code: code)
        with contextlib.suppress(KeyboardInterrupt), start(tmp_path / "run") as run:
            run.row(metric, 1.0, better="none")
            if metric != "three":
                raise KeyboardInterrupt
    if clean:
        data = json.loads(export_results(run.path, tmp_path / "out.json").read_text())
        assert data["environment"] == {"commit": "a", "dirty": False}
    else:
        with pytest.raises(ValueError, match="from its start to its end of one commit"):
            export_results(run.path, tmp_path / "out.json")


def test_what_a_failed_start_left_makes_no_run_unclean(tmp_path, monkeypatch):
    for dirty in (True, False):
        monkeypatch.setattr(runs, "environment", lambda dirty=dirty: {"commit": "a", "dirty": dirty})
        with contextlib.suppress(KeyError), start(tmp_path / "run") as run:
            if dirty:
                raise KeyError("x")
    assert json.loads(export_results(run.path, tmp_path / "out.json").read_text())["environment"]["dirty"] is False


def test_export_joins_results_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HONE_COMMIT", "0123456789abcdef")
    with start(tmp_path / "run") as run:
        run.row("psnr", 1.0, better="higher")
    data = json.loads(export_results(run.path, tmp_path / "out.json").read_text())
    assert data["rows"][0]["value"] == 1.0
    assert data["environment"]["python"]
    assert data["config"]["block"] == 128
    assert data["config"]["layers"] == [1, 2]
    with pytest.raises(KeyError), start(tmp_path / "bad") as bad:
        raise KeyError("x")
    with pytest.raises(ValueError, match="its status is failed"):
        export_results(bad.path, tmp_path / "bad.json")


def test_export_cuts_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "environment", lambda: {"commit": "0123456789abcdef", "dirty": False})
    paths = {"hosts": [str(tmp_path / "a.safetensors"), "b/c.json"], "source": {"model": str(tmp_path / "m")}, "n": 1}
    paths["prompt"] = "/a cat and a dog"
    with start(tmp_path / "run", config=paths) as run:
        pass
    data = json.loads(export_results(run.path, tmp_path / "out.json").read_text())
    assert data["config"] == {"hosts": ["a.safetensors", "b/c.json"], "source": {"model": "m"}, "n": 1} | {
        "prompt": "/a cat and a dog"
    }
    assert json.loads((run.path / "config.json").read_text()) == paths


def test_load_results_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 1"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"results\.json: not JSON"):
        load_results(tmp_path)


def test_a_run_whose_files_are_damaged_is_named(tmp_path):
    with start(tmp_path):
        pass
    whole = (tmp_path / "results.json").read_text()
    (tmp_path / "results.json").write_text('{"schema": 1, "package": "hone-core", "verb": "demo", "status": "done"}')
    with pytest.raises(ValueError, match=r"results\.json: .*; it lacks preset, seed, started, seconds, rows"):
        start(tmp_path)
    (tmp_path / "results.json").write_text(whole)
    for damage in (b"{", b"\xff"):
        (tmp_path / "config.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"config\.json: expected a JSON config; "):
            start(tmp_path)


def test_results_of_a_run_are_those_on_disk(tmp_path):
    with start(tmp_path) as run:
        run.row("psnr", 1.0, better="higher")
        assert run.results()["rows"] == []
    assert run.results() == load_results(tmp_path)
