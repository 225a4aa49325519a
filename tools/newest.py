"""Run the CPU tests on the newest versions that the members' bounds allow: what a pip user gets.

    python tools/newest.py                         make .newest, the environment, and run every member's tests in it
    python tools/newest.py tests/kernels -k gluon  make it, and hand these to pytest

The other lane, ``uv run --all-packages pytest``, has the pinned versions of the root pyproject. This one knows nothing
of them: the highest versions on the day that ``[tool.hone] newest`` names there. ``hone_core.environment.TRIED`` holds
those of both lanes, and a test in each compares.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from workspace import ROOT, load_root, members

ENVIRONMENT = ROOT / ".newest"


def requirements(root: Path = ROOT) -> list[str]:
    """Every member as an editable install with all its extras, as arguments of ``uv pip install``."""
    found = []
    for member in members(root):
        extras = ",".join(member.project.get("optional-dependencies", {}))
        found += ["--editable", str(root / member.folder) + (f"[{extras}]" if extras else "")]
    return found


def install(environment: Path = ENVIRONMENT, root: Path = ROOT) -> None:
    """Make the environment, or bring it to the newest versions of the date.

    Raises:
        CalledProcessError: uv could not resolve or install.
    """
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(environment)], check=True)
    command = ["uv", "pip", "install", "--quiet", "--upgrade", "--no-sources", "--python", str(python)]
    command += ["--exclude-newer", load_root(root)["tool"]["hone"]["newest"]]
    command += [*requirements(root), "--group", f"{root / 'pyproject.toml'}:test"]
    # Outside the checkout, so that uv reads no workspace settings, whose pins would hold.
    with tempfile.TemporaryDirectory(prefix="hone-newest-") as folder:
        subprocess.run(command, cwd=folder, check=True)


def main() -> int:
    """Install, then test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, options = parser.parse_known_args()
    if shutil.which("uv") is None:
        raise SystemExit("uv is not on the PATH; pip install uv")
    install()
    hidden = ("PYTEST_", "PYTHONPATH", "VIRTUAL_ENV", "UV_PROJECT")
    env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    # The command line tools that tests start must be those of this environment.
    env |= {"HONE_LANE": "newest", "PATH": f"{ENVIRONMENT / 'bin'}{os.pathsep}{env['PATH']}"}
    command = [str(ENVIRONMENT / "bin" / "python"), "-P", "-m", "pytest", *options]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
