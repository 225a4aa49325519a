"""The one command: everything that a change must pass.

uv run --all-packages python tools/check.py                 all quick checks and the CPU tests
uv run --all-packages python tools/check.py --only lint,layout
uv run --all-packages python tools/check.py --fix           format, fix lint, write tables and constraints
uv run --all-packages python tools/check.py --all           also slow tests, and every member's tests in isolation
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass

from workspace import ROOT, members

PYTEST = [sys.executable, "-P", "-m", "pytest"]


def _tool(name: str, *options: str) -> list[str]:
    return [sys.executable, f"tools/{name}.py", *options]


@dataclass(frozen=True)
class Step:
    """A command; ``fix`` is what it is under --fix, and ``extra`` steps run under --all only."""

    command: list[str]
    fix: list[str] | None = None
    extra: bool = False


STEPS = {
    "format": Step(["ruff", "format", "--check", "."], ["ruff", "format", "."]),
    "lint": Step(["ruff", "check", "."], ["ruff", "check", "--fix", "."]),
    "layout": Step(_tool("layout")),
    "types": Step(["mypy", *(str(member.source) for member in members())]),
    "boundaries": Step(_tool("boundaries")),
    "tracked": Step(_tool("tracked")),
    "tables": Step(_tool("tables", "--check"), _tool("tables")),
    "methods": Step(_tool("methods", "--check"), _tool("methods")),
    "costs": Step(_tool("costs", "--check"), _tool("costs")),
    "seconds": Step(_tool("seconds", "--check")),
    "licences": Step(_tool("licences", "--check")),
    "constraints": Step(_tool("constraints", "--check"), _tool("constraints")),
    "siblings": Step(_tool("pip_install", "--check")),
    "tests": Step(PYTEST),
    "slow": Step([*PYTEST, "-m", "slow and not gpu and not interpret"], extra=True),
    "isolation": Step(_tool("isolation", "--tests", "all"), extra=True),
}


def main() -> int:
    """Run the steps and say which failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"steps, separated by commas: {', '.join(STEPS)}")
    parser.add_argument("--fix", action="store_true", help="mend what can be mended by a program")
    parser.add_argument("--all", action="store_true", help="the slow steps too")
    args = parser.parse_args()
    names = [name.strip() for name in args.only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"unknown steps {', '.join(unknown)}; expected some of {', '.join(STEPS)}")
    chosen = names or [name for name, step in STEPS.items() if args.all or not step.extra]
    failed = []
    for name in chosen:
        step = STEPS[name]
        command = step.fix if args.fix and step.fix else step.command
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        # pytest's 5 is "no tests"; only the slow selection may be empty.
        if code and not (name == "slow" and code == 5):
            failed.append(name)
        print(f"   {time.perf_counter() - start:.1f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else f"passed: {', '.join(chosen)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
