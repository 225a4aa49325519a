"""What mkdocs builds (see mkdocs.yml): the repository's Markdown files where they lie, and a page of API per member.

A page is the file itself, not a copy: links and pictures work as they do in the repository.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {".css", ".md", ".png", ".svg", ".gif"}
START = {
    "Start": "README.md",
    "How results are made": "docs/results.md",
    "Past one machine": "docs/costs.md",
    "Changes": "CHANGELOG.md",
}
WORK = {
    "Contributing": "CONTRIBUTING.md",
    "Conventions": "docs/conventions.md",
    "Adding a method": "docs/adding_a_method.md",
    "Licence": "LICENSE.md",
    "Licences of dependencies": "docs/licences.md",
}
FIRST = ["method", "models", "config"]
"""Modules of a method that its page of API begins with."""
REMARK = re.compile(r'<details class="(source|differs)" open>\s*<summary>(.*?)</summary>\s*<p>(.*?)</details>', re.S)
FOLDER = re.compile(r"(\]\()((?:\.\./)*(?:packages|shared)/\w+|(?:\.\./)*kernels)(#[\w-]+)?\)")


@event_priority(100)
def on_config(config: Any) -> Any:
    """Say what stands in the navigation, and where mkdocstrings finds the sources."""
    packages, shared = _members("packages"), _members("shared")
    config.nav = [
        *({title: page} for title, page in START.items()),
        {"Methods": [{name: f"packages/{name}/README.md"} for name in packages]},
        {
            "Shared": [
                {"kernels": "kernels/README.md"},
                {"kernels, the log": "kernels/LOG.md"},
                *({name: f"shared/{name}/README.md"} for name in shared),
            ]
        },
        {"Python API": [{f"hone_{name}": f"api/hone_{name}.md"} for name in [*packages, "kernels", *shared]]},
        {"Working on it": [{title: page} for title, page in WORK.items()]},
    ]
    paths = [
        str(ROOT / "kernels/src"),
        *(str(path) for kind in ("packages", "shared") for path in ROOT.glob(f"{kind}/*/src")),
    ]
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = paths
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages: tracked files in their places, and one of API for each member."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    # What lies in docs/ comes from there, below docs/; the theme's files stay.
    kept = Files([file for file in files if file.src_dir != config.docs_dir])
    for name in tracked:
        path = ROOT / name
        shown = path.suffix in SHOWN or (path.suffix == ".json" and name.startswith("results/"))
        if shown and path.is_file() and not name.startswith((".", "tests/")):
            kept.append(File.generated(config, name, abs_src_path=str(path)))
    for name in [*_members("packages"), "kernels", *_members("shared")]:
        kept.append(File.generated(config, f"api/hone_{name}.md", content=_api(f"hone_{name}")))
    kept.append(
        File.generated(config, "LICENSE.md", content=f"# Licence\n\n```text\n{(ROOT / 'LICENSE').read_text()}```\n")
    )
    return kept


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A link to a member's folder leads to its page, as it does in the repository."""
    text = FOLDER.sub(r"\1\2/README.md\3)", markdown)
    return re.sub(r"(\]\((?:\.\./)*LICENSE)\)", r"\1.md)", text)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """``Source:`` and ``Differs:`` of a docstring are sentences, whose first line mkdocstrings takes for a title."""
    return REMARK.sub(lambda found: f"<p>{found[1].title()}: {found[2]} {found[3]}", html)


def _members(kind: str) -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob(f"{kind}/*/pyproject.toml"))


def _api(module: str) -> str:
    """A member's modules that say what they offer: method, models and config, then the others."""
    folder = next(ROOT.glob(f"*/*/src/{module}"), ROOT / "kernels/src" / module)
    lines = [f"# {module}\n"]
    paths = sorted(folder.rglob("*.py"))
    for path in sorted(paths, key=lambda path: FIRST.index(path.stem) if path.stem in FIRST else len(FIRST)):
        parts = path.relative_to(folder).with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        names = [part for part in parts if part != "__init__"]
        if not names or "__all__" not in path.read_text(encoding="utf-8"):
            continue
        dotted = ".".join([module, *names])
        lines.append(f"## `{dotted}`\n\n::: {dotted}\n    options:\n      heading_level: 3\n")
    return "\n".join(lines)
