"""Check who imports whom.

    python tools/boundaries.py

packages may import shared and kernels, never each other; shared may import core and kernels; kernels import nothing of
ours; core imports nothing of ours. There are no circles, neither between members nor between modules, and every
distribution that a member imports is one that it declares.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workspace import ROOT, Member, members, report

# Import name to distribution, where they differ by more than case and dashes.
DISTRIBUTION = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "skimage": "scikit-image",
}


@dataclass(frozen=True)
class Import:
    """One imported module: ``at_load`` is false inside functions and under TYPE_CHECKING."""

    module: str
    names: tuple[str, ...]
    line: int
    at_load: bool


def check(root: Path = ROOT) -> list[str]:
    """All problems of the tree, one line each."""
    found = members(root)
    by_module = {member.module: member for member in found}
    problems: list[str] = []
    uses: dict[str, set[str]] = {member.name: set() for member in found}
    for member in found:
        graph: dict[str, set[str]] = {}
        modules = {_module_name(member, file): file for file in sorted(member.source.rglob("*.py"))}
        for name, file in modules.items():
            where = file.relative_to(root)
            graph[name] = set()
            for item in imports(file, name):
                top = item.module.partition(".")[0]
                if top == member.module:
                    if item.at_load:
                        graph[name] |= _targets(item, modules) - {name}
                elif top in by_module:
                    other = by_module[top]
                    uses[member.name].add(other.name)
                    problems += _forbidden(member, other, f"{where}:{item.line}")
                else:
                    problems += _undeclared(member, top, f"{where}:{item.line}")
        problems += [f"{member.folder}: modules import each other in a circle: {path}" for path in circles(graph)]
    problems += [f"members import each other in a circle: {path}" for path in circles(uses)]
    return list(dict.fromkeys(problems))


def _forbidden(member: Member, other: Member, where: str) -> list[str]:
    allowed = {
        "packages": other.kind in ("shared", "kernels"),
        "shared": member.name != "hone-core" and (other.name == "hone-core" or other.kind == "kernels"),
        "kernels": False,
    }
    if not allowed.get(member.kind, False):
        return [f"{where}: {member.folder} must not import {other.module}"]
    if other.name not in member.siblings:
        return [f"{where}: {member.name} imports {other.module} and does not declare {other.name}"]
    return []


def _undeclared(member: Member, top: str, where: str) -> list[str]:
    if top in sys.stdlib_module_names or top == "__future__":
        return []
    distribution = DISTRIBUTION.get(top, top.lower().replace("_", "-"))
    if distribution in member.dependencies(extras=True):
        return []
    return [f"{where}: {member.name} imports {top} and does not declare {distribution}"]


def imports(file: Path, name: str) -> Iterator[Import]:
    """Imports of a file, relative ones made absolute."""
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    yield from _walk(tree, package, at_load=True)


def _walk(node: ast.AST, package: str, *, at_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, (), child.lineno, at_load)
        elif isinstance(child, ast.ImportFrom):
            module = child.module or ""
            if child.level:
                parts = package.split(".")
                module = ".".join([*parts[: len(parts) - child.level + 1], *([module] if module else [])])
            yield Import(module, tuple(alias.name for alias in child.names), child.lineno, at_load)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, package, at_load=False)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for part in child.body:
                yield from _walk(ast.Module([part], []), package, at_load=False)
            for part in child.orelse:
                yield from _walk(ast.Module([part], []), package, at_load=at_load)
        else:
            yield from _walk(child, package, at_load=at_load)


def _targets(item: Import, modules: dict[str, Path]) -> set[str]:
    """Modules that an import loads: ``from a import b`` loads a.b where that is a module, else a."""
    loaded = {f"{item.module}.{name}" for name in item.names} & modules.keys()
    if len(loaded) < len(item.names) or not item.names:
        loaded |= {item.module} & modules.keys()
    return loaded


def _module_name(member: Member, file: Path) -> str:
    parts = [member.module, *file.relative_to(member.source).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Each circle once, as ``a -> b -> a``."""
    found: dict[frozenset[str], str] = {}
    state: dict[str, int] = {}

    def visit(node: str, path: list[str]) -> None:
        state[node] = 1
        for target in sorted(graph.get(node, ())):
            if state.get(target) == 1:
                circle = [*path[path.index(target) :], target]
                found.setdefault(frozenset(circle), " -> ".join(circle))
            elif target not in state:
                visit(target, [*path, target])
        state[node] = 2

    for node in sorted(graph):
        if node not in state:
            visit(node, [node])
    return list(found.values())


def main() -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to check")
    return report(check(parser.parse_args().root.resolve()), "boundaries")


if __name__ == "__main__":
    raise SystemExit(main())
