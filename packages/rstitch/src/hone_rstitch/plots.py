"""The two pictures: accuracy against the large model's share, and answers coloured by who wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hone_core.plots import BLUE, GREY, INK, ORANGE, RED, drawing, error_line, finish

from .config import LARGE

if TYPE_CHECKING:
    from .evaluate import Outcome

__all__ = ["answers", "curve"]

STYLES = {
    "stitch": (BLUE, "o-", "R-Stitch"),
    "random": (GREY, "s--", "random, same share"),
    "cascade": (ORANGE, "^:", "cascade, same large steps"),
}
COLORS = (BLUE, RED)
"""Of what the small and the large model wrote."""


def curve(lines: Mapping[str, Sequence[Outcome]], alone: Mapping[str, Outcome], path: Path, *, title: str = "") -> Path:
    """Accuracy against the share of tokens that the large model wrote.

    Args:
        lines: ``stitch``, ``random``, ``cascade`` to a setting per point.
        alone: ``small`` and ``large``, each model by itself.
        path: PNG to write.
        title: Over the picture.
    """
    with drawing(path, 5.2, 3.4) as figure:
        axes = figure.subplots()
        for name, outcomes in lines.items():
            if not outcomes:
                continue
            color, style, label = STYLES[name]
            points = [(o.share, o.accuracy, o.interval) for o in outcomes]
            error_line(axes, points, style=style, color=color, label=label)
        for name, outcome in alone.items():
            axes.axhline(100 * outcome.accuracy, color=INK, linewidth=0.6, linestyle=(0, (1, 3)))
            axes.annotate(f"{name} model alone", (0, 100 * outcome.accuracy), va="bottom", fontsize=7)
        axes.set_xlabel("tokens written by the large model, %")
        axes.set_ylabel("accuracy, %")
        axes.legend(loc="lower right")
        finish(figure, title=title, note="bars: 95 % bootstrap intervals over problems")
    return path


def answers(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> Path:
    """Entropy under each character of some answers, coloured by who wrote it.

    Args:
        rows: ``question``, ``right`` and ``tokens``: per token its ``text``, ``model``, ``entropy`` and
            ``discarded_entropy`` (None where nothing was thrown away).
        path: PNG to write.
        title: Over the picture.
    """
    with drawing(path, 8, 0.9 * len(rows) + 0.6) as figure:
        grid = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
        longest = max(len(row["tokens"]) for row in rows)
        for axes, row in zip(grid, rows, strict=True):
            tokens = row["tokens"]
            axes.bar(range(len(tokens)), [t["entropy"] for t in tokens], color=[COLORS[t["model"]] for t in tokens])
            thrown = [(at, t["discarded_entropy"]) for at, t in enumerate(tokens) if t["discarded_entropy"] is not None]
            axes.plot([at for at, _ in thrown], [h for _, h in thrown], "v", color=BLUE, fillstyle="none")
            axes.set_xticks(range(len(tokens)), [t["text"] for t in tokens], fontsize=9, family="monospace")
            for label, token in zip(axes.get_xticklabels(), tokens, strict=True):
                label.set_color(COLORS[token["model"]])
                label.set_fontweight("bold" if token["model"] == LARGE else "normal")
            axes.set_xlim(-0.6, longest - 0.4)
            axes.set_ylim(0, 1)
            axes.set_ylabel(f"{row['question']}\n{'right' if row['right'] else 'wrong'}", rotation=0, ha="right")
            axes.set_yticks([])
        note = "blue: small model, red: large; bars: entropy / ln V; triangles: tokens of the small model thrown away"
        finish(figure, title=title, note=note)
    return path
