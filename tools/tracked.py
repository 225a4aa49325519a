"""Check what must not be committed: registry addresses, paths of one machine, lock files, large files.

python tools/tracked.py
"""

import argparse
import re
from pathlib import Path

from workspace import ROOT, report, tracked_files

MAX_BYTES = 10 * 10**6
# Brackets keep these patterns from matching their own text.
FORBIDDEN = {
    "a registry address": re.compile(
        r"""https?://[^\s"'/<>]+/(?:simple|packages|whl)(?:[/"'\s]|$)"""
        r"""|(?:^|\s)--?(?:extra-)?inde[x]-url[=\s]+\S|^\s*(?:extra-)?inde[x]-url\s*=|tool\.uv\.inde[x]\b|file[s]\.pythonhosted""",
        re.M,
    ),
    "a path of one machine": re.compile(r"(?<![\w.~-])/(?:hom[e]/\w+|User[s]/\w+|roo[t]|wor[k])/"),
}
LOCKS = ("uv.lock", "poetry.lock", "pdm.lock")


def check(root: Path = ROOT) -> list[str]:
    """All problems, one line each."""
    problems = []
    for name in tracked_files(root):
        data = (root / name).read_bytes()
        if name.name in LOCKS:
            problems.append(f"{name}: lock files record registry addresses and stay out")
        if len(data) > MAX_BYTES:
            problems.append(f"{name}: {len(data) / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:.0f}")
        if b"\0" in data[:8192]:
            continue
        text = data.decode("utf-8", errors="replace")
        for what, pattern in FORBIDDEN.items():
            if match := pattern.search(text):
                line = text.count("\n", 0, match.start()) + 1
                problems.append(f"{name}:{line}: {what}: {match[0].strip()!r}")
    return problems


def main() -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    return report(check(parser.parse_args().root), "tracked")


if __name__ == "__main__":
    raise SystemExit(main())
