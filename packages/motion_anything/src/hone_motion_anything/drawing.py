"""Skeletons as pictures and as MP4, side by side, with the music in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hone_core.io import atomic_path
from hone_core.plots import BLUE, GREEN, GREY, INK, ORANGE, RED, SKY
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from .skeletons import HUMANML3D, Skeleton

__all__ = ["draw_frames", "strip", "write_video"]

_COLOURS = (RED, BLUE, GREY, ORANGE, GREEN)
"""Of the chains: right leg, left leg, spine, right arm, left arm."""
_PANEL = 240
"""Pixels of a panel's side."""


def _project(joints: NDArray[np.floating]) -> NDArray[np.floating]:
    """``[..., 3]`` to the picture's plane ``[..., 2]``, seen from the front, a little from the left and above."""
    turn, tilt = math.radians(25), math.radians(12)
    x = joints[..., 0] * math.cos(turn) + joints[..., 2] * math.sin(turn)
    depth = -joints[..., 0] * math.sin(turn) + joints[..., 2] * math.cos(turn)
    return np.stack([x, joints[..., 1] * math.cos(tilt) - depth * math.sin(tilt)], -1)


def _floor(axis: Any, centre: NDArray[np.floating]) -> None:
    reach = np.arange(-3, 3.1, 0.5)
    for at in reach:
        for line in ([[at, 0, -3], [at, 0, 3]], [[-3, 0, at], [3, 0, at]]):
            x, y = _project(np.asarray(line, dtype=float)).T
            axis.plot(x, y, color="#d8dee9", linewidth=0.6, zorder=0)
    axis.set_xlim(centre[0] - 1.25, centre[0] + 1.25)
    axis.set_ylim(centre[1] - 0.5, centre[1] + 2.0)
    axis.set_aspect("equal")
    axis.axis("off")


def draw_frames(
    motions: Mapping[str, Float[Tensor, "frames joints 3"]],
    *,
    skeleton: Skeleton = HUMANML3D,
    beats: Sequence[int] = (),
) -> NDArray[np.uint8]:
    """Pictures ``[frames, height, width, 3]`` of motions side by side; a beat is shown by a bar.

    Args:
        motions: Title to joints, of equally many frames.
        skeleton: Of all.
        beats: Frames of the music's beats.

    Raises:
        ValueError: There are none, or their lengths differ.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = {len(joints) for joints in motions.values()}
    if len(lengths) != 1:
        raise ValueError(f"expected motions of one length; got {sorted(lengths) or 'none'}")
    pictures = []
    with rc_context({"font.size": 8, "text.color": INK}):
        figure = Figure(figsize=(_PANEL * len(motions) / 100, (_PANEL + 48) / 100), dpi=100)
        canvas = FigureCanvasAgg(figure)
        flat: list[tuple[NDArray[np.floating], list[Any]]] = []
        for number, (title, joints) in enumerate(motions.items()):
            axis = figure.add_axes((number / len(motions), 0.0, 1 / len(motions), 0.83))
            data = joints.detach().cpu().double().numpy()
            # The camera stands where the whole motion is in sight.
            middle = (data[:, 0].max(0) + data[:, 0].min(0)) / 2
            _floor(axis, _project(np.asarray([middle[0], 0, middle[2]])))
            lines = [
                axis.plot([], [], color=colour, linewidth=3, solid_capstyle="round")[0]
                for colour in _COLOURS[: len(skeleton.chains)]
            ]
            flat.append((_project(data), lines))
            words = _wrapped(title, 34)
            figure.text((number + 0.5) / len(motions), 0.915, words, ha="center", va="center", parse_math=False)
        bar = figure.add_axes((0.02, 0.01, 0.96, 0.02))
        bar.axis("off")
        bar.set_xlim(0, 1)
        (beat,) = bar.plot([0, 1], [0, 0], color=SKY, linewidth=6, visible=False)
        for frame in range(lengths.pop()):
            for points, lines in flat:
                for chain, line in zip(skeleton.chains, lines, strict=False):
                    line.set_data(points[frame, list(chain), 0], points[frame, list(chain), 1])
            beat.set_visible(any(0 <= frame - at < 3 for at in beats))
            canvas.draw()
            pictures.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    return np.stack(pictures)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:3])


def strip(
    motions: Mapping[str, Float[Tensor, "frames joints 3"]],
    path: str | Path,
    *,
    poses: int = 8,
    cells: Mapping[str, Tensor] | None = None,
) -> Path:
    """A PNG with a row of poses for each motion, and below them the cells of time and part that are marked.

    A pose is of the middle of its share of the time, and stands there.

    Args:
        motions: Title to joints.
        path: File.
        poses: In a row.
        cells: Title to marks ``[T, P]`` in [0, 1], for some of the motions.
    """
    from hone_core.plots import drawing, finish

    from .skeletons import PARTS

    cells = cells or {}
    tall = [1.0 if title not in cells else 1.6 for title in motions]
    with drawing(path, 1.0 * poses + 0.8, 1.7 * sum(tall) + 0.2) as figure:
        grid = figure.add_gridspec(len(motions), 1, height_ratios=tall)
        for row, (title, joints) in enumerate(motions.items()):
            place = grid[row].subgridspec(
                2 if title in cells else 1, 1, height_ratios=(1.0, 0.5)[: 1 + (title in cells)]
            )
            axis = figure.add_subplot(place[0])
            at = ((np.arange(poses) + 0.5) * len(joints) / poses).astype(int)
            data = joints.detach().cpu().double().numpy()[at]
            data = data - data[:, :1] * np.array([1.0, 0.0, 1.0])
            points = _project(data)
            axis.axis("off")
            for number, pose in enumerate(points):
                own = axis.inset_axes((number / poses, 0, 1 / poses, 1))
                own.axis("off")
                own.set_aspect("equal")
                own.set_xlim(-0.6, 0.6)
                own.set_ylim(-0.15, 2.15)
                for chain, colour in zip(HUMANML3D.chains, _COLOURS, strict=True):
                    x, y = pose[list(chain)].T
                    own.plot(x, y, color=colour, linewidth=1.5, clip_on=False)
            axis.set_title(title, loc="left")
            if title in cells:
                below = figure.add_subplot(place[1])
                below.imshow(cells[title].T.cpu().numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1)
                below.set_yticks(range(len(PARTS)), PARTS)
                below.set_xticks([])
        finish(figure)
    return Path(path)


def write_video(
    pictures: NDArray[np.uint8], path: str | Path, *, fps: float = 20.0, sound: str | Path | None = None
) -> Path:
    """Write pictures ``[frames, height, width, 3]`` as H.264, with a WAV as its sound; returns the path.

    Raises:
        ValueError: The path does not end in .mp4.
    """
    import imageio_ffmpeg

    if Path(path).suffix != ".mp4":
        raise ValueError(f"expected a path ending in .mp4; got {path}")
    height, width = pictures.shape[1:3]
    pictures = pictures[:, : height - height % 2, : width - width % 2]
    options = {} if sound is None else {"audio_path": str(sound), "audio_codec": "aac"}
    with atomic_path(path) as scratch:
        writer = imageio_ffmpeg.write_frames(
            str(scratch),
            (pictures.shape[2], pictures.shape[1]),
            fps=fps,
            codec="libx264",
            macro_block_size=2,
            ffmpeg_log_level="error",
            **options,
        )
        writer.send(None)
        for picture in pictures:
            writer.send(np.ascontiguousarray(picture))
        writer.close()
    return Path(path)
