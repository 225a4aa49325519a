"""Videos as files: names that a person recognises, written whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from hone_core.io import atomic_path
from numpy.typing import NDArray

__all__ = ["save_video", "video_name"]


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
