"""Configs: frozen dataclasses to JSON and back, with nothing guessed.

A field that is missing, unknown or of the wrong type is an error that names the field, so that an old or mistyped
config file never runs as something else.
"""

import dataclasses
import difflib
import enum
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from hone_core.io import atomic_write_json

__all__ = ["from_dict", "load_config", "save_config", "to_dict"]

T = TypeVar("T")

# JSON has no number for these, and Python's own extension ("Infinity") is not readable by strict parsers.
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_dict(cfg: Any) -> dict[str, Any]:
    """Turn a config dataclass into plain JSON types.

    Tuples become lists, paths and enums strings, and non-finite floats the strings "inf", "-inf" and "nan".

    Raises:
        TypeError: ``cfg`` is not a dataclass instance, or holds a value with no JSON form.
    """
    if not dataclasses.is_dataclass(cfg) or isinstance(cfg, type):
        raise TypeError(f"cfg must be a dataclass instance; got {type(cfg).__name__}")
    return {f.name: _encode(getattr(cfg, f.name), f.name) for f in dataclasses.fields(cfg) if f.init}


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build a config dataclass from plain JSON types.

    Args:
        cls: The dataclass. Its fields may be numbers, strings, paths, enums, ``Literal``, optional, lists, tuples,
            string-keyed dicts and other dataclasses.
        data: Field name to value. Fields with a default may be left out.

    Raises:
        TypeError: ``cls`` is not a dataclass.
        ValueError: A key is unknown or missing, or a value does not fit its field's type.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"cls must be a dataclass; got {cls!r}")
    return _decode_dataclass(cls, data, "")


def save_config(cfg: Any, path: str | Path) -> Path:
    """Write a config as JSON, atomically, and return the path."""
    return atomic_write_json(path, to_dict(cfg))


def load_config(cls: type[T], path: str | Path) -> T:
    """Read a config that ``save_config`` (or any run) wrote.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read.
        ValueError: The file is not JSON, or does not describe a ``cls``.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise type(error)(
            f"{path}: expected a JSON config, but it cannot be read ({error.strerror}). Pass the config.json of a run, "
            "or leave the config out for the defaults"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a JSON config; {error}") from error
    try:
        return from_dict(cls, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _encode(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _encode(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value) if f.init
        }
    if isinstance(value, enum.Enum):
        return _encode(value.value, where)
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{where}: dict keys must be strings; got {sorted({type(k).__name__ for k in value})}")
        return {key: _encode(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(
        f"{where}: {type(value).__name__} has no JSON form; use numbers, strings, paths, tuples or dataclasses"
    )


def _decode_dataclass(cls: type, data: Any, where: str) -> Any:
    label = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ValueError(f"{label}: expected an object with the fields of {cls.__name__}; got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(fields)}"
            raise ValueError(f"{label}: unknown key {key!r}{hint}")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - data.keys()):
        raise ValueError(f"{label}: missing {', '.join(missing)}")
    prefix = f"{where}." if where else ""
    return cls(**{key: _decode(hints[key], value, f"{prefix}{key}") for key, value in data.items()})


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Annotated:
        return _decode(args[0], value, where)
    if origin is typing.Literal:
        # `1 == True`, so the type has to agree as well.
        if not any(value == option and type(value) is type(option) for option in args):
            raise _mismatch(where, f"one of {', '.join(map(repr, args))}", value)
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, value, where)
    if origin is tuple:
        return _decode_tuple(args, value, where)
    if origin is list:
        if not isinstance(value, list):
            raise _mismatch(where, "a list", value)
        return [_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _mismatch(where, "an object", value)
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    return _decode_scalar(kind, value, where)


def _decode_union(options: tuple, value: Any, where: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    problems = []
    for option in options:
        if option is types.NoneType:
            continue
        try:
            return _decode(option, value, where)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; ".join(problems))


def _decode_tuple(args: tuple, value: Any, where: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise _mismatch(where, "a list", value)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise _mismatch(where, f"a list of {len(args)} values", value)
    return tuple(_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(args, value, strict=True)))


def _decode_scalar(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(value)
        except ValueError:
            raise _mismatch(where, f"one of {', '.join(repr(m.value) for m in kind)}", value) from None
    if isinstance(kind, type) and issubclass(kind, Path):
        if not isinstance(value, str):
            raise _mismatch(where, "a path", value)
        return kind(value)
    if kind is float:
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _mismatch(where, "a number", value)
        return float(value)
    if kind in (bool, int, str):
        # bool is a subclass of int, and `true` for a count is a mistake.
        if type(value) is not kind:
            raise _mismatch(where, {bool: "true or false", int: "a whole number", str: "a string"}[kind], value)
        return value
    raise TypeError(f"{where}: fields of type {kind!r} cannot be read from JSON")


def _mismatch(where: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{where}: expected {expected}; got {value!r}")
