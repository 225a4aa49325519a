"""One page with every demo: pictures, videos, tables, verdicts, in one file that needs no network.

    python tools/gallery.py                      run the demos that have not run, and write runs/gallery/index.html
    python tools/gallery.py --only blade,nar     some packages
    python tools/gallery.py --read               run nothing; a package without a finished demo is left out

A demo's run lies in runs/gallery/<package>; delete the folder to run it again. Words and verdicts are those of the
front page (docs/methods.toml); the table is the table ``demo`` of results/<package>/tables.toml, of this run.
"""

import argparse
import base64
import html
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import methods
import tables
from workspace import ROOT

RUNS = "runs/gallery"
PICTURES = {".png": "image/png", ".gif": "image/gif", ".svg": "image/svg+xml"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { margin-bottom: 0; }
nav { display: grid; grid-template-columns: repeat(auto-fill, minmax(12.5rem, 1fr)); gap: 1rem; padding: .7rem 0 2rem; }
nav a { color: inherit; text-decoration: none; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
nav a:hover { border-color: #48c; }
nav img { width: 100%; height: 9rem; object-fit: cover; object-position: 0 0; margin: 0; border-radius: 0; }
nav b, nav span { display: block; margin: .3rem .7rem; }
nav span { font-size: 14px; line-height: 1.4; }
nav span:last-child { opacity: .75; margin-bottom: .7rem; }
section { padding: 1rem 0 2rem; border-bottom: 1px solid var(--line); }
.run, .verdict { margin: .3rem 0; }
.verdict { padding: .5rem .8rem; background: var(--soft); border-left: 3px solid #48c; }
img, video { max-width: 100%; height: auto; display: block; margin: .7rem 0; background: #fff; border-radius: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
small { opacity: .75; }
code { overflow-wrap: anywhere; }
"""


def specs(package: str, root: Path = ROOT) -> Path:
    """Where the tables of a package are specified; that of its demo is missing as long as the demo is."""
    return root / "results" / package / tables.SPECS


def is_done(run: Path) -> bool:
    """Whether a finished demo lies there."""
    results = run / "results.json"
    return results.is_file() and json.loads(results.read_text(encoding="utf-8")).get("status") == "done"


def perform(package: str, run: Path) -> bool:
    """Run a demo into its folder; whether it ended well."""
    command = [str(Path(sys.executable).with_name(f"hone-{package.replace('_', '-')}")), "demo", "--out", str(run)]
    print(f"== {' '.join(command)}", flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def page(runs: dict[str, Path], root: Path = ROOT) -> str:
    """The page of these finished demos, by package.

    Raises:
        tables.TableError: A package's words or its table cannot be made.
    """
    said = methods.load(root)
    sections = [_section(package, run, said[package], root) for package, run in runs.items()]
    left = [package for package in said if package not in runs]
    absent = f" Not shown here: {', '.join(left)}." if left else ""
    links = "".join(_card(package, run, said[package]) for package, run in runs.items())
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>hone: the demos</title>\n<style>{STYLE}</style>\n<h1>hone</h1>\n"
        "<p>Ten published methods that make generative models do less work, each on a tiny model that it ships."
        f"{absent}</p>\n"
        f"<nav>\n{links}</nav>\n{''.join(sections)}</html>\n"
    )


def _card(package: str, run: Path, said: dict[str, str]) -> str:
    """One method at a glance: a picture of its demo (one that moves, or the last), and what was measured."""
    covers = sorted(_pictures(run), key=lambda path: path.suffix == ".gif")
    shown = "".join(f'<img alt="" src="{_data(path, PICTURES[path.suffix])}">' for path in covers[-1:])
    lines = [f"Less of: {_words(said['less'])}.", f"Measured: {_words(said['measured'])}."]
    words = f"<b>{package}</b>" + "".join(f"<span>{line}</span>" for line in lines)
    return f'<a href="#{package}">{shown}{words}</a>\n'


def _pictures(run: Path) -> list[Path]:
    """A demo's pictures. A plot is stored as PNG and SVG; one is enough."""
    found = sorted(path for path in run.glob("figures/*") if path.suffix in PICTURES)
    return [path for path in found if path.suffix != ".svg" or path.with_suffix(".png") not in found]


def _section(package: str, run: Path, said: dict[str, str], root: Path) -> str:
    verdict = methods.VERDICT.sub(r"<b>\1</b>", _words(said["verdict"]))
    parts = [
        f'<section id="{package}">\n<h2>{package}</h2>\n<p class="run">Less of: {_words(said["less"])}. '
        f'<a href="https://arxiv.org/abs/{said["paper"]}">arXiv {said["paper"]}</a>.</p>\n',
        f'<p class="run">For: {_words(said["run"])}. <code>{html.escape(said["code"])}</code></p>\n',
        f'<p class="run">Measured: {_words(said["measured"])}.</p>\n',
        f'<p class="verdict">The paper\'s claims, put to the test: {verdict}.</p>\n',
    ]
    for video in sorted(run.glob("artifacts/*.mp4")):
        parts.append(f'<video controls loop muted playsinline src="{_data(video, "video/mp4")}"></video>\n')
    for picture in _pictures(run):
        parts.append(f'<img loading="lazy" alt="{picture.stem}" src="{_data(picture, PICTURES[picture.suffix])}">\n')
    spec = tomllib.loads(specs(package, root).read_text(encoding="utf-8"))["demo"]
    parts.append(_table(tables.render(spec | {"files": ["results.json"], "caption": False}, run, run)))
    made = {"environment": json.loads((run / "environment.json").read_text(encoding="utf-8"))}
    parts.append(f"<small>{_words(tables.caption({'results.json': made}).strip('*').replace('`', ''))}.</small>\n")
    return "".join([*parts, "</section>\n"])


def _data(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _words(text: str) -> str:
    return html.escape(text.rstrip("."))


def _table(markdown: str) -> str:
    """A table as ``tables.render`` writes it."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    body = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"
        for tag, cells in [("th", rows[0]), *(("td", row) for row in rows[2:])]
    )
    return f'<div class="wide"><table>\n{body}</table></div>\n'


def main() -> int:
    """Run what is missing, write the page, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="packages, separated by commas")
    parser.add_argument("--read", action="store_true", help="run nothing")
    parser.add_argument("--runs", type=Path, default=ROOT / RUNS, help=f"where the demos' runs lie (default: {RUNS})")
    args = parser.parse_args()
    known = list(methods.load())
    without = [name for name in known if "demo" not in tomllib.loads(specs(name).read_text(encoding="utf-8"))]
    chosen = [name.strip() for name in args.only.split(",") if name.strip()] or [n for n in known if n not in without]
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown packages {', '.join(unknown)}; expected some of {', '.join(known)}")
    if early := [name for name in chosen if name in without]:
        parser.error(f"{', '.join(early)} has no demo yet")
    folders = {package: args.runs.resolve() / package for package in chosen}
    failed = [
        package for package, run in folders.items() if not is_done(run) and not args.read and not perform(package, run)
    ]
    done = {package: run for package, run in folders.items() if is_done(run)}
    if not done:
        print("no demo has run; without --read they are run first")
        return 1
    out = args.runs / "index.html"
    out.write_text(page(done), encoding="utf-8")
    left = [package for package in [*chosen, *without] if package not in done]
    print(f"gallery: {out}, {out.stat().st_size / 2**20:.1f} MiB" + (f"; without {', '.join(left)}" if left else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
