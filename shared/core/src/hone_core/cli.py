"""Verbs of a command line, from config dataclasses (or functions) to tyro.

A package's ``cli.py`` is a table of verbs and one call of ``run_cli``. The flags of a verb are the fields of its
config; nothing but the config's module is imported for ``--help``, which takes well under a second.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import json
import logging
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

from hone_core.devices import check_device
from hone_core.errors import MissingExtraError, UnsupportedHardwareError
from hone_core.flags import RUN_FLAGS, Flag, apply, flags_of, is_default
from hone_core.processes import Processes

__all__ = ["FAILED", "OK", "USAGE", "Verb", "run_cli", "verb"]

OK, FAILED, USAGE = 0, 1, 2
"""Exit codes: done; failed; wrong usage or a missing extra."""


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb, by the names of what it is made of; each is imported only when the verb is called.

    With a config, its flags are the config's fields (see ``hone_core.flags``) and those of every run: ``--config`` (a
    file in place of the defaults; a flag that is given overrides it), ``--out``, ``--export``, ``--device`` and
    ``--dry-run``. It runs in a run folder: a finished run of the same command is only reported, an unfinished one is
    resumed. The printed report is ``Report.of(run)``, made from what the folder holds, of the class that ``run`` is
    annotated to return.

    Args:
        run: ``"package.module:function"``. With a config ``function(cfg, run) -> Report``, of a ``hone_core.runs.Run``
            and a subclass of ``hone_core.runs.Report``; else a function whose keyword arguments are the flags.
        help: One line for the list of verbs.
        config: ``"package.module:Class"`` of a frozen dataclass, in a module that imports no torch. Fields ``seed`` and
            ``preset`` are the run's; a run of nothing but defaults has the preset ``default``.
        prepare: ``"package.module:function"``, ``function(cfg) -> cfg``, called before the run folder is opened and
            before ``--dry-run`` prints: it looks for inputs and completes the config. Doing so twice is as once.
        opened: ``"package.module:function"``, ``function(cfg, run) -> None``, called with the run before it is entered;
            it may ``reopen`` a finished one, or refuse.
        shared: Whether several processes may run it together, see ``hone_core.processes``. The first one prints.
    """

    run: str
    help: str
    config: str | None = None
    prepare: str | None = None
    opened: str | None = None
    shared: bool = False


def verb(
    package: str,
    run: str,
    config: str | None,
    help: str,
    *,
    prepare: str | None = None,
    opened: str | None = None,
    shared: bool = False,
) -> Verb:
    """A verb of a package, by names within it; a table of verbs has this with its package filled in.

    Args:
        package: Module, such as ``hone_blade``.
        run: ``"module:function"`` in the package, and likewise ``prepare`` and ``opened``.
        config: Class of the package's ``config``; None for a function whose keyword arguments are the flags.
        help: See ``Verb``.
        prepare: See ``Verb``.
        opened: See ``Verb``.
        shared: See ``Verb``.
    """
    return Verb(
        run=f"{package}.{run}",
        help=help,
        config=config and f"{package}.config:{config}",
        prepare=prepare and f"{package}.{prepare}",
        opened=opened and f"{package}.{opened}",
        shared=shared,
    )


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def run_cli(
    prog: str,
    verbs: Mapping[str, Callable[..., Any] | Verb],
    description: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Run one verb and exit.

    Each verb gets the flags of its config (see ``Verb``), or those that its signature declares, and on top ``--json``
    (the result as JSON on stdout), ``--quiet`` (only warnings and errors on stderr) and ``--verbose`` (debug lines, and
    the traceback of an error). A function that declares ``json``, ``quiet`` or ``verbose`` itself gets the value passed
    on. A flag whose default is None or empty shows no default of its own; its line of help says what holds then, as in
    ``(default: 8)``.

    A flag of many values (``tuple[T, ...]``, ``list[T]``) takes them after one flag, ``--hosts A B``, or with a
    flag each, ``--hosts A --hosts B``. Any other flag that is given twice is wrong usage.

    What a verb returns is its result, printed on stdout: a string as it is, a mapping or dataclass as lines (a
    dataclass with its own ``__str__``: that) or, with ``--json``, as JSON. None prints nothing. An object with a
    ``to_dict`` method gives its JSON by that.

    Exit codes: 0 done, 1 failed, 2 wrong usage or a missing extra. An error is one line on stderr; ``HONE_TRACEBACK=1``
    or ``--verbose`` shows where it came from.

    Args:
        prog: Name of the command, which is also the distribution's name.
        verbs: Verb to function or ``Verb``, in the order of the help text.
        description: One line: what the package does.
        argv: Arguments; None for those of the process.

    Raises:
        SystemExit: Always, with the exit code.
    """
    # Read when torch loads OpenMP. By default its idle threads spin, which on a busy two-core machine takes twice the
    # time (two steps of blade's tiny host: 8.8 s against 4.9 s). What the caller has set holds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview(prog, verbs, description), file=sys.stdout if args else sys.stderr)
        raise SystemExit(OK if args else USAGE)
    if args[0] == "--version":
        print(f"{prog} {importlib.metadata.version(prog)}")
        raise SystemExit(OK)
    name, rest = args[0], args[1:]
    if name not in verbs:
        print(f"{prog}: unknown verb {name!r}; expected one of {', '.join(verbs)}. Try {prog} --help.", file=sys.stderr)
        raise SystemExit(USAGE)
    raise SystemExit(_run_verb(f"{prog} {name}", verbs[name], rest))


def _run_verb(prog: str, verb: Callable[..., Any] | Verb, args: list[str]) -> int:
    # tyro costs a tenth of a second, which the list of verbs does not need.
    import tyro

    show_traceback = "--verbose" in args or os.environ.get("HONE_TRACEBACK", "") not in ("", "0")
    try:
        fn = _function_of(prog, verb, args)
        _check_needed(fn, args)
        call, common = tyro.cli(_with_common_flags(fn), args=_gather_repeats(fn, args), prog=prog)
        with _logs(quiet=common["quiet"] or not Processes.of_launcher().main, verbose=common["verbose"]):
            result = call()
        _print_result(result, as_json=common["json"])
        return OK
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except _UsageError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return USAGE
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        message = " ".join(str(error).split())
        # These speak to the user; any other is most likely ours, and its message alone says little.
        if not isinstance(error, (ValueError, OSError, MissingExtraError, UnsupportedHardwareError)):
            message = f"{type(error).__name__}: {message} (HONE_TRACEBACK=1 shows where)"
        print(f"{prog}: error: {message}", file=sys.stderr)
        return USAGE if isinstance(error, MissingExtraError) else FAILED


class _UsageError(Exception):
    """What is wrong with the flags, where tyro says nothing."""


def _check_needed(fn: Callable[..., Any], args: list[str]) -> None:
    """Refuse a command line without a flag that a function cannot do without, in a line as those of a config.

    Raises:
        _UsageError: One is missing.
    """
    if {"-h", "--help"} & {*args}:
        return
    given = _given(args)
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            arguments = (inspect.getdoc(fn) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
            line = re.search(rf"^    {name}: (.*(?:\n     .*)*)", arguments, re.MULTILINE)
            text = f": {' '.join(line[1].split())}" if line else ""
            raise _UsageError(f"--{name.replace('_', '-')} is needed{text}")


def _function_of(prog: str, verb: Callable[..., Any] | Verb, args: list[str]) -> Callable[..., Any]:
    """The function whose keyword arguments are the verb's flags."""
    if not isinstance(verb, Verb):
        return verb
    if verb.config is None:
        return _import(verb.run)
    import tyro

    from hone_core.config import read_config

    cls, file = _import(verb.config), _value_of("--config", args)
    values = None if file is None else read_config(file)
    try:
        flags = flags_of(cls, values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    given = _given(args)

    def call(
        *,
        config: Path | None,
        out: Path | None,
        export: Path | None,
        device: str,
        dry_run: bool,
        quiet: bool,
        **parsed: Any,
    ) -> Any:
        if export is not None and not export.parent.is_dir():
            raise _UsageError(f"--export: the folder {export.parent} does not exist; make it first")
        if export is not None and export.is_dir():
            raise _UsageError(f"--export: {export} is a folder; name a file in it")
        check_device(device)
        for flag in flags:
            if flag.required and flag.name not in given:
                raise _UsageError(f"--{flag.name.replace('_', '-')} is needed: {flag.help}")
        cfg = apply(cls, values, {flag: parsed[flag.name] for flag in flags if flag.name in given})
        if verb.prepare is not None:
            cfg = _import(verb.prepare)(cfg)
        package, name = prog.split()
        if dry_run:
            from hone_core.config import to_dict

            return {"config": to_dict(cfg), "out": str(out or f"runs/{package}/{name}/...")}
        return _run_folder(
            verb,
            cfg,
            package=package,
            verb=name,
            out=out,
            export=export,
            preset=getattr(cfg, "preset", None) or ("default" if is_default(cfg) else None),
            seed=_seed_of(cfg, flags),
            device=device,
            quiet=quiet,
            command=shlex.join([package, name, *args]),
            flags={".".join(flag.path): f"--{flag.name.replace('_', '-')}" for flag in flags},
        )

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            flag.name,
            keyword,
            default=None if flag.required else flag.default,
            annotation=Optional[flag.kind] if flag.required else flag.kind,  # noqa: UP045 - of a type at run time
        )
        for flag in flags
    ]
    of_run: dict[str, tuple[Any, Any]] = {
        "config": (Path | None, None),
        "out": (Path | None, None),
        "export": (Path | None, None),
        "device": (str, "auto"),
    }
    switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
    of_run |= {"dry_run": (switch, False), "quiet": (switch, False)}
    parameters += [
        inspect.Parameter(name, keyword, default=default, annotation=kind) for name, (kind, default) in of_run.items()
    ]
    lines = {flag.name: flag.help + " (required)" * flag.required for flag in flags} | RUN_FLAGS
    lines["quiet"] = _COMMON["quiet"]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # tyro reads it
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__doc__ = f"{verb.help}\n\nArgs:\n" + "\n".join(f"    {name}: {text}" for name, text in lines.items())
    return call


def _run_folder(table: Verb, cfg: Any, *, export: Path | None, **start: Any) -> Any:
    """Open the run folder, run the verb in it unless it has run, export it if asked, and report what is there."""
    from hone_core.environment import code_version
    from hone_core.runs import Run, export_results

    processes = Processes.of_launcher()
    if not table.shared:
        try:
            processes.alone(start["verb"])
        except ValueError as error:
            raise _UsageError(str(error)) from error
    function = _import(table.run)
    report = function.__annotations__["return"]
    if isinstance(report, str):
        report = eval(report, inspect.unwrap(function).__globals__)
    try:
        run = Run.start(config=cfg, processes=processes, **start)
    except Exception:
        if processes.main:
            processes.share("run", None)
        raise
    try:
        if table.opened is not None:
            _import(table.opened)(cfg, run)
        if not run.done and export is not None:
            commit, dirty = code_version()
            if run.unclean(commit, dirty):
                why, do = ("the checkout has uncommitted changes", "commit first")
                if not dirty:
                    why, do = (f"the run in {run.path} was begun with other code", "choose another --out")
                raise _UsageError(
                    f"--export: {why}, and an exported result must come from a commit; {do}, or leave --export out"
                )
    except BaseException:
        if start["out"] is None and processes.main:
            with contextlib.suppress(OSError):
                run.path.rmdir()  # made for this run, which will not be
        raise
    if not run.done:
        with run:
            function(cfg, run)
        processes.end()
    if not processes.main:
        return None
    if export is not None:
        export_results(run.path, export)
    return report.of(run)


def _seed_of(cfg: Any, flags: list[Flag]) -> int:
    """Value of the field ``seed`` that lies least deep; 0 where there is none."""
    for flag in sorted(flags, key=lambda flag: len(flag.path)):
        if flag.path[-1] == "seed":
            return functools.reduce(getattr, flag.path, cfg)
    return getattr(cfg, "seed", 0)


def _value_of(name: str, args: list[str]) -> str | None:
    """Value of a flag on the command line, before its parser is built."""
    for arg, after in zip(args, [*args, None][1:], strict=True):
        head, equals, value = arg.partition("=")
        if head == name:
            return value if equals else after
    return None


def _given(args: list[str]) -> set[str]:
    """Names of the flags on a command line; ``--no-x`` gives ``x``."""
    heads = {arg.partition("=")[0][2:].replace("-", "_") for arg in args if arg.startswith("--")}
    return heads | {head.removeprefix("no_") for head in heads}


def _gather_repeats(fn: Callable[..., Any], args: list[str]) -> list[str]:
    """Arguments with all values of a repeated flag after its first occurrence; tyro would drop all but the last.

    Raises:
        _UsageError: A flag of one value is given twice.
    """
    import typing

    hints = typing.get_type_hints(fn)
    hints = {f"--{name.replace('_', '-')}": hints.get(name) for name in inspect.signature(fn).parameters}
    group: list[str] = []
    groups = [group]
    first: dict[str, list[str]] = {}
    for arg in args:
        head, equals, value = arg.partition("=")
        flag = head.replace("_", "-")
        if not arg.startswith("--"):
            group.append(arg)
        elif flag in first and _takes_many(hints[flag]):
            group = first[flag]
            group += [value] if equals else []
        elif flag in first and hints[flag] is not bool:
            raise _UsageError(f"{flag} takes one value and is given twice")
        else:
            group = [arg]
            groups.append(group)
            if flag in hints:
                first[flag] = group
    return [arg for group in groups for arg in group]


def _takes_many(hint: Any) -> bool:
    """Whether a flag of this type has any number of values."""
    import types
    import typing

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(map(_takes_many, args))
    return origin is list or (origin is tuple and args[-1:] == (Ellipsis,))


_COMMON = {
    "json": "Print the result as JSON on stdout.",
    "quiet": "Only warnings and errors on stderr.",
    "verbose": "Debug lines on stderr, and the traceback of an error.",
}


def _with_common_flags(fn: Callable[..., Any]) -> Callable[..., tuple[Callable[[], Any], dict[str, bool]]]:
    """A function of the same flags and the common ones that returns the call and the common values."""
    import typing

    import tyro

    switch = typing.Annotated[bool, tyro.conf.FlagCreatePairsOff]
    signature = inspect.signature(fn)
    own = [name for name in _COMMON if name in signature.parameters]
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=switch)
        for name in _COMMON
        if name not in own
    ]

    def parsed(*args: Any, **kwargs: Any) -> tuple[Callable[[], Any], dict[str, bool]]:
        common = {name: kwargs[name] if name in own else kwargs.pop(name) for name in _COMMON}
        return (lambda: fn(*args, **kwargs)), common

    parsed.__signature__ = signature.replace(  # type: ignore[attr-defined]  # tyro reads it
        parameters=[*signature.parameters.values(), *extra], return_annotation=inspect.Signature.empty
    )
    hints = typing.get_type_hints(fn, include_extras=True)
    hints.pop("return", None)
    for name, parameter in signature.parameters.items():
        if (parameter.default is None or parameter.default in ((), [], "")) and name in hints:
            # This only says that the flag was left out: it is no value to show, and what then holds stands in the text.
            shown = tyro.conf.arg(metavar=_metavar(hints[name]), help_behavior_hint="")
            hints[name] = typing.Annotated[hints[name], shown]
    parsed.__annotations__ = hints | {parameter.name: switch for parameter in extra}
    parsed.__doc__ = _with_common_docs(inspect.getdoc(fn) or "", [parameter.name for parameter in extra])
    parsed.__name__ = fn.__name__
    return parsed


def _metavar(hint: Any) -> str:
    """What stands for a value in the help, None left out: ``INT``, ``{a,b}``, ``STR [STR ...]``."""
    import types
    import typing

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _metavar(args[0])
    if origin in (typing.Union, types.UnionType):
        return "|".join(_metavar(arg) for arg in args if arg is not type(None))
    if origin is typing.Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if origin in (tuple, list):
        return f"{(item := _metavar(args[0]))} [{item} ...]"
    return getattr(hint, "__name__", str(hint)).upper()


def _with_common_docs(doc: str, names: list[str]) -> str:
    """The docstring up to its Args section's end, with the common flags added to that section."""
    lines = [f"    {name}: {_COMMON[name]}" for name in names]
    head, mark, tail = doc.partition("\nArgs:\n")
    if not mark:
        for section in ("\nReturns:", "\nRaises:"):
            head = head.partition(section)[0]
        return f"{head.rstrip()}\n\nArgs:\n" + "\n".join(lines)
    arguments = tail.partition("\n\n")[0]
    return f"{head}{mark}{arguments}\n" + "\n".join(lines)


def _overview(prog: str, verbs: Mapping[str, Callable[..., Any] | Verb], description: str) -> str:
    width = max(map(len, verbs), default=0)
    lines = [f"usage: {prog} VERB [flags]", "", description, "", "verbs:"]
    for name, verb in verbs.items():
        summary = verb.help if isinstance(verb, Verb) else (inspect.getdoc(verb) or "").partition("\n")[0]
        lines.append(f"  {name:<{width}}  {summary}")
    lines += ["", f"{prog} VERB --help lists a verb's flags; {prog} --version prints the version."]
    return "\n".join(lines)


def _print_result(result: Any, *, as_json: bool) -> None:
    if result is None:
        return
    try:
        print(_show(result, as_json=as_json), flush=True)
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`); Python would complain once more while it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(result: Any, *, as_json: bool) -> str:
    if isinstance(result, str):
        return json.dumps(result) if as_json else result
    data = _plain(result)
    if as_json:
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    if isinstance(data, Mapping) and (isinstance(result, Mapping) or type(result).__str__ is object.__str__):
        return "\n".join(_table(data))
    return str(result)


_LONG = 100
"""Characters of a line from which a mapping gets a line for each entry."""


def _table(data: Mapping[str, Any]) -> list[str]:
    """A line for each entry; for one that is a long mapping itself, a line for each of its own, indented."""
    width = max((len(str(key)) for key in data), default=0)
    lines = []
    for key, value in data.items():
        line = f"{key!s:<{width}}  {_inline(value)}"
        if isinstance(value, Mapping) and len(line) > _LONG:
            lines += [str(key), *(f"  {row}" for row in _table(value))]
        else:
            lines.append(line)
    return lines


def _plain(value: Any) -> Any:
    """JSON types of a result."""
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _inline(value: Any) -> str:
    if value in ("", [], {}):
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_inline, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def _logs(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """One handler on stderr while a verb runs; debug lines of our own packages only, not of every library."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="[%X]")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    ours = [logging.getLogger(name) for name in sys.modules if name.startswith("hone_") and "." not in name]
    handlers, levels = root.handlers, {one: one.level for one in [root, *ours]}
    root.handlers = [handler]
    root.setLevel(logging.WARNING if quiet else logging.INFO)
    for package in ours if verbose else ():
        package.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        # Of a program that calls verbs, later lines are not for the stream of this one, which may be closed by then.
        root.handlers = handlers
        for one, level in levels.items():
            one.setLevel(level)
