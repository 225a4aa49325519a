import layout
import pytest

ALPHA = "packages/alpha/src/hone_alpha"


def test_good_tree_has_no_problem(tree):
    assert layout.check(tree.path) == []


@pytest.mark.parametrize("name", ["README.md", "src/hone_alpha/method.py", "src/hone_alpha/py.typed"])
def test_missing_file(tree, name):
    tree.remove(f"packages/alpha/{name}")
    assert layout.check(tree.path) == [f"packages/alpha: {name} is missing"]


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        (f"{ALPHA}/method.py", "x = 1\n" * 401, "401 lines; at most 400"),
        (f"{ALPHA}/models.py", "import tyro\n", "tyro is imported in cli.py only"),
        (f"{ALPHA}/train.py", '"""Training."""\n', "holds no code"),
        (f"{ALPHA}/train.py", 'def train():\n    """Train."""\n', "train.py:1: train does nothing yet"),
        (f"{ALPHA}/train.py", "def train():\n    raise NotImplementedError('soon')\n", "train does nothing yet"),
        (f"{ALPHA}/utils.py", "x = 1\n", "name the file after its concept"),
        ("shared/core/src/hone_core/helpers.py", "x = 1\n", "name the file after its concept"),
        ("kernels/src/hone_kernels/new/triton.py", "x = 1\n", "new/reference.py is missing"),
        ("tests/packages/alpha/__init__.py", "", "test folders are no packages"),
        ("tests/packages/beta/test_a.py", "", "there is no member packages/beta"),
        ("kernels/__init__.py", "", "top folders are no packages"),
    ],
)
def test_bad_file(tree, file, text, problem):
    tree.write(file, text)
    assert any(problem in line for line in layout.check(tree.path))


@pytest.mark.parametrize(
    ("folder", "old", "new", "problem"),
    [
        ("packages/alpha", "hone-core~=0.1.0", "hone-core", "expected 'hone-core~=0.1.0'; got 'hone-core'"),
        (
            "packages/alpha",
            "[project]",
            '[project]\noptional-dependencies = { x = ["hone-core[plots]"] }',
            "expected 'hone-core[plots]~=0.1.0'; got 'hone-core[plots]'",
        ),
        ("packages/alpha", 'version = "0.1.0"', 'version = "0.2.0"', "members have one version"),
        ("packages/alpha", 'name = "hone-alpha"', 'name = "alpha"', "expected the import package"),
        ("packages/alpha", "hone_alpha.cli:main", "hone_alpha.app:main", "[project.scripts] must be"),
        ("packages/alpha", "[project]", "[tool.ruff]\nline-length = 1\n[project]", "remove [tool.ruff]"),
        (".", "hone-alpha = { workspace = true }", "", "[tool.uv.sources] lacks hone-alpha"),
        (".", "hone-alpha =", "hone-gone = { workspace = true }\nhone-alpha =", "names hone-gone, which is no member"),
    ],
)
def test_bad_pyproject(tree, folder, old, new, problem):
    tree.pyproject(folder, old, new)
    assert any(problem in line for line in layout.check(tree.path))


def test_a_wheel_carries_the_licence(tree):
    tree.write("LICENSE", "Do as we please.\n")
    assert len(layout.check(tree.path)) == 3
    tree.write("LICENSE", "Do as you please.\n")
    tree.remove("kernels/LICENSE")
    tree.pyproject("packages/alpha", 'license-files = ["LICENSE"]', "")
    assert layout.check(tree.path) == [
        "kernels: LICENSE must be a copy of the root's",
        'packages/alpha/pyproject.toml: expected license-files = ["LICENSE"]',
    ]


def test_member_without_tests(tree):
    tree.remove("tests/kernels")
    assert layout.check(tree.path) == ["kernels: no tests in tests/kernels"]


def test_large_assets(tree):
    file = tree.write(f"{ALPHA}/assets/host.safetensors", "")
    file.write_bytes(bytes(9 * 2**20))
    assert layout.check(tree.path) == ["packages/alpha: assets/ holds 9.0 MiB; at most 8 are allowed"]


def test_main_exit_code(tree, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["layout.py", "--root", str(tree.path)])
    assert layout.main() == 0
    tree.remove(f"{ALPHA}/method.py")
    assert layout.main() == 1
    assert "layout: 1 problem" in capsys.readouterr().out
