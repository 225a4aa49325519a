"""Check that every member has the files that its kind has, and nothing that it should not have.

    python tools/layout.py

The rules are those of docs/adding_a_method.md.
"""

import argparse
import ast
import itertools
import re
from pathlib import Path

from workspace import ROOT, Member, load_root, members, report

REQUIRED = {
    "packages": ("__init__.py", "py.typed", "method.py", "config.py", "models.py", "cli.py"),
    "shared": ("__init__.py", "py.typed"),
    "kernels": ("__init__.py", "py.typed", "cli.py"),
}
OP_FILES = ("__init__.py", "reference.py", "api.py")
VAGUE = ("utils.py", "util.py", "helpers.py", "misc.py", "common.py")
METHOD_LINES = 400
ASSET_BYTES = 8 * 2**20
TOP_FOLDERS = ("packages", "shared", "kernels", "tools", "tests", "docs", "results")


def check(root: Path = ROOT) -> list[str]:
    """All problems of the tree, one line each."""
    found = members(root)
    problems = [problem for member in found for problem in _member(member)]
    problems += _versions(found)
    problems += _sources(root, found)
    problems += _tests(root, found)
    return problems


def _member(member: Member) -> list[str]:
    where, source = member.folder, member.source
    if not source.is_dir():
        return [f"{where}: expected the import package at src/{member.module}"]
    problems = []
    expected = "hone-kernels" if member.kind == "kernels" else "hone-" + member.folder.name.replace("_", "-")
    if member.name != expected:
        problems.append(f"{where}: the distribution must be called {expected}; it is {member.name}")
    if member.tool:
        problems.append(f"{where}/pyproject.toml: settings belong to the root; remove [tool.{next(iter(member.tool))}]")
    for name in ("pyproject.toml", "README.md"):
        if not (member.root / where / name).is_file():
            problems.append(f"{where}: {name} is missing")
    # A wheel is made of the member's folder, and carries the licence.
    copy, licence = member.root / where / "LICENSE", member.root / "LICENSE"
    if not copy.is_file() or copy.read_bytes() != licence.read_bytes():
        problems.append(f"{where}: LICENSE must be a copy of the root's")
    if member.project.get("license-files") != ["LICENSE"]:
        problems.append(f'{where}/pyproject.toml: expected license-files = ["LICENSE"]')
    for name in REQUIRED.get(member.kind, ()):
        if not (source / name).is_file():
            problems.append(f"{where}: src/{member.module}/{name} is missing")
    scripts = member.project.get("scripts", {})
    wanted = {member.name: f"{member.module}.cli:main"} if member.kind in ("packages", "kernels") else {}
    if scripts != wanted:
        problems.append(f"{where}/pyproject.toml: [project.scripts] must be {wanted or 'absent'}; it is {scripts}")
    if member.kind == "kernels":
        problems += _ops(member)
    assets = source / "assets"
    size = sum(file.stat().st_size for file in assets.rglob("*") if file.is_file()) if assets.is_dir() else 0
    if size > ASSET_BYTES:
        problems.append(f"{where}: assets/ holds {size / 2**20:.1f} MiB; at most {ASSET_BYTES / 2**20:.0f} are allowed")
    for file in sorted(source.rglob("*.py")):
        problems += _module(member, file)
    return problems


def _ops(member: Member) -> list[str]:
    folders = [folder for folder in sorted(member.source.iterdir()) if folder.is_dir() and any(folder.glob("*.py"))]
    return [
        f"{member.folder}: {folder.name}/{name} is missing"
        for folder in folders
        for name in OP_FILES
        if not (folder / name).is_file()
    ]


def _module(member: Member, file: Path) -> list[str]:
    where = file.relative_to(member.root)
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(where))
    problems = []
    if file.name in VAGUE:
        problems.append(f"{where}: name the file after its concept")
    if member.kind == "packages" and file.name == "method.py" and len(text.splitlines()) > METHOD_LINES:
        problems.append(f"{where}: {len(text.splitlines())} lines; at most {METHOD_LINES}, split it by concept")
    imported = {name.partition(".")[0] for name in _imports(tree)}
    if "tyro" in imported and file.name != "cli.py":
        problems.append(f"{where}: tyro is imported in cli.py only")
    code = [node for node in tree.body if not _is_docstring(node)]
    if not code and file.name != "__init__.py":
        problems.append(f"{where}: holds no code; a missing file says that there is no such stage, an empty one lies")
    problems += [
        f"{where}:{node.lineno}: {node.name} does nothing yet; leave it out until it does"
        for node in code
        if isinstance(node, ast.FunctionDef) and all(map(_is_nothing, node.body)) and not _is_overload(node)
    ]
    return problems


def _imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_overload(node: ast.FunctionDef) -> bool:
    return any(isinstance(item, ast.Name) and item.id == "overload" for item in node.decorator_list)


def _is_nothing(node: ast.stmt) -> bool:
    """Pass, an ellipsis or docstring, or NotImplementedError."""
    if isinstance(node, ast.Pass) or _is_docstring(node):
        return True
    return isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.dump(node.exc)


def _versions(found: list[Member]) -> list[str]:
    """One version for all members, and sibling bounds that fit it."""
    problems = []
    versions = {member.name: member.project.get("version") for member in found}
    if len(set(versions.values())) > 1:
        problems.append(f"members have one version; found {versions}")
    for member in found:
        extras = member.project.get("optional-dependencies", {}).values()
        for text in itertools.chain(member.project.get("dependencies", []), *extras):
            if text.startswith("hone-"):
                name = re.split(r"[^\w-]", text)[0]
                asked = re.search(r"\[.*?\]", text)
                bound = f"{name}{asked[0] if asked else ''}~={versions.get(name)}"
                if text.replace(" ", "") != bound:
                    problems.append(f"{member.folder}/pyproject.toml: expected {bound!r}; got {text!r}")
    return problems


def _sources(root: Path, found: list[Member]) -> list[str]:
    """Each member is a workspace source of the root, and nothing else is."""
    sources = set(load_root(root)["tool"]["uv"].get("sources", {}))
    names = {member.name for member in found}
    return [f"pyproject.toml: [tool.uv.sources] lacks {name}" for name in sorted(names - sources)] + [
        f"pyproject.toml: [tool.uv.sources] names {name}, which is no member" for name in sorted(sources - names)
    ]


def _tests(root: Path, found: list[Member]) -> list[str]:
    """The test tree mirrors the members and holds no packages."""
    problems = [
        f"{file.relative_to(root)}: test folders are no packages; remove it"
        for file in root.glob("tests/**/__init__.py")
    ]
    problems += [
        f"{folder}/__init__.py: top folders are no packages; remove it"
        for folder in TOP_FOLDERS
        if (root / folder / "__init__.py").exists()
    ]
    for member in found:
        if not any((root / member.tests).rglob("test_*.py")):
            problems.append(f"{member.folder}: no tests in {member.tests}")
    for kind in ("packages", "shared"):
        for folder in sorted((root / "tests" / kind).glob("*/")):
            if folder.name != "__pycache__" and not (root / kind / folder.name / "pyproject.toml").exists():
                problems.append(f"tests/{kind}/{folder.name}: there is no member {kind}/{folder.name}")
    return problems


def main() -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to check")
    return report(check(parser.parse_args().root.resolve()), "layout")


if __name__ == "__main__":
    raise SystemExit(main())
