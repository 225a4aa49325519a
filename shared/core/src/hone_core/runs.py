"""Run folders: what was run, on what, and what came out, in files that are always whole.

A folder holds ``config.json``, ``environment.json``, ``metrics.jsonl``, ``results.json``, ``figures/`` and
``artifacts/``. A crash leaves ``status: failed`` and the message in ``results.json``.
"""

import fcntl
import importlib.metadata
import json
import math
import os
import re
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO, get_args

from hone_core.config import read_config, to_dict
from hone_core.environment import environment
from hone_core.io import atomic_write_json, atomic_write_text
from hone_core.processes import Processes

__all__ = ["SCHEMA", "Report", "Row", "Run", "drop_lines_after", "export_results", "load_results"]

SCHEMA = 1
"""Version of the ``results.json`` layout."""

Better = Literal["higher", "lower", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured value.

    ``unit`` is a plain word ("ms", "dB", "GiB"; empty for a ratio); ``better`` is the direction that is an
    improvement; ``n`` counts what the value is over, ``spread`` is its standard deviation and ``interval`` its 95 %
    confidence interval (low, high), in the same unit; ``paper_value`` is the publication's figure for the same thing.
    ``labels`` are further columns that tell values apart, such as a shape. A speed-up is stored as the two times that
    it comes from.
    """

    metric: str
    value: float
    unit: str = ""
    better: Better
    n: int = 1
    spread: float | None = None
    variant: str = ""
    split: str = ""
    paper_value: float | None = None
    interval: tuple[float, float] | None = None
    labels: dict[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.better not in get_args(Better):
            raise ValueError(f"better must be one of {', '.join(get_args(Better))}; got {self.better!r}")
        numbers = {"value": self.value, "spread": self.spread, "paper_value": self.paper_value}
        if self.interval is not None:
            numbers |= {"interval": sum(self.interval)}
            if len(self.interval) != 2 or self.interval[0] > self.interval[1]:
                raise ValueError(f"{self.metric}: interval must be (low, high); got {self.interval}")
        for name, number in numbers.items():
            if number is not None and not math.isfinite(number):
                raise ValueError(
                    f"{self.metric}: {name} must be finite; got {number}. Report why it is missing instead."
                )
        if self.n < 1:
            raise ValueError(f"{self.metric}: n must be at least 1; got {self.n}")

    @property
    def key(self) -> tuple:
        """What the value is of: a run holds one row per key."""
        return self.metric, self.variant, self.split, tuple(sorted(self.labels.items()))


class Run:
    """One run of one verb, as a context manager. Make it with ``Run.start``.

    Attributes:
        path: The run's folder.
        package: Distribution that runs.
        seed: The seed it was started with.
        device: Where it was asked to run, as given: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        quiet: Whether progress is to be kept off stderr.
        command: The command line, as typed.
        rows: Rows so far.
        resumed: The folder held an unfinished run of the same command, which this one continues.
        done: The folder holds a finished run of the same command: its rows are in ``rows``, and there is nothing
            left to do. ``row`` and ``log`` refuse.
        processes: Those that run it together. Only the first writes what a run writes of itself; rows and lines of the
            log are its own.
    """

    def __init__(self, path: Path, header: dict[str, Any], config: dict[str, Any]) -> None:
        self.path = path
        self.package: str = header["package"]
        self.seed: int = header["seed"]
        self.device, self.quiet, self.command = "auto", False, ""
        self.rows: list[Row] = []
        self.resumed = self.done = False
        self.processes = Processes()
        self._header, self._config = header, config
        self._spent = 0.0
        self._clock = time.perf_counter()
        self._message: str | None = None
        self._metrics: TextIO | None = None
        self._let_go: Callable[[], object] = lambda: None

    @classmethod
    def start(
        cls,
        *,
        package: str,
        verb: str,
        config: Any = None,
        out: str | Path | None = None,
        preset: str | None = None,
        seed: int = 0,
        device: str = "auto",
        quiet: bool = False,
        command: str = "",
        processes: Processes | None = None,
        flags: Mapping[str, str] | None = None,
    ) -> "Run":
        """Open the folder of a run.

        What happens in ``out`` depends on what is there. Nothing, or an empty folder: a new run. An unfinished
        (failed or interrupted) run of the same package, verb, preset, seed and config: it is resumed, its metrics are
        appended to, and a row with the same metric, variant, split and labels replaces the earlier one. A finished
        run of the same command: ``run.done`` is true and the caller returns its results. A run of another command that
        failed before it made anything: its folder is taken over. Anything else is refused, and nothing is overwritten.

        Args:
            package: Distribution name, for example "hone-blade".
            verb: What is run, for example "demo".
            config: A config dataclass, a mapping of JSON types, or None.
            out: The folder. None: ``runs/<package>/<verb>/<date>-<preset>-<seed>`` under the working directory,
                always new.
            preset: Name of the preset that the config came from.
            seed: Of the run.
            device: Where to run; no part of what is compared, like the next two.
            quiet: Keep progress off stderr.
            command: The command line, as typed.
            processes: Those that run it together; the first looks at the folder, and says to the others what it found.
            flags: Dotted name of a field of the config to its flag, by which a refusal calls it; else by its name.

        Raises:
            FileExistsError: ``out`` holds another command's run, or files that are no run.
            OSError: ``out`` is None, and no folder can be made.

        Entering the run raises an OSError where no folder can be made or written, and a FileExistsError where another
        process is in it: a run is written by one.
        """
        settings = {} if config is None else dict(config) if isinstance(config, Mapping) else to_dict(config)
        # What is compared on a resume is what a file gives back: tuples, for one, come back as lists.
        settings = json.loads(json.dumps(settings, allow_nan=False))
        header = {
            "schema": SCHEMA,
            "package": package,
            "version": _version(package),
            "verb": verb,
            "preset": preset,
            "seed": seed,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        processes = processes or Processes()
        if out is None:
            out = Path("runs") / package / verb / f"{datetime.now():%Y%m%d-%H%M%S}-{preset or 'custom'}-{seed}"
            out = _new_folder(out) if processes.main else out
        run = cls(Path(out), header, settings)
        run.device, run.quiet, run.command = device, quiet, command
        run.processes = processes
        if run.processes.main:
            run._adopt(flags or {})
        else:
            run.quiet = True
        told = {"path": str(run.path), "resumed": run.resumed, "done": run.done}
        told = run.processes.share("run", told)
        if told is None:
            raise RuntimeError("the first process could not open the run; its message says why")
        run.path, run.resumed, run.done = Path(told["path"]), told["resumed"], told["done"]
        return run

    @property
    def figures(self) -> Path:
        """Folder for plots; made on first use."""
        return self._folder("figures")

    @property
    def artifacts(self) -> Path:
        """Folder for videos, checkpoints and other outputs; made on first use."""
        return self._folder("artifacts")

    def log(self, *, step: int, **scalars: float) -> None:
        """Append a line of training or sampling scalars to ``metrics.jsonl``."""
        self._refuse_if_done()
        # A diverged loss must reach the log: a non-finite value is written as a string, as in configs.
        if not self.processes.main:
            return
        values = {k: v if math.isfinite(v) else str(v) for k, v in ((k, float(v)) for k, v in scalars.items())}
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(json.dumps({"step": int(step), **values}) + "\n")
        self._metrics.flush()

    def forget_after(self, step: int) -> None:
        """Drop the lines of ``metrics.jsonl`` beyond a step: what a resumed training does again."""
        if self.processes.main:
            if self._metrics is not None:
                # The file is replaced, and lines of now would go into the old one.
                self._metrics.close()
                self._metrics = None
            drop_lines_after(self.path / "metrics.jsonl", step)

    def row_of_end(
        self, metric: str, *, unit: str = "", better: Better = "lower", variant: str = "", split: str = ""
    ) -> Row:
        """Add the mean of the last tenth of what was logged of a training's ``metric``."""
        lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        values = [float(json.loads(line)[metric]) for line in lines[-max(1, len(lines) // 10) :]]
        mean = sum(values) / len(values)
        return self.row(metric, mean, unit=unit, better=better, n=len(values), variant=variant, split=split)

    def row(
        self,
        metric: str,
        value: float,
        *,
        unit: str = "",
        better: Better,
        n: int = 1,
        spread: float | None = None,
        variant: str = "",
        split: str = "",
        paper_value: float | None = None,
        interval: tuple[float, float] | None = None,
        labels: Mapping[str, str | int | float] | None = None,
    ) -> Row:
        """Add a result; see ``Row``. A row of the same metric, variant, split and labels is replaced.

        Raises:
            ValueError: A value is not finite, ``better`` is not a direction, or ``n`` is not positive.
        """
        self._refuse_if_done()
        row = Row(
            metric=metric,
            value=float(value),
            unit=unit,
            better=better,
            n=n,
            spread=None if spread is None else float(spread),
            variant=variant,
            split=split,
            paper_value=None if paper_value is None else float(paper_value),
            interval=None if interval is None else (float(interval[0]), float(interval[1])),
            labels=dict(labels or {}),
        )
        self.rows = [old for old in self.rows if old.key != row.key] + [row]
        return row

    def save(self) -> None:
        """Write the rows so far, which a process that is killed leaves behind; for where each took long."""
        self._refuse_if_done()
        if self.processes.main:
            self._write("running")

    def reopen(self) -> None:
        """Take up a finished run again, to add to its rows or replace some; call it before entering the run.

        Raises:
            RuntimeError: The run is not finished.
        """
        if not self.done:
            raise RuntimeError(f"{self.path} holds no finished run; an unfinished one is resumed by starting it")
        self.done, self.resumed = False, True

    def results(self) -> dict[str, Any]:
        """The content of ``results.json`` as it stands on disk."""
        return load_results(self.path)

    def unclean(self, commit: str | None, dirty: bool | None) -> bool | None:
        """Whether code was other than a commit's, now as told or in what an earlier part of this run left."""
        file = self.path / "environment.json"
        if dirty or not (self.resumed and file.exists()) or self._made_nothing():
            return dirty
        before = json.loads(file.read_text(encoding="utf-8"))
        return True if before["dirty"] or before["commit"] != commit else dirty

    def __enter__(self) -> "Run":
        self._clock = time.perf_counter()
        if not self.done and self.processes.main:
            # It takes seconds; whoever stops them leaves no folder that is half a run's.
            found = environment()
            found["dirty"] = self.unclean(found["commit"], found["dirty"])
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise _no_folder(self.path, error) from error
            self._hold(handle)
            try:
                atomic_write_json(self.path / "config.json", self._config)
            except OSError as error:
                raise _no_folder(self.path, error) from error
            atomic_write_json(self.path / "environment.json", found)
            self._write("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self.done or not self.processes.main:
            return
        if error is not None:
            self._message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        try:
            self._write("done" if error is None else "failed")
        finally:
            self._let_go()

    def _hold(self, handle: int) -> None:
        """Lock the folder, which is open, until the run ends or its process does.

        Raises:
            FileExistsError: Another run has it.
        """
        self._let_go = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._let_go()
            raise FileExistsError(
                f"another process is running in {self.path}; wait until it has ended, or choose another --out"
            ) from error
        except OSError:
            pass  # a file system without locks, where whoever starts two runs in one folder has to see to it

    def _write(self, status: str) -> None:
        results = self._header | {
            "seconds": round(self._spent + time.perf_counter() - self._clock, 3),
            "status": status,
        }
        if self._message is not None:
            results["message"] = self._message
        results["rows"] = [_row_to_dict(row) for row in self.rows]
        atomic_write_json(self.path / "results.json", results)

    def _adopt(self, flags: Mapping[str, str]) -> None:
        """Look at what the folder holds already."""
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file; --out must name a folder")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        results_file, config_file = self.path / "results.json", self.path / "config.json"
        if all(file.name in _OWN[:2] or _SCRATCH.fullmatch(file.name) for file in self.path.iterdir()):
            return  # of a run that was killed as it began
        if not (results_file.exists() and config_file.exists()):
            raise FileExistsError(f"{self.path} is not empty and holds no run; choose another --out")
        stored = load_results(self.path)
        if missing := [key for key in _HEADER if key not in stored]:
            raise ValueError(f"{results_file}: expected a run's results; it lacks {', '.join(missing)}")
        header = ("package", "verb", "preset", "seed")
        before = _flatten(read_config(config_file))
        now = _flatten(self._config)
        settings = [key for key in {**before, **now} if before.get(key, _ABSENT) != now.get(key, _ABSENT)]
        changed = [key for key in header if stored[key] != self._header[key]]
        if (changed or settings) and stored["status"] == "failed" and self._made_nothing():
            return
        if changed or settings:
            # What a person changed comes alone: of another verb every setting differs; the preset of a run follows from
            # its settings, as does the seed where it is one.
            if "package" in changed or "verb" in changed:
                changed, settings = [key for key in changed if key in ("package", "verb")], []
            elif settings:
                known = any(key.split(".")[-1] == "seed" for key in settings)
                changed = ["seed"] if "seed" in changed and not known else []
            differ = [(key, stored[key], self._header[key]) for key in changed]
            differ += [(flags.get(key, key), before.get(key, _ABSENT), now.get(key, _ABSENT)) for key in settings]
            shown = ", ".join(f"{name} {_said(there)} there, {_said(here)} here" for name, there, here in differ[:5])
            shown += f", and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise FileExistsError(
                f"{self.path} holds a run of another command ({shown}); "
                "choose another --out, or repeat the same command to resume"
            )
        self.rows = [_row_from_dict(row) for row in stored["rows"]]
        self.done = stored["status"] == "done"
        self.resumed = not self.done
        self._spent = stored["seconds"]
        self._header["started"] = stored["started"]
        if self.resumed:
            self._drop_partial_line()

    def _made_nothing(self) -> bool:
        """Whether the folder holds only what every run writes at its start and its end."""
        made = [
            file
            for file in self.path.rglob("*")
            if file.is_file()
            and file.relative_to(self.path).as_posix() not in _OWN
            and not (file.parent == self.path and _SCRATCH.fullmatch(file.name))
        ]
        return not made and not load_results(self.path)["rows"]

    def _drop_partial_line(self) -> None:
        """Cut a line that a crash left unfinished, so that the next one starts a line of its own."""
        file = self.path / "metrics.jsonl"
        if file.exists() and (data := file.read_bytes()) and not data.endswith(b"\n"):
            with file.open("rb+") as handle:
                handle.truncate(data.rfind(b"\n") + 1)

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _refuse_if_done(self) -> None:
        if self.done:
            raise RuntimeError(
                f"{self.path} holds a finished run of this command; "
                "check run.done first, or choose another --out to repeat it"
            )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run found, made from what its folder holds, so that a repeated command prints the same.

    A verb's own report adds fields, fills them in ``of``, and says in ``__str__`` what a person wants to read.

    Attributes:
        path: The run's folder.
        rows: What ``results.json`` holds.
    """

    path: Path
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return the report of a run whose rows are written."""
        return cls(path=run.path, rows=tuple(run.rows))

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            spread = "" if row.spread is None else f" +- {row.spread:.3g}"
            notes = ", ".join(f"{key} {value}" for key, value in row.labels.items())
            line = f"{row.split:<10} {row.metric:<14} {row.variant:<12} {row.value:>10.4g} {row.unit}{spread}"
            lines.append(line.strip() + (f"   ({notes})" if notes else ""))
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def drop_lines_after(file: Path, step: int) -> None:
    """Drop the lines of a log that are of later steps, and one that a crash left unfinished.

    Raises:
        ValueError: Another line is none of a log.
    """
    if file.exists():
        lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        try:
            kept = "".join(line for line in lines if json.loads(line)["step"] <= step)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}); move it away to go on without it") from error
        atomic_write_text(file, kept)


def load_results(path: str | Path) -> dict[str, Any]:
    """Read ``results.json`` of a run folder (or such a file itself).

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not a results file of this schema.
    """
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; expected a run folder or its results.json")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{file}: expected a results file of schema {SCHEMA}")
    return data


def export_results(run: str | Path, target: str | Path, *, allow_dirty: bool = False) -> Path:
    """Write a finished run as one file for ``results/<package>/``: its results with its environment inside.

    Absolute paths in its settings are cut to their last part: they mean nothing on another machine.

    Args:
        run: The run's folder.
        target: File to write.
        allow_dirty: Also export a run of code that had uncommitted changes, or was of several commits, whose numbers
            nobody can reproduce from the commit; the file, and each table made from it, say so.

    Raises:
        FileNotFoundError: ``run`` is no run folder.
        ValueError: The run is not done, or its code had uncommitted changes or was of several commits.
    """
    run = Path(run)
    data = load_results(run)
    if data["status"] != "done":
        raise ValueError(f"{run}: only a finished run can be exported; its status is {data['status']}")
    data["environment"] = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    if data["environment"].get("dirty") and not allow_dirty:
        raise ValueError(
            f"{run}: expected a run of committed code, from its start to its end of one commit; its checkout had "
            f"changes on top of commit {(data['environment'].get('commit') or 'none')[:10]}, or it was begun at "
            "another one. Commit and run again, or pass allow_dirty=True"
        )
    data["config"] = _without_places(json.loads((run / "config.json").read_text(encoding="utf-8")))
    return atomic_write_json(target, data)


def _without_places(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_places(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_without_places(value) for value in config]
    is_path = isinstance(config, str) and Path(config).is_absolute() and not any(map(str.isspace, config))
    return (Path(config).name or config) if is_path else config


_OWN = ("config.json", "environment.json", "results.json")
"""What a run writes of itself, in this order."""
_SCRATCH = re.compile(r"\.(config|environment|results)-\w+\.json")
"""What is left of these where a process was killed as it wrote one."""
_HEADER = ("package", "verb", "preset", "seed", "started", "seconds", "status", "rows")
"""What a results file says besides its schema and the package's version."""
_ABSENT = object()


def _said(value: Any) -> str:
    """A setting's value in a message."""
    if value is _ABSENT:
        return "no such setting"
    if value is None:
        return "not given"
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones, so that a difference can be named."""
    if not isinstance(config, dict) or (prefix and not config):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _row_to_dict(row: Row) -> dict[str, Any]:
    data = asdict(row)
    for name in ("interval", "labels"):
        if not data[name]:
            del data[name]
    return data


def _row_from_dict(data: dict[str, Any]) -> Row:
    interval = data.get("interval")
    return Row(**data | {"interval": interval and tuple(interval)})


def _new_folder(path: Path) -> Path:
    """Make a folder of this name, or of it with a number: of two processes that begin at once each gets its own."""
    given, count = path, 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            count += 1
            path = given.with_name(f"{given.name}-{count}")
        except OSError as error:
            raise _no_folder(path, error) from error


def _no_folder(path: Path, error: OSError) -> OSError:
    return OSError(f"no run folder can be made at {path} ({error.strerror or error}); choose another --out")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
