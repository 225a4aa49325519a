"""Settings of the evaluation by VBench. Imports no torch, so a verb's config may import it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from hone_core.config import Dtype

__all__ = ["DIMENSIONS", "Protocol", "VBenchConfig"]

Protocol = Literal["clips", "vbench"]

DIMENSIONS = (
    *("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree"),
    *("aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color"),
    *("spatial_relationship", "scene", "appearance_style", "temporal_style", "overall_consistency"),
)
"""The sixteen dimensions of VBench."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VBenchConfig:
    """Videos of VBench's prompts, of ``protocol="vbench"``; the other protocol does not look at these."""

    model: str | None = None
    """VBench: folder of a diffusers pipeline, or its hub address."""
    vbench_info: Path | None = None
    """VBench: its ``VBench_full_info.json``, or a text file of prompts, one a line, to be graded elsewhere (default:
    that of the installed package vbench)."""
    dimensions: tuple[str, ...] = ()
    """VBench: dimensions whose prompts are made and that are graded (default: all sixteen)."""
    videos_per_prompt: int = 5
    """VBench: videos of each prompt; five, as it asks for."""
    guidance: float | None = None
    """VBench: classifier-free guidance weight; 1 is none (default: that of generate)."""
    negative_prompt: str = ""
    """VBench: what guidance leads away from."""
    height: int | None = None
    """VBench: pixels (default: the pipeline's own, like width and frames)."""
    width: int | None = None
    """VBench: pixels."""
    frames: int | None = None
    """VBench: frames."""
    dense: bool = False
    """VBench: leave attention as it is."""
    dtype: Dtype = "auto"
    """VBench: of transformer and text encoder."""
    offload: bool = False
    """VBench: keep on the GPU only the part that is running."""
    local_files_only: bool = False
    """VBench: never ask the hub, only its local cache."""
    grade: bool = True
    """VBench: grade the videos by its command ``vbench``, which has to be on the path."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.dimensions) - set(DIMENSIONS))
        if unknown:
            raise ValueError(f"dimensions must name some of {', '.join(DIMENSIONS)}; got {', '.join(unknown)}")
        if self.videos_per_prompt < 1:
            raise ValueError(f"videos_per_prompt must be at least 1; got {self.videos_per_prompt}")
        if self.guidance is not None and self.guidance < 1:
            raise ValueError(f"guidance must be at least 1, which is none; got {self.guidance}")

    def check(self, protocol: str) -> None:
        """Refuse a protocol that is unknown, that lacks its pipeline, or that would not look at what is given.

        Raises:
            ValueError: See above.
        """
        if protocol not in get_args(Protocol):
            raise ValueError(f"protocol must be one of {', '.join(get_args(Protocol))}; got {protocol!r}")
        if protocol == "vbench" and self.model is None:
            raise ValueError("protocol vbench needs a pipeline: --model FOLDER")
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if protocol == "clips" and given:
            raise ValueError(
                f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for protocol vbench; the clips are those of "
                "the tiny host"
            )

    @property
    def graded(self) -> tuple[str, ...]:
        """The dimensions in use."""
        return self.dimensions or DIMENSIONS
