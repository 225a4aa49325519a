"""Seconds of each member's tests, by the README's test command, for the table in CONTRIBUTING.md.

    python tools/seconds.py            run it, write results/seconds.json, and the table
    python tools/seconds.py --check    fail where the table's file lacks a member, or names what is none

It takes as long as the tests do. Measure on idle cores and from a clean commit; what is over the limits is said.
"""

import argparse
import json
import re
import subprocess

import tables
from workspace import ROOT, members, report

FILE = ROOT / "results" / "seconds.json"
COMMAND = ("uv", "run", "--all-packages", "pytest", "--durations=20")
WHOLE = "the whole command"
WHOLE_LIMIT, PACKAGE_LIMIT = 720, 90
"""On two idle cores. A package alone takes half its seconds, and START to begin with."""
START = 10
# What tests/conftest.py prints for each member, and pytest at the end.
LINE = re.compile(r"^ *(\d+\.\d) ([\w/]+)$", re.M)
END = re.compile(r"\d+ passed.* in (\d+\.\d+)s")


def rows(output: str) -> list[dict]:
    """Results of a run's output: the time of the whole command, then of each member, longest first.

    Raises:
        ValueError: It is not the output of a run that passed.
    """
    section = output.rpartition(" seconds per member ")[2]
    if not (ends := END.findall(section)) or re.search(r"\d+ (?:failed|error)", section.splitlines()[-1]):
        raise ValueError(f"expected the output of tests that passed; it ends in {output[-300:]!r}")
    times = [(WHOLE, float(ends[-1])), *((name, float(value)) for value, name in LINE.findall(section))]
    return [
        {"metric": "seconds", "value": value, "unit": "s", "better": "lower", "variant": name} for name, value in times
    ]


def check() -> list[str]:
    """Whether the file has each member once, the repository's own tests, and nothing else."""
    found = [row["variant"] for row in json.loads(FILE.read_text(encoding="utf-8"))["rows"]]
    expected = {WHOLE, "repo", *(str(member.folder) for member in members())}
    differ = sorted(expected ^ set(found)) + sorted({name for name in found if found.count(name) > 1})
    return [f"{FILE.name}: expected each member once; missing, unknown or twice: {', '.join(differ)}"] if differ else []


def over(measured: list[dict]) -> list[str]:
    """What takes longer than it should."""
    limits = {WHOLE: WHOLE_LIMIT} | {
        str(member.folder): 2 * (PACKAGE_LIMIT - START) for member in members() if member.kind == "packages"
    }
    return [
        f"{row['variant']} takes {row['value']:.0f} s; at most {limit} are allowed"
        for row in measured
        if (limit := limits.get(row["variant"])) and row["value"] > limit
    ]


def main() -> int:
    """Measure, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run nothing")
    if parser.parse_args().check:
        return report(check(), "seconds")
    where = "import json; from hone_core.environment import environment; print(json.dumps(environment()))"
    python = [*COMMAND[:3], "python", "-c", where]
    # Before the tests, which may leave files.
    environment = json.loads(subprocess.run(python, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)
    process = subprocess.Popen(COMMAND, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = []
    assert process.stdout
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        return report(["the tests failed; nothing is written"], "seconds")
    measured = rows("".join(lines))
    document = {"status": "done", "command": " ".join(COMMAND), "environment": environment, "rows": measured}
    FILE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return report([*over(measured), *check(), *tables.run(write=True)], "seconds")


if __name__ == "__main__":
    raise SystemExit(main())
