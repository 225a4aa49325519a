"""Export constraints.txt: every resolved version with its hashes and without any index address.

    python tools/constraints.py            write it
    python tools/constraints.py --check    fail if it differs from the resolution

It takes the place of a committed lock file, which would record index addresses (see CONTRIBUTING.md).
"""

import argparse
import re
import shutil
import subprocess
from pathlib import Path

from workspace import ROOT, load_root, report

FILE = "constraints.txt"
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)", re.M)


def export(root: Path = ROOT) -> str:
    """What the file should hold.

    Raises:
        SystemExit: uv is missing or cannot resolve.
    """
    uv = shutil.which("uv")
    if uv is None:
        raise SystemExit("uv is not on the PATH; pip install uv")
    command = [uv, "export", "--all-packages", "--all-extras", "--no-emit-workspace", "--no-header", "--no-annotate"]
    command += ["--no-emit-index-url", "--quiet"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"uv export failed:\n{done.stderr}")
    return done.stdout


def pins(text: str) -> dict[str, set[str]]:
    """Distribution to its versions (more than one where platforms differ)."""
    found: dict[str, set[str]] = {}
    for match in PIN.finditer(text):
        found.setdefault(re.sub(r"[-_.]+", "-", match["name"]).lower(), set()).add(match["version"])
    return found


def disagreements(root: Path = ROOT) -> list[str]:
    """Where constraint-dependencies of the root pyproject and the committed file differ."""
    committed = pins((root / FILE).read_text(encoding="utf-8"))
    wanted = pins("\n".join(load_root(root)["tool"]["uv"].get("constraint-dependencies", [])))
    return [
        f"{FILE}: {name} is {_show(committed.get(name))}; pyproject.toml pins {_show(versions)}"
        for name, versions in wanted.items()
        if committed.get(name) != versions
    ]


def _show(versions: set[str] | None) -> str:
    return ", ".join(sorted(versions)) if versions else "absent"


def check(root: Path = ROOT) -> list[str]:
    """Differences between the committed file, the pins and the resolution."""
    if not (root / FILE).exists():
        return [f"{FILE} is missing; run python tools/constraints.py"]
    problems = disagreements(root)
    committed, fresh = (root / FILE).read_text(encoding="utf-8"), export(root)
    if committed != fresh:
        here, there = pins(committed), pins(fresh)
        changed = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        detail = ", ".join(changed) if changed else "hashes or markers"
        problems.append(f"{FILE} differs from the resolution ({detail}); run python tools/constraints.py")
    return problems


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file would change")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        return report(check(args.root), "constraints")
    (args.root / FILE).write_text(export(args.root), encoding="utf-8")
    return report(disagreements(args.root), "constraints")


if __name__ == "__main__":
    raise SystemExit(main())
