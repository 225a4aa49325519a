"""Write what the front page says of the methods, from docs/methods.toml and the JSON files in results/.

    python tools/methods.py            write it
    python tools/methods.py --check    fail where README.md differs

README.md holds ``<!-- methods: NAME -->``, a table, and ``<!-- /methods -->``. Every word stands in docs/methods.toml;
every number is a cell of tools/tables.py, made of files in results/<package>.
"""

import argparse
import re
import tomllib
from pathlib import Path
from typing import Any

from tables import TableError, cell, documents, fields
from workspace import ROOT, members, report

SOURCE = "docs/methods.toml"
MARKER = re.compile(r"^<!-- methods: (?P<name>\w+) -->\n.*?^<!-- /methods -->$", re.M | re.S)
VERDICT = re.compile(r"\b(not confirmed|confirmed|refuted|undecided|mixed|not tested)\b")
WORDS = ("run", "paper", "less", "code", "needs", "measured", "verdict")


def load(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """What is said of each package, numbers filled in.

    Raises:
        TableError: A package is missing or unknown, a word is missing, or a number cannot be made.
    """
    said = tomllib.loads((root / SOURCE).read_text(encoding="utf-8"))
    packages = {member.folder.name for member in members(root) if member.kind == "packages"}
    if wrong := packages ^ said.keys():
        raise TableError(f"{SOURCE}: expected each package once; missing or unknown: {', '.join(sorted(wrong))}")
    return {name: _filled(name, dict(entry), root) for name, entry in said.items()}


def _filled(name: str, entry: dict[str, Any], root: Path) -> dict[str, str]:
    if missing := [word for word in WORDS if word not in entry]:
        raise TableError(f"{SOURCE}, {name}: {', '.join(missing)} is missing")
    numbers = {key: spec for key, spec in entry.items() if key not in WORDS}
    if unused := [key for key in numbers if f"{{{key}}}" not in entry["measured"]]:
        raise TableError(f"{SOURCE}, {name}: measured does not use {', '.join(unused)}")
    shown = {key: _number(f"{name}, {key}", name, dict(spec), root) for key, spec in numbers.items()}
    try:
        measured = entry["measured"].format(**shown)
    except KeyError as error:
        raise TableError(f"{SOURCE}, {name}: measured names {error}, which is not specified") from error
    return {word: entry[word] for word in WORDS} | {"measured": measured}


def _number(place: str, package: str, spec: dict[str, Any], root: Path) -> str:
    found = documents(spec.pop("files"), root / "results" / package, root)
    text = cell([fields(row) for document in found.values() for row in document["rows"]], spec, place)
    if text == "-":
        raise TableError(f"{SOURCE}, {place}: no result fits {spec}")
    return text


def table(name: str, said: dict[str, dict[str, str]]) -> str:
    """The rows of one of the front page's tables."""
    if name == "choose":
        rows = [[entry["run"], _link(package), f"`{entry['code']}`", entry["needs"]] for package, entry in said.items()]
        titles = ["you run", "take", "one line", "it needs"]
    elif name == "measured":
        rows = [
            [
                _link(package),
                f"{entry['less']} ([{entry['paper']}](https://arxiv.org/abs/{entry['paper']}))",
                entry["measured"],
                VERDICT.sub(r"**\1**", entry["verdict"]),
            ]
            for package, entry in said.items()
        ]
        titles = ["package", "what it does less of", "measured", "the paper's claims, put to the test"]
    else:
        raise TableError(f"README.md asks for methods: {name}; there are choose and measured")
    return "".join("| " + " | ".join(line) + " |\n" for line in [titles, ["---"] * len(titles), *rows])


def _link(package: str) -> str:
    return f"[`{package}`](packages/{package})"


def update(text: str, root: Path = ROOT) -> str:
    """The front page with its tables written anew."""
    said = load(root)
    names = [match["name"] for match in MARKER.finditer(text)]
    if sorted(names) != ["choose", "measured"]:
        raise TableError(f"README.md: expected the tables choose and measured, once each; got {names}")
    return MARKER.sub(
        lambda match: f"<!-- methods: {match['name']} -->\n{table(match['name'], said)}<!-- /methods -->", text
    )


def main() -> int:
    """Write the front page, or say that it differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    try:
        written = update(text)
    except TableError as error:
        return report([str(error)], "methods")
    if check and written != text:
        return report(["README.md differs from docs/methods.toml and results/; run python tools/methods.py"], "methods")
    if not check:
        page.write_text(written, encoding="utf-8")
    return report([], "methods")


if __name__ == "__main__":
    raise SystemExit(main())
