"""The members of the workspace, read from their pyproject files. Shared by the scripts beside it."""

import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Member:
    """One member: ``kind`` is packages, shared or kernels; ``folder`` is relative to the root."""

    kind: str
    folder: Path
    root: Path
    project: dict
    tool: dict

    @property
    def name(self) -> str:
        """Distribution name, for example hone-blade."""
        return self.project["name"]

    @property
    def module(self) -> str:
        """Import name, for example hone_blade."""
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        """Folder of the import package."""
        return self.root / self.folder / "src" / self.module

    @property
    def tests(self) -> Path:
        """Folder of its tests, relative to the root."""
        return Path("tests") / self.folder

    @property
    def siblings(self) -> list[str]:
        """Members that it depends on, by distribution name."""
        return [
            name
            for text in self.project.get("dependencies", [])
            if (name := requirement_name(text)).startswith("hone-")
        ]

    def dependencies(self, *, extras: bool = False) -> set[str]:
        """Distributions that it declares, normalised; with ``extras`` those of its extras too."""
        texts = list(self.project.get("dependencies", []))
        if extras:
            texts += [text for group in self.project.get("optional-dependencies", {}).values() for text in group]
        return {requirement_name(text) for text in texts}


def requirement_name(text: str) -> str:
    """Normalised name of a requirement such as ``"hone-core[testing]~=0.1.0; python_version > '3'"``."""
    match = re.match(r"[A-Za-z0-9._-]+", text.strip())
    if match is None:
        raise ValueError(f"not a requirement: {text!r}")
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def load_root(root: Path = ROOT) -> dict:
    """The root pyproject."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def members(root: Path = ROOT) -> list[Member]:
    """Every member, in the order in which they build on each other: shared, kernels, packages."""
    found = []
    for pattern in load_root(root)["tool"]["uv"]["workspace"]["members"]:
        for folder in sorted(root.glob(pattern)):
            file = folder / "pyproject.toml"
            if file.exists():
                data = tomllib.loads(file.read_text(encoding="utf-8"))
                relative = folder.relative_to(root)
                found.append(Member(relative.parts[0], relative, root, data["project"], data.get("tool", {})))
    rank = {"shared": 0, "kernels": 1, "packages": 2}
    return sorted(found, key=lambda member: (rank.get(member.kind, 3), member.name))


def find_member(text: str, root: Path = ROOT) -> Member:
    """A member by folder name (blade), distribution (hone-blade), import name or path.

    Raises:
        SystemExit: There is none.
    """
    everything = members(root)
    for member in everything:
        if text.rstrip("/") in (member.name, member.module, member.folder.name, member.folder.as_posix()):
            return member
    raise SystemExit(f"no member {text!r}; the members are {', '.join(m.folder.as_posix() for m in everything)}")


def closure(member: Member) -> list[Member]:
    """The member and the siblings that it needs, each after those that it needs itself.

    Raises:
        ValueError: A sibling is no member, or the siblings need each other in a circle.
    """
    by_name = {other.name: other for other in members(member.root)}
    order: list[Member] = []

    def visit(current: Member, path: tuple[str, ...]) -> None:
        if current.name in path:
            raise ValueError(f"members need each other in a circle: {' -> '.join((*path, current.name))}")
        for name in current.siblings:
            if name not in by_name:
                raise ValueError(f"{current.name} depends on {name}, which is no member of the workspace")
            visit(by_name[name], (*path, current.name))
        if current not in order:
            order.append(current)

    visit(member, ())
    return order


def tracked_files(root: Path = ROOT) -> list[Path]:
    """Files that git tracks or would add, relative to the root."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    return [Path(name) for name in dict.fromkeys(names) if name and (root / name).is_file()]


def report(problems: list[str], what: str) -> int:
    """Print the problems and return the exit code."""
    for problem in problems:
        print(problem)
    print(f"{what}: {len(problems)} problem{'s' if len(problems) != 1 else ''}" if problems else f"{what}: ok")
    return 1 if problems else 0
