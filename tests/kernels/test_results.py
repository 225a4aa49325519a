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

# The op of a verb that records settings -> module: what ships, in the words of the results files. A tile that differs
# may be named in the README, by its sides; another setting may not differ.
SETTINGS = {
    "block_scores": lambda: {
        f"{size} bytes d{dim}": (str(tile), f"{tile.rows} x {tile.cols}")
        for (size, dim), tile in module("block_scores.triton").TILES.items()
    },
    "attention_fp8": lambda: {
        **{
            f"forward d{dim}": (str(tile), f"{tile.q} x {tile.k}")
            for dim, tile in module("attention_fp8.triton").TILES.items()
        },
        "prologue": (
            ", ".join(str(getattr(module("attention_fp8.triton_quantize"), name)) for name in PROLOGUES),
            None,
        ),
    },
}
PROLOGUES = ("PROLOGUE", "ROTATING")
# Verbs whose files record no settings: they time what the op chooses by itself.
WITHOUT = {"bench attention", "attention profile", "sanitize"}


def module(name):
    return importlib.import_module(f"hone_kernels.{name}")


def shipped(verb):
    """What ships of the op that a verb measured: its recorded form, and its words for the README."""
    op = verb.split()[0]
    assert op in SETTINGS, f"no settings are known for the verb {verb!r}; name its module here"
    return SETTINGS[op]()


def unexplained(verb, recorded, name, text):
    """Shipped settings that differ from the recorded ones and that no paragraph below a table of this file names."""
    tables = rf"^\*Measured on [^\n]*/{re.escape(name)}`[^\n]*\n<!-- /table -->\n\n(.*?)\n\n"
    below = " ".join(re.findall(tables, text, re.M | re.S))
    known = shipped(verb)
    return [
        f"{key}: {name} has {recorded.get(key)}, {setting} ships"
        for key, (setting, words) in known.items()
        if recorded.get(key) != setting and (words is None or words not in below)
    ] + [f"{key}: {name} has it, nothing ships" for key in recorded.keys() - known.keys()]


needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux only")


@needs_triton
@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_recorded_settings_ship_or_the_readme_says_otherwise(file):
    document = json.loads(file.read_text(encoding="utf-8"))
    if "tiles" not in document:
        assert document["verb"] in WITHOUT
        return
    assert not unexplained(document["verb"], document["tiles"], file.name, README.read_text(encoding="utf-8"))


@needs_triton
@pytest.mark.parametrize(
    ("verb", "key", "words"),
    [
        ("block_scores bench", "2 bytes d64", "64 x 128 ships"),
        ("attention_fp8 bench", "forward d64", "64 x 128 ships"),
        ("attention_fp8 bench", "prologue", None),
    ],
)
def test_a_setting_that_no_longer_ships_is_noticed(verb, key, words):
    recorded = {name: setting for name, (setting, _) in shipped(verb).items()}
    text = "*Measured on x; from `results/kernels/a.json`.*\n<!-- /table -->\n\nNothing.\n\n"
    assert not unexplained(verb, recorded, "a.json", text)
    assert len(unexplained(verb, {**recorded, "9 bytes d9": "Tile()"}, "a.json", text)) == 1
    recorded[key] = "another"
    assert len(unexplained(verb, recorded, "a.json", text)) == 1
    if words is not None:
        assert not unexplained(verb, recorded, "a.json", text.replace("Nothing", words))
    del recorded[key]
    assert len(unexplained(verb, recorded, "a.json", text)) == 1


def test_an_unknown_verb_fails():
    with pytest.raises(AssertionError, match="no settings are known for the verb 'attention_fp4 bench'"):
        unexplained("attention_fp4 bench", {}, "a.json", "")
