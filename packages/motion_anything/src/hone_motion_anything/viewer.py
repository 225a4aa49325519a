"""Motions as one web page that needs nothing else: turned by hand, side by side, with the music and what is marked."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from hone_core.io import atomic_path
from jaxtyping import Bool, Float
from torch import Tensor

from .features import check_motion
from .skeletons import HUMANML3D, PART_JOINTS, PARTS, Skeleton

__all__ = ["write_viewer"]

_DATA = '{"motions": []}'
"""What the page has in place of motions."""


def write_viewer(
    motions: Mapping[str, Float[Tensor, "frames joints 3"]],
    path: str | Path,
    skeleton: Skeleton = HUMANML3D,
    *,
    fps: float | None = None,
    marks: Mapping[str, Bool[Tensor, "time 6"]] | None = None,
    beats: Sequence[int] = (),
    sound: str | Path | None = None,
) -> Path:
    """Write motions of one length as a page; returns the path.

    Args:
        motions: Title to joints in metres, +y up.
        path: File ending in ``.html``.
        skeleton: Of all.
        fps: Frames a second; the set's if None.
        marks: Title to the time steps and parts that are marked, for some of HumanML3D's motions.
        beats: Frames of the music's beats.
        sound: A WAV that plays with the motions.

    Raises:
        ValueError: There are no motions, their lengths differ, joints are of another skeleton, of several motions or
            not finite, marks are of no motion or of other parts.
        FileNotFoundError: There is no such sound.
    """
    if Path(path).suffix != ".html":
        raise ValueError(f"expected a path ending in .html; got {path}")
    lengths = {len(joints) for joints in motions.values()}
    if len(lengths) != 1:
        raise ValueError(f"expected motions of one length; got {sorted(lengths) or 'none'}")
    marks = marks or {}
    for title, cells in marks.items():
        if title not in motions or skeleton is not HUMANML3D or cells.dim() != 2 or cells.shape[1] != len(PARTS):
            raise ValueError(
                f"marks must be [time, {len(PARTS)}] of a shown motion of {HUMANML3D.name}; got {list(cells.shape)} of "
                f"{title!r}"
            )
    shown = []
    for title, joints in motions.items():
        check_motion(joints, skeleton)
        places = joints.detach().cpu().numpy().astype("<f4")
        entry = {"title": title, "places": _text(places.tobytes())}
        if title in marks:
            entry["marks"] = _text(marks[title].cpu().numpy().astype(np.uint8).tobytes())
        shown.append(entry)
    owners = [0] * skeleton.count
    if skeleton is HUMANML3D:
        for part, joints_of in enumerate(PART_JOINTS):
            for joint in joints_of:
                owners[joint] = part
    data = {
        "motions": shown,
        "parents": skeleton.parents,
        "chains": skeleton.chains,
        "part_of": owners,
        "parts": PARTS,
        "fps": fps or skeleton.fps,
        "frames": lengths.pop(),
        "beats": [int(beat) for beat in beats],
        "sound": None if sound is None else _text(Path(sound).read_bytes()),
    }
    # A title must not end the element that it stands in.
    text = json.dumps(data).replace("<", "\\u003c")
    page = (files("hone_motion_anything") / "viewer.html").read_text(encoding="utf-8")
    before, after = page.split(_DATA)
    with atomic_path(path) as scratch:
        scratch.write_text(before + text + after, encoding="utf-8")
    return Path(path)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
