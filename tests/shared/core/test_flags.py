import dataclasses
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest
from hone_core.config import flag, from_dict, to_dict
from hone_core.flags import apply, field_docs, flags_of, is_default


class Order(Enum):
    RASTER = "raster"
    TILE = "tile"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    steps: int = 8
    """Denoising steps."""
    shift: float = 3.0
    """Of the noise levels."""
    seed: int = 0
    """Of the noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    model: str
    """What to load, a folder or a
    ``hub`` address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawConfig(Base):
    prompts: tuple[str, ...] = field(default=(), metadata=flag("prompt"))
    """What to draw."""
    prompt_file: Path | None = field(default=None, metadata=flag(instead_of=("prompts",)))
    """Text file, instead."""
    sampler: Sampler = field(default_factory=lambda: Sampler(steps=4))
    order: Order = Order.TILE
    """Of tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights."""
    compile: bool = True
    """Compile blocks."""
    layers: dict[str, int] = field(default_factory=dict, metadata=flag(hidden=True))
    retry: bool = field(default=False, metadata=flag(stored=False))
    """Try again."""


def by_name(cls, values=None):
    return {entry.name: entry for entry in flags_of(cls, values)}


def test_one_flag_per_field_with_its_docstring():
    flags = by_name(DrawConfig)
    names = "model prompt prompt_file steps shift seed order dtype compile retry"
    assert list(flags) == names.split()
    assert flags["model"].help == "What to load, a folder or a hub address."
    assert flags["steps"].path == ("sampler", "steps")
    assert (flags["steps"].default, flags["shift"].default) == (4, 3.0)
    assert flags["model"].required
    assert not flags["steps"].required
    assert flags["order"].default is Order.TILE


def test_values_of_a_file_are_the_defaults():
    flags = by_name(DrawConfig, {"compile": False, "order": "raster", "sampler": {"shift": 1}})
    assert (flags["compile"].default, flags["order"].default) == (False, Order.RASTER)
    # As from_dict has it: what a file says of a nested config is all that is said.
    assert (flags["steps"].default, flags["shift"].default) == (8, 1.0)
    with pytest.raises(ValueError, match=r"sampler: unknown key 'stesp'; did you mean 'steps'"):
        flags_of(DrawConfig, {"sampler": {"stesp": 1}})
    with pytest.raises(ValueError, match=r"sampler\.steps: expected a whole number; got 'x'"):
        flags_of(DrawConfig, {"sampler": {"steps": "x"}})
    with pytest.raises(ValueError, match="DrawConfig: expected an object"):
        flags_of(DrawConfig, [])


def build(values, **given):
    flags = by_name(DrawConfig, values)
    return apply(DrawConfig, values, {flags[name]: value for name, value in given.items()})


def test_what_is_given_changes_defaults_and_files():
    cfg = build(None, model="m", shift=2.0, order=Order.RASTER, prompt_file=Path("a/b"))
    assert cfg == DrawConfig(
        model="m", sampler=Sampler(steps=4, shift=2.0), order=Order.RASTER, prompt_file=Path("a/b")
    )
    stored = json.loads(json.dumps(to_dict(DrawConfig(model="m", layers={"a": 1}, sampler=Sampler(seed=5)))))
    cfg = build(stored, compile=False, steps=2)
    assert cfg == DrawConfig(model="m", layers={"a": 1}, sampler=Sampler(steps=2, seed=5), compile=False)


def test_a_flag_that_stands_for_another_field_drops_its_value_from_a_file():
    stored = {"model": "m", "prompts": ["a"]}
    assert build(stored).prompts == ("a",)
    assert build(stored, prompt_file=Path("f")).prompts == ()
    assert build(stored, prompt_file=Path("f"), prompt=("b",)).prompts == ("b",)


def test_what_is_not_stored_is_no_part_of_the_config_file():
    cfg = DrawConfig(model="m", retry=True)
    assert "retry" not in to_dict(cfg)
    assert from_dict(DrawConfig, to_dict(cfg)) == dataclasses.replace(cfg, retry=False)


def test_a_name_that_two_fields_have_goes_to_the_outer_one():
    @dataclass(frozen=True)
    class Outer:
        sampler: Sampler = Sampler()
        seed: int = 3

    flags = by_name(Outer)
    assert list(flags) == ["steps", "shift", "sampler_seed", "seed"]
    assert flags["seed"].default == 3
    assert apply(Outer, None, {flags["sampler_seed"]: 7}) == Outer(sampler=Sampler(seed=7))


def test_fields_that_can_be_no_flag_are_refused():
    @dataclass(frozen=True)
    class Deep:
        layers: dict[str, int] = field(default_factory=dict)

    @dataclass(frozen=True)
    class Optional:
        sampler: Sampler | None = None

    @dataclass(frozen=True)
    class Pairs:
        pairs: tuple[tuple[int, int], ...] = ()

    for cls, name in ((Deep, "layers"), (Optional, "sampler"), (Pairs, "pairs")):
        with pytest.raises(TypeError, match=f"{name}: a flag cannot give .*hidden=True"):
            flags_of(cls)

    @dataclass(frozen=True)
    class Taken:
        device: str = "auto"

    @dataclass(frozen=True)
    class Twice:
        a: int = field(default=0, metadata=flag("b"))
        b: int = 0

    for cls, name in ((Taken, "device"), (Twice, "b")):
        with pytest.raises(TypeError, match=f"the flag --{name} stands for two things"):
            flags_of(cls)


def test_docs_of_a_class_without_source_are_empty():
    made = dataclasses.make_dataclass("Made", [("a", int, 0)])
    assert field_docs(made) == {}
    assert [entry.help for entry in flags_of(made)] == [""]


def test_defaults_are_told_whatever_the_seed():
    plain = DrawConfig(model="m")
    assert not is_default(plain)  # the model is nobody's default
    assert is_default(plain, DrawConfig(model="m", sampler=Sampler(steps=4, seed=9)))
    assert not is_default(plain, DrawConfig(model="m", sampler=Sampler(steps=5)))
    assert is_default(Sampler(seed=4))
    assert not is_default(Sampler(shift=1.0))
    assert is_default(dataclasses.replace(plain, retry=True), plain)
