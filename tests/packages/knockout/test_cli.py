import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hone_core.config import to_dict
from hone_core.runs import Run
from hone_knockout import cli
from hone_knockout.config import SIZES, BenchConfig, Source, TrainConfig
from hone_knockout.data import generated_items
from hone_knockout.sources import source_of_run

ASK = ["generate", "--model", "M", "--ask", "?"]


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.run_cli("hone-knockout", cli.VERBS, "", list(map(str, argv)))
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


@pytest.fixture(scope="module")
def folder(host, tmp_path_factory):
    """A model folder and a question file with its videos."""
    path = tmp_path_factory.mktemp("model")
    host.model.save_pretrained(path / "model")
    host.processor.save_pretrained(path / "model")
    lines = []
    for index, item in enumerate(generated_items(8, host.config.clip)):
        np.save(path / f"{index}.npy", item.clip.frames.permute(0, 2, 3, 1).numpy())
        lines.append({"video": f"{index}.npy", "question": item.question, "options": list(item.options)})
        lines[-1] |= {"answer": item.answer, "category": item.category}
    (path / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def test_info(capsys):
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0
    assert "llava_onevision" in json.loads(out)["layouts"]


def test_demo_at_its_smallest(capsys, host_file, tmp_path):
    argv = ["demo", "--host", host_file, "--limit", 8, "--out", tmp_path / "run", "--quiet"]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "chance level" in out
    assert run(capsys, *argv)[1] == out


def test_inspect(capsys, host_file, folder, tmp_path):
    code, out, _ = run(capsys, "inspect", "--host", host_file, "--save", tmp_path / "l.json")
    assert code == 0
    assert "4 frames of 9 tokens" in out
    assert (tmp_path / "l.json").exists()
    code, again, _ = run(
        capsys,
        "inspect",
        "--model",
        folder / "model",
        "--video",
        folder / "0.npy",
        "--ask",
        "what shape is the red one ?",
    )
    assert code == 0
    assert "4 frames of 9 tokens" in again
    assert "4 frames sampled" in again


def test_generate(capsys, folder, tmp_path):
    ask = ["generate", "--model", folder / "model", "--video", folder / "0.npy", "--ask", "where is the white dot ?"]
    whole = [*ask, "--exit", 3, "--local", "0-1", "--max-new-tokens", 2, "--out", tmp_path / "a"]
    code, out, err = run(capsys, *whole)
    assert code == 0, err
    assert "VT 0-1 + exit 3" in out
    assert run(capsys, *whole) == (0, out, "")
    scored = ["--knock", "LV", "--layers", "2-", "--option", "up", "down", "--out", tmp_path / "b"]
    code, out, _ = run(capsys, *ask, *scored, "--json")
    assert code == 0
    assert list(json.loads(out)["answers"]) == ["baseline", "LV 2-4"]


def test_eval_recommend_and_plot(capsys, folder, tmp_path):
    argv = ["eval", "--model", folder / "model", "--data", folder / "qa.jsonl", "--setting", "global1", "local"]
    argv += ["--step", 1, "--batch", 4, "--frames", 4, "--out", tmp_path / "run", "--quiet"]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "global1 LV 2-4" in out
    assert (tmp_path / "run" / "figures" / "sweep.png").exists()
    code, again, _ = run(capsys, *argv)
    assert (code, again) == (0, out)
    code, out, err = run(
        capsys, "recommend", "--run", tmp_path / "run", "--max-drop", 100, "--out", tmp_path / "rec", "--quiet"
    )
    assert code == 0, err
    assert "both together, on the reporting half" in out
    assert "exit and LV-K in the same layers differ by at most" in out
    rows = json.loads((tmp_path / "rec" / "results.json").read_text())["rows"]
    assert [row["value"] < 1e-3 for row in rows if row["metric"] == "exit_gap"] == [True]
    chosen = ["recommend", "--run", tmp_path / "run", "--max-drop", 100, "--no-verify", "--out", tmp_path / "chosen"]
    code, shown, _ = run(capsys, *chosen, "--json")
    assert code == 0
    found = json.loads(shown)
    assert (found["recipe"]["exit"], found["recipe"]["window"], found["recipe"]["window_alone"]) == (1, 1, 5)
    assert found["rows"] == []
    # The same command again gives the same; another budget or another run in its place is refused.
    again = ["--out", tmp_path / "rec", "--quiet"]
    assert run(capsys, "recommend", "--run", tmp_path / "run", "--max-drop", 100, *again)[1] == out
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for argv in (["--run", tmp_path / "run", "--max-drop", 99], ["--run", tmp_path / "other", "--max-drop", 100]):
        code, shown, err = run(capsys, "recommend", *argv, *again)
        assert (code, shown) == (1, "")
        assert "holds" in err
    code, out, _ = run(capsys, "plot", "--run", tmp_path / "run", "--save", tmp_path / "p.svg")
    assert code == 0
    assert Path(out.strip()).exists()


@pytest.mark.parametrize("source", ["model", "host"])
def test_recommend_from_another_directory(capsys, folder, copy_host, tmp_path, monkeypatch, source):
    """The eval run names everything from the directory that it was started in."""
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    shutil.copytree(folder, here)
    copy_host(here / "host.safetensors")
    monkeypatch.chdir(here)
    data = ["--model", "model", "--data", "qa.jsonl", "--videos", ".", "--frames", 4]
    flags = data if source == "model" else ["--host", "host.safetensors", "--limit", 8]
    argv = ["eval", *flags, "--setting", "global1", "--step", 2, "--batch", 4, "--out", "run", "--quiet"]
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    stored = json.loads((here / "run" / "config.json").read_text())["source"]
    paths = [stored[name] for name in ("model", "data", "videos", "host") if stored[name] is not None]
    assert paths
    assert all(Path(value).is_absolute() for value in paths)
    monkeypatch.chdir(there)
    rest = ["--max-drop", 100, "--out", tmp_path / "rec", "--quiet"]
    code, out, err = run(capsys, "recommend", "--run", "../here/run", *rest)
    assert code == 0, err
    assert "both together, on the reporting half" in out
    # The same run under another name is the same command.
    monkeypatch.chdir(here)
    assert run(capsys, "recommend", "--run", "run", *rest) == (0, out, "")
    moved = {"model": "qa.jsonl", "host": "host.safetensors"}[source]
    (here / moved).rename(here / "moved")
    code, out, err = run(capsys, "recommend", "--run", here / "run", *rest[:2], "--out", tmp_path / "again")
    assert (code, out) == (1, "")
    assert f"was expected at {here / moved} and is not there" in err
    assert "config.json" in err
    # What is read of the run alone still is.
    alone = ["recommend", "--run", here / "run", *rest[:2], "--no-verify", "--out", tmp_path / "alone"]
    assert run(capsys, *alone)[0] == 0
    if source == "model":
        (here / "model").rename(here / "model2")
        code, _, err = run(capsys, *alone[:-1], tmp_path / "alone2")
        assert code == 1
        assert f"model of the run {here / 'run'} was expected at {here / 'model'}" in err


def test_recommend_of_a_run_of_another_verb(capsys, tmp_path):
    with Run.start(package="hone-knockout", verb="bench", config=to_dict(BenchConfig()), out=tmp_path / "run"):
        pass
    code, out, err = run(capsys, "recommend", "--run", str(tmp_path / "run"))
    assert (code, out) == (1, "")
    assert "is a run of bench; expected one that hone-knockout eval wrote" in err


def test_a_source_is_looked_for_in_the_run_s_folder_too(tmp_path):
    (tmp_path / "qa.jsonl").touch()
    source = Source(data=Path("qa.jsonl"), model="llava-hf/llava-onevision-qwen2-7b-ov-hf", limit=3)
    assert source_of_run(tmp_path, source) == replace(source, data=tmp_path / "qa.jsonl")
    with pytest.raises(FileNotFoundError, match="data of the run"):
        source_of_run(tmp_path, replace(source, data=Path("none.jsonl")))


def test_tokens_per_frame_on_the_command_line(capsys, folder, tmp_path):
    ask = ["--model", folder / "model", "--video", folder / "0.npy", "--ask", "what shape is the red one ?"]
    code, out, err = run(capsys, "inspect", *ask, "--tokens-per-frame", 6)
    assert code == 0, err
    assert "6 frames of 6 tokens" in out
    code, _, err = run(capsys, "inspect", *ask, "--tokens-per-frame", 7)
    assert code == 1
    assert "tokens_per_frame=7 does not divide a run of 36 video tokens" in err
    knock = ["--tokens-per-frame", 6, "--knock", "VT", "--max-new-tokens", 1, "--out", tmp_path / "answer"]
    code, out, err = run(capsys, "generate", *ask, *knock)
    assert code == 0, err
    assert "6 frames of 6 tokens" in out
    data = ["--model", folder / "model", "--data", folder / "qa.jsonl", "--setting", "global2", "--knock", "VT"]
    data += ["--frames", 4, "--tokens-per-frame", 6, "--out", tmp_path / "run", "--quiet"]
    code, _, err = run(capsys, "eval", *data)
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tokens_per_frame"] == 6


def test_failed_questions_are_counted_and_asked_again(capsys, folder, tmp_path):
    for name in ("qa.jsonl", *(f"{index}.npy" for index in range(8))):
        shutil.copy(folder / name, tmp_path / name)
    (tmp_path / "3.npy").rename(tmp_path / "away.npy")
    argv = ["eval", "--model", folder / "model", "--data", tmp_path / "qa.jsonl", "--setting", "global2"]
    argv += ["--knock", "LV", "--frames", 4, "--out", tmp_path / "run", "--quiet"]
    hint = f"the same command with --out {tmp_path / 'run'} --retry-failed asks them again"
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "; 7 questions" in out
    assert "1 of 8 questions left out: there is no video" in out
    assert hint in out
    chart = tmp_path / "run" / "figures" / "sweep.png"
    first = chart.read_bytes()
    # Still away, then there but not asked for, then asked for.
    assert run(capsys, *argv, "--retry-failed")[1] == out
    (tmp_path / "away.npy").rename(tmp_path / "3.npy")
    code, again, err = run(capsys, *argv)
    assert (code, again) == (0, out)
    code, whole, err = run(capsys, *argv, "--retry-failed")
    assert code == 0, err
    assert "; 8 questions" in whole
    assert "left out" not in whole
    assert "--retry-failed" not in whole
    assert chart.read_bytes() != first
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["value"] for row in rows if row["metric"] == "failed_items"] == [0]
    answers = (tmp_path / "run" / "artifacts" / "answers.jsonl").read_text().splitlines()
    assert len([line for line in answers if "results" in json.loads(line)]) == 8
    # Nothing is left to ask.
    assert run(capsys, *argv, "--retry-failed")[1] == whole


def test_eval_of_the_host(capsys, host_file, tmp_path):
    code, out, err = run(
        capsys, "eval", "--host", host_file, "--limit", 8, "--setting", "global2", "--knock", "LV", "--random-control",
        "--batch", 8, "--out", tmp_path / "run", "--quiet",
    )  # fmt: skip
    assert code == 0, err
    assert "global2 LV random 0-4" in out


def test_bench(capsys, tmp_path):
    argv = ["bench", "--model", "tiny", "--frames", 4, "--rounds", 1, "--device", "cpu", "--out", tmp_path / "b"]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "exit + window" in out
    assert run(capsys, *argv)[1] == out


def test_train_host(capsys, tmp_path, small, monkeypatch):
    code, out, _ = run(capsys, "train-host", "--dry-run", "--steps", 3, "--json")
    assert code == 0
    assert json.loads(out)["config"]["steps"] == 3
    tiny = TrainConfig(host=small, batch=4, warmup_steps=1, eval_every=2, eval_clips=8, log_every=1)
    monkeypatch.setitem(SIZES, "small", tiny)
    argv = ["train-host", "--size", "small", "--steps", 2, "--seed", 3, "--device", "cpu", "--out", tmp_path / "run"]
    code, out, err = run(capsys, *argv, "--quiet")
    assert code == 0, err
    assert "2 steps in" in out
    assert run(capsys, *argv, "--quiet")[1] == out
    made = json.loads((tmp_path / "run" / "artifacts" / "host.json").read_text())
    assert made["command"] == " ".join(map(str, ["hone-knockout", *argv, "--quiet"]))
    assert made["seed"] == 3


def test_hosts_of_reproduce_are_named_for_any_directory(capsys, copy_host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        copy_host(tmp_path / f"{name}.safetensors")
    code, out, _ = run(capsys, "reproduce", "--hosts", "a.safetensors", "b.safetensors", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["config"]["hosts"] == [str(tmp_path / f"{name}.safetensors") for name in "ab"]


def test_a_flag_of_many_values_may_be_repeated(capsys, folder, host_file):
    code, out, err = run(capsys, "bench", "--frames", 8, "--frames", 16, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["config"]["frames"] == [8, 16]
    ask = ["generate", "--model", folder / "model", "--video", folder / "0.npy", "--ask", "where ?", "--dry-run"]
    more = ["--option", "up", "--option", "down", "left", "--knock", "VT", "--knock", "VS", "--layers", "0-1"]
    code, out, err = run(capsys, *ask, *more, "--json")
    assert code == 0, err
    cfg = json.loads(out)["config"]
    assert cfg["options"] == ["up", "down", "left"]
    assert cfg["knock"] == ["VT", "VS"]
    flags = ["--host", host_file, "--setting", "global1", "--setting", "local", "--limit", 8]
    code, out, err = run(capsys, "eval", *flags, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["config"]["settings"] == ["global1", "local"]


def test_reproduce_looks_for_every_host_before_it_starts(capsys, host_file, tmp_path):
    out = tmp_path / "run"
    code, _, err = run(capsys, "reproduce", "--hosts", host_file, tmp_path / "b.safetensors", "--out", out)
    assert code == 1
    assert f"there is no tiny host at {tmp_path / 'b.safetensors'}" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--video", "bad.mp4"], "could not be decoded as a video"),
        (["--start", "99"], "no frame between 99 s"),
        (["--tokens-per-frame", "7"], "does not divide a run of 36"),
        (["--option", *map(str, range(27))], "there are letters for 26 options; got 27"),
        (["--option", "up", "up"], "options must differ"),
        (["--option", "up"], "one option is no choice"),
        (["--knock", "LV", "LV"], "named twice in --knock LV LV"),
    ],
)
def test_generate_looks_at_video_and_options_before_the_weights(capsys, folder, tmp_path, monkeypatch, more, message):
    """The folder of this model has no weights."""
    shutil.copytree(folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    monkeypatch.chdir(tmp_path)
    video = [] if "--video" in more else ["--video", folder / "0.npy"]
    code, out, err = run(capsys, "generate", "--model", "model", *video, "--ask", "where ?", *more)
    assert (code, out) == (1, "")
    assert message in err


def test_options_that_begin_alike_are_seen_before_the_weights(capsys, folder, monkeypatch):
    def clash(*_, **__):
        raise ValueError("cannot be told apart")

    monkeypatch.setattr("hone_knockout.sample.option_token_ids", clash)
    monkeypatch.setattr("hone_knockout.sample.load_model", lambda *_, **__: pytest.fail("weights were read"))
    ask = ["--model", folder / "model", "--video", folder / "0.npy", "--ask", "where ?", "--option", "up", "down"]
    code, _, err = run(capsys, "generate", *ask)
    assert code == 1
    assert "cannot be told apart" in err


def test_what_needs_no_torch_loads_none():
    commands = {
        "generate --model M --video none.mp4 --ask ?": 1,
        "inspect --model M --video none.mp4 --ask ?": 1,
        "eval --model M --data none.jsonl": 1,
        "eval --host none.safetensors": 1,
        "reproduce --hosts none.safetensors": 1,
        "demo --host none.safetensors --dry-run": 1,
        "reproduce --dry-run": 0,
    }
    script = (
        "import sys\nfrom hone_knockout import cli\n"
        f"for argv in {list(commands)}:\n"
        "    try:\n        cli.run_cli('hone-knockout', cli.VERBS, '', argv.split())\n"
        "    except SystemExit as stop:\n        print('CODE', stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    codes = [line for line in done.stdout.splitlines() if line.startswith("CODE")]
    assert codes == [f"CODE {code} False" for code in commands.values()], done.stderr


def test_plot_of_a_run_that_is_not_finished(capsys, tmp_path):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "results.json").write_text(json.dumps({"schema": 1, "status": "failed", "rows": []}))
    code, _, err = run(capsys, "plot", "--run", run_folder)
    assert code == 1
    assert "is not finished; resume it" in err


def test_hub_that_cannot_be_reached(capsys, folder, monkeypatch):
    def lost(address, file):
        raise OSError("We couldn't connect to the hub. Check your connection.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lost)
    code, _, err = run(
        capsys, "generate", "--model", "lab/no-such-model", "--video", folder / "0.npy", "--ask", "?", "--dry-run"
    )
    assert code == 1
    for part in ("there is no folder lab/no-such-model here", "We couldn't connect to the hub)", "--model", "network"):
        assert part in err


@pytest.mark.parametrize("verb", ["demo", "bench", "reproduce", "train-host"])
def test_dry_run_does_nothing(capsys, verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, verb, "--dry-run")
    assert code == 0
    assert "config" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*ASK, "--video", "none.mp4"], "there is no video"),
        ([*ASK, "--video", "V", "--preset", "x"], "preset must be one of"),
        ([*ASK, "--video", "V", "--preset", "exit-7b", "--exit", "3"], "preset stands for"),
        ([*ASK, "--video", "V", "--preset", "tiny", "--layers", "0-1"], "preset stands for"),
        ([*ASK, "--video", "V", "--layers", "0-3"], "layers are those of --knock"),
        ([*ASK, "--video", "V", "--option", "a", "b", "--max-new-tokens", "3"], "of a written answer"),
        (["inspect", "--frames", "3"], "belong to --model"),
        (["inspect", "--model", "M"], "needs a video and a question"),
        (["inspect", "--model", "M", "--host", "H"], "not both"),
        (["eval", "--model", "M", "--data", "D", "--host", "H"], "not both"),
        (["eval", "--dtype", "float32"], "dtype belong to --model"),
        (["eval", "--videos", "V", "--format", "mvbench"], "format, videos belong to --model"),
        (["eval", "--retry-failed"], "goes with --out"),
        (["eval", "--limit", "0"], "limit must be positive"),
        (["eval", "--data", "qa.jsonl"], "data and model belong together"),
        (["eval", "--data", "none.jsonl", "--model", "M"], "there is no question file"),
        (["eval", "--knock", "LV", "LV"], "kinds must differ"),
        (["eval", "--setting", "local", "local"], "settings must differ"),
        (["recommend", "--run", "none"], "is no run folder"),
        (["plot"], "which run?"),
        (["demo", "--host", "none.safetensors"], "there is no tiny host"),
        (["demo", "--limit", "3"], "at least 8 questions"),
        (["bench", "--frames", "3", "--model", "qwen2.5-vl-7b"], "multiples of 2"),
    ],
)
def test_bad_input(capsys, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 1
    assert out == ""
    assert message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate"], "--model is needed"),
        (["generate", "--model", "M"], "--video is needed"),
        (["recommend"], "--run is needed"),
        (["eval", "--knock", "span"], "invalid choice"),
    ],
)
def test_wrong_usage(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err


def test_bad_layers_are_seen_before_the_weights(capsys, folder, tmp_path):
    """The folder of this model has a config and no weights."""
    (tmp_path / "config.json").write_text((folder / "model" / "config.json").read_text())
    ask = ["generate", "--model", tmp_path, "--video", folder / "0.npy", "--ask", "?"]
    for more, message in (
        (["--knock", "LV", "--layers", "3-9"], "layers are 0 .. 4"),
        (["--exit", "5"], "exit must be at most 4"),
        (["--knock", "VT", "--layers", "4", "--exit", "2"], "have no visual tokens after the exit"),
    ):
        code, _, err = run(capsys, *ask, *more)
        assert code == 1
        assert message in err
    (tmp_path / "config.json").unlink()
    shutil.copytree(folder / "model", tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    code, out, _ = run(capsys, *ask, "--exit", "3", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["config"]["exit"] == 3


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_eval_sees_a_window_that_does_not_fit_before_anything_is_made(capsys, folder, host_file, tmp_path, more):
    """The folder of this model has a config and no weights."""
    (tmp_path / "config.json").write_text((folder / "model" / "config.json").read_text())
    out = tmp_path / "run"
    for source in (["--model", tmp_path, "--data", folder / "qa.jsonl"], ["--host", host_file]):
        code, _, err = run(capsys, "eval", *source, "--window", 50, "--out", out, *more)
        assert code == 1
        assert "expected 1 <= width <= 5" in err
        assert not out.exists()


def test_flags_of_eval_change_the_source_of_a_config(capsys, folder, host_file, tmp_path):
    def plan(*argv):
        code, out, err = run(capsys, "eval", *argv, "--dry-run", "--json")
        assert code == 0, err
        return json.loads(out)

    model, data = ["--model", folder / "model"], ["--data", folder / "qa.jsonl"]
    made = plan(*model, *data, "--videos", folder, "--limit", 6, "--dtype", "float32", "--random-control")
    assert made["config"]["source"]["limit"] == 6
    path = tmp_path / "config.json"
    path.write_text(json.dumps(made["config"]))
    assert plan("--config", path) == made
    changed = plan("--config", path, "--limit", 4, "--dtype", "bfloat16", "--no-random-control", "--no-reuse")
    assert changed["config"]["source"] == made["config"]["source"] | {"limit": 4, "dtype": "bfloat16"}
    assert made["config"] | {"source": {}} == changed["config"] | {
        "source": {}, "random_control": True, "reuse": True,
    }  # fmt: skip
    code, _, err = run(capsys, "eval", "--config", path, "--videos", tmp_path, "--dry-run")
    assert code == 1
    assert "none of the 6 videos can be read" in err
    # Another file has its own folder and format; a host has none of them.
    assert plan("--config", path, *data)["config"]["source"]["videos"] is None
    assert plan("--config", path, "--host", host_file)["config"]["source"] == to_dict(Source(host=host_file, limit=6))


def test_all_videos_missing(capsys, folder, tmp_path):
    code, _, err = run(
        capsys, "eval", "--model", folder / "model", "--data", folder / "qa.jsonl", "--videos", tmp_path, "--dry-run"
    )
    assert code == 1
    assert "none of the 8 videos can be read" in err


def test_the_script(tmp_path):
    command = [str(Path(sys.executable).parent / "hone-knockout"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "train-host" in done.stdout
