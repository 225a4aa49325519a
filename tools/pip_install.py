"""Print the local paths of a member and of the siblings that it needs, for plain pip.

    pip install $(python tools/pip_install.py blade)

pip does not read the workspace's sources: ``pip install ./packages/blade`` alone would look for the siblings elsewhere.
For the versions that were measured, install constraints.txt first and the members without their dependencies:

    pip install --require-hashes -r constraints.txt
    pip install --no-deps $(python tools/pip_install.py blade)

From wheels, which are files that can be carried elsewhere:

    uv build --all-packages --wheel --no-sources --out-dir dist
    pip install $(python tools/pip_install.py blade --wheels dist)
"""

import argparse
from pathlib import Path

from workspace import ROOT, Member, closure, find_member, members, report


def paths(name: str, root: Path = ROOT, extra: str = "", wheels: Path | None = None) -> list[str]:
    """Paths that hold in the working directory, siblings first; ``extra`` goes on the member itself.

    They are folders of the checkout, or files in ``wheels``.
    """
    chain = closure(find_member(name, root))
    suffix = f"[{extra}]" if extra else ""
    if wheels is not None:
        found = [wheel(member, wheels) for member in chain]
    else:
        inside = Path.cwd().resolve() == root.resolve()
        found = [f"./{member.folder.as_posix()}" if inside else str(root.resolve() / member.folder) for member in chain]
    return [*found[:-1], found[-1] + suffix]


def wheel(member: Member, wheels: Path) -> str:
    """The member's wheel in a folder, of its present version.

    Raises:
        SystemExit: It is not there.
    """
    found = sorted(wheels.glob(f"{member.module}-{member.project['version']}-*.whl"))
    if len(found) != 1:
        raise SystemExit(
            f"{wheels} holds {len(found)} wheels of {member.name} {member.project['version']}; expected one. "
            f"Build them: uv build --all-packages --wheel --no-sources --out-dir {wheels}"
        )
    return str(found[0])


def check(root: Path = ROOT) -> list[str]:
    """Members whose siblings cannot be found."""
    problems = []
    for member in members(root):
        try:
            closure(member)
        except ValueError as error:
            problems.append(str(error))
    return problems


def main() -> int:
    """Print the paths, or check every member."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("member", nargs="?", help="folder name, distribution or path")
    parser.add_argument("--extra", default="", help="extras of the member, separated by commas")
    parser.add_argument(
        "--wheels", type=Path, help="folder of built wheels, to take in place of the checkout's folders"
    )
    parser.add_argument("--check", action="store_true", help="check that the siblings of every member exist")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        return report(check(args.root), "pip_install")
    if args.member is None:
        parser.error("name a member, for example blade")
    print(" ".join(paths(args.member, args.root, args.extra, args.wheels)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
