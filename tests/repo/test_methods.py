import ast
import importlib
import json
import tomllib

import methods
import pytest
from tables import TableError
from workspace import ROOT, members

PACKAGES = [member.folder.name for member in members() if member.kind == "packages"]


def entry(**changes):
    words = dict.fromkeys(methods.WORDS, "x")
    return words | {"measured": "{speed} as fast", "speed": {"files": ["x.json"], "where": {"variant": "a"}}} | changes


@pytest.fixture
def root(tmp_path):
    (tmp_path / "results" / "blade").mkdir(parents=True)
    rows = [{"metric": "time", "value": 2.5, "unit": "x", "variant": "a"}]
    (tmp_path / "results" / "blade" / "x.json").write_text(json.dumps({"rows": rows}))
    return tmp_path


def test_numbers_are_cells_of_results(root):
    assert methods._filled("blade", entry(), root)["measured"] == "2.50x as fast"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measured": "fast"}, "does not use speed"),
        ({"measured": "{speed} and {more}"}, "names 'more'"),
        ({"speed": {"files": ["x.json"], "where": {"variant": "b"}}}, "no result fits"),
        ({"speed": {"files": ["y.json"]}}, "there is no file"),
    ],
)
def test_what_does_not_fit_is_named(root, changes, message):
    with pytest.raises(TableError, match=message):
        methods._filled("blade", entry(**changes), root)


def test_a_missing_word_is_named(root):
    without = {key: value for key, value in entry().items() if key != "verdict"}
    with pytest.raises(TableError, match="blade: verdict is missing"):
        methods._filled("blade", without, root)


def test_every_package_stands_in_both_tables():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in PACKAGES:
        assert sum(line.startswith("|") and f"(packages/{name})" in line for line in text.splitlines()) == 2


@pytest.mark.parametrize("name", PACKAGES)
def test_the_line_of_code_names_what_exists(name):
    code = tomllib.loads((ROOT / methods.SOURCE).read_text(encoding="utf-8"))[name]["code"]
    module = importlib.import_module(f"hone_{name}")
    tree = ast.parse(code)
    called = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id[0].isupper() and node.id != "FOLDER"
    }
    called |= {
        node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert all(hasattr(module, word) for word in called)
    presets = importlib.import_module(f"hone_{name}.config").PRESETS
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attach":
            named = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            assert set(named) <= set(presets)
