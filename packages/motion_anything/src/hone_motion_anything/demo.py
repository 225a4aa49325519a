"""The demo: text to motion, text and music to dance, and an edit, as videos with sound, with what the masks cover.

Runs on the packaged tiny host on a CPU and downloads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run

from .config import DemoConfig
from .dance import FPS, beat_alignment, resampled
from .data import generated
from .drawing import draw_frames, strip, write_video
from .features import part_columns, recover
from .grading import draw_clips, mask_overlap
from .grammar import FRAMES, TOKEN_FRAMES, caption, right, text_ids
from .host import Host, load_host
from .method import attention_mask
from .music import beat_frames, click_track, music_features, pooled, write_wav
from .skeletons import HUMANML3D, PARTS
from .viewer import write_viewer

__all__ = ["DemoReport", "beats_of", "demo"]

EDIT = (5, "a person waves the right hand")
"""Part that the edit makes anew, and by which words."""


@dataclass(frozen=True, kw_only=True)
class DemoReport(Report):
    """Result of the demo; as text, a table.

    Attributes:
        texts: Motions of the texts.
        dance: Text and music, with its sound.
        edit: Before and after.
        viewer: All of them as a page, to look at from every side.
        sheet: Poses, and cells that the method's mask would hide.
    """

    texts: Path
    dance: Path
    edit: Path
    viewer: Path
    sheet: Path

    @classmethod
    def of(cls, run: Run) -> DemoReport:
        """Return the report of a run whose rows are written."""
        texts, dance, edit = (run.artifacts / f"{name}.mp4" for name in ("texts", "dance", "edit"))
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            texts=texts,
            dance=dance,
            edit=edit,
            viewer=run.artifacts / "viewer.html",
            sheet=run.figures / "motions.png",
        )

    def __str__(self) -> str:
        lines = [f"{'what':<36}{'of':<14}{'value':>9}"]
        lines += [f"{row.metric:<36}{row.variant:<14}{row.value:>9.3f} {row.unit}".rstrip() for row in self.rows]
        files = {"texts": self.texts, "dance": self.dance, "edit": self.edit, "page": self.viewer, "poses": self.sheet}
        lines += ["", *(f"{name:<8} {file}" for name, file in files.items())]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def beats_of(joints: torch.Tensor, beats: np.ndarray) -> float:
    """Beat alignment of a motion at 20 frames a second, resampled to the metric's 60."""
    return beat_alignment(resampled(joints.cpu().numpy(), HUMANML3D.fps), beats * FPS / HUMANML3D.fps)


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Generate, edit, grade and draw.

    Raises:
        CheckpointError: There is no host.
        ValueError: A text is empty, or has a word that the host does not know.
    """
    words = text_ids(cfg.texts)
    host = load_host(resolve_device(run.device), path=cfg.host)
    generator = torch.Generator(host.device).manual_seed(cfg.seed)
    report = DemoReport.of(run)

    tokens = host.tokens(host.condition(words), generator, cfg.unmask)
    motions = host.tokenizer.decode(tokens)
    joints = recover(motions).cpu()
    write_video(draw_frames(dict(zip(cfg.texts, joints, strict=True))), report.texts)

    track = click_track(cfg.tempo, 0.25, FRAMES / HUMANML3D.fps, timbre=cfg.seed)
    heard = music_features(track)
    dance = host.condition(words[:1], pooled(heard, TOKEN_FRAMES)[None])
    danced = recover(host.draw(dance, generator, cfg.unmask))[0].cpu()
    sound = write_wav(track, run.artifacts / "music.wav")
    beats = beat_frames(heard)
    title = f"{cfg.texts[0]}, music of {cfg.tempo:g} beats a minute"
    write_video(draw_frames({title: danced}, beats=beats.tolist()), report.dance, sound=sound)

    edited = _edit(host, cfg, tokens[:1], generator)
    kept = [column for number, own in enumerate(part_columns()) if number != EDIT[0] for column in own]
    changed = float((edited[..., kept] - motions[:1][..., kept]).abs().max())
    after = recover(edited)[0].cpu()
    shown = {cfg.texts[0]: joints[0], f"{PARTS[EDIT[0]]} made anew: {EDIT[1]}": after}
    write_video(draw_frames(shown), report.edit)
    anew = torch.zeros(tokens.shape[1:], dtype=torch.bool)
    anew[:, EDIT[0]] = True
    page = {title: danced, **dict(zip(cfg.texts, joints, strict=True)), list(shown)[1]: after}
    write_viewer(page, report.viewer, marks={list(shown)[1]: anew}, beats=beats.tolist(), sound=sound)

    # Which cells of the real thing the method would hide, beside those that move.
    plain = generated(cfg.limit, cfg.seed + 20_000, dance=False, device=host.device)
    ids = host.tokenizer.encode(plain.features[:1])
    valid = torch.ones_like(ids[..., 0], dtype=torch.bool)
    mask = attention_mask(*host.transformer.scores(ids, host.condition(plain.words[:1]), valid), valid, 0.3, 0.3)
    real = recover(plain.features[0]).cpu()
    said = caption(plain.scenes, 0)
    known, hidden = f"{said}: cells that move", f"{said}: cells that attention hides"
    cells = {known: plain.cells[0].float(), hidden: mask[0].float()}
    rows = {known: real, hidden: real} | dict(zip(cfg.texts, joints, strict=True))
    strip(rows, report.sheet, cells=cells)

    _grade(host, cfg, run)
    run.row("beat alignment", beats_of(danced, beats), better="higher", variant="this dance")
    run.row("largest change of kept columns", changed, better="lower", variant="this edit")
    return DemoReport.of(run)


def _edit(host: Host, cfg: DemoConfig, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    edit = torch.zeros_like(tokens, dtype=torch.bool)
    edit[..., EDIT[0]] = True
    condition = host.condition(text_ids([EDIT[1]]))
    return host.tokenizer.decode(host.tokens(condition, generator, cfg.unmask, start=tokens, edit=edit))


def _grade(host: Host, cfg: DemoConfig, run: Run) -> None:
    seed = cfg.seed + 20_000
    for dance in (False, True):
        clips = generated(cfg.limit, seed, dance=dance, device=host.device)
        drawn = draw_clips(host, clips, cfg.seed, cfg.unmask)
        kind = "text and music" if dance else "text"
        for name, features in (("real", clips.features), ("generated", drawn)):
            moved = recover(features)
            share = float(right(moved, clips.scenes).float().mean())
            run.row(f"events all right, {kind}", share, better="higher", n=cfg.limit, variant=name)
            if dance:
                scenes = clips.scenes
                every = [
                    beats_of(motion, np.arange(first * 20, FRAMES, 1200 / tempo))
                    for motion, first, tempo in zip(
                        moved, scenes.first_beat.tolist(), scenes.dance.tolist(), strict=True
                    )
                ]
                run.row("beat alignment", float(np.mean(every)), better="higher", n=cfg.limit, variant=name)
        found = mask_overlap(host, clips)
        for name in ("precision", "recall", "share"):
            value = float(getattr(found, name).mean())
            better = "none" if name == "share" else "higher"
            run.row(f"mask {name}, {kind}", value, better=better, n=cfg.limit, variant="attention")  # type: ignore[arg-type]
