"""Export constraints.txt: every resolved version with its hashes and without any index address.

    python tools/constraints.py            write it
    python tools/constraints.py --check    fail if it differs from the resolution

It takes the place of a committed lock file, which would record index addresses (see CONTRIBUTING.md). The check also
compares the members' bounds with the versions that the two lanes have tried. Its first line
says on which day it was exported, and ``exclude-newer`` of the root pyproject lies at least two weeks before that day:
an index may show a file days after its upload date, and a resolution made then would differ.
"""

import argparse
import ast
import datetime
import re
import shutil
import subprocess
from pathlib import Path

from workspace import ROOT, load_root, members, report, requirement_name

FILE = "constraints.txt"
TRIED = ROOT / "shared/core/src/hone_core/environment.py"
SETTLED = datetime.timedelta(days=14)
HEADER = re.compile(r"# Exported on (\d{4}-\d{2}-\d{2})\.\n")
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)", re.M)


def export(root: Path = ROOT) -> str:
    """What the file should hold below its first line.

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
    """Where the root pyproject and the committed file differ: in exact pins, or in dates that lie too close."""
    committed = (root / FILE).read_text(encoding="utf-8")
    settings = load_root(root)["tool"]["uv"]
    found, wanted = pins(committed), pins("\n".join(settings.get("constraint-dependencies", [])))
    problems = [
        f"{FILE}: {name} is {_show(found.get(name))}; pyproject.toml pins {_show(versions)}"
        for name, versions in wanted.items()
        if found.get(name) != versions
    ]
    if (header := HEADER.match(committed)) is None:
        return [*problems, f"{FILE}: expected a first line '# Exported on YYYY-MM-DD.'"]
    exported, newest = datetime.date.fromisoformat(header[1]), settings["exclude-newer"].partition("T")[0]
    if datetime.date.fromisoformat(newest) > exported - SETTLED:
        problems.append(
            f"{FILE}: exported on {exported}; exclude-newer must be {exported - SETTLED} or earlier, it is {newest}"
        )
    return problems


def tried() -> dict[str, tuple[str, str]]:
    """``hone_core.environment.TRIED``, read without an import: these scripts need the standard library only."""
    for node in ast.parse(TRIED.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TRIED" and node.value:
            return ast.literal_eval(node.value)
    raise LookupError(f"{TRIED} assigns no TRIED")


def bounds(root: Path = ROOT) -> list[str]:
    """Where members allow other versions than those from the older lane's minor release to the newer one's."""
    problems, versions = [], tried()
    for member in members(root):
        project = member.project
        extras = [text for group in project.get("optional-dependencies", {}).values() for text in group]
        for text in [*project.get("dependencies", []), *extras]:
            name = requirement_name(text)
            if name not in versions:
                continue
            (low, at), (high, last) = (map(int, version.split(".")[:2]) for version in versions[name])
            expected = f"{name}>={low}.{at},<{high}.{last + 1}"
            if text.partition(";")[0].strip() != expected:
                problems.append(f"{member.name}: {text!r} must be {expected!r}, what the lanes have tried")
    return problems


def _show(versions: set[str] | None) -> str:
    return ", ".join(sorted(versions)) if versions else "absent"


def check(root: Path = ROOT) -> list[str]:
    """Differences between the committed file, the pins and the resolution."""
    if not (root / FILE).exists():
        return [f"{FILE} is missing; run python tools/constraints.py"]
    problems = [*disagreements(root), *bounds(root)]
    committed, fresh = HEADER.sub("", (root / FILE).read_text(encoding="utf-8"), count=1), export(root)
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
    header = f"# Exported on {datetime.datetime.now(datetime.UTC).date()}.\n"
    (args.root / FILE).write_text(header + export(args.root), encoding="utf-8")
    return report(disagreements(args.root), "constraints")


if __name__ == "__main__":
    raise SystemExit(main())
