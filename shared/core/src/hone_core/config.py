"""Configs: frozen dataclasses to JSON and back, with nothing guessed.

A field that is missing, unknown or of the wrong type is an error that names the field, so that an old or mistyped
config file never runs as something else. ``hone_core.flags`` makes the flags of a command line from the same classes.
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
from typing import Any, Generic, Literal, TypeVar

__all__ = ["Dtype", "Preset", "check_least", "decode", "encode", "flag", "from_dict", "known_fields", "load_config"]
__all__ += ["read_config", "to_dict"]

T = TypeVar("T")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""What ``hone_core.devices.resolve_dtype`` takes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Preset(Generic[T]):
    """Named settings of a method and where they come from; a package's ``PRESETS`` holds them by name.

    Attributes:
        config: The settings.
        model: What they are for.
        provenance: Where they stand: in the paper or its release, or ours.
    """

    config: T
    model: str
    provenance: str

    def __str__(self) -> str:
        """As ``info`` prints it: the settings in short, if they have a ``label``, what they are for, and provenance."""
        parts = (getattr(self.config, "label", ""), self.model, self.provenance)
        return " ".join(f"{part.rstrip('.')}." for part in parts if part)


# JSON has no number for these, and Python's own extension ("Infinity") is not readable by strict parsers.
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


FLAG = "hone_core.flag"
"""Key of a field's metadata that ``flag`` fills."""


@dataclasses.dataclass(frozen=True, slots=True)
class FlagOptions:
    """What a field says of its flag; see ``flag``."""

    name: str | None = None
    hidden: bool = False
    instead_of: tuple[str, ...] = ()
    stored: bool = True


def flag(
    name: str | None = None, *, hidden: bool = False, instead_of: tuple[str, ...] = (), stored: bool = True
) -> dict[str, Any]:
    """Metadata of a field whose flag is not simply the field's: ``prompts: int = field(metadata=flag("limit"))``.

    Args:
        name: Of the flag, without dashes; the field's own unless given.
        hidden: The field has no flag, and is set from Python or by ``--config`` only.
        instead_of: Fields of the same dataclass that this one stands for: when the flag is given, their values in a
            ``--config`` file no longer count.
        stored: False for a field that says how to go about a run and not what it is: it is left out of
            ``config.json``, so that the command is the same with another value.
    """
    return {FLAG: FlagOptions(name=name, hidden=hidden, instead_of=instead_of, stored=stored)}


def check_least(config: Any, least: int, *names: str) -> None:
    """Refuse numbers below a bound; for the ``__post_init__`` of a config.

    Args:
        config: Whose fields are looked at.
        least: Bound, itself allowed.
        names: Of the fields; one that is None passes.

    Raises:
        ValueError: A field is below it, or no number (NaN).
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def to_dict(cfg: Any) -> dict[str, Any]:
    """Turn a config dataclass into plain JSON types.

    Tuples become lists, paths and enums strings, and non-finite floats the strings "inf", "-inf" and "nan". Fields that
    are not stored (see ``flag``) are left out.

    Raises:
        TypeError: ``cfg`` is not a dataclass instance, or holds a value with no JSON form.
    """
    if not dataclasses.is_dataclass(cfg) or isinstance(cfg, type):
        raise TypeError(f"cfg must be a dataclass instance; got {type(cfg).__name__}")
    return _encode_fields(cfg, "")


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


def load_config(cls: type[T], path: str | Path) -> T:
    """Read a config from JSON, such as the ``config.json`` of a run.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read.
        ValueError: The file is not JSON, or does not describe a ``cls``.
    """
    data = read_config(path)
    try:
        return from_dict(cls, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_config(path: str | Path) -> Any:
    """The JSON of a config file, not looked at yet.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The file is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise type(error)(
            f"{path}: expected a JSON config, but it cannot be read ({error.strerror}). Pass the config.json of a run, "
            "or leave the config out for the defaults"
        ) from error
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path}: expected a JSON config; {error}") from error


def _encode_fields(value: Any, prefix: str) -> dict[str, Any]:
    return {
        f.name: encode(getattr(value, f.name), f"{prefix}{f.name}")
        for f in dataclasses.fields(value)
        if f.init and f.metadata.get(FLAG, FlagOptions()).stored
    }


def encode(value: Any, where: str) -> Any:
    """The JSON form of a field's value; see ``to_dict``.

    Raises:
        TypeError: It has none.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _encode_fields(value, f"{where}.")
    if isinstance(value, enum.Enum):
        return encode(value.value, where)
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, (list, tuple)):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{where}: dict keys must be strings; got {sorted({type(k).__name__ for k in value})}")
        return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(
        f"{where}: {type(value).__name__} has no JSON form; use numbers, strings, paths, tuples or dataclasses"
    )


def known_fields(cls: type, data: Any, where: str = "") -> dict[str, dataclasses.Field]:
    """Fields of a dataclass by name, once every key of ``data`` is known to be one.

    Args:
        cls: The dataclass.
        data: An object of JSON.
        where: Its place, for the message.

    Raises:
        ValueError: ``data`` is no object, or has a key that no field has.
    """
    label = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ValueError(f"{label}: expected an object with the fields of {cls.__name__}; got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(fields)}"
            raise ValueError(f"{label}: unknown key {key!r}{hint}")
    return fields


def _decode_dataclass(cls: type, data: Any, where: str) -> Any:
    fields = known_fields(cls, data, where)
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - data.keys()):
        raise ValueError(f"{where or cls.__name__}: missing {', '.join(missing)}")
    hints, prefix = typing.get_type_hints(cls), f"{where}." if where else ""
    return cls(**{key: decode(hints[key], value, f"{prefix}{key}") for key, value in data.items()})


def decode(kind: Any, value: Any, where: str) -> Any:
    """A field's value from its JSON form; see ``from_dict``.

    Args:
        kind: The field's type.
        value: Of plain JSON types.
        where: The field's place, for the message.

    Raises:
        ValueError: The value does not fit.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Annotated:
        return decode(args[0], value, where)
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
        return [decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _mismatch(where, "an object", value)
        return {key: decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
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
            return decode(option, value, where)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; ".join(problems))


def _decode_tuple(args: tuple, value: Any, where: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise _mismatch(where, "a list", value)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise _mismatch(where, f"a list of {len(args)} values", value)
    return tuple(decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(args, value, strict=True)))


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
