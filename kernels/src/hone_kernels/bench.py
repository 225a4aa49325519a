"""The verb ``bench``: an op on this GPU, its values compared before it is timed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hone_core.errors import MissingExtraError
from hone_core.runs import Row, Run

from hone_kernels import attention
from hone_kernels.attention import bench as attention_bench
from hone_kernels.attention_fp8 import bench as fp8_bench
from hone_kernels.backends import Backend
from hone_kernels.block_scores import bench as scores_bench
from hone_kernels.column_mass import bench as mass_bench
from hone_kernels.config import BenchConfig
from hone_kernels.gpu import the_gpu
from hone_kernels.kept_tokens import bench as kept_bench
from hone_kernels.logits import SUPPORT as LOGITS
from hone_kernels.logits import bench as logits_bench
from hone_kernels.plane_sweep import bench as sweep_bench
from hone_kernels.pyramid_attention import bench as pyramid_bench
from hone_kernels.ragged_decode import bench as decode_bench
from hone_kernels.rows import TimesReport
from hone_kernels.splat_blend import bench as blend_bench

__all__ = ["BenchReport", "bench", "plot", "prepare"]

_GROUPED: dict[str, Any] = {
    "column_mass": mass_bench,
    "kept_tokens": kept_bench,
    "plane_sweep": sweep_bench,
    "pyramid_attention": pyramid_bench,
    "ragged_decode": decode_bench,
    "splat_blend": blend_bench,
}


@dataclass(frozen=True, kw_only=True)
class BenchReport(TimesReport):
    """What was timed, and the picture if one was drawn."""

    figure: Path | None = None

    @classmethod
    def of(cls, run: Run) -> BenchReport:
        """Return the report of a run whose rows are written."""
        figure = run.path / "figures" / "rate.png"
        return cls(path=run.path, rows=tuple(run.rows), figure=figure if figure.exists() else None)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *([f"figure   {self.figure}"] if self.figure else [])])


def prepare(cfg: BenchConfig) -> BenchConfig:
    """Complete the config by what the op measures unless told.

    Raises:
        ValueError: A shape is none, or no data type has a mode.
        MissingExtraError: A picture is asked for, and nothing can draw it.
    """
    if cfg.op == "block_scores":
        known = [name for name in scores_bench.SHAPES if name != "small"]
        if unknown := set(cfg.shapes) - set(scores_bench.SHAPES):
            raise ValueError(f"no shape {', '.join(sorted(unknown))}; there are {', '.join(scores_bench.SHAPES)}")
        return replace(cfg, shapes=cfg.shapes or tuple(known))
    if cfg.op == "logits":
        for dtype in cfg.dtypes:
            if getattr(torch, dtype) not in LOGITS["triton"].dtypes:
                raise ValueError(f"logits are not {dtype}")
        cfg = replace(
            cfg, shapes=cfg.shapes or tuple(logits_bench.SHAPES), dtypes=cfg.dtypes or ("bfloat16", "float32")
        )
        for shape in cfg.shapes:
            logits_bench.parse(shape)
        return cfg
    if cfg.op in _GROUPED:
        cfg = replace(cfg, shapes=cfg.shapes or _GROUPED[cfg.op].SHAPES)
        for shape in cfg.shapes:
            _GROUPED[cfg.op].parse(shape)
        return cfg
    names = attention_bench.SHAPES if cfg.op == "attention" else fp8_bench.PROLOGUES
    cfg = replace(cfg, shapes=cfg.shapes or tuple(names))
    for shape in cfg.shapes:
        _shape(shape)
    if cfg.op == "attention_fp8":
        cfg = replace(cfg, densities=cfg.densities or fp8_bench.DENSITIES, modes=cfg.modes or ("backward", "prologue"))
        if set(cfg.modes) - {"backward", "prologue"}:
            raise ValueError(f"attention_fp8 measures backward and prologue; got {', '.join(cfg.modes)}")
    else:
        cfg = replace(
            cfg,
            densities=cfg.densities or (1.0, 0.5, 0.2, 0.1),
            dtypes=cfg.dtypes or ("bfloat16", "float8_e4m3fn"),
            modes=cfg.modes or ("forward", "forward pooled", "backward", "prologue", "host"),
            memory=cfg.memory or ("BHSD", "BSHD"),
            block=cfg.block or 128,
        )
        absent = {dtype: "forward pooled" if dtype == "float8_e4m3fn" else "prologue" for dtype in cfg.dtypes}
        if not any(mode != without for without in absent.values() for mode in cfg.modes):
            raise ValueError(
                f"nothing to measure: no dtype in [{', '.join(cfg.dtypes)}] has a mode in [{', '.join(cfg.modes)}]. "
                "'prologue' is of float8_e4m3fn, 'forward pooled' of the others"
            )
    if _drawn(cfg):
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("bench", "hone-kernels", "The picture of rates (or --no-plot)") from error
    return cfg


def _drawn(cfg: BenchConfig) -> bool:
    """Whether there is a rate of the forward to draw."""
    return cfg.plot and cfg.op == "attention" and "forward" in cfg.modes


def _shape(text: str) -> attention_bench.Shape:
    return fp8_bench.PROLOGUES.get(text) or attention_bench.Shape.parse(text)


def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Measure, write rows into the run, and draw ``figures/rate.png``.

    Args:
        cfg: What to time, complete (see ``prepare``).
        run: The run, entered.

    Raises:
        UnsupportedHardwareError: There is no CUDA device.
        RuntimeError: Nothing can run, or a value is wrong; no time is reported then.
    """
    device = the_gpu(run.device)
    with torch.cuda.device(device):
        if cfg.op == "block_scores":
            chosen = {name: scores_bench.SHAPES[name] for name in cfg.shapes}
            scores_bench.bench(run, chosen, rounds=cfg.rounds, seed=cfg.seed)
        elif cfg.op == "logits":
            shapes = {text: logits_bench.parse(text) for text in cfg.shapes}
            dtypes = [getattr(torch, name) for name in cfg.dtypes]
            logits_bench.bench(run, shapes, dtypes, rounds=cfg.rounds, seed=cfg.seed)
        elif cfg.op in _GROUPED:
            _GROUPED[cfg.op].bench(run, cfg.shapes, rounds=cfg.rounds, seed=cfg.seed)
        elif cfg.op == "attention_fp8":
            options: dict[str, Any] = dict(densities=cfg.densities, modes=cfg.modes, rounds=cfg.rounds, seed=cfg.seed)
            fp8_bench.bench(run, [_shape(text) for text in cfg.shapes], **options)
        else:
            attention_bench.bench(
                run,
                [_shape(text) for text in cfg.shapes],
                densities=cfg.densities,
                dtypes=[getattr(torch, name) for name in cfg.dtypes],
                backends=cfg.backends or _usable(device),
                modes=cfg.modes,
                memory=cfg.memory,
                block=cfg.block or 128,
                rounds=cfg.rounds,
                seed=cfg.seed,
            )
    if _drawn(cfg):
        plot(run.rows, run.figures / "rate.png")
    return BenchReport.of(run)


def _usable(device: torch.device) -> list[Backend]:
    """Backends of ours that run bfloat16 attention of head size 128 here, the best first."""
    sizes: dict[str, Any] = dict(head_dim=128, block_q=128, block_k=128)
    known: tuple[Backend, ...] = ("gluon", "triton")
    return [name for name in known if attention.SUPPORT[name].reason(device, torch.bfloat16, **sizes) is None]


def plot(rows: list[Row], path: Path) -> None:
    """Rate of the forward on computed pairs against density: a flat line means time in proportion to density.

    A row of panels per dtype and order in memory, a column per shape.
    """
    from hone_core.plots import drawing

    rows = [row for row in rows if (row.split, row.metric) == ("forward", "rate")]

    def kind(row: Row) -> str:
        return " ".join(str(row.labels[name]) for name in ("dtype", "memory") if name in row.labels)

    shapes, kinds = list(dict.fromkeys(row.labels["shape"] for row in rows)), list(dict.fromkeys(map(kind, rows)))
    variants = list(dict.fromkeys(row.variant for row in rows))
    with drawing(path, 3.6 * len(shapes) + 1.8, 3.2 * len(kinds)) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots(len(kinds), len(shapes), sharex=True, sharey=True, squeeze=False)
        entries = {}
        for (i, name), (j, shape) in itertools.product(enumerate(kinds), enumerate(shapes)):
            axis = axes[i][j]
            mine = [row for row in rows if (row.labels["shape"], kind(row)) == (shape, name)]
            for variant in dict.fromkeys(row.variant for row in mine):
                points = sorted((row.labels["density"], row.value) for row in mine if row.variant == variant)
                if variant.endswith(" dense"):
                    entries[variant] = axis.axhline(points[0][1], linestyle="--", linewidth=1, color="gray")
                else:
                    color = f"C{variants.index(variant)}"
                    (entries[variant],) = axis.plot(*zip(*points, strict=True), marker="o", color=color)
            axis.set_xscale("log")
            ticks = sorted({row.labels["density"] for row in rows})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.set_title(f"{shape}, {name}")
            axis.grid(alpha=0.3)
        # The axis is shared: its limit is set when every panel has its lines.
        axes[0][0].set_ylim(0, 1.05 * max(row.value for row in rows))
        figure.supxlabel("density (blocks computed)")
        figure.supylabel("TFLOP/s on computed pairs")
        figure.legend(entries.values(), entries.keys(), loc="outside right center")
