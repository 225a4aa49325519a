"""Results speak of the kernels that ship, or the README says where they do not."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = [
    path for path in sorted((ROOT / "results" / "kernels").glob("*.json")) if '"tiles"' in path.read_text("utf-8")
]
README = ROOT / "kernels" / "README.md"


def shipped_tiles(op):
    """The table of tiles that ships, in the words of the results files."""
    module = pytest.importorskip(f"hone_kernels.{op}.triton", reason="Triton is for Linux only")
    return {f"{size} bytes d{dim}": tile for (size, dim), tile in module.TILES.items()}


def unexplained(op, recorded, name, text):
    """Shipped tiles that differ from the recorded ones and that no paragraph below a table of this file names."""
    tables = rf"^<!-- table: [^>]*{re.escape(name)}.*?^<!-- /table -->\n\n(.*?)\n\n"
    below = " ".join(re.findall(tables, text, re.M | re.S))
    return [
        f"{key}: {name} has {recorded.get(key)}, {tile} ships"
        for key, tile in shipped_tiles(op).items()
        if recorded.get(key) != str(tile) and f"{tile.rows} x {tile.cols}" not in below
    ]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_recorded_tiles_ship_or_the_readme_says_otherwise(file):
    document = json.loads(file.read_text(encoding="utf-8"))
    op = document["verb"].split()[0]
    assert not unexplained(op, document["tiles"], file.name, README.read_text(encoding="utf-8"))


def test_a_tile_that_no_longer_ships_is_noticed():
    tiles = {key: str(tile) for key, tile in shipped_tiles("block_scores").items()}
    text = '<!-- table: x\nfiles = ["a.json"]\n-->\n<!-- /table -->\n\nNothing.\n\n'
    assert not unexplained("block_scores", tiles, "a.json", text)
    tiles["2 bytes d64"] = "Tile(rows=1, cols=1, warps=1, stages=1)"
    assert len(unexplained("block_scores", tiles, "a.json", text)) == 1
    assert not unexplained("block_scores", tiles, "a.json", text.replace("Nothing", "64 x 128 ships"))
