"""pip_install, constraints, tracked, isolation and check, on small trees."""

import ast
import subprocess
import sys

import boundaries
import check
import constraints
import isolation
import pip_install
import pytest
import tracked
import workspace


def test_pip_install_lists_siblings_first(tree, monkeypatch):
    monkeypatch.chdir(tree.path)
    expected = ["./shared/core", "./kernels", "./packages/alpha"]
    for name in ("alpha", "hone-alpha", "hone_alpha", "packages/alpha/"):
        assert pip_install.paths(name, tree.path) == expected
    assert pip_install.paths("alpha", tree.path, "train")[-1] == "./packages/alpha[train]"
    assert pip_install.paths("core", tree.path) == ["./shared/core"]
    monkeypatch.chdir(tree.path / "shared")
    assert pip_install.paths("core", tree.path) == [str(tree.path / "shared" / "core")]
    with pytest.raises(SystemExit, match="no member 'beta'; the members are shared/core, kernels, packages/alpha"):
        pip_install.paths("beta", tree.path)


def test_pip_install_takes_wheels_of_the_present_version(tree):
    files = [tree.write(f"dist/hone_{name}-0.1.0-py3-none-any.whl", "") for name in ("core", "kernels", "alpha")]
    tree.write("dist/hone_core-0.0.9-py3-none-any.whl", "")
    expected = [str(file) for file in files]
    assert pip_install.paths("alpha", tree.path, wheels=tree.path / "dist") == expected
    assert pip_install.paths("alpha", tree.path, "train", tree.path / "dist")[-1] == f"{expected[-1]}[train]"
    files[1].unlink()
    with pytest.raises(
        SystemExit, match=r"holds 0 wheels of hone-kernels 0\.1\.0; expected one\. Build them: uv build"
    ):
        pip_install.paths("alpha", tree.path, wheels=tree.path / "dist")


def test_pip_install_check_finds_lost_and_circular_siblings(tree):
    assert pip_install.check(tree.path) == []
    tree.pyproject("shared/core", "torch>=2", "hone-kernels~=0.1.0")
    tree.pyproject("kernels", "torch>=2", "hone-core~=0.1.0")
    assert "hone-core -> hone-kernels -> hone-core" in pip_install.check(tree.path)[0]
    tree.pyproject("kernels", "hone-core~=0.1.0", "hone-gone~=0.1.0")
    assert "hone-kernels depends on hone-gone, which is no member" in pip_install.check(tree.path)[0]


SCRIPTS = sorted((workspace.ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_scripts_use_the_standard_library_only(file):
    names = {item.module.partition(".")[0] for item in boundaries.imports(file, file.stem)}
    assert names <= sys.stdlib_module_names | {other.stem for other in SCRIPTS}


@pytest.mark.parametrize("file", [f for f in SCRIPTS if f.stem != "workspace"], ids=lambda file: file.stem)
def test_scripts_start_by_path_and_say_what_they_do(file):
    done = subprocess.run([sys.executable, str(file), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).splitlines()[0] in done.stdout


def test_requirement_names():
    assert workspace.requirement_name("hone_core[testing]~=0.1.0; python_version > '3'") == "hone-core"
    with pytest.raises(ValueError, match="not a requirement"):
        workspace.requirement_name(">=1")


def test_constraints_pins_are_read():
    text = (
        "Foo_bar==1.2.3 ; sys_platform == 'linux' \\\n    --hash=sha256:aa\nfoo-bar==1.2.2\nbaz==2 \\\n    --hash=x:b\n"
    )
    assert constraints.pins(text) == {"foo-bar": {"1.2.3", "1.2.2"}, "baz": {"2"}}


def test_constraints_disagree_with_pyproject(tree):
    tree.write("constraints.txt", "# Exported on 2026-01-15.\ntorch==2.0\n")
    assert constraints.disagreements(tree.path) == []
    tree.write("constraints.txt", "# Exported on 2026-01-15.\ntorch==2.1\n")
    assert constraints.disagreements(tree.path) == ["constraints.txt: torch is 2.1; pyproject.toml pins 2.0"]


def test_bounds_wider_or_narrower_than_the_lanes_are_found(tree, monkeypatch):
    monkeypatch.setattr(constraints, "tried", lambda: {"torch": ("2.11.0", "2.14.1")})
    for folder, bound in (("shared/core", ">=2.11,<2.15"), ("kernels", ">=2.11,<2.15; python_version > '3'")):
        tree.pyproject(folder, '"torch>=2"', f'"torch{bound}"')
    tree.pyproject("packages/alpha", '"torch>=2"', '"torch>=2.11,<2.16"')
    (found,) = constraints.bounds(tree.path)
    assert found == "hone-alpha: 'torch>=2.11,<2.16' must be 'torch>=2.11,<2.15', what the lanes have tried"


def test_constraints_are_exported_two_weeks_after_the_newest_file(tree):
    tree.write("constraints.txt", "# Exported on 2026-01-14.\ntorch==2.0\n")
    (problem,) = constraints.disagreements(tree.path)
    assert problem.endswith("exclude-newer must be 2025-12-31 or earlier, it is 2026-01-01")
    tree.write("constraints.txt", "torch==2.0\n")
    assert constraints.disagreements(tree.path) == [
        "constraints.txt: expected a first line '# Exported on YYYY-MM-DD.'"
    ]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.txt", "-i https://host.example/" + "simple/\n", "a.txt:1: a registry address"),
        ("a.txt", "\nurl = 'https://host.example/" + "packages/aa/x.whl'", "a.txt:2: a registry address"),
        ("a.toml", "[[tool.uv." + "index]]\n", "a registry address"),
        ("a.sh", "pip install --extra-" + "index-url https://host.example x\n", "a registry address"),
        ("a.md", "cd /" + "root/project\n", "a path of one machine"),
        ("a.md", "see /" + "home/someone/x\n", "a path of one machine"),
        ("uv.lock", "version = 1\n", "lock files record registry addresses"),
    ],
)
def test_tracked_finds(tmp_path, name, text, problem):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "fine.md").write_text("https://example.org/packages.html and ./work/x and a/root/b\n")
    assert tracked.check(tmp_path) == []
    (tmp_path / name).write_text(text)
    (found,) = tracked.check(tmp_path)
    assert problem in found


def test_tracked_finds_large_files(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "big.bin").write_bytes(bytes(10_000_001))
    assert tracked.check(tmp_path) == ["big.bin: 10.0 MB; at most 10"]
    (tmp_path / ".gitignore").write_text("big.bin\n")
    assert tracked.check(tmp_path) == []


def test_isolation_imports_every_module_of_a_package(tmp_path):
    package = tmp_path / "sample"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("__all__ = ['__name__']\n")
    (package / "sub" / "__init__.py").write_text("")
    (package / "sub" / "a.py").write_text("")
    command = [sys.executable, "-c", isolation.IMPORT_ALL, "sample"]
    assert isolation._run(command, cwd=tmp_path).strip() == "2 modules of sample import"
    (package / "sub" / "a.py").write_text("import no_such_module_at_all\n")
    with pytest.raises(isolation.IsolationError, match="No module named 'no_such_module_at_all'"):
        isolation._run(command, cwd=tmp_path)


def test_isolation_drops_hashes_from_constraints():
    text = "a==1 ; x == 'y' \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\nb==2 \\\n    --hash=sha256:cc\n"
    assert isolation.without_hashes(text) == "a==1 ; x == 'y'\nb==2\n"


def test_check_runs_steps_and_fails_with_them(monkeypatch, capfd):
    steps = {
        "good": check.Step([sys.executable, "-c", "print('fine')"], [sys.executable, "-c", "print('mended')"]),
        "bad": check.Step([sys.executable, "-c", "raise SystemExit(3)"]),
        "long": check.Step([sys.executable, "-c", "print('long')"], extra=True),
    }
    monkeypatch.setattr(check, "STEPS", steps)

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["check.py", *argv])
        return check.main(), capfd.readouterr().out

    code, out = run()
    assert code == 1
    assert "fine" in out
    assert "long" not in out
    assert out.endswith("failed: bad\n")
    assert run("--only", "good")[0] == 0
    assert "mended" in run("--only", "good", "--fix")[1]
    assert "long\n" in run("--all")[1]
    with pytest.raises(SystemExit):
        run("--only", "goood")
