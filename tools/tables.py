"""Write the tables of README files from the JSON files in results/.

    python tools/tables.py            write them
    python tools/tables.py --check    fail where a file differs from its results

The README of a member holds ``<!-- table: NAME -->``, the rows, and ``<!-- /table -->``; what to show stands under that
name in results/<folder of the member>/tables.toml:

    [attention-forward]
    files = ["attention_h200.json"]
    where = { mode = "forward" }
    rows = ["shape", "density"]
    each = { value = "ms_p50", unit = "ms" }
    columns = [
      { title = "ours", where = { provider = "hone" } },
      { title = "torch, {}", pivot = "provider", values = { "sdpa cudnn" = "cuDNN", "sdpa flash" = "flash" } },
      { title = "speed-up", speedup = { baseline = { provider = "sdpa cudnn" }, method = { provider = "hone" } } },
    ]

- files: results files beside tables.toml (* matches names). Their rows are read together.
- where: the rows that take part. A value is one that the field must equal, or a list of such values.
- rows: fields whose values make the table's rows, in the order in which the files list them. ``{ field = "variant",
  title = "mask" }`` gives the column a title of its own, ``names = { asa_g = "ASA-G" }`` other words for its values.
- columns: ``where`` picks one result per table row, ``value`` the field to show ("value" unless said), ``digits`` the
  decimals (2), ``unit`` a suffix (the row's own unit unless said; "" for none), ``scale`` a factor for the shown
  number, ``spread = true`` adds the spread, ``interval = true`` the 95 % interval. ``speedup`` divides the baseline's
  value by the method's; of several baselines (a list in its where) the smallest counts with ``best = true``.
- A column with ``pivot`` stands for one per value of that field; ``{}`` in its title is the value. ``values`` says
  which, in which order and under which names; unless said, all.
- each: what holds of every column that does not say otherwise.
- caption = false leaves out the line under the table that names hardware, commit and file.

Fields are those of the results' rows; a row's labels count as fields, and ``file`` is the name of the one that it
stands in. A value that was not measured shows as a dash, a positive one that would round to zero as less than the
smallest number with these digits. Two results for one cell are an error, and so is a table that no README shows.
"""

import argparse
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from workspace import ROOT, report, tracked_files

SPECS = "tables.toml"
MARKER = re.compile(r"^<!-- table: (?P<name>[\w.-]+) -->\n(?P<body>.*?)^<!-- /table -->$", re.M | re.S)
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.M | re.S)
KEYS = {
    "table": {"files", "where", "rows", "columns", "each", "caption"},
    "row": {"field", "title", "names"},
    "column": {
        *("title", "where", "value", "digits", "unit", "scale", "spread", "interval", "speedup"),
        *("pivot", "values"),
    },
    "speedup": {"baseline", "method", "best"},
}


class TableError(Exception):
    """A table cannot be made from what its specification says."""


def render(spec: dict[str, Any], folder: Path, root: Path = ROOT) -> str:
    """The table of one specification, in Markdown; its files lie in ``folder``.

    Raises:
        TableError: The spec is wrong, a file is missing, or two results fit one cell.
    """
    _only(spec, "table", "table")
    for key in ("files", "rows", "columns"):
        if not spec.get(key):
            raise TableError(f"{key} is missing")
    found = documents(spec["files"], folder, root)
    rows = [{"file": Path(name).name} | fields(row) for name, document in found.items() for row in document["rows"]]
    chosen = [row for row in rows if fits(row, spec.get("where", {}))]
    if not chosen:
        raise TableError(f"no result fits where = {spec.get('where', {})}")
    keys = [{"field": key} if isinstance(key, str) else key for key in spec["rows"]]
    for key in keys:
        _only(key, "row", "rows")
    groups: dict[tuple, list[dict]] = {}
    for row in chosen:
        groups.setdefault(tuple(row.get(key["field"], "") for key in keys), []).append(row)

    columns = [made for column in spec["columns"] for made in _columns(spec.get("each", {}) | column, chosen)]
    lines = [[key.get("title", key["field"]) for key in keys] + [column.get("title", "") for column in columns]]
    for values, members in groups.items():
        cells = [str(key.get("names", {}).get(str(value), value)) for key, value in zip(keys, values, strict=True)]
        shown = [cell(members, column, " ".join(cells)) for column in columns]
        # A group in which no column finds anything belongs to another table.
        if any(text != _DASH for text in shown):
            lines.append(cells + shown)
    align = ["---"] * len(keys) + ["---:"] * len(columns)
    text = "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], align, *lines[1:]]) + "\n"
    return text + (f"\n{caption(found)}\n" if spec.get("caption", True) else "")


_DASH = "-"


def _columns(column: dict[str, Any], rows: list[dict]) -> list[dict[str, Any]]:
    """The column, or with ``pivot`` one for each value of that field."""
    _only(column, "column", "columns")
    if "pivot" not in column:
        return [column]
    field, where = column["pivot"], column.get("where", {})
    found = dict.fromkeys(row[field] for row in rows if field in row and fits(row, where))
    values = column.get("values", list(found))
    names = values if isinstance(values, dict) else {value: value for value in values}
    if unknown := [value for value in names if value not in found]:
        raise TableError(f"no result has {field} = {unknown[0]!r}; expected some of {list(found)}")
    rest = {key: value for key, value in column.items() if key not in ("pivot", "values")}
    return [
        rest | {"title": column.get("title", "{}").replace("{}", str(name)), "where": where | {field: value}}
        for value, name in names.items()
    ]


def cell(rows: list[dict], column: dict[str, Any], where: str) -> str:
    """What one column shows of these rows."""
    field, digits, scale = column.get("value", "value"), column.get("digits", 2), column.get("scale", 1)
    place = f"{where}, column {column.get('title', '')!r}"
    picked = [row for row in rows if fits(row, column.get("where", {}))]
    if speedup := column.get("speedup"):
        _only(speedup, "speedup", "speedup")
        sides = {side: [row for row in picked if fits(row, speedup[side])] for side in ("baseline", "method")}
        if speedup.get("best"):
            measured = [row for row in sides["baseline"] if row.get(field) is not None]
            sides["baseline"] = sorted(measured, key=lambda row: row[field])[:1]
        times = [_one(rows, field, place) for rows in sides.values()]
        if any(row is None for row in times):
            return _DASH
        return f"{times[0][field] / times[1][field]:.{digits}f}{column.get('unit', 'x')}"
    row = _one(picked, field, place)
    if row is None:
        return _DASH
    value = row[field]
    if isinstance(value, str | bool):
        return str(value)
    text = f"{value * scale:.{digits}f}"
    if value * scale > 0 and float(text) == 0:
        text = f"< {10**-digits:.{digits}f}"
    if column.get("spread") and row.get("spread") is not None:
        text += f" ± {row['spread'] * scale:.{digits}f}"
    if column.get("interval") and row.get("interval"):
        text += " [" + ", ".join(f"{bound * scale:.{digits}f}" for bound in row["interval"]) + "]"
    unit = column.get("unit", row.get("unit", "") if field in ("value", "paper_value") else "")
    return text + (unit if unit in ("", "%", "x") else f" {unit}")


def _one(rows: list[dict], field: str, place: str) -> dict | None:
    rows = [row for row in rows if row.get(field) is not None]
    if len(rows) > 1:
        raise TableError(f"{place}: {len(rows)} results fit; narrow where. The first two are {rows[0]} and {rows[1]}")
    return rows[0] if rows else None


def fits(row: dict, where: dict[str, Any]) -> bool:
    """Whether each field has the wanted value, or one of them."""
    return all(row.get(key, "") in (want if isinstance(want, list) else [want]) for key, want in where.items())


def fields(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a result, its labels among them."""
    return {**{k: v for k, v in row.items() if k != "labels"}, **row.get("labels", {})}


def _only(given: dict, kind: str, where: str) -> None:
    if unknown := sorted(given.keys() - KEYS[kind]):
        raise TableError(f"{where}: unknown {', '.join(unknown)}; expected {', '.join(sorted(KEYS[kind]))}")


def documents(patterns: list[str], folder: Path, root: Path) -> dict[str, dict]:
    """The results files that match, by path."""
    found: dict[str, dict] = {}
    for pattern in patterns:
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise TableError(f"there is no file {(folder / pattern).relative_to(root)}")
        for path in paths:
            document = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
                raise TableError(f"{path.relative_to(root)}: expected an object with rows")
            if document.get("status", "done") != "done":
                raise TableError(f"{path.relative_to(root)}: its run is {document['status']}, not done")
            found[path.relative_to(root).as_posix()] = document
    return found


def caption(documents: dict[str, dict]) -> str:
    """Hardware, versions and commit of each file; files that agree share a sentence."""
    sentences: dict[str, list[str]] = {}
    for name, document in documents.items():
        environment = document.get("environment", {})
        hardware = environment.get("gpu") or environment.get("cpu") or "hardware not recorded"
        commit = (environment.get("commit") or "")[:10] or "not recorded"
        changed = " with local changes" if environment.get("dirty") else ""
        torch = f", torch {environment['torch']}" if environment.get("torch") else ""
        sentences.setdefault(f"{hardware}{torch}, commit {commit}{changed}", []).append(f"`{name}`")
    return " ".join(f"*Measured on {what}; from {', '.join(files)}.*" for what, files in sentences.items())


def update(text: str, specs: dict[str, Any], folder: Path, root: Path = ROOT) -> str:
    """The text with every table written anew; tables inside code fences are examples and stay.

    Raises:
        TableError: With the table's name, what is wrong.
    """
    fences = [match.span() for match in FENCE.finditer(text)]

    def write(match: re.Match[str]) -> str:
        if _inside(match, fences):
            return match[0]
        name = match["name"]
        if name not in specs:
            raise TableError(f"{(folder / SPECS).relative_to(root)} has no table {name}; it has {', '.join(specs)}")
        try:
            table = render(specs[name], folder, root)
        except TableError as error:
            raise TableError(f"table {name}: {error}") from error
        return f"<!-- table: {name} -->\n{table}<!-- /table -->"

    if (opened := len(_names(text))) != (closed := sum(not _inside(match, fences) for match in MARKER.finditer(text))):
        raise TableError(f"{opened} tables are opened and {closed} are closed by <!-- /table -->")
    return MARKER.sub(write, text)


def _names(text: str) -> list[str]:
    """Names of the tables that a page opens."""
    fences = [match.span() for match in FENCE.finditer(text)]
    opened = re.finditer(r"^<!-- table:\s*([\w.-]*)", text, re.M)
    return [match[1] for match in opened if not _inside(match, fences)]


def _inside(match: re.Match[str], spans: list[tuple[int, int]]) -> bool:
    return any(start < match.start() < end for start, end in spans)


def run(root: Path = ROOT, *, write: bool) -> list[str]:
    """Write or compare the tables of every tracked Markdown file; returns the problems."""
    problems = []
    shown: dict[Path, list[str]] = {}
    for name in tracked_files(root):
        text = (root / name).read_text(encoding="utf-8") if name.suffix == ".md" else ""
        if not (names := _names(text)):
            continue
        folder = root / "results" / name.parent.name
        shown.setdefault(folder, []).extend(names)
        try:
            fresh = update(text, _specs(folder), folder, root)
        except (TableError, tomllib.TOMLDecodeError, FileNotFoundError) as error:
            problems.append(f"{name}: {error}")
            continue
        if fresh != text and write:
            (root / name).write_text(fresh, encoding="utf-8")
            print(f"{name}: written")
        elif fresh != text:
            problems.append(f"{name}: differs from results/; run python tools/tables.py")
    for file in sorted(root.glob(f"results/**/{SPECS}")):
        if unused := [name for name in _specs(file.parent) if name not in shown.get(file.parent, [])]:
            problems.append(f"{file.relative_to(root)}: no README shows {', '.join(unused)}")
    return problems


def _specs(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / SPECS).read_text(encoding="utf-8"))


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file would change")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    return report(run(args.root.resolve(), write=not args.check), "tables")


if __name__ == "__main__":
    raise SystemExit(main())
