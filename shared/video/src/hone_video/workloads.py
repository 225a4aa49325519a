"""Models at the size of their usual videos, for timing. Imports no torch, so a verb's config may import it."""

import math
from dataclasses import dataclass
from typing import Literal

from .grids import Grid

__all__ = ["HD_WORKLOADS", "WORKLOADS", "Workload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A model at the size of its usual video.

    Attributes:
        model: Name in ``hone_video.architectures.FULL_SIZE``, or ``tiny-wan``, ``tiny-cogvideox`` or ``tiny-hunyuan``.
        kind: Which family.
        grid: Video tokens along (frames, height, width).
        text_tokens: Length of the text; part of the sequence but in Wan.
    """

    model: str
    kind: Literal["wan", "cogvideox", "hunyuan"]
    grid: Grid
    text_tokens: int

    @property
    def joint_text(self) -> int:
        """Text tokens inside self-attention."""
        return 0 if self.kind == "wan" else self.text_tokens

    @property
    def tokens(self) -> int:
        """Length of the self-attention sequence."""
        return math.prod(self.grid) + self.joint_text

    @property
    def size(self) -> dict[str, int]:
        """Frames, height and width of the video, as the pipelines name them."""
        frames, height, width = self.grid
        return {"num_frames": 4 * (frames - 1) + 1, "height": 16 * height, "width": 16 * width}


WORKLOADS: dict[str, Workload] = {
    "wan2.1-1.3b": Workload(model="wan2.1-1.3b", kind="wan", grid=(21, 30, 52), text_tokens=512),
    "wan2.1-14b": Workload(model="wan2.1-14b", kind="wan", grid=(21, 30, 52), text_tokens=512),
    "cogvideox-5b": Workload(model="cogvideox-5b", kind="cogvideox", grid=(13, 30, 45), text_tokens=226),
    "tiny-wan": Workload(model="tiny-wan", kind="wan", grid=(3, 8, 10), text_tokens=8),
    "tiny-cogvideox": Workload(model="tiny-cogvideox", kind="cogvideox", grid=(3, 8, 10), text_tokens=8),
}
"""480p videos of 81 (Wan) and 49 (CogVideoX) frames, and two for a CPU."""

HD_WORKLOADS: dict[str, Workload] = {
    "wan2.1-1.3b-720p": Workload(model="wan2.1-1.3b", kind="wan", grid=(21, 45, 80), text_tokens=512),
    "wan2.1-14b-720p": Workload(model="wan2.1-14b", kind="wan", grid=(21, 45, 80), text_tokens=512),
    "hunyuan-video-720p": Workload(model="hunyuan-video", kind="hunyuan", grid=(33, 45, 80), text_tokens=256),
    "tiny-hunyuan": Workload(model="tiny-hunyuan", kind="hunyuan", grid=(3, 8, 10), text_tokens=8),
}
"""720p videos of 81 (Wan) and 129 frames (HunyuanVideo), 75,600 and 118,800 tokens, and one for a CPU."""
