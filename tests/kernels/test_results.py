"""Results speak of the kernels that ship, or the README says where they do not."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "results" / "kernels").glob("*.json"))
README = ROOT / "kernels" / "README.md"

# Op of a bench -> what the README calls a setting that ships: a tile that differs from the recorded one may be named
# there, by its sides; another setting may not differ.
WORDS = {
    "block_scores": lambda kernel: sides(module("block_scores.triton").TILES, tuple(map(int, NUMBERS(kernel)))),
    "attention_fp8": lambda kernel: (
        None if kernel == "prologue" else sides(module("attention_fp8.triton").TILES, int(NUMBERS(kernel)[0]))
    ),
}
NUMBERS = re.compile(r"\d+").findall
# Ops and verbs whose rows name no settings: they time what the op chooses by itself.
WITHOUT = {
    "attention",
    "column_mass",
    "logits",
    "plane_sweep",
    "profile",
    "pyramid_attention",
    "ragged_decode",
    "sanitize",
    "splat_blend",
}


def module(name):
    return importlib.import_module(f"hone_kernels.{name}")


def sides(tiles, key):
    tile = tiles[key]
    return f"{tile.rows} x {tile.cols}" if hasattr(tile, "rows") else f"{tile.q} x {tile.k}"


def op_of(document):
    """The op of a bench, else the verb."""
    return document["config"].get("op", document["verb"])


def recorded(rows):
    """Launch settings by kernel, as the rows name them."""
    named = [row["labels"] for row in rows if "kernel" in row["labels"]]
    return {labels["kernel"]: labels["settings"] for labels in named}


def shipped(op):
    """What ships of an op, as a bench would name it now."""
    assert op in WORDS, f"no settings are known for the op {op!r}; name its words here"
    return module(f"{op}.bench").shipped()


def unexplained(op, settings, name, text):
    """Recorded settings that differ from those that ship and that no paragraph below a table of this file names."""
    tables = rf"^\*Measured on [^\n]*/{re.escape(name)}`[^\n]*\n<!-- /table -->\n\n(.*?)\n\n"
    below = " ".join(re.findall(tables, text, re.M | re.S))
    known = shipped(op)
    return [
        f"{kernel}: {name} has {setting}, {known.get(kernel, 'nothing')} ships"
        for kernel, setting in settings.items()
        if known.get(kernel) != setting
        and (kernel not in known or WORDS[op](kernel) is None or WORDS[op](kernel) not in below)
    ]


needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux only")


@needs_triton
@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_recorded_settings_ship_or_the_readme_says_otherwise(file):
    document = json.loads(file.read_text(encoding="utf-8"))
    settings = recorded(document["rows"])
    if not settings:
        assert op_of(document) in WITHOUT
        return
    assert not unexplained(op_of(document), settings, file.name, README.read_text(encoding="utf-8"))


@needs_triton
@pytest.mark.parametrize(
    ("op", "kernel", "words"),
    [
        ("block_scores", "2 bytes d64", "64 x 128 ships"),
        ("attention_fp8", "forward d64", "64 x 128 ships"),
        ("attention_fp8", "prologue", None),
    ],
)
def test_a_setting_that_no_longer_ships_is_noticed(op, kernel, words):
    settings = shipped(op)
    text = "*Measured on x; from `results/a.json`.*\n<!-- /table -->\n\nNothing.\n\n"
    assert not unexplained(op, settings, "a.json", text)
    assert len(unexplained(op, {**settings, "9 bytes d9": "Tile()"}, "a.json", text)) == 1
    settings[kernel] = "another"
    assert len(unexplained(op, settings, "a.json", text)) == 1
    if words is not None:
        assert not unexplained(op, settings, "a.json", text.replace("Nothing", words))


def test_an_unknown_op_fails():
    with pytest.raises(AssertionError, match="no settings are known for the op 'attention_fp4'"):
        unexplained("attention_fp4", {}, "a.json", "")
