"""The two pictures: accuracy against the large model's share, and answers coloured by who wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hone_core.plots import BLUE, GREY, INK, ORANGE, RED, drawing, finish
from numpy.typing import NDArray

from .config import LARGE

if TYPE_CHECKING:
    from .evaluate import Outcome

__all__ = ["answers", "curve"]

STYLES = {
    "stitch": (BLUE, "o-", "R-Stitch"),
    "cascade": (ORANGE, "^-.", "cascade, same large steps"),
    "random": (GREY, "s--", "random routing, same share"),
}
COLORS = (BLUE, RED)
"""Of what the small and the large model wrote."""


def curve(lines: Mapping[str, Sequence[Outcome]], alone: Mapping[str, Outcome], path: Path, *, title: str = "") -> Path:
    """Accuracy against the share of tokens that the large model wrote.

    Shares stand at their square roots, since thresholds that matter lie close together at small ones.

    Args:
        lines: ``stitch``, ``random``, ``cascade`` to a setting per point.
        alone: ``small`` and ``large``, each model by itself.
        path: PNG to write.
        title: Over the picture.
    """
    from matplotlib.ticker import FixedLocator

    with drawing(path, 6.4, 4.0) as figure:
        axes = figure.subplots()
        for order, name in enumerate(STYLES):
            outcomes = sorted(lines.get(name, ()), key=lambda outcome: outcome.share)
            if not outcomes:
                continue
            color, style, label = STYLES[name]
            shares = [100 * outcome.share for outcome in outcomes]
            low, high = (np.asarray([100 * outcome.interval[end] for outcome in outcomes]) for end in (0, 1))
            axes.fill_between(shares, low, high, color=color, alpha=0.15, linewidth=0)
            accuracy = [100 * outcome.accuracy for outcome in outcomes]
            axes.plot(shares, accuracy, style, color=color, label=label, markersize=5, zorder=4 - 0.1 * order)
        # Beside the axes, where no line runs; those close to each other move apart.
        ranked = sorted(alone.items(), key=lambda item: item[1].accuracy)
        bottom, top = axes.get_ylim()
        close = len(ranked) > 1 and 100 * (ranked[1][1].accuracy - ranked[0][1].accuracy) < 0.12 * (top - bottom)
        for place, (name, outcome) in enumerate(ranked):
            axes.axhline(100 * outcome.accuracy, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
            side, rise = (("top", -2), ("bottom", 2))[place] if close else ("center", 0)
            words = f"{name} model\nalone {100 * outcome.accuracy:.1f} %"
            axes.annotate(
                words,
                (1, 100 * outcome.accuracy),
                xycoords=axes.get_yaxis_transform(),
                xytext=(5, rise),
                textcoords="offset points",
                va=side,
            )
        axes.set_xscale("function", functions=(_root, np.square))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(FixedLocator([0, 1, 2, 5, 10, 20, 30, 40, 60, 80, 100]))
        axes.set_xlabel("tokens written by the large model, % (square-root axis)")
        axes.set_ylabel("accuracy, %")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncol=3, columnspacing=1.2, borderaxespad=0.2)
        finish(figure, title=title, note="bands: 95 % bootstrap intervals over problems")
    return path


def _root(share: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.maximum(share, 0))


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
        # All rows are of one height, which the largest entropy fills.
        most = max(max(t["entropy"], t["discarded_entropy"] or 0.0) for row in rows for t in row["tokens"]) or 1.0
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
            axes.set_ylim(0, 1.15 * most)
            axes.set_ylabel(f"{row['question']}\n{'right' if row['right'] else 'wrong'}", rotation=0, ha="right")
            axes.set_yticks([])
        note = (
            "blue: small model, red: large; bars: entropy / ln V; triangles: tokens of the small model thrown away; "
            f"the highest is {most:.2f}"
        )
        finish(figure, title=title, note=note)
    return path
