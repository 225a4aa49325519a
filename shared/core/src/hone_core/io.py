"""Files that are either whole or absent: each write goes to a neighbour and is renamed into place. And prompts."""

import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hone_core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["atomic_path", "atomic_write_bytes", "atomic_write_json", "atomic_write_text", "save_safetensors"]
__all__ += ["in_order", "read_lines", "read_prompts", "read_published", "save_state", "tensor_names"]

T = TypeVar("T")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a scratch path beside ``path``; on a clean exit it replaces ``path``, on an error it is removed.

    The scratch name keeps the suffix, because writers such as ffmpeg choose the format by it.

    Raises:
        OSError: It cannot be written, such as for a disk that is full; a file that was there is as before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    # The system takes the umask off. It cannot be read without setting it, which all threads would feel, so that what
    # comes of it is kept for writers that make the file anew.
    os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE(scratch.stat().st_mode)
    try:
        yield scratch
        scratch.chmod(mode)
        with scratch.open("rb") as file:
            # A name that is on the disk before its bytes are is half a file once the power fails.
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # A write that fails, such as for a disk that is full, names no file.
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error
    finally:
        scratch.unlink(missing_ok=True)


def atomic_write_bytes(path: str | Path, data: bytes) -> Path:
    """Write bytes so that a reader never sees half a file; returns the path."""
    with atomic_path(path) as scratch:
        scratch.write_bytes(data)
    return Path(path)


def atomic_write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text so that a reader never sees half a file; returns the path."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, data: Any) -> Path:
    """Write JSON (two-space indent, keys in the given order, strict numbers) atomically; returns the path.

    Raises:
        ValueError: ``data`` holds a NaN or an infinity, which JSON cannot carry.
        TypeError: ``data`` holds something that is not a JSON type.
    """
    return atomic_write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save_safetensors(
    tensors: Mapping[str, "Tensor"], path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Save tensors atomically in the safetensors format; returns the path.

    Tensors are made contiguous first, and tensors that share memory are stored once each.

    Raises:
        OSError: It cannot be written, such as for a disk that is full; a file that was there is as before.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as scratch:
        try:
            save_file(
                {k: v.detach().clone().contiguous() for k, v in tensors.items()}, scratch, metadata=dict(metadata or {})
            )
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
    return Path(path)


def tensor_names(path: str | Path) -> list[str]:
    """Names of the tensors of a safetensors file; loads neither torch nor the tensors.

    Raises:
        CheckpointError: It is no such file, or is cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file, or is cut short: {error}") from error


def save_state(state: Any, path: str | Path) -> Path:
    """Save what ``torch.load`` reads, atomically; returns the path.

    Raises:
        OSError: It cannot be written, such as for a disk that is full; a file that was there is as before.
    """
    import torch

    with atomic_path(path) as scratch:
        try:
            with scratch.open("wb") as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:
            # Torch may speak of positions in its archive; the file's own error is behind it.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(f"{path} could not be written: {cause}") from error
    return Path(path)


def in_order(name: str) -> tuple[list[str | int], str]:
    """What sorts names of files as they were made: numbers in them count as numbers, 9 before 10."""
    # Every other part is a number. Names of equal numbers, such as 1 and 01, go by their letters.
    parts = re.split(r"(\d+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def read_lines(path: str | Path) -> list[str]:
    """Lines of a UTF-8 file, with or without a byte order mark, as spreadsheets write it.

    A line ends with a newline alone: a text, such as one within JSON, may hold other separators of lines.

    Raises:
        UnicodeDecodeError: It is not UTF-8.
    """
    return Path(path).read_text(encoding="utf-8-sig").split("\n")


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are skipped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no prompt, or is not UTF-8.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"the file of prompts {path} does not exist; expected a text file with one prompt a line"
        )
    try:
        lines = read_lines(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); expected one prompt a line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"{path} holds no prompt; expected one a line")
    return prompts


def read_published(path: str | Path, benchmark: str, read: Callable[[], Iterable[T]]) -> list[T]:
    """What a reader finds in a benchmark's own file or folder of prompts: at least one.

    Args:
        path: The file or folder, for the message.
        benchmark: Whose prompts.
        read: Reads them.

    Raises:
        CheckpointError: It is missing, cannot be read, or is none of this benchmark.
    """
    try:
        found = list(read())
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} holds no prompts as {benchmark} publishes them ({error!r})") from error
    if not found:
        raise CheckpointError(f"{path} holds no prompts of {benchmark}")
    return found
