import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hone_core.cli import Verb, run_cli
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


VERBS = {
    "demo": demo,
    "note": note,
    "nothing": nothing,
    "broken": broken,
    "odd": odd,
    "far": Verb("hone_core.no_such_module:run", "Lives far away."),
}


@pytest.fixture(autouse=True)
def _restore_logging():
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.getLogger("hone_core").setLevel(logging.NOTSET)


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
    known = "demo, note, nothing, broken, odd, far"
    assert err == f"hone-core: unknown verb 'dmeo'; expected one of {known}. Try hone-core --help.\n"


def test_version(call):
    assert call("--version")[:2] == (0, "hone-core 0.1.0\n")


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
    modules = ["cli", "config", "devices", "environment", "errors", "io", "lazy", "progress", "runs", "timing"]
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
