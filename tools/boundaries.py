"""Check who imports whom.

    python tools/boundaries.py

packages may import shared and kernels, never each other; shared may import core and kernels; kernels import nothing of
ours, except that the modules of their verbs import core, and their ops no verb; core imports nothing of ours. Every
distribution that a member imports is one that it declares, and every one that a package installs, by itself or through
its siblings, is one that a module of ours imports on the way from it (``BEHIND`` names what a library imports for us).
There are no circles, neither between members nor between
modules; an import inside a function counts, one under TYPE_CHECKING does not. A config.py loads no torch: not by its
own imports, those in functions and properties included, and not by a module that they load.
"""

import argparse
import ast
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from workspace import ROOT, Member, members, report, requirement_name

# Import name to distribution, where they differ by more than case and dashes.
DISTRIBUTION = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "skimage": "scikit-image",
}

# Distributions that no module of ours names, and those that import them for us.
BEHIND = {
    "accelerate": ("diffusers", "transformers"),  # loading of weights
    "ftfy": ("diffusers",),  # prompts of Wan's pipelines
    "huggingface-hub": ("diffusers", "transformers"),
    "imageio": ("diffusers",),  # export_to_video
    "imageio-ffmpeg": ("imageio", "diffusers"),
    "num2words": ("transformers",),  # SmolVLM's processor
    "sentencepiece": ("transformers",),  # T5's tokenizers
    "torchvision": ("transformers", "torchmetrics"),  # processors of images and videos; LPIPS
}

# Modules of kernels that come with an extra: verbs, their settings, and what they share.
VERBS = frozenset(
    f"{name}.py"
    for name in ("cli", "config", "bench", "tune", "profile", "sanitize", "problems", "spills", "gpu", "rows")
)

HEAVY = frozenset({"torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "numpy", "triton"})


class When(Enum):
    """When an import happens: as its module loads, when a function is called, or for a type checker only."""

    LOAD = "load"
    CALL = "call"
    TYPING = "typing"


@dataclass(frozen=True)
class Import:
    """One imported module."""

    module: str
    names: tuple[str, ...]
    line: int
    when: When


def check(root: Path = ROOT) -> list[str]:
    """All problems of the tree, one line each."""
    found = members(root)
    by_module = {member.module: member for member in found}
    files = {_module_name(member, file): file for member in found for file in sorted(member.source.rglob("*.py"))}
    imported = {name: list(imports(file, name)) for name, file in files.items()}
    problems: list[str] = []
    uses: dict[str, set[str]] = {member.name: set() for member in found}
    for name, items in imported.items():
        member = by_module[name.partition(".")[0]]
        for item in items:
            where = f"{files[name].relative_to(root)}:{item.line}"
            top = item.module.partition(".")[0]
            if top == member.module:
                if member.kind == "kernels" and files[name].name not in VERBS:
                    problems += [
                        f"{where}: an op must not import {target}, which needs an extra"
                        for target in sorted(_targets(item, files))
                        if files[target].name in VERBS
                    ]
                continue
            if top in by_module:
                uses[member.name].add(by_module[top].name)
                problems += _forbidden(member, by_module[top], files[name], where)
            else:
                problems += _undeclared(member, top, where)
    graph = {
        name: {target for item in items if item.when is not When.TYPING for target in _targets(item, files)} - {name}
        for name, items in imported.items()
    }
    problems += [problem for member in found for problem in _superfluous(member, by_module, imported, graph)]
    problems += [f"modules import each other in a circle: {path}" for path in circles(graph)]
    problems += [f"members import each other in a circle: {path}" for path in circles(uses)]
    problems += [
        f"{files[name].relative_to(root)}: a config loads no {path[-1]}: {' -> '.join(path)}"
        for name in (f"{member.module}.config" for member in found if member.kind != "shared")
        if name in files
        for path in loads_heavy(name, imported, files)
    ]
    return list(dict.fromkeys(problems))


def loads_heavy(name: str, imported: dict[str, list[Import]], files: dict[str, Path]) -> list[list[str]]:
    """One path of imports to each heavy distribution that a module ever loads.

    The module's own imports count wherever they stand; of those that it loads, what they import as they load.
    """
    paths: dict[str, list[str]] = {}
    seen = {name}
    queue = [[name]]
    for path in queue:
        for item in imported.get(path[-1], []):
            if item.when is When.TYPING or (item.when is When.CALL and len(path) > 1):
                continue
            if (top := item.module.partition(".")[0]) in HEAVY:
                paths.setdefault(top, [*path, top])
            for target in sorted(_with_parents(_targets(item, files), files) - seen):
                seen.add(target)
                queue.append([*path, target])
    return list(paths.values())


def _with_parents(names: set[str], files: Collection[str]) -> set[str]:
    """The modules and the packages that hold them, which load first."""
    split = [name.split(".") for name in names]
    return {".".join(parts[:end]) for parts in split for end in range(1, len(parts) + 1)} & set(files)


def _forbidden(member: Member, other: Member, file: Path, where: str) -> list[str]:
    allowed = {
        "packages": other.kind in ("shared", "kernels"),
        "shared": member.name != "hone-core" and (other.name == "hone-core" or other.kind == "kernels"),
        "kernels": file.name in VERBS and other.name == "hone-core",
    }
    if not allowed.get(member.kind, False):
        return [f"{where}: {member.folder} must not import {other.module}"]
    if other.name not in member.dependencies(extras=member.kind == "kernels"):
        return [f"{where}: {member.name} imports {other.module} and does not declare {other.name}"]
    return []


def _undeclared(member: Member, top: str, where: str) -> list[str]:
    if top in sys.stdlib_module_names or top == "__future__":
        return []
    distribution = _distribution(top)
    if distribution in member.dependencies(extras=True):
        return []
    return [f"{where}: {member.name} imports {top} and does not declare {distribution}"]


def _distribution(module: str) -> str:
    top = module.partition(".")[0]
    return DISTRIBUTION.get(top, top.lower().replace("_", "-"))


def _superfluous(
    member: Member, by_module: dict[str, Member], imported: dict[str, list[Import]], graph: dict[str, set[str]]
) -> Iterator[str]:
    """What the member declares in vain, and, of a package, what its siblings install that it has no use for."""
    by_name = {other.name: other for other in by_module.values()}
    reached = {name for name in imported if name.partition(".")[0] == member.module}
    own = {_distribution(item.module) for name in reached for item in imported[name] if item.when is not When.TYPING}
    queue = list(reached)
    for name in queue:
        new = _with_parents(graph[name], imported) - reached
        reached |= new
        queue += new
    used = {_distribution(item.module) for name in reached for item in imported[name] if item.when is not When.TYPING}
    used |= {name for name, users in BEHIND.items() if used & set(users)}
    brought = _brought(member, by_name)
    for name in sorted(member.dependencies() - by_name.keys() - own):
        if name not in used:
            yield f"{member.name} declares {name}, which it does not import"
        elif others := sorted(brought[name] - {member.name}):
            yield f"{member.name} declares {name}, which it does not import and {others[0]} brings"
    if member.kind == "packages":
        for name in sorted(brought.keys() - used - member.dependencies()):
            yield f"{member.name} installs {name} through {', '.join(sorted(brought[name]))} and has no use for it"


def _brought(member: Member, by_name: dict[str, Member]) -> dict[str, set[str]]:
    """Third-party distributions that come with a member, and the members that declare them; extras where asked for."""
    brought: dict[str, set[str]] = {}
    queue = [(member, frozenset[str]())]
    for current, extras in queue:
        optional = current.project.get("optional-dependencies", {})
        for text in [*current.project.get("dependencies", []), *(text for name in extras for text in optional[name])]:
            name = requirement_name(text)
            if name in by_name:
                asked = re.search(r"\[(.*?)\]", text)
                step = (by_name[name], frozenset(re.split(r"\s*,\s*", asked[1].strip()) if asked else ()))
                if step not in queue:
                    queue.append(step)
            else:
                brought.setdefault(name, set()).add(current.name)
    return brought


def imports(file: Path, name: str) -> Iterator[Import]:
    """Imports of a file, relative ones made absolute."""
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    yield from _walk(tree, package, When.LOAD)


def _walk(node: ast.AST, package: str, when: When) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, (), child.lineno, when)
        elif isinstance(child, ast.ImportFrom):
            module = child.module or ""
            if child.level:
                parts = package.split(".")
                module = ".".join([*parts[: len(parts) - child.level + 1], *([module] if module else [])])
            yield Import(module, tuple(alias.name for alias in child.names), child.lineno, when)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, package, When.CALL if when is When.LOAD else when)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from _walk(ast.Module(child.body, []), package, When.TYPING)
            yield from _walk(ast.Module(child.orelse, []), package, when)
        else:
            yield from _walk(child, package, when)


def _targets(item: Import, files: dict[str, Path]) -> set[str]:
    """Modules that an import loads: ``from a import b`` loads a.b where that is a module, else a."""
    loaded = {f"{item.module}.{name}" for name in item.names} & files.keys()
    if len(loaded) < len(item.names) or not item.names:
        loaded |= {item.module} & files.keys()
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
