import dataclasses
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
from hone_core import environment, runs
from hone_core.cli import Verb, run_cli, verb
from hone_core.config import flag
from hone_core.errors import MissingExtraError


@dataclass(frozen=True)
class Report:
    score: float
    path: Path

    def __str__(self):
        return f"score {self.score:.1f}"


def demo(*, out: Path = Path("out"), seed: int = 0, kind: Literal["dense", "asa"] = "asa", fail: str = ""):
    """Make a picture.

    Args:
        out: Where it goes.
        seed: Of the noise.
        kind: Attention.
        fail: How to fail.

    Returns:
        The report.
    """
    logging.getLogger("hone_core").info("at work")
    if fail == "extra":
        raise MissingExtraError("train", "hone-core", "Training")
    if fail == "value":
        raise ValueError("two\n  lines")
    if fail == "key":
        raise KeyError("lost")
    if fail == "interrupt":
        raise KeyboardInterrupt
    return Report(score=seed / 2, path=out) if kind == "asa" else {"kind": kind, "times": {"p50": 1.23456789}}


def note(*, text: str = "hi", quiet: bool = False):
    """Say something."""
    return f"{text} {quiet}"


def broken():
    """Lose a pipe at work."""
    raise BrokenPipeError("ffmpeg has gone")


def odd():
    """Return what JSON has no form for."""
    return {"a": float("inf"), "b": (Path("x"),)}


def nothing():
    """Do nothing."""


def asked(*, ask: str, depth_m: float, often: int = 1):
    """Answer.

    Args:
        ask: A question,
            in words.
        depth_m: How deep, in metres.
        often: Times.
    """
    return f"{ask} {depth_m:g} {often}"


VERBS = {
    "demo": demo,
    "asked": asked,
    "note": note,
    "nothing": nothing,
    "broken": broken,
    "odd": odd,
    "far": Verb(run="hone_core.no_such_module:run", help="Lives far away."),
}


@pytest.fixture
def call(capsys):
    def run(*argv):
        with pytest.raises(SystemExit) as caught:
            run_cli("hone-core", VERBS, "Core things.", argv)
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


def test_overview_lists_verbs_without_importing_them(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: hone-core VERB [flags]\n\nCore things.\n")
    assert "  demo     Make a picture.\n" in out
    assert "  far      Lives far away.\n" in out


def test_no_verb_and_unknown_verb_are_usage_errors(call):
    code, out, err = call()
    assert (code, out) == (2, "")
    assert "verbs:" in err
    code, out, err = call("dmeo")
    assert (code, out) == (2, "")
    known = "demo, asked, note, nothing, broken, odd, far"
    assert err == f"hone-core: unknown verb 'dmeo'; expected one of {known}. Try hone-core --help.\n"


def test_a_flag_without_default_must_be_given_to_a_function_too(call):
    line = "hone-core asked: error: --ask is needed: A question, in words.\n"
    assert call("asked", "--depth-m", "2") == (2, "", line)
    assert call("asked", "--ask=why") == (2, "", "hone-core asked: error: --depth-m is needed: How deep, in metres.\n")
    assert call("asked", "--ask=why", "--depth_m", "2") == (0, "why 2 1\n", "")
    assert call("asked", "--help")[0] == 0


def test_version(call):
    assert call("--version")[:2] == (0, "hone-core 0.2.0\n")


def test_verb_help_shows_flags_with_their_docs(call):
    code, out, _ = call("demo", "--help")
    assert code == 0
    for part in (
        "hone-core demo",
        "--out PATH",
        "Where it goes.",
        "--kind {dense,asa}",
        "--json",
        "--quiet",
        "--verbose",
    ):
        assert part in out
    assert "Returns" not in out


def test_text_json_and_mapping_results(call):
    assert call("demo", "--seed", "3")[:2] == (0, "score 1.5\n")
    code, out, err = call("demo", "--seed", "3", "--json", "--quiet")
    assert code == 0
    assert json.loads(out) == {"score": 1.5, "path": "out"}
    assert err == ""
    assert call("demo", "--kind", "dense")[1] == "kind   dense\ntimes  p50 1.23457\n"
    assert call("nothing")[:2] == (0, "")


def test_own_quiet_flag_is_passed_on(call):
    assert call("note", "--quiet")[1] == "hi True\n"
    assert call("note", "--json")[1] == '"hi False"\n'


def test_logs_go_to_stderr(call):
    assert "INFO hone_core: at work" in call("demo")[2]


@pytest.mark.parametrize("fail", ["", "value"])
def test_logging_is_as_it_was_once_a_verb_has_run(call, fail):
    loggers = [logging.getLogger(), logging.getLogger("hone_core")]
    before = [(one.handlers[:], one.level) for one in loggers]
    assert call("demo", "--verbose", *(["--fail", fail] if fail else []))[0] == (1 if fail else 0)
    assert [(one.handlers, one.level) for one in loggers] == before


@pytest.mark.parametrize(
    ("fail", "code", "line"),
    [
        ("extra", 2, "hone-core demo: error: Training needs the extra 'train' of hone-core"),
        ("value", 1, "hone-core demo: error: two lines\n"),
        ("key", 1, "hone-core demo: error: KeyError: 'lost' (HONE_TRACEBACK=1 shows where)\n"),
        ("interrupt", 130, "hone-core demo: interrupted\n"),
    ],
)
def test_errors_are_one_line(call, fail, code, line, monkeypatch):
    monkeypatch.delenv("HONE_TRACEBACK", raising=False)
    got, out, err = call("demo", "--fail", fail, "--quiet")
    assert (got, out) == (code, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_traceback_on_request(call, monkeypatch):
    assert "Traceback" in call("demo", "--fail", "value", "--verbose")[2]
    monkeypatch.setenv("HONE_TRACEBACK", "1")
    assert "Traceback" in call("demo", "--fail", "value")[2]


@pytest.mark.parametrize("argv", [("demo", "--sed", "1"), ("demo", "--seed", "one"), ("demo", "--kind", "other")])
def test_wrong_flags_are_usage_errors(call, argv):
    assert call(*argv)[0] == 2


def many(
    *,
    host: tuple[Path, ...] | None = None,
    num_frames: tuple[int, ...] = (),
    part: tuple[Literal["a", "b"], ...] = (),
    name: list[str] | None = None,
    size: tuple[int, int] = (1, 1),
    seed: int = 0,
    fast: bool = False,
):
    """Take many values."""
    return {"host": host, "num_frames": num_frames, "part": part, "name": name, "size": size, "seed": seed}


@pytest.mark.parametrize(
    ("argv", "flag", "values"),
    [
        ("--host x y", "host", ["x", "y"]),
        ("--host x --host y", "host", ["x", "y"]),
        ("--host x --seed 1 --host y z --fast", "host", ["x", "y", "z"]),
        ("--host=x --host=y", "host", ["x", "y"]),
        ("--host=x --host y", "host", ["x", "y"]),
        ("--num-frames 8 --num_frames -1 --fast --num-frames=4 2", "num_frames", [8, -1, 4, 2]),
        ("--part a --part b", "part", ["a", "b"]),
        ("--name a --name b", "name", ["a", "b"]),
        ("--fast --fast --seed 3", "seed", 3),
        ("--size 3 4", "size", [3, 4]),
    ],
)
def test_values_after_one_flag_or_a_flag_each(capsys, argv, flag, values):
    with pytest.raises(SystemExit) as exit:
        run_cli("hone-core", {"many": many}, "", ["many", *argv.split(), "--json"])
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    assert json.loads(out)[flag] == values


@pytest.mark.parametrize("argv", ["--seed 1 --seed 2", "--seed=1 --host x --seed=1", "--size 1 2 --size 3 4"])
def test_a_flag_of_one_value_given_twice_is_a_usage_error(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        run_cli("hone-core", {"many": many}, "", ["many", *argv.split()])
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert err == f"hone-core many: error: {argv[:6]} takes one value and is given twice\n"


def test_empty_values_are_shown(capsys):
    with pytest.raises(SystemExit):
        run_cli("hone-core", {"show": show_empty}, "", ["show"])
    assert capsys.readouterr().out == "a  b -, c -, d -, e 0\nf  -\n"


def show_empty():
    """Return nothing much."""
    return {"a": {"b": [], "c": "", "d": {}, "e": 0}, "f": ()}


def test_a_long_mapping_has_a_line_for_each_entry(capsys):
    with pytest.raises(SystemExit):
        run_cli("hone-core", {"show": show_long}, "", ["show"])
    text = "x" * 90
    assert capsys.readouterr().out == f"a\n  b     {text}\n  long\n    c   1\n    dd  {text}\ne  1\n"


def show_long():
    """Return much."""
    text = "x" * 90
    return {"a": {"b": text, "long": {"c": 1, "dd": text}}, "e": 1}


def test_lazy_verb_reports_a_broken_module(call):
    code, _, err = call("far")
    assert code == 1
    assert "No module named 'hone_core.no_such_module'" in err


def test_a_pipe_lost_at_work_is_a_failure_and_one_lost_by_the_reader_is_not(call):
    code, _, err = call("broken")
    assert (code, err) == (1, "hone-core broken: error: ffmpeg has gone\n")
    script = (
        "from hone_core.cli import run_cli\n"
        "def long():\n    'Say much.'\n    return 'x' * 10_000_000\n"
        "run_cli('hone-core', {'long': long}, '', ['long'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_values_that_json_lacks_become_strings(call):
    assert json.loads(call("odd", "--json")[1]) == {"a": "inf", "b": ["x"]}


def test_importing_core_loads_no_torch():
    modules = ["cli", "config", "devices", "environment", "errors", "flags", "io", "lazy", "progress", "runs", "timing"]
    code = f"import sys, {', '.join(f'hone_core.{m}' for m in modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_help_of_flags_that_may_be_left_out(capsys):
    """No None to type, and the default that the docstring names is the only one."""

    def sample(
        *,
        prompt: tuple[str, ...] | None = None,
        steps: int | None = None,
        folder: Path | None = None,
        kind: Literal["dense", "asa"] | None = None,
        seed: int = 0,
    ):
        """Sample.

        Args:
            prompt: What to draw.
            steps: Number of them (default: 8).
            folder: Where from.
            kind: Attention.
            seed: Of the noise.
        """
        return {"prompt": prompt, "steps": steps, "folder": folder, "kind": kind}

    with pytest.raises(SystemExit) as exit:
        run_cli("hone-core", {"sample": sample}, "", ["sample", "--help"])
    assert exit.value.code == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "None" not in out
    for text in ("--prompt STR [STR ...]", "--steps INT Number of them (default: 8). --folder PATH Where from. --kind"):
        assert text in out
    assert "--kind {dense,asa} Attention. --seed INT Of the noise. (default: 0)" in out
    argv = ["sample", "--prompt", "a", "b", "--kind", "asa", "--json"]
    with pytest.raises(SystemExit):
        run_cli("hone-core", {"sample": sample}, "", argv)
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"prompt": ["a", "b"], "steps": None, "folder": None, "kind": "asa"}


# Verbs with a config.


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    steps: int = 8
    """Denoising steps."""
    seed: int = 0
    """Of the noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawConfig:
    """What to draw."""

    prompts: tuple[str, ...] = field(default=("a fox",), metadata=flag("prompt"))
    """What to draw; a word such as ``fox``."""
    size: tuple[int, int] = (2, 3)
    """Height and width."""
    limit: int | None = None
    """Only so many prompts (default: all)."""
    kind: Literal["dense", "asa"] = "asa"
    """Attention."""
    weights: Path | None = None
    """File to look for."""
    noise: Noise = field(default_factory=Noise)
    compile: bool = True
    """Compile blocks."""
    control: bool = False
    """Add a control."""
    table: dict[str, int] = field(default_factory=dict, metadata=flag(hidden=True))
    crash: bool = field(default=False, metadata=flag(stored=False))
    """Fail half way."""
    again: bool = field(default=False, metadata=flag(stored=False))
    """Add to a finished run."""

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1; got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class DrawReport(runs.Report):
    mean: float

    @classmethod
    def of(cls, run):
        return cls(path=run.path, rows=tuple(run.rows), mean=run.rows[-1].value)

    def __str__(self):
        return f"mean {self.mean} of {len(self.rows)} in {self.path.name}"


def prepare(cfg: DrawConfig) -> DrawConfig:
    if cfg.weights is not None and not cfg.weights.exists():
        raise FileNotFoundError(f"there is no file {cfg.weights}")
    return dataclasses.replace(cfg, prompts=cfg.prompts[: cfg.limit], limit=None)


def opened(cfg, run):
    if cfg.again and run.done:
        run.reopen()


CALLS = []


def draw(cfg: DrawConfig, run: runs.Run) -> DrawReport:
    CALLS.append((cfg, run.device, run.quiet, run.command, run.resumed))
    run.row("first", 1.0, better="none")
    if cfg.crash:
        raise ValueError("the pen broke")
    run.row("mean", cfg.noise.steps / 4, better="none", variant=cfg.kind)
    return DrawReport.of(run)


@torch.no_grad()
def whole(cfg: DrawConfig, run: runs.Run) -> "runs.Report":
    # The decorator's module does not know the name of the report.
    run.row("time", 1.25, unit="ms", better="lower", spread=0.5, variant="dense", labels={"frames": 8})
    return runs.Report.of(run)


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedyConfig:
    model: str
    """Folder of a model."""
    steps: int = 4
    """Steps."""


def needy(cfg: NeedyConfig, run: runs.Run) -> runs.Report:
    return runs.Report.of(run)


TABLE = {
    "draw": Verb(
        run=f"{__name__}:draw",
        help="Draw something.",
        config=f"{__name__}:DrawConfig",
        prepare=f"{__name__}:prepare",
        opened=f"{__name__}:opened",
    ),
    "whole": Verb(run=f"{__name__}:whole", help="Report rows.", config=f"{__name__}:DrawConfig"),
    "needy": Verb(run=f"{__name__}:needy", help="Need a model.", config=f"{__name__}:NeedyConfig"),
}


@pytest.fixture
def table(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CALLS.clear()

    def run(argv):
        with pytest.raises(SystemExit) as caught:
            run_cli("hone-core", TABLE, "Core things.", argv.split())
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


def plan(table, argv):
    code, out, err = table(f"{argv} --dry-run --json --quiet")
    assert code == 0, err
    return json.loads(out)["config"]


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        ("--prompt a b", ("prompts",), ["a", "b"]),
        ("--prompt a --prompt b", ("prompts",), ["a", "b"]),
        ("--prompt=a", ("prompts",), ["a"]),
        ("--size 4 5", ("size",), [4, 5]),
        ("--kind dense", ("kind",), "dense"),
        ("--steps 2", ("noise", "steps"), 2),
        ("--weights here", ("weights",), "here"),
        ("--compile", ("compile",), True),
        ("--no-compile", ("compile",), False),
        ("--control", ("control",), True),
        ("--no-control", ("control",), False),
    ],
)
@pytest.mark.parametrize("file", [False, True])
def test_flags_of_every_kind_change_defaults_and_a_file(table, tmp_path, argv, path, value, file):
    (tmp_path / "here").touch()
    if file:
        stored = {"prompts": ["x"], "size": [9, 9], "kind": "asa", "noise": {"steps": 5}, "table": {"a": 1}}
        # A switch of the file is what the flag is not, so that a flag that is dropped shows.
        stored |= {"compile": argv == "--no-compile", "control": argv == "--no-control"}
        (tmp_path / "config.json").write_text(json.dumps(stored))
        argv += " --config config.json"
    got = plan(table, f"draw {argv}")
    if file:
        assert got["table"] == {"a": 1}
        assert got["noise"]["steps"] == (2 if "--steps" in argv else 5)
        assert got["prompts"] == (["x"] if "--prompt" not in argv else value)
    for name in path:
        got = got[name]
    assert got == value


def test_a_finished_run_is_exported_whether_it_ran_now_or_before(table, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "environment", lambda: {"commit": "c", "dirty": False})
    monkeypatch.setattr(environment, "code_version", lambda: ("c", False))
    assert table("whole --out run --export absent/x.json")[0] == 2
    assert table(f"whole --out run --export {tmp_path}")[0] == 2
    assert not (tmp_path / "run").exists()
    for name in ("first", "second"):
        code, _, err = table(f"whole --out run --export {name}.json")
        assert code == 0, err
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first == second
    assert first["rows"] == json.loads((tmp_path / "run" / "results.json").read_text())["rows"]


def test_code_with_changes_is_not_exported_and_that_is_said_before_the_run(table, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "environment", lambda: {"commit": "c", "dirty": True})
    monkeypatch.setattr(environment, "code_version", lambda: ("c", True))
    code, _, err = table("whole --out run --export run.json")
    assert code == 2
    assert "the checkout has uncommitted changes" in err
    assert not (tmp_path / "run").exists()
    assert table("whole --out run")[0] == 0
    monkeypatch.setattr(environment, "code_version", lambda: ("d", False))
    code, _, err = table("whole --out run --export run.json")
    assert code == 1
    assert "expected a run of committed code" in err
    assert not (tmp_path / "run.json").exists()


def test_a_run_of_two_commits_is_not_exported_and_that_is_said_before_it_goes_on(table, tmp_path, monkeypatch):
    for commit in "cd":
        monkeypatch.setattr(runs, "environment", lambda commit=commit: {"commit": commit, "dirty": False})
        monkeypatch.setattr(environment, "code_version", lambda commit=commit: (commit, False))
        code, _, err = table("whole --out run --export run.json")
        assert code == (0 if commit == "c" else 2)
        file = tmp_path / "run" / "results.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "failed"}))
        (tmp_path / "run.json").unlink(missing_ok=True)
    assert "was begun with other code" in err
    assert "choose another --out" in err


def test_dry_run_prints_the_prepared_plan_and_makes_nothing(table, tmp_path):
    code, out, _ = table("draw --prompt a b c --limit 2 --out run --dry-run --json")
    assert code == 0
    assert json.loads(out)["config"]["prompts"] == ["a", "b"]
    assert json.loads(out)["out"] == "run"
    assert json.loads(table("draw --dry-run --json")[1])["out"] == "runs/hone-core/draw/..."
    code, _, err = table("draw --weights absent --dry-run")
    assert (code, err) == (1, "hone-core draw: error: there is no file absent\n")
    assert not CALLS
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry", ["", " --dry-run"])
@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x"])
def test_a_word_that_is_no_device_is_refused_before_the_run(table, tmp_path, device, dry):
    code, out, err = table(f"draw --out run --device {device}{dry}")
    assert (code, out) == (1, "")
    assert f"device must be auto, cpu, cuda or cuda:<index>; got '{device}'" in err
    assert not CALLS
    assert not (tmp_path / "run").exists()


def test_a_run_gets_what_is_no_part_of_its_config(table):
    assert table("draw --out run --device cuda:1 --quiet --steps 2")[:2] == (0, "mean 0.5 of 2 in run\n")
    ((cfg, device, quiet, command, resumed),) = CALLS
    assert cfg == DrawConfig(noise=Noise(steps=2))
    assert (device, quiet, resumed) == ("cuda:1", True, False)
    assert command == "hone-core draw --out run --device cuda:1 --quiet --steps 2"


def test_a_finished_run_prints_the_same_and_runs_nothing(table, tmp_path):
    first = table("draw --out run")
    before = (tmp_path / "run" / "results.json").read_bytes()
    assert first[0] == 0
    assert table("draw --out run") == first
    assert table("draw --out run --config run/config.json")[:2] == first[:2]
    assert len(CALLS) == 1
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    shown = json.loads(table("draw --out run --json")[1])
    assert (shown["path"], shown["mean"], shown["rows"][1]["variant"]) == ("run", 2.0, "asa")
    code, out, err = table("draw --out run --steps 3")
    assert (code, out) == (1, "")
    assert "holds a run of another command (--steps 8 there, 3 here); choose another --out" in err


def test_a_failed_run_is_resumed(table):
    code, out, err = table("draw --out run --crash --quiet")
    assert (code, out, err) == (1, "", "hone-core draw: error: the pen broke\n")
    assert runs.load_results("run")["status"] == "failed"
    assert table("draw --out run")[:2] == (0, "mean 2.0 of 2 in run\n")
    assert [resumed for *_, resumed in CALLS] == [False, True]


def test_a_finished_run_can_be_opened_again(table):
    table("draw --out run")
    assert table("draw --out run --again")[0] == 0
    assert [resumed for *_, resumed in CALLS] == [False, True]


@pytest.mark.parametrize(
    ("argv", "preset", "seed"),
    [("", "default", 0), ("--seed 3", "default", 3), ("--steps 2 --seed 1", None, 1), ("--prompt a", None, 0)],
)
def test_seed_and_preset_are_those_of_the_config(table, argv, preset, seed):
    table(f"draw --out run {argv}")
    results = runs.load_results("run")
    assert (results["preset"], results["seed"], results["verb"]) == (preset, seed, "draw")


def test_the_plain_report_is_a_line_per_row(table):
    code, out, _ = table("whole --out run")
    assert code == 0
    assert out == "time           dense              1.25 ms +- 0.5   (frames 8)\nresults  run/results.json\n"
    assert table("whole --out run")[1] == out


@pytest.mark.parametrize(
    "argv",
    [
        "--kind other",
        "--size 1",
        "--table 1",
        "--limit x",
        "--sead 1",
        "--kind asa --kind asa",
        "--no-limit",
        "--config",
    ],
)
def test_wrong_flags_of_a_config_are_usage_errors(table, tmp_path, argv):
    code, out, err = table(f"draw {argv}")
    assert (code, out) == (2, "")
    assert err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "absent.json: expected a JSON config, but it cannot be read (No such file or directory)."),
        ("{", "absent.json: expected a JSON config; "),
        ('{"nois": {}}', "absent.json: DrawConfig: unknown key 'nois'; did you mean 'noise'?"),
        ('{"noise": {"steps": 1.5}}', "absent.json: noise.steps: expected a whole number; got 1.5"),
        ('{"limit": 0}', "limit must be at least 1; got 0"),
    ],
)
def test_a_config_file_that_does_not_fit_is_one_line(table, tmp_path, content, line):
    if content is not None:
        (tmp_path / "absent.json").write_text(content)
    code, out, err = table("draw --config absent.json")
    assert (code, out) == (1, "")
    assert err.startswith(f"hone-core draw: error: {line}")
    assert err.count("\n") == 1


def test_a_field_without_default_must_be_given(table, tmp_path):
    code, out, err = table("needy")
    assert (code, out, err) == (2, "", "hone-core needy: error: --model is needed: Folder of a model.\n")
    assert plan(table, "needy --model m") == {"model": "m", "steps": 4}
    (tmp_path / "config.json").write_text('{"model": "there"}')
    assert plan(table, "needy --config config.json --steps 2") == {"model": "there", "steps": 2}


def test_help_of_a_config(table, tmp_path):
    def text(argv):
        code, out, _ = table(argv)
        assert code == 0
        return " ".join(out.replace("│", " ").split())

    shown = text("draw --help")
    assert "None" not in shown
    for part in (
        "Draw something.",
        "--prompt [STR [STR ...]] What to draw; a word such as fox. (default: 'a fox')",
        "--limit INT Only so many prompts (default: all). --kind {dense,asa} Attention. (default: asa)",
        "--compile, --no-compile Compile blocks. (default: True)",
        "--weights PATH File to look for.",
        "--config PATH A run's config.json to start from",
        "--dry-run",
        "--device STR auto, cpu, cuda or cuda:1. (default: auto)",
        "--quiet Only warnings and errors on stderr.",
    ):
        assert part in shown, part
    assert "--table" not in shown
    assert "--no-dry-run" not in shown
    (tmp_path / "config.json").write_text('{"noise": {"steps": 5}, "compile": false}')
    shown = text("draw --help --config config.json")
    assert "Denoising steps. (default: 5)" in shown
    assert "Compile blocks. (default: False)" in shown
    assert "Folder of a model. (required)" in text("needy --help")


@pytest.mark.parametrize(("given", "held"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_do_not_spin_unless_asked(given, held, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit):
        run_cli("hone-core", {}, "Nothing.", ["--help"])
    assert os.environ["OMP_WAIT_POLICY"] == held


def test_a_verb_by_names_within_its_package():
    named = verb(
        "hone_x", "sample:draw", "DrawConfig", "Draw.", prepare="inputs:find", opened="sample:reopen", shared=True
    )
    assert named == Verb(
        run="hone_x.sample:draw",
        help="Draw.",
        config="hone_x.config:DrawConfig",
        prepare="hone_x.inputs:find",
        opened="hone_x.sample:reopen",
        shared=True,
    )
    assert verb("hone_x", "plots:plot", None, "Plot.") == Verb(run="hone_x.plots:plot", help="Plot.")
