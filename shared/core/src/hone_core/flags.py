"""Flags from a config dataclass: one per field, nested dataclasses flattened, the field's docstring as its help.

``hone_core.cli`` parses them; here is what they are, and how values that were given become a config again.
"""

import ast
import dataclasses
import enum
import inspect
import itertools
import textwrap
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hone_core.config import FLAG, FlagOptions, decode, encode, from_dict, known_fields, to_dict

__all__ = ["RUN_FLAGS", "Flag", "apply", "field_docs", "flags_of", "is_default"]

T = TypeVar("T")

RUN_FLAGS = {
    "config": "A run's config.json to start from; other flags change it.",
    "out": "Run folder; the same command with the same folder resumes.",
    "export": "Also write the finished run as one file, such as results/<package>/NAME.json.",
    "device": "auto, cpu, cuda or cuda:1.",
    "dry_run": "Look for the inputs, print the settings and do nothing.",
}
"""Flags that every verb with a config has, and their help; ``--json``, ``--quiet`` and ``--verbose`` come to them."""

_TAKEN = {*RUN_FLAGS, "json", "quiet", "verbose"}


@dataclass(frozen=True, slots=True, eq=False)
class Flag:
    """One flag of a config.

    Attributes:
        name: Without dashes, words joined by ``_``.
        path: Names of the fields that lead to its value.
        kind: Type of the value.
        default: The value if the flag is left out; ``dataclasses.MISSING`` if it must be given.
        help: Docstring of the field, in one line.
        instead_of: Paths of the fields that it stands for, see ``hone_core.config.flag``.
    """

    name: str
    path: tuple[str, ...]
    kind: Any
    default: Any
    help: str
    instead_of: tuple[tuple[str, ...], ...] = ()

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is dataclasses.MISSING


def flags_of(cls: type, values: Any = None) -> list[Flag]:
    """Flags of a config dataclass.

    A field of a nested dataclass is a flag of its own name; where two fields have one name, the nested one's is led by
    the name of the field that holds it: ``--seed`` and ``--comparison-seed``.

    Args:
        cls: The dataclass.
        values: What a ``--config`` file holds (plain JSON types), in place of the defaults. It may be incomplete.

    Raises:
        TypeError: A field has a type that no flag can give and is not hidden (see ``hone_core.config.flag``), or
            stands where a flag of every run does.
        ValueError: ``values`` has an unknown key, or a value that does not fit.
    """
    found = list(_walk(cls, {} if values is None else values, (), None))
    count = Counter(flag.name for flag in found)
    found = [
        dataclasses.replace(flag, name="_".join((*flag.path[:-1], flag.name)))
        if count[flag.name] > 1 and len(flag.path) > 1
        else flag
        for flag in found
    ]
    for name, times in Counter(flag.name for flag in found).items():
        if times > 1 or name in _TAKEN:
            raise TypeError(
                f"{cls.__name__}: the flag --{name.replace('_', '-')} stands for two things; rename a field"
            )
    return found


def _walk(cls: type, values: Any, path: tuple[str, ...], defaults: Any) -> Iterator[Flag]:
    """Flags of one dataclass; ``defaults`` is the instance that holds if ``values`` says nothing."""
    where = ".".join(path)
    known = known_fields(cls, values, where)
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for name, field in known.items():
        options: FlagOptions = field.metadata.get(FLAG, FlagOptions())
        if options.hidden:
            continue
        kind, here = hints[name], (*path, name)
        default = _default(field) if defaults is None else getattr(defaults, name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            inner = None if name in values or default is dataclasses.MISSING else default
            yield from _walk(kind, values.get(name, {}), here, inner)
            continue
        if not _has_flag(kind):
            raise TypeError(
                f"{cls.__name__}.{name}: a flag cannot give {kind}; hide it with metadata=flag(hidden=True)"
            )
        if name in values:
            default = decode(kind, values[name], ".".join(here))
        yield Flag(
            name=options.name or name,
            path=here,
            kind=kind,
            default=default,
            help=docs.get(name, ""),
            instead_of=tuple((*path, other) for other in options.instead_of),
        )


def apply(cls: type[T], values: Any, given: Mapping[Flag, Any]) -> T:
    """The config of a file (or the defaults) with the flags that were given.

    Args:
        cls: The dataclass.
        values: What the file holds, as of ``flags_of``.
        given: Flag to value, only those on the command line.

    Raises:
        ValueError: The values do not fit together.
    """
    changes = {flag.path: encode(value, flag.name) for flag, value in given.items()}
    replaced = {path for flag in given for path in flag.instead_of} - changes.keys()
    return from_dict(cls, _merge(cls, {} if values is None else values, changes, replaced, ()))


def _merge(
    cls: type,
    values: Any,
    changes: dict[tuple[str, ...], Any],
    replaced: set[tuple[str, ...]],
    path: tuple[str, ...],
) -> dict[str, Any]:
    hints, merged = typing.get_type_hints(cls), dict(values)
    for name, field in known_fields(cls, values, ".".join(path)).items():
        here = (*path, name)
        if here in changes:
            merged[name] = changes[here]
        elif here in replaced:
            merged.pop(name, None)
        elif dataclasses.is_dataclass(hints[name]) and any(p[: len(here)] == here for p in changes.keys() | replaced):
            if name not in merged:
                default = _default(field)
                merged[name] = {} if default is dataclasses.MISSING else to_dict(default)
            merged[name] = _merge(hints[name], merged[name], changes, replaced, here)
    return merged


def is_default(cfg: Any, defaults: Any = None) -> bool:
    """Whether a config holds its defaults (or those of an instance), whatever its seed and what is not stored."""
    for field in dataclasses.fields(cfg):
        if not field.init or field.name == "seed" or not field.metadata.get(FLAG, FlagOptions()).stored:
            continue
        value, default = (
            getattr(cfg, field.name),
            _default(field) if defaults is None else getattr(defaults, field.name),
        )
        both = dataclasses.is_dataclass(value) and type(value) is type(default)
        if not (is_default(value, default) if both else value == default):
            return False
    return True


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _has_flag(kind: Any) -> bool:
    """Whether a value of this type can be typed: a scalar, some of them, or None."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return all(arg is types.NoneType or _has_flag(arg) for arg in args)
    if origin in (tuple, list):
        return all(arg is Ellipsis or (_has_flag(arg) and typing.get_origin(arg) not in (tuple, list)) for arg in args)
    if origin is typing.Literal:
        return True
    return isinstance(kind, type) and issubclass(kind, (bool, int, float, str, Path, enum.Enum))


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field, in one line without its code marks; a field of a base class is there as well."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # no source, as in an interactive session
            continue
        body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
        for line, after in itertools.pairwise(body):
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[line.target.id] = " ".join(after.value.value.replace("``", "").split())
    return found
