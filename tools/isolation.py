"""Check that each member's wheel works in an environment that holds nothing but what the wheel declares.

    python tools/isolation.py                    every member, a quick part of its tests
    python tools/isolation.py blade --tests all  one member, all its CPU tests

For each member: build the wheels, make a bare environment, install the member's wheel with those of its siblings and of
its extras' siblings, look whether what is installed fits together, import every module, time ``--help``. Then add the
test tools and run its tests. At last all wheels have to fit into one environment. Third-party versions are those of
constraints.txt.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pip_install import paths, wheel
from workspace import ROOT, Member, find_member, members

HELP_SECONDS = 1.0
# Named files of a member's tests that say most per second; where none of them exists, all its tests run.
SMOKE = ("test_config.py", "test_cli.py", "test_method.py", "test_layout.py", "test_reference.py")

IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if name.startswith("hone_core.testing"):
        continue
    try:
        importlib.import_module(name)
    except ImportError as error:
        # A module may be of an extra, or for a program that loads it, and then says which.
        if type(error).__name__ not in ("MissingExtraError", "MissingProgramError"):
            raise
for name in getattr(package, "__all__", []):
    getattr(package, name)
print(f"{len(names)} modules of {package.__name__} import")
"""


class IsolationError(Exception):
    """A member does not work on its own."""


def check(member: Member, wheels: Path, scratch: Path, tests: str) -> None:
    """Install, import, time ``--help`` and test one member.

    Raises:
        IsolationError: Any of these failed; the output is in the message.
    """
    environment = scratch / member.name
    binaries = environment / "bin"
    _run(["uv", "venv", "--quiet", "--python", sys.executable, str(environment)])
    by_name = {other.name: other for other in members(member.root)}
    extra = [by_name[name] for name in sorted(member.dependencies(extras=True) & by_name.keys())]
    own = list(
        dict.fromkeys([*paths(member.name, member.root, wheels=wheels), *(wheel(other, wheels) for other in extra)])
    )
    _install(environment, scratch, own)
    # From an empty folder, in isolated mode: nothing of the checkout can be imported by accident.
    print(_run([str(binaries / "python"), "-I", "-c", IMPORT_ALL, member.module], cwd=scratch).strip(), flush=True)
    for script in member.project.get("scripts", {}):
        seconds = min(_time([str(binaries / script), "--help"], scratch) for _ in range(3))
        print(f"{script} --help: {seconds:.2f} s", flush=True)
        if seconds > HELP_SECONDS:
            raise IsolationError(f"{script} --help takes {seconds:.2f} s; at most {HELP_SECONDS} are allowed")
    if tests == "none":
        return
    own = list(dict.fromkeys([*own, wheel(by_name["hone-core"], wheels)]))
    _install(environment, scratch, [*own, "--group", f"{member.root / 'pyproject.toml'}:test"])
    chosen = [str(member.tests)]
    if tests == "smoke":
        named = [str(f.relative_to(member.root)) for name in SMOKE for f in (member.root / member.tests).rglob(name)]
        chosen = sorted(named) or chosen
    command = [str(binaries / "python"), "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    print(_run(command, cwd=member.root).strip().splitlines()[-1], flush=True)


def _install(environment: Path, scratch: Path, what: list[str]) -> None:
    pins = scratch / "constraints.txt"
    if not pins.exists():
        pins.write_text(without_hashes((ROOT / "constraints.txt").read_text(encoding="utf-8")), encoding="utf-8")
    # Outside the checkout, so that uv reads no workspace settings: what a user's environment gets is what is tested.
    _run(["uv", "pip", "install", "--quiet", "--python", str(environment), "-c", str(pins), *what], cwd=scratch)
    _run(["uv", "pip", "check", "--quiet", "--python", str(environment)], cwd=scratch)


def without_hashes(text: str) -> str:
    """Constraints without hashes, which would be asked of the members' own wheels too."""
    return re.sub(r" \\\n(?:\s+--hash=\S+(?: \\)?\n?)+", "\n", text)


def _time(command: list[str], cwd: Path) -> float:
    start = time.perf_counter()
    _run(command, cwd=cwd)
    return time.perf_counter() - start


def _run(command: list[str], cwd: Path | None = None) -> str:
    hidden = ("PYTEST_", "PYTHONPATH", "VIRTUAL_ENV", "UV_PROJECT")
    env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise IsolationError(f"{' '.join(command)} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main() -> int:
    """Check the named members, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="*", help="folder names or distributions; all if none is named")
    parser.add_argument(
        "--tests", choices=("none", "smoke", "all"), default="smoke", help="how much of the tests to run"
    )
    args = parser.parse_args()
    if shutil.which("uv") is None:
        raise SystemExit("uv is not on the PATH; pip install uv")
    failed = []
    with tempfile.TemporaryDirectory(prefix="hone-isolation-") as folder:
        scratch, wheels = Path(folder), Path(folder) / "dist"
        # Without sources the wheels carry what their metadata says, as published ones do.
        _run(
            ["uv", "build", "--all-packages", "--wheel", "--no-sources", "--quiet", "--out-dir", str(wheels)], cwd=ROOT
        )
        for member in [find_member(name) for name in args.members] or members():
            print(f"== {member.name}", flush=True)
            start = time.perf_counter()
            try:
                check(member, wheels, scratch, args.tests)
            except IsolationError as error:
                print(error, flush=True)
                failed.append(member.name)
            shutil.rmtree(scratch / member.name, ignore_errors=True)
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
        if not args.members:
            print("== all in one environment", flush=True)
            try:
                _run(["uv", "venv", "--quiet", "--python", sys.executable, str(scratch / "all")])
                _install(scratch / "all", scratch, [wheel(member, wheels) for member in members()])
            except IsolationError as error:
                print(error, flush=True)
                failed.append("all in one environment")
    print(f"isolation: {'failed: ' + ', '.join(failed) if failed else 'ok'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
