"""Folders of text, music and dance: a reader, and a writer of generated ones.

    motions/NAME.npy   HumanML3D's features [rows, 263], or joints [frames, 22, 3] at 20 frames a second
                       (or NAME.npz with SMPL's poses, NAME.bvh, NAME.pkl of AIST++, at their own rates)
    texts/NAME.txt     captions as HumanML3D writes them; may be missing where there is music
    music/NAME.wav     what is danced to, from the motion's first frame on; may be missing where there are captions.
                       A name as AIST++'s, gBR_sBM_cAll_d04_mBR0_ch01, takes music/mBR0.wav where it has none of its own
    train.txt, val.txt, test.txt   names

The form is ours: the paper's set, TMD, was not released, and nothing says how its files look. AIST++'s fit, with their
music beside them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hone_core.io import atomic_path
from hone_core.runs import Report, Run
from jaxtyping import Float
from torch import Tensor

from .config import MakeSetConfig
from .dance import resampled
from .data import generated
from .features import extract
from .grammar import FRAMES, TOKEN_FRAMES, caption
from .humanml3d import LEAST, Clip, checked_features, read_texts
from .motion_files import READS, read_motion, read_numbers
from .music import click_track, music_features, pooled, read_wav, write_wav
from .skeletons import HUMANML3D

__all__ = ["WINDOW", "MakeSetReport", "is_triples", "make_set", "read_triples", "write_triples"]

WINDOW = 196
"""Rows at most; a longer dance is cut into such pieces (ours), where HumanML3D's longer clips are left out."""


@dataclass(frozen=True, kw_only=True)
class MakeSetReport(Report):
    """Result of ``make-set``; as text, the folder.

    Attributes:
        folder: Of the set.
    """

    folder: Path

    @classmethod
    def of(cls, run: Run) -> MakeSetReport:
        """Return the report of a run whose set is written."""
        return cls(path=run.path, rows=tuple(run.rows), folder=run.artifacts / "set")

    def __str__(self) -> str:
        counts = ", ".join(f"{row.value:g} of {row.split}" for row in self.rows)
        return f"{self.folder}\n{counts}"


def make_set(cfg: MakeSetConfig, run: Run) -> MakeSetReport:
    """Write a generated set into the run's ``artifacts``."""
    counts = {"train": cfg.train, "val": cfg.val, "test": cfg.test}
    write_triples(run.artifacts / "set", counts, cfg.seed, cfg.kinds)
    for split, count in counts.items():
        run.row("motions", count, better="none", split=split)
    return MakeSetReport.of(run)


def is_triples(folder: Path) -> bool:
    """Whether a folder is of this form, and not HumanML3D's."""
    return (folder / "motions").is_dir()


def read_triples(folder: Path, split: str) -> list[Clip]:
    """Clips of a split, from 40 rows up.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A motion, a text or the music is damaged, the music is shorter than the motion, or there is neither
            a text nor music; the message names the file.
    """
    names = folder / f"{split}.txt"
    if not names.is_file():
        raise FileNotFoundError(f"there is no {names}")
    heard: dict[Path, Tensor] = {}
    found = []
    for name in names.read_text(encoding="utf-8").split():
        path = next((p for suffix in READS if (p := folder / "motions" / f"{name}{suffix}").is_file()), None)
        if path is None:
            raise FileNotFoundError(f"there is no motion {folder / 'motions' / name} ({', '.join(READS)})")
        features, track = _features(path), _track(folder, name)
        texts = folder / "texts" / f"{name}.txt"
        if track is None and not texts.is_file():
            raise ValueError(f"{path} has neither a text {texts} nor music")
        music = None
        if track is not None:
            if track not in heard:
                heard[track] = music_features(read_wav(track), int(HUMANML3D.fps))
            music = heard[track]
            if len(music) < len(features):
                raise ValueError(
                    f"{track}: the music is shorter than the motion {path}: {len(music) / HUMANML3D.fps:.2f} of "
                    f"{len(features) / HUMANML3D.fps:.2f} s"
                )
        whole: list[str] = []
        pieces: list[tuple[int, int, tuple[str, ...]]] = []
        for text, start, end in read_texts(texts) if texts.is_file() else []:
            if start == end == 0:
                whole.append(text)
            else:
                pieces.append((int(start * HUMANML3D.fps), int(end * HUMANML3D.fps), (text,)))
        if whole or not pieces:
            pieces += [(first, first + WINDOW, tuple(whole)) for first in range(0, len(features), WINDOW)]
        for first, last, captions in pieces:
            last = min(last, len(features), first + WINDOW)
            if last - first >= LEAST:
                part = None if music is None else pooled(music[first:last], TOKEN_FRAMES)
                found.append(Clip(f"{name}[{first}:{last}]", features[first:last], captions, part))
    if not found:
        raise ValueError(f"{names} leads to no clip of {LEAST} rows or more")
    return found


def _track(folder: Path, name: str) -> Path | None:
    own = folder / "music" / f"{name}.wav"
    if own.is_file():
        return own
    match = re.search(r"_(m[A-Z]{2}\d)_", name)
    if match is None:
        return None
    shared = folder / "music" / f"{match[1]}.wav"
    if not shared.is_file():
        raise FileNotFoundError(f"there is neither {own} nor {shared} for the dance {name}")
    return shared


def _features(path: Path) -> Float[Tensor, "rows 263"]:
    if path.suffix == ".npy":
        values = read_numbers(path)
        if values.ndim == 2:
            return checked_features(values.float(), path, HUMANML3D)
    motion = read_motion(path, fps=HUMANML3D.fps if path.suffix == ".npy" else None)
    joints = motion.joints
    if motion.fps != HUMANML3D.fps:
        joints = torch.from_numpy(resampled(joints.numpy(), motion.fps, HUMANML3D.fps))
    try:
        return extract(joints).float()
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error


def write_triples(folder: Path, counts: dict[str, int], seed: int, kinds: Sequence[str] = ("text", "both")) -> Path:
    """Write generated motions, captions and music; returns the folder.

    Args:
        folder: To write into.
        counts: Split to its number of motions, each with scenes of its own.
        seed: Of the scenes.
        kinds: That take turns: ``text`` stands without music, ``both`` dances with a caption, ``music`` without one.
    """
    for name in ("motions", "texts", "music"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(counts.items()):
        names = [f"{split}{index:05}" for index in range(count)]
        for turn, kind in enumerate(kinds):
            own = names[turn :: len(kinds)]
            if not own:
                continue
            clips = generated(len(own), 1000 * (seed + 1) + 10 * number + turn, dance=kind != "text")
            for index, name in enumerate(own):
                with atomic_path(folder / "motions" / f"{name}.npy") as scratch:
                    np.save(scratch, clips.features[index].numpy())
                if kind != "music":
                    line = f"{caption(clips.scenes, index)}##0.0#0.0\n"
                    (folder / "texts" / f"{name}.txt").write_text(line, encoding="utf-8")
                if kind != "text":
                    tempo, first = float(clips.scenes.dance[index]), float(clips.scenes.first_beat[index])
                    sound = click_track(tempo, first, FRAMES / HUMANML3D.fps, timbre=int(clips.scenes.words[index]))
                    write_wav(sound, folder / "music" / f"{name}.wav")
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder
