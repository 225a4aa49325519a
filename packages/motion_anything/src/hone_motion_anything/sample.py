"""``generate``: motions for texts, to music, or edits of a motion in time and by part, with a tiny host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from jaxtyping import Bool
from torch import Tensor

from .config import GenerateConfig
from .dance import resampled
from .decoding import edited
from .features import extract, recover
from .grammar import FRAMES, TOKEN_FRAMES, text_ids
from .host import load_host
from .motion_files import STRETCHED, Motion, distance_lines, distance_rows, read_motion, write_motion
from .music import RATE, music_features, pooled, read_wav, write_wav
from .skeletons import HUMANML3D
from .viewer import write_viewer

__all__ = ["GenerateReport", "edit_cells", "generate", "read_edited", "read_track"]

SECONDS = FRAMES / HUMANML3D.fps


@dataclass(frozen=True, kw_only=True)
class GenerateReport(Report):
    """Result of ``generate``; as text, the files, and how far joints are off in them.

    Attributes:
        files: In the order of the texts.
    """

    files: tuple[Path, ...]

    @classmethod
    def of(cls, run: Run) -> GenerateReport:
        """Return the report of a run whose files are there."""
        return cls(path=run.path, rows=tuple(run.rows), files=tuple(sorted(run.artifacts.glob("motion*"))))

    def __str__(self) -> str:
        return "\n".join([*map(str, self.files), *distance_lines(self.rows)])


def read_track(cfg: GenerateConfig) -> Tensor | None:
    """The four seconds of the music that are danced to."""
    if cfg.music is None:
        return None
    track = read_wav(cfg.music)
    first, count = round(cfg.music_start * RATE), round(SECONDS * RATE)
    if len(track) - first < count:
        raise ValueError(
            f"{cfg.music}: the music is shorter than the motion: {max(0, len(track) - first) / RATE:.2f} of "
            f"{SECONDS:g} s from second {cfg.music_start:g}"
        )
    return track[first : first + count]


def read_edited(cfg: GenerateConfig) -> Tensor | None:
    """Features ``[1, 80, 263]`` of the motion to edit."""
    if cfg.edit is None:
        return None
    motion = read_motion(cfg.edit, fps=cfg.fps, up=cfg.up)
    joints = motion.joints
    if motion.fps != HUMANML3D.fps:
        joints = torch.from_numpy(resampled(joints.numpy(), motion.fps, HUMANML3D.fps))
    if len(joints) < FRAMES:
        raise ValueError(
            f"{cfg.edit} lasts {len(joints) / HUMANML3D.fps:.2f} s; the tiny host edits motions of {SECONDS:g} s"
        )
    # One frame more than rows; where there is none the last one stands still.
    joints = torch.cat([joints, joints[-1:]])[: FRAMES + 1]
    try:
        return extract(joints).float()[None]
    except ValueError as error:
        raise ValueError(f"{cfg.edit}, {error}") from error


def edit_cells(cfg: GenerateConfig) -> Bool[Tensor, "1 time parts"]:
    """What an edit makes anew: all parts of an interval, some parts of all of it, or both."""
    return edited(FRAMES // TOKEN_FRAMES, cfg.edit_seconds or (0.0, SECONDS), cfg.edit_parts)


def generate(cfg: GenerateConfig, run: Run) -> GenerateReport:
    """Make one motion for each text into the run's ``artifacts``, and the music beside it.

    Raises:
        ValueError, FileNotFoundError, CheckpointError: As ``inputs.find_asked``.
    """
    host = load_host(resolve_device(run.device), path=cfg.host)
    track, known = read_track(cfg), read_edited(cfg)
    count = max(1, len(cfg.texts))
    words = text_ids(cfg.texts) if cfg.texts else None
    music = None if track is None else pooled(music_features(track), TOKEN_FRAMES)[None].expand(count, -1, -1)
    condition = host.condition(words, music)
    generator = torch.Generator(host.device).manual_seed(cfg.seed)
    if known is None:
        tokens = host.tokens(condition, generator, cfg.unmask)
    else:
        start = host.tokenizer.encode(known.to(host.device)).expand(count, -1, -1)
        cells = edit_cells(cfg).to(host.device).expand(count, -1, -1)
        tokens = host.tokens(condition, generator, cfg.unmask, start=start, edit=cells)
        run.row("made anew", float(cells.float().mean()), better="none", n=count)
    made = recover(host.tokenizer.decode(tokens)).cpu().double()
    motions = [Motion(joints, HUMANML3D.fps, HUMANML3D) for joints in made]
    for number, motion in enumerate(motions):
        for kind in cfg.formats:
            if kind != "html":
                bones = cfg.bones if f".{kind}" in STRETCHED else "fixed"
                write_motion(motion, run.artifacts / f"motion-{number:03}.{kind}", bones=bones)
    distance_rows(run, motions, cfg.formats, cfg.bones)
    sound = None if track is None else write_wav(track, run.artifacts / "music.wav")
    if "html" in cfg.formats:
        titles = [f"{number} {text}" for number, text in enumerate(cfg.texts)] or ["to the music"]
        shown = dict(zip(titles, made, strict=True))
        marks = {} if known is None else dict.fromkeys(titles, edit_cells(cfg)[0])
        if known is not None:
            shown = {"before": recover(known[0].cpu().double()), **shown}
        write_viewer(shown, run.artifacts / "motions.html", marks=marks, sound=sound)
    return GenerateReport.of(run)
