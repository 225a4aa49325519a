"""Licences of everything that the members install, extras included, for docs/licences.md.

    uv run --isolated --all-packages --all-extras python tools/licences.py    write the page's tables
    python tools/licences.py --check    fail where the page differs from the resolution or from what is installed here

What is listed comes from uv.lock, each licence from the distribution's metadata.
"""

import argparse
import importlib.metadata
import re
import tomllib
from collections.abc import Iterable
from email.message import Message

import constraints
from workspace import ROOT, members, report, requirement_name

PAGE = ROOT / "docs" / "licences.md"
MARKER = re.compile(r"^<!-- licences: (?P<name>\w+) -->\n(?P<body>.*?)^<!-- /licences -->$", re.M | re.S)
# Names that metadata use, and SPDX's.
SPDX = {
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD": "BSD (which one is not said)",
    "BSD License": "BSD (which one is not said)",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "NVIDIA Proprietary Software": "LicenseRef-NVIDIA-Proprietary",
    "Python Software Foundation License": "PSF-2.0",
}
# Where metadata say nothing, or not all: what the files of the distribution say.
READ = {
    "cuda-toolkit": "none stated; it has no files and asks for NVIDIA's libraries",
    "gsplat": "Apache-2.0",
    "imageio-ffmpeg": "BSD-2-Clause; its wheels carry the program ffmpeg, GPL-3.0-or-later",
    "num2words": "LGPL-2.1",
    "torchao": "BSD-3-Clause",
}
OPEN = re.compile(r"GPL|MPL|EPL|EUPL|CDDL|SSPL|-NC|[Nn]on-?[Cc]ommercial|Proprietary")
"""Copyleft, for non-commercial use, or not open."""


def licence(name: str, metadata: Message) -> str:
    """The licence that a distribution's metadata state, by SPDX's names where they are known."""
    if name in READ:
        return READ[name]
    stated = str(metadata.get("License-Expression") or metadata.get("License") or "").strip()
    if not stated or "\n" in stated or len(stated) > 60:
        # Some put the whole text there.
        classifiers = [str(text) for text in metadata.get_all("Classifier", []) if str(text).startswith("License ::")]
        stated = " and ".join(SPDX.get(last, last) for last in (text.rpartition(" :: ")[2] for text in classifiers))
    return SPDX.get(stated, stated)


def installers() -> dict[str, list[str]]:
    """Third-party distributions, and the packages that install them: by name, or with the extra that does."""
    locked: dict[str, list[dict]] = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]:
        locked.setdefault(package["name"], []).append(package)
    ours = members()
    found: dict[str, list[str]] = {}
    for member in sorted(ours, key=lambda member: (member.kind != "packages", member.name)):
        plain = _closure(locked, member.name, [""])
        for name in plain:
            found.setdefault(name, []).append(member.name)
        for extra in member.project.get("optional-dependencies", {}):
            for name in _closure(locked, member.name, ["", extra]) - plain:
                found.setdefault(name, []).append(f"{member.name}[{extra}]")
    packages = {member.name for member in ours if member.kind == "packages"}
    for name, by in found.items():
        # Shared members are installed by packages; they count where no package asks.
        chosen = [who for who in by if who.partition("[")[0] in packages] or by
        plain_first = [who for who in chosen if "[" not in who] or chosen
        found[name] = ["all ten"] if packages <= set(plain_first) else plain_first
    return {name: by for name, by in sorted(found.items()) if name not in {member.name for member in ours}}


def _closure(locked: dict[str, list[dict]], name: str, extras: Iterable[str]) -> set[str]:
    queue = [(name, extra) for extra in extras]
    for current, extra in queue:
        for package in locked[current]:
            needs = (
                package.get("optional-dependencies", {}).get(extra, []) if extra else package.get("dependencies", [])
            )
            new = [(need["name"], part) for need in needs for part in ["", *need.get("extra", [])]]
            queue += [item for item in dict.fromkeys(new) if item not in queue]
    return {current for current, _ in queue} - {name}


def tables(licences: dict[str, str], by: dict[str, list[str]]) -> dict[str, str]:
    """The page's tables: ``named``, what asks for a look, and ``all``."""
    named = {name: text for name, text in licences.items() if OPEN.search(text)}
    return {
        "named": _table(["distribution", "licence", "installed by"], [[n, t, _who(by[n])] for n, t in named.items()]),
        "all": _table(["distribution", "licence", "installed by"], [[n, t, _who(by[n])] for n, t in licences.items()]),
    }


def _who(names: list[str]) -> str:
    return ", ".join(name.removeprefix("hone-") for name in names)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in [titles, ["---"] * len(titles), *rows])


def listed(text: str) -> dict[str, str]:
    """Distribution to licence, as the page's last table has them."""
    (body,) = (match["body"] for match in MARKER.finditer(text) if match["name"] == "all")
    cells = [line.strip("| ").split(" | ") for line in body.splitlines()[2:]]
    return {line[0]: line[1] for line in cells}


def here() -> dict[str, str]:
    """Licences of what is installed in this environment in the versions of constraints.txt."""
    pinned = constraints.pins((ROOT / constraints.FILE).read_text(encoding="utf-8"))
    found = {requirement_name(dist.metadata["Name"]): dist for dist in importlib.metadata.distributions()}
    return {name: licence(name, dist.metadata) for name, dist in found.items() if dist.version in pinned.get(name, ())}


def check(text: str) -> list[str]:
    """Where the page differs from the resolution, from what is installed, or its first table from its last."""
    by, shown, installed = installers(), listed(text), here()
    problems = [
        f"{name} is {'missing' if name in by else 'no dependency'}" for name in sorted(by.keys() ^ shown.keys())
    ]
    problems += [
        f"{name}: its metadata say {installed[name]!r}, the page {shown[name]!r}"
        for name in sorted(by.keys() & shown.keys() & installed.keys())
        if installed[name] != shown[name]
    ]
    if not problems and update(text, tables(shown, by)) != text:
        problems.append("who installs what differs")
    return [f"docs/licences.md: {problem}; write it anew (see tools/licences.py)" for problem in problems]


def update(text: str, made: dict[str, str]) -> str:
    """The page with its tables written anew."""
    return MARKER.sub(
        lambda match: f"<!-- licences: {match['name']} -->\n{made[match['name']]}<!-- /licences -->", text
    )


def main() -> int:
    """Write the page, or say that it differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    if not (ROOT / "uv.lock").is_file():
        return report(["there is no resolution here; run uv sync --all-packages first"], "licences")
    text = PAGE.read_text(encoding="utf-8")
    if options.check:
        return report(check(text), "licences")
    by, installed = installers(), here()
    if missing := [name for name in by if not installed.get(name)]:
        return report([f"{name} is not installed, or states no licence" for name in missing], "licences")
    PAGE.write_text(update(text, tables({name: installed[name] for name in by}, by)), encoding="utf-8")
    return report([], "licences")


if __name__ == "__main__":
    raise SystemExit(main())
