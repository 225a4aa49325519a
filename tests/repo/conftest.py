import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The scripts in tools/ import each other by name, as they do when they are run by path; what tests here share likewise.
sys.path += [str(ROOT / "tools"), str(ROOT / "tests" / "repo")]


@pytest.fixture(scope="session")
def root():
    return ROOT


ROOT_PYPROJECT = """
[tool.uv]
exclude-newer = "2026-01-01T00:00:00Z"
constraint-dependencies = ["torch==2.0"]
[tool.uv.workspace]
members = ["packages/*", "shared/*", "kernels"]
[tool.uv.sources]
hone-core = { workspace = true }
hone-kernels = { workspace = true }
hone-alpha = { workspace = true }
"""

MEMBER_PYPROJECT = """
[project]
name = "{name}"
version = "0.1.0"
license-files = ["LICENSE"]
dependencies = {dependencies}
{more}
"""


class Tree:
    """A small workspace that passes every check."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("pyproject.toml", ROOT_PYPROJECT)
        self.write("LICENSE", "Do as you please.\n")
        self.member("shared/core", "hone-core", ["torch>=2"])
        self.member(
            "kernels", "hone-kernels", ["torch>=2"], '[project.scripts]\nhone-kernels = "hone_kernels.cli:main"'
        )
        self.write("kernels/src/hone_kernels/cli.py", "def main():\n    print()\n")
        self.member(
            "packages/alpha",
            "hone-alpha",
            ["hone-core~=0.1.0", "hone-kernels~=0.1.0", "torch>=2"],
            '[project.scripts]\nhone-alpha = "hone_alpha.cli:main"',
        )
        for name in ("method", "config", "models", "data"):
            self.write(f"packages/alpha/src/hone_alpha/{name}.py", '"""Doc."""\nVALUE = 1\n')
        self.write("packages/alpha/src/hone_alpha/cli.py", "import tyro\ndef main():\n    tyro.cli(int)\n")
        self.pyproject("packages/alpha", '"torch>=2"', '"torch>=2", "tyro"')
        for name in ("__init__", "reference", "api"):
            self.write(f"kernels/src/hone_kernels/op/{name}.py", "VALUE = 1\n")
        for source in ("packages/alpha/src/hone_alpha", "shared/core/src/hone_core", "kernels/src/hone_kernels/op"):
            self.write(f"{source}/tensors.py", "import torch\n")

    def member(self, folder: str, name: str, dependencies: list[str], more: str = "") -> None:
        self.write(f"{folder}/pyproject.toml", MEMBER_PYPROJECT.format(name=name, dependencies=dependencies, more=more))
        self.write(f"{folder}/README.md", "# x\n")
        self.write(f"{folder}/LICENSE", "Do as you please.\n")
        module = name.replace("-", "_")
        self.write(f"{folder}/src/{module}/__init__.py", "")
        self.write(f"{folder}/src/{module}/py.typed", "")
        self.write(f"tests/{folder}/test_x.py", "")

    def write(self, name: str, text: str) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def pyproject(self, folder: str, old: str, new: str) -> None:
        file = self.path / folder / "pyproject.toml"
        text = file.read_text()
        # Dependencies are written with Python's repr, so either quote may stand there.
        old = old if old in text else old.replace('"', "'")
        assert old in text
        file.write_text(text.replace(old, new))

    def remove(self, name: str) -> None:
        path = self.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)
