"""``eval``: a host by the protocols of text to motion and of dance, repeated, with 95 % intervals."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from numpy.typing import NDArray
from torch import Tensor

from .config import EvalConfig
from .dance import FPS, beat_alignment, dance_scores, geometric_features, kinetic_features, resampled
from .data import Clips, generated
from .features import recover
from .grading import draw_clips, embed
from .grammar import FRAMES, right
from .host import Host, load_host
from .metrics import diversity, frechet, matching, multimodality, r_precision, repeated
from .skeletons import HUMANML3D, SMPL_OFFSETS

__all__ = ["EvalReport", "evaluate", "with_hands"]

_BETTER: dict[str, Literal["higher", "lower", "none"]] = {
    "R1": "higher", "R2": "higher", "R3": "higher", "FID": "lower", "MM-Dist": "lower", "Diversity": "none",
    "MModality": "none", "events": "higher", "FIDk": "lower", "FIDg": "lower", "Divk": "none", "Divg": "none",
    "BAS": "higher",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalReport(Report):
    """Metrics of real and generated motions; as text, a table."""

    def __str__(self) -> str:
        lines = [f"{'set':<8}{'motions':<12}{'metric':<11}{'value':>9}   95 %"]
        for row in self.rows:
            low, high = row.interval or (row.value, row.value)
            lines.append(
                f"{row.split:<8}{row.variant:<12}{row.metric:<11}{row.value:>9.4f}   +- {(high - low) / 2:.4f}"
            )
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def with_hands(joints: NDArray[np.floating]) -> NDArray[np.floating]:
    """24 joints of 22: the hands lie on as their forearms point, which is ours and changes FIDk a little."""
    hands = []
    for wrist, elbow, hand in ((20, 18, 22), (21, 19, 23)):
        way = joints[:, wrist] - joints[:, elbow]
        length = float(np.linalg.norm(SMPL_OFFSETS[hand]))
        hands.append(joints[:, wrist] + way / np.linalg.norm(way, axis=-1, keepdims=True) * length)
    return np.concatenate([joints, np.stack(hands, 1)], 1)


def _dance(features: Tensor) -> tuple[NDArray[np.floating], NDArray[np.floating], list[NDArray[np.floating]]]:
    """Kinetic and geometric features, and the joints at 60 frames a second that they are of."""
    motions = []
    for joints in recover(features).double().cpu().numpy():
        motion = with_hands(resampled(joints, HUMANML3D.fps))
        motions.append(motion - motion[:1, :1])
    return (
        np.stack([kinetic_features(motion) for motion in motions]),
        np.stack([geometric_features(motion) for motion in motions]),
        motions,
    )


def _telling(features: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Columns that vary over a real set.

    The others are left out of distances, which is ours: the grammar's dances never bring their chest forward fast, say,
    and the first generated one that did would be a thousand deviations away.
    """
    return features.std(0) > 1e-3


def _beats(clips: Clips, motions: list[NDArray[np.floating]]) -> float:
    scenes = clips.scenes
    found = []
    for motion, first, tempo in zip(motions, scenes.first_beat.tolist(), scenes.dance.tolist(), strict=True):
        found.append(beat_alignment(motion, np.arange(first, FRAMES / HUMANML3D.fps, 60 / tempo) * FPS))
    return float(np.mean(found))


def _text_metrics(
    host: Host, clips: Clips, features: Tensor, real: NDArray[np.floating], rng: np.random.Generator
) -> dict[str, float]:
    texts, made = embed(host, clips, features)
    hits = r_precision(texts, made, pool=min(32, len(clips)))
    return {
        "R1": hits[0],
        "R2": hits[1],
        "R3": hits[2],
        "FID": frechet(made, real),
        "MM-Dist": matching(texts, made),
        "Diversity": diversity(made, rng, pairs=min(300, len(clips) - 1)),
        "events": float(right(recover(features), clips.scenes).float().mean()),
    }


def _many(host: Host, clips: Clips, cfg: EvalConfig, seed: int, rng: np.random.Generator) -> float:
    """Multimodality: several motions of each of a few texts."""
    texts = min(cfg.many_texts, len(clips))
    generator = torch.Generator(host.device).manual_seed(seed)
    found = []
    for index in range(texts):
        words = clips.words[index : index + 1].expand(cfg.many, -1)
        drawn = host.draw(host.condition(words), generator, cfg.unmask)
        with torch.no_grad():
            found.append(host.evaluator.motion(host.tokenizer.normalise(drawn)).cpu().numpy())
    return multimodality(np.stack(found), rng, pairs=min(10, cfg.many - 1))


def evaluate(cfg: EvalConfig, run: Run) -> EvalReport:
    """Measure real and generated motions; every repetition draws its own scenes and motions, and is kept.

    Raises:
        CheckpointError: There is no host.
    """
    files = [run.artifacts / f"repetition-{number:03}.json" for number in range(cfg.repetitions)]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    if missing:
        host = load_host(resolve_device(run.device), path=cfg.host)
        *truth, _ = _dance(generated(cfg.real_dances, 39_999, dance=True, device=host.device).features)
        with progress_bar(cfg.repetitions, desc="repetitions", quiet=run.quiet) as bar:
            bar.update(cfg.repetitions - len(missing))
            for number in missing:
                values = _repetition(host, cfg, truth, number)
                atomic_write_json(files[number], [[*key, value] for key, value in values.items()])
                bar.update()
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for file in files:
        for split, name, metric, value in json.loads(file.read_text(encoding="utf-8")):
            found[split, name, metric].append(value)
    for (split, name, metric), each in found.items():
        mean, half = repeated(each)
        run.row(
            metric,
            mean,
            better=_BETTER[metric],
            n=cfg.repetitions,
            spread=float(np.std(each)),
            variant=name,
            split=split,
            interval=(mean - half, mean + half),
        )
    return EvalReport.of(run)


def _repetition(
    host: Host, cfg: EvalConfig, truth: Sequence[NDArray[np.floating]], number: int
) -> dict[tuple[str, str, str], float]:
    """Set, motions and metric to the value of one repetition."""
    found: dict[tuple[str, str, str], float] = {}
    seed = 40_000 + 1000 * cfg.seed + number
    rng = np.random.default_rng(seed)
    plain = generated(cfg.limit, seed, dance=False, device=host.device)
    # The real set that FID compares with is another draw, so that real motions have a distance too.
    other = generated(cfg.limit, seed + 500_000, dance=False, device=host.device)
    _, real = embed(host, other, other.features)
    drawn = draw_clips(host, plain, seed, cfg.unmask)
    for name, features in (("real", plain.features), ("generated", drawn)):
        for metric, value in _text_metrics(host, plain, features, real, rng).items():
            found["text", name, metric] = float(value)
    found["text", "generated", "MModality"] = _many(host, plain, cfg, seed, rng)
    clips = generated(cfg.dances, seed, dance=True, device=host.device)
    danced = draw_clips(host, clips, seed, cfg.unmask)
    for name, features in (("real", clips.features), ("generated", danced)):
        *own, motions = _dance(features)
        for letter, made, true in zip("kg", own, truth, strict=True):
            telling = _telling(true)
            distance, spread = dance_scores(made[:, telling], true[:, telling])
            found["dance", name, f"FID{letter}"] = distance
            found["dance", name, f"Div{letter}"] = spread
        found["dance", name, "BAS"] = _beats(clips, motions)
        found["dance", name, "events"] = float(right(recover(features), clips.scenes).float().mean())
    return found
