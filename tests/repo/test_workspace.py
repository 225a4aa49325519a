"""The tree, the versions and the environment agree with each other."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib

import constraints
import newest
import pytest
import tracked
import workspace
from hone_core.environment import TRIED, untried

ROOT = workspace.ROOT
MEMBERS = workspace.members()


def test_members_match_the_tree():
    folders = {
        file.parent.relative_to(ROOT).as_posix()
        for pattern in ("packages/*/pyproject.toml", "shared/*/pyproject.toml", "kernels/pyproject.toml")
        for file in ROOT.glob(pattern)
    }
    assert {member.folder.as_posix() for member in MEMBERS} == folders
    assert set(workspace.load_root()["tool"]["uv"]["sources"]) == {member.name for member in MEMBERS}


def test_versions_are_in_lockstep():
    (version,) = {member.project["version"] for member in MEMBERS}
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for member in MEMBERS:
        found = re.search(r'^__version__ = "(.*)"$', (member.source / "__init__.py").read_text(encoding="utf-8"), re.M)
        assert found is None or found[1] == version, member.name


def test_members_declare_what_the_house_asks():
    for member in MEMBERS:
        assert member.project["license"] == "Apache-2.0"
        assert member.project["requires-python"] == ">=3.11"
        pinned = [text for text in member.project.get("dependencies", []) if "==" in text.partition(";")[0]]
        assert pinned == [], f"{member.name} pins {pinned}; the root does that"


def test_nothing_is_tracked_that_must_not_be():
    assert tracked.check() == []


def test_resolution_is_fixed_by_date_and_pins():
    settings = workspace.load_root()["tool"]["uv"]
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}T00:00:00Z", settings["exclude-newer"])
    assert all("==" in text for text in settings["constraint-dependencies"])
    assert "/uv.lock" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def test_constraints_agree_with_the_pins_and_lie_two_weeks_after_the_newest_file():
    assert constraints.disagreements() == []


def test_members_allow_what_a_lane_has_tried():
    assert constraints.tried() == TRIED
    assert constraints.bounds() == []


def test_tried_versions_are_the_pins_and_what_is_installed():
    pinned = dict(text.split("==") for text in workspace.load_root()["tool"]["uv"]["constraint-dependencies"])
    assert {name: tried[0] for name, tried in TRIED.items()} == pinned
    lane = {"pinned": 0, "newest": 1}[os.environ.get("HONE_LANE", "pinned")]
    expected = {name: tried[lane] for name, tried in TRIED.items() if sys.platform == "linux" or name != "triton"}
    assert {name: importlib.metadata.version(name) for name in expected} == expected
    assert untried() == []


def test_newest_lane_installs_every_member_with_its_extras():
    found = " ".join(newest.requirements())
    for member in MEMBERS:
        assert f"--editable {ROOT / member.folder}" in found
    assert f"{ROOT / 'kernels'}[bench]" in found
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}T00:00:00Z", workspace.load_root()["tool"]["hone"]["newest"])
    assert "python3 tools/newest.py" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.kind == "packages"], ids=lambda member: member.name)
def test_uv_run_of_a_package_installs_what_it_and_its_siblings_declare_and_no_group(member):
    if not (ROOT / "uv.lock").exists():
        pytest.skip("no resolution here: uv has not been run in this checkout")
    command = ["uv", "export", "--package", member.name, "--frozen", "--quiet", "--no-hashes", "--no-header"]
    shown = subprocess.run(
        [*command, "--no-emit-workspace"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    locked = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
    wanted = {(member.name, "")}
    queue = list(wanted)
    for name, extra in queue:
        for package in (package for package in locked if package["name"] == name):
            needs = (
                package.get("optional-dependencies", {}).get(extra, []) if extra else package.get("dependencies", [])
            )
            new = {(need["name"], part) for need in needs for part in ["", *need.get("extra", [])]} - wanted
            wanted |= new
            queue += new
    assert constraints.pins(shown).keys() == {name for name, _ in wanted} - {m.name for m in MEMBERS}


def test_constraints_agree_with_the_resolution():
    if not (ROOT / "uv.lock").exists():
        pytest.skip("no resolution here: uv has not been run in this checkout")
    locked = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    resolved: dict[str, set[str]] = {}
    for package in locked["package"]:
        # More than one version where Python versions differ.
        resolved.setdefault(package["name"], set()).add(package.get("version", ""))
    committed = constraints.pins((ROOT / constraints.FILE).read_text(encoding="utf-8"))
    assert {name: versions for name, versions in committed.items() if resolved.get(name) != versions} == {}


@pytest.mark.skipif(os.environ.get("HONE_LANE") == "newest", reason="tools/newest.py installs without constraints")
def test_installed_versions_are_those_of_the_constraints():
    committed = constraints.pins((ROOT / constraints.FILE).read_text(encoding="utf-8"))
    installed = {
        re.sub(r"[-_.]+", "-", dist.metadata["Name"]).lower(): dist.version
        for dist in importlib.metadata.distributions()
    }
    both = installed.keys() & committed.keys()
    assert {"torch", "numpy", "tyro"} <= both
    assert {name: installed[name] for name in both if installed[name] not in committed[name]} == {}


def test_constraints_carry_hashes_and_no_address():
    text = (ROOT / constraints.FILE).read_text(encoding="utf-8")
    assert "://" not in text
    blocks = re.split(r"\n(?=\S)", constraints.HEADER.sub("", text).strip())
    assert all("--hash=sha256:" in block for block in blocks)


def test_the_folder_kernels_is_no_package_here():
    # Tests in a folder kernels/ and the root on sys.path have both shadowed an installed package of that name.
    spec = importlib.util.find_spec("kernels")
    assert spec is None or str(ROOT) not in str(spec.origin or list(spec.submodule_search_locations or []))
    assert str(ROOT) not in sys.path


def test_folders_of_tests_are_no_packages():
    assert list((ROOT / "tests").rglob("__init__.py")) == []
