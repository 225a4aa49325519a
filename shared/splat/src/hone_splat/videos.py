"""Pictures of a path as MP4."""

from __future__ import annotations

from pathlib import Path

import torch
from hone_core.errors import MissingExtraError
from hone_core.io import atomic_path
from jaxtyping import Float
from torch import Tensor

__all__ = ["write_video"]


def write_video(image_01: Float[Tensor, "frames 3 height width"], path: str | Path, *, fps: int = 30) -> Path:
    """Write frames as H.264, or not at all; returns the path.

    Raises:
        MissingExtraError: imageio-ffmpeg is not installed.
        ValueError: The suffix is not .mp4, a side is odd, or a value is not finite.
    """
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise MissingExtraError("video", "hone-splat", "Writing an MP4") from error
    height, width = image_01.shape[-2:]
    if Path(path).suffix != ".mp4" or height % 2 or width % 2:
        raise ValueError(f"expected a path ending in .mp4 and even sides; got {path} and {height} x {width}")
    if not bool(torch.isfinite(image_01).all()):
        raise ValueError("a frame holds values that are not finite")
    pixels = (image_01.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).contiguous().cpu().numpy()
    with atomic_path(path) as scratch:
        writer = imageio_ffmpeg.write_frames(
            str(scratch), (width, height), fps=fps, codec="libx264", macro_block_size=2, ffmpeg_log_level="error"
        )
        writer.send(None)
        for frame in pixels:
            writer.send(frame)
        writer.close()
    return Path(path)
