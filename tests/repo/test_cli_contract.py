"""What every command line keeps to, for each script that a member declares."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import workspace
from helps import HEAVY, verb_helps
from hone_core.cli import Verb
from hone_core.flags import flags_of

SCRIPTS = {
    name: member
    for member in workspace.members()
    for name in member.project.get("scripts", {})
    # In an environment that holds only some members, the others' scripts are not there to test.
    if any(point.name == name for point in importlib.metadata.entry_points(group="console_scripts"))
}
HELP_SECONDS = 1.0
WORDS = {
    "info",
    "demo",
    "sample",
    "generate",
    "render",
    "serve",
    "train",
    "eval",
    "bench",
    "reproduce",
    "plot",
    "inspect",
    "calibrate",
    "recommend",
    "simulate",
    "distill",
    "extract",
    "convert",
}
# Of kernels, and of what layers keep.
WORDS |= {"tune", "profile", "sanitize", "spills"}
# Of photographs.
WORDS |= {"doctor", "view", "convert"}
# Of motions.
WORDS |= {"make-set"}
# A package may train its tiny host by a verb of its own, or a pipeline beside the tiny host.
WORDS |= {"train-host", "train-router", "distill-pipeline", "encode-prompts"}

# Runs the entry point and says on stderr what it imported.
PROBE = f"""
import importlib.metadata, sys
script = sys.argv[1]
sys.argv = sys.argv[1:]
(point,) = importlib.metadata.entry_points(group="console_scripts", name=script)
code = 0
try:
    code = point.load()()
except SystemExit as exit:
    code = exit.code
print("HEAVY", ",".join(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


def run(*argv):
    return subprocess.run([sys.executable, "-P", "-c", PROBE, *argv], capture_output=True, text=True, check=False)


def heavy(done):
    return done.stderr.rpartition("HEAVY ")[2].strip()


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


def test_every_script_of_the_workspace_is_installed_under_uv_run():
    declared = [name for member in workspace.members() for name in member.project.get("scripts", {})]
    assert sorted(SCRIPTS) == sorted(declared)


def test_entry_point_resolves(script):
    (point,) = importlib.metadata.entry_points(group="console_scripts", name=script)
    assert callable(point.load())


def test_help_is_quick_and_light(script):
    command = [str(Path(sys.executable).parent / script), "--help"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < HELP_SECONDS
    assert done.stdout.startswith(f"usage: {script} ")
    assert done.stderr == ""
    assert heavy(run(script, "--help")) == ""


def test_verbs_help_and_import_nothing_heavy(script):
    helps = verb_helps(script)
    assert helps
    for verb, (code, text, loaded) in helps.items():
        assert code in (None, 0), f"{verb}: {text}"
        assert f"{script} {verb}" in text
        assert loaded == [], f"{script} {verb} --help imports {loaded}"


def test_every_flag_of_a_config_says_what_it_is(script):
    table = getattr(importlib.import_module(f"{SCRIPTS[script].module}.cli"), "VERBS", {})
    for name, verb in table.items():
        if isinstance(verb, Verb) and verb.config is not None:
            module, _, config = verb.config.partition(":")
            flags = flags_of(getattr(importlib.import_module(module), config))
            silent = [flag.name for flag in flags if not flag.help]
            assert not silent, f"{script} {name}: the fields {', '.join(silent)} of {config} have no docstring"
            # Who leaves a flag out has typed no None: its help says "(default: ...)".
            inner = [flag.name for flag in flags if flag.default is None and re.search(r"\bNone\b", flag.help)]
            assert not inner, f"{script} {name}: say (default: ...) in place of None of {', '.join(inner)}"


def test_verbs_are_words_of_the_house(script):
    assert set(verb_helps(script)) <= WORDS
    wanted = {"info", "demo"} if SCRIPTS[script].kind == "packages" else {"info"}
    assert wanted <= set(verb_helps(script))


@pytest.mark.parametrize("argv", [["no-such-verb"], ["info", "--no-such-flag"], []], ids=["verb", "flag", "nothing"])
def test_wrong_usage_exits_2_with_nothing_on_stdout(script, argv):
    done = run(script, *argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr) > len("HEAVY ")


def test_version(script):
    done = run(script, "--version")
    assert done.returncode == 0
    assert done.stdout == f"{script} {SCRIPTS[script].project['version']}\n"


@pytest.mark.parametrize(
    "module",
    [f"{m.module}.config" for m in SCRIPTS.values()] + [m.module for m in SCRIPTS.values()],
)
def test_config_and_package_import_without_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
