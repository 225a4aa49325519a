import json
import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest
from hone_core.config import from_dict, load_config, to_dict


class Order(Enum):
    RASTER = "raster"
    TILE = "tile"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: float = 0.5
    sizes: tuple[int, int] = (1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    steps: int
    kind: Literal["paper", "official", 3] = "paper"
    layers: tuple[int, ...] = ()
    inner: Inner = Inner()
    order: Order = Order.RASTER
    path: Path | None = None
    names: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    limit: float = math.inf
    flag: bool = False
    either: int | str = 1


FULL = Config(
    steps=4,
    kind=3,
    layers=(0, 5),
    inner=Inner(rate=0.25, sizes=(3, 4)),
    order=Order.TILE,
    path=Path("a/b"),
    names=["x"],
    weights={"l1": 2.0},
    limit=-math.inf,
    flag=True,
    either="two",
)


@pytest.mark.parametrize("config", [Config(steps=1), FULL])
def test_round_trip_through_json(config, tmp_path):
    assert from_dict(Config, json.loads(json.dumps(to_dict(config), allow_nan=False))) == config
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    assert load_config(Config, file) == config


def test_to_dict_gives_plain_json_types():
    data = to_dict(FULL)
    assert data["layers"] == [0, 5]
    assert data["order"] == "tile"
    assert data["path"] == "a/b"
    assert data["limit"] == "-inf"
    assert data["inner"] == {"rate": 0.25, "sizes": [3, 4]}


def test_nan_survives():
    assert math.isnan(from_dict(Inner, to_dict(Inner(rate=math.nan))).rate)


def test_whole_number_is_a_fine_float():
    rate = from_dict(Inner, {"rate": 1}).rate
    assert rate == 1.0
    assert type(rate) is float


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "Config: missing steps"),
        ({"steps": 1, "stpes": 2}, r"unknown key 'stpes'; did you mean 'steps'\?"),
        ({"steps": 1, "zzz": 2}, "unknown key 'zzz'; the fields are steps, kind"),
        ({"steps": 1.5}, "steps: expected a whole number; got 1.5"),
        ({"steps": True}, "steps: expected a whole number; got True"),
        ({"steps": 1, "kind": "other"}, "kind: expected one of 'paper', 'official', 3; got 'other'"),
        ({"steps": 1, "layers": [1, "2"]}, r"layers\[1\]: expected a whole number; got '2'"),
        ({"steps": 1, "inner": {"sizes": [1]}}, "inner.sizes: expected a list of 2 values"),
        ({"steps": 1, "inner": {"rat": 1}}, "inner: unknown key 'rat'; did you mean 'rate'"),
        ({"steps": 1, "inner": 3}, "inner: expected an object"),
        ({"steps": 1, "order": "spiral"}, "order: expected one of 'raster', 'tile'; got 'spiral'"),
        ({"steps": 1, "path": 3}, "path: expected a path; got 3"),
        ({"steps": 1, "flag": 1}, "flag: expected true or false; got 1"),
        ({"steps": 1, "weights": {"a": "b"}}, "weights.a: expected a number; got 'b'"),
        ({"steps": 1, "limit": "huge"}, "limit: expected a number; got 'huge'"),
        ({"steps": 1, "either": 1.5}, "either: expected a whole number; got 1.5; either: expected a string"),
    ],
)
def test_bad_data_names_the_field(data, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Config, data)


def test_literal_does_not_take_true_for_one():
    @dataclass
    class One:
        value: Literal[1]

    with pytest.raises(ValueError, match="expected one of 1; got True"):
        from_dict(One, {"value": True})


def test_not_a_dataclass():
    with pytest.raises(TypeError, match="dataclass instance; got dict"):
        to_dict({"a": 1})
    with pytest.raises(TypeError, match="cls must be a dataclass"):
        from_dict(dict, {})


def test_value_without_json_form():
    @dataclass
    class Bad:
        value: object

    with pytest.raises(TypeError, match="value: object has no JSON form"):
        to_dict(Bad(value=object()))


def test_load_names_the_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{oops")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON config"):
        load_config(Inner, file)
    file.write_text('{"rate": "x"}')
    with pytest.raises(ValueError, match=r"config\.json: rate: expected a number"):
        load_config(Inner, file)
    with pytest.raises(
        FileNotFoundError, match=r"none\.json: expected a JSON config, .*No such file.*\. Pass the config"
    ):
        load_config(Inner, tmp_path / "none.json")
    with pytest.raises(IsADirectoryError, match=r"expected a JSON config, but it cannot be read"):
        load_config(Inner, tmp_path)
