"""``convert``: a motion into another format, or a published checkpoint into safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hone_core.io import save_safetensors
from hone_core.runs import Report, Run

from .checkpoints import MANIFESTS, load_published
from .config import ConvertConfig
from .motion_files import SKELETONS, distance_lines, distance_rows, read_motion, write_motion

__all__ = ["ConvertReport", "convert"]


@dataclass(frozen=True, kw_only=True)
class ConvertReport(Report):
    """Result of ``convert``; as text, the file, what it holds, and how far joints are off.

    Attributes:
        target: What was written.
    """

    target: Path

    @classmethod
    def of(cls, run: Run) -> ConvertReport:
        """Return the report of a run that is done."""
        (target,) = run.artifacts.iterdir()
        return cls(path=run.path, rows=tuple(run.rows), target=target)

    def __str__(self) -> str:
        counts = ", ".join(f"{row.value:g} {row.metric}" for row in self.rows if not row.unit)
        return "\n".join([str(self.target), counts, *distance_lines(self.rows)])


def convert(cfg: ConvertConfig, run: Run) -> ConvertReport:
    """Read, check and write into the run's ``artifacts``.

    Raises:
        ValueError: The motion is not what was said; the message names file and frame.
        CheckpointError: The checkpoint is another one, or damaged.
    """
    if cfg.model is not None:
        model = load_published(cfg.model, cfg.source)
        meta = {"hone": cfg.model, "of": MANIFESTS[cfg.model].where, "licence": MANIFESTS[cfg.model].licence}
        save_safetensors(model.state_dict(), run.artifacts / f"{cfg.source.stem}.safetensors", metadata=meta)
        count = sum(value.numel() for value in model.state_dict().values())
        run.row("numbers", count, better="none")
        return ConvertReport.of(run)
    motion = read_motion(cfg.source, SKELETONS[cfg.skeleton], fps=cfg.fps, up=cfg.up)
    target = run.artifacts / f"{cfg.source.stem}.{cfg.to}"
    try:
        write_motion(motion, target, features=cfg.features, bones=cfg.bones)
    except ValueError as error:
        raise ValueError(f"{cfg.source}, {error}") from error
    run.row("frames", len(motion.joints), better="none")
    run.row("frames a second", motion.fps, better="none")
    distance_rows(run, [motion], [cfg.to], cfg.bones)
    return ConvertReport.of(run)
