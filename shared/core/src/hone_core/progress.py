"""Progress on stderr: a bar on a terminal, a log line now and then elsewhere, nothing when quiet."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Progress", "progress_bar"]

log = logging.getLogger(__name__)

LOG_SECONDS = 10.0
"""Time between two log lines where there is no terminal, in seconds."""


class Progress(Protocol):
    """What ``progress_bar`` gives."""

    def update(self, n: int = 1) -> None:
        """Count ``n`` more items as done."""

    def show(self, **values: object) -> None:
        """Set the values that stand beside the bar, for example ``loss="0.31"``."""


@contextmanager
def progress_bar(total: int | None = None, *, desc: str, quiet: bool = False) -> Iterator[Progress]:
    """Show progress that the caller counts with ``update``.

    Args:
        total: Number of items; None if it is not known.
        desc: What is being done, a word or two.
        quiet: Show nothing.
    """
    if quiet:
        yield _Silent()
    elif sys.stderr.isatty():
        with _Bar(total, desc) as bar:
            yield bar
    else:
        lines = _Lines(total, desc)
        yield lines
        lines.finish()


class _Silent:
    def update(self, n: int = 1) -> None:
        pass

    def show(self, **values: object) -> None:
        pass


class _Bar:
    def __init__(self, total: int | None, desc: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=desc, file=sys.stderr, dynamic_ncols=True, leave=False)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, n: int = 1) -> None:
        self.bar.update(n)

    def show(self, **values: object) -> None:
        self.bar.set_postfix({key: str(value) for key, value in values.items()})


class _Lines:
    """One log line every ``LOG_SECONDS``, and one at the end if there was any before."""

    def __init__(self, total: int | None, desc: str) -> None:
        self.total, self.desc = total, desc
        self.done = 0
        self.values: dict[str, object] = {}
        self.start = self.last = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last >= LOG_SECONDS:
            self.last = now
            self._write(now)

    def show(self, **values: object) -> None:
        self.values = values

    def finish(self) -> None:
        if self.last > self.start:
            self._write(time.monotonic())

    def _write(self, now: float) -> None:
        seconds = now - self.start
        left = ""
        if self.total and 0 < self.done < self.total:
            left = f", {seconds / self.done * (self.total - self.done):.0f} s left"
        values = "".join(f", {key} {value}" for key, value in self.values.items())
        log.info("%s: %d/%s in %.0f s%s%s", self.desc, self.done, self.total or "?", seconds, left, values)
