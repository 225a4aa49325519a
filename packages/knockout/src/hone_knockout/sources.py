"""Model and questions of a source. Imports no torch by itself."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Source

if TYPE_CHECKING:
    from hone_lm.question_sets import Item

__all__ = ["absolute_model", "absolute_source", "load_source", "read_questions", "source_layers", "source_of_run"]

log = logging.getLogger(__name__)


def read_questions(source: Source, seed: int) -> list[Item]:
    """Questions of a source, before any model is loaded.

    Raises:
        ValueError: No video of them is there.
    """
    from hone_lm.question_sets import check_items, load_items

    if source.data is None:
        from .data import generated_items
        from .host import host_config

        return generated_items(source.limit or 256, host_config(source.host).clip, seed=2000 + seed)
    items = load_items(source.data, format=source.format, videos=source.videos)[: source.limit]
    problems = check_items(items)
    for problem in problems[:5]:
        log.warning("%s", problem)
    if len(problems) == len(items):
        raise ValueError(f"none of the {len(items)} videos can be read: {problems[0]} (--videos names their folder)")
    return items


def source_layers(source: Source) -> int:
    """Decoder layers of a source's model, without its weights.

    Raises:
        ValueError: The model cannot be taken.
    """
    if source.model is not None:
        from .models import check_model

        return check_model(source.model)
    from .host import host_config

    return host_config(source.host).layers


def load_source(source: Source, device: str) -> tuple[Any, Any]:
    """Model and processor."""
    from hone_core.devices import resolve_device, resolve_dtype

    target = resolve_device(device)
    if source.model is None:
        from .host import load_host

        host = load_host(target, path=source.host)
        return host.model, host.processor
    from hone_lm.checkpoints import load_model

    return load_model(source.model, device=target, dtype=resolve_dtype(source.dtype, target))


def source_of_run(run: Path, source: Source, *, model_alone: bool = False) -> Source:
    """The source of a run, with what is named by a path looked for: where it says, else from the run's folder.

    Args:
        run: The run's folder.
        source: As it was stored.
        model_alone: Look for the model only, since no question is asked again.

    Raises:
        FileNotFoundError: It is not there.
    """
    found: dict[str, Any] = {}
    for name in ("model",) if model_alone else ("model", "data", "videos", "host"):
        value = getattr(source, name)
        if value is None:
            continue
        there = next((place for place in (Path(value), run / value) if place.exists()), None)
        if there is not None:
            found[name] = there
        elif name != "model" or Path(value).is_absolute():
            raise FileNotFoundError(
                f"{name} of the run {run} was expected at {value} and is not there. If it was moved, put it back, or "
                f"write its place into source.{name} of {run / 'config.json'}"
            )
    if "model" in found:
        found["model"] = str(found["model"])
    return absolute_source(replace(source, **found))


def absolute_source(source: Source) -> Source:
    """With absolute paths, so that a run can be repeated from any directory."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else Path(os.path.abspath(path))

    return replace(
        source,
        model=None if source.model is None else absolute_model(source.model),
        data=absolute(source.data),
        videos=absolute(source.videos),
        host=absolute(source.host),
    )


def absolute_model(model: str) -> str:
    """A model that is no folder here is an address on the hub."""
    return os.path.abspath(model) if Path(model).exists() else model
