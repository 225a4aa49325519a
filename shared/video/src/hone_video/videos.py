"""Videos as files: names that a person recognises, written whole or not at all, shared out over processes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hone_core.io import atomic_path, atomic_write_json
from hone_core.runs import Run
from numpy.typing import NDArray

__all__ = ["make_videos", "missing_videos", "save_video", "video_name"]


def video_name(index: int, prompt: str) -> str:
    """File name of the video of a prompt, which sorts by its index."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "video"
    return f"{index:04d}-{slug}.mp4"


def save_video(frames: NDArray[np.floating], path: Path, *, fps: int, what: str, advice: str) -> Path:
    """Write frames ``[F, H, W, 3]`` in [0, 1] as MP4; returns the path.

    Args:
        frames: Of one video.
        path: The file.
        fps: Frames per second.
        what: They are of, such as "prompt 0"; a message begins with it.
        advice: What to do where they are not finite.

    Raises:
        RuntimeError: They are not finite.
    """
    from diffusers.utils import export_to_video

    if not np.isfinite(frames).all():
        raise RuntimeError(f"{what} gave frames that are not finite; {advice}")
    with atomic_path(path) as scratch:
        export_to_video(list(frames), str(scratch), fps=fps)
    return path


def missing_videos(targets: Sequence[Path]) -> list[int]:
    """Which videos are not there yet."""
    return [index for index, target in enumerate(targets) if not target.is_file()]


def make_videos(
    run: Run,
    targets: Sequence[Path],
    draw: Callable[[int], tuple[NDArray[np.floating], list[dict[str, Any]]]],
    *,
    fps: int,
    what: str,
    advice: str,
) -> None:
    """Make the videos that are missing, with all processes of the run: each takes the next one when it is free.

    What is measured of a video is kept beside it, in the run's folder ``videos``, before the video gets its name, so
    that a run which is stopped at any time, in any process, loses nothing but the videos it was at. At the end the
    first process has the rows of all.

    Args:
        run: The run, entered, the same in all processes.
        targets: The files, in the same order in all processes.
        draw: Makes one by its number: frames ``[F, H, W, 3]`` in [0, 1], and rows, as keyword arguments of ``run.row``.
        fps: Frames per second.
        what: A video is of, with its number for ``{}``, for messages.
        advice: What to do where frames are not finite.

    Raises:
        RuntimeError: Frames are not finite.
    """
    facts = [run.path / "videos" / f"{target.stem}.json" for target in targets]
    while (index := run.processes.take("videos")) < len(targets):
        if targets[index].is_file():
            continue
        frames, rows = draw(index)
        atomic_write_json(facts[index], rows)
        save_video(frames, targets[index], fps=fps, what=what.format(index), advice=advice)
    run.processes.wait("videos")
    if run.processes.main:
        for file in facts:
            # Videos from elsewhere have none.
            for row in json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []:
                run.row(**row)
