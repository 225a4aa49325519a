"""``hone-kernels``: what runs here, and how fast."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

OK, FAILED, USAGE = 0, 1, 2

DESCRIPTION = "GPU kernels of hone: block-sparse attention, block scores, block selection."
VERBS = {
    "info": "Versions, the GPU, and which backends can run on it.",
    "bench": "Time an op beside cuDNN, FlexAttention and others that are installed; leaves JSON and a plot.",
}


class _UsageError(ValueError):
    """Arguments that no machine could follow, or a missing extra."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 failed, 2 wrong usage.

    Raises:
        SystemExit: Always, with the exit code.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if args else sys.stderr)
        raise SystemExit(OK if args else USAGE)
    if args[0] == "--version":
        print(f"hone-kernels {importlib.metadata.version('hone-kernels')}")
        raise SystemExit(OK)
    if args[0] not in VERBS:
        print(f"hone-kernels: unknown verb {args[0]!r}; expected one of {', '.join(VERBS)}", file=sys.stderr)
        raise SystemExit(USAGE)
    parsed = _parser(args[0]).parse_args(args[1:])
    try:
        (_info if args[0] == "info" else _bench)(parsed)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"hone-kernels {args[0]}: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE if isinstance(error, _UsageError) else FAILED) from None
    raise SystemExit(OK)


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items())
    return (
        f"usage: hone-kernels VERB [flags]\n\n{DESCRIPTION}\n\nverbs:\n{verbs}\n\n"
        "hone-kernels VERB --help lists a verb's flags; hone-kernels --version prints the version."
    )


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"hone-kernels {verb}", description=VERBS[verb], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if verb == "bench":
        parser.add_argument("op", choices=["attention"], help="which op")
        parser.add_argument(
            "--shapes",
            nargs="+",
            metavar="SHAPE",
            help="names, or HEADSxTOKENSxHEAD_SIZE such as 12x32768x128 (default: Wan2.1-1.3B and CogVideoX-5B)",
            default=argparse.SUPPRESS,
        )
        parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5, 0.2, 0.1], help="blocks listed")
        dtypes = ["bfloat16", "float16", "float32", "float8_e4m3fn"]
        parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float8_e4m3fn"], choices=dtypes)
        parser.add_argument(
            "--backends",
            nargs="+",
            metavar="NAME",
            help="of ours (default: all that run here)",
            default=argparse.SUPPRESS,
        )
        parser.add_argument(
            "--modes", nargs="+", metavar="MODE", help="forward, 'forward pooled', backward, prologue (default: all)",
            default=argparse.SUPPRESS,
        )  # fmt: skip
        parser.add_argument("--block", type=int, default=128, help="block size on both sides")
        parser.add_argument("--rounds", type=int, default=20, help="timed calls of each, in random order")
        parser.add_argument("--seed", type=int, default=0, help="of data, lists and order")
        parser.add_argument("--out", type=Path, help="JSON file to write")
        parser.add_argument("--plot", type=Path, help="PNG file to write: rate against density (needs the extra bench)")
        parser.add_argument("--quiet", action="store_true", help="no line per measurement on stderr")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    return parser


def _info(args: argparse.Namespace) -> None:
    import torch

    from hone_kernels.attention import SUPPORT

    found: dict[str, Any] = {**environment(), "backends": _available(list(SUPPORT))}
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        where = "this GPU" if torch.cuda.is_available() else "this machine"
        for name, value in found.items():
            if name == "backends":
                print(f"attention on {where}:")
                for backend, reason in value.items():
                    print(f"  {backend:<10} {'runs' if reason is None else 'does not: ' + reason}")
            else:
                print(f"{name:<8} {value}")


def _available(backends: list[str]) -> dict[str, str | None]:
    """Backend to why it cannot run bfloat16 attention of head size 128 here, or None."""
    import torch

    from hone_kernels.attention import SUPPORT

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = dict(head_dim=128, block_q=128, block_k=128)
    return {name: SUPPORT[name].reason(device, torch.bfloat16, **sizes) for name in backends}


def _bench(args: argparse.Namespace) -> None:
    import torch

    from hone_kernels.attention.bench import MODES, SHAPES, Shape, bench, check_settings, measured

    settings = dict(
        densities=args.densities,
        dtypes=[getattr(torch, name) for name in args.dtypes],
        backends=getattr(args, "backends", []),
        modes=getattr(args, "modes", list(MODES)),
        block=args.block,
        rounds=args.rounds,
    )
    try:
        shapes = [Shape.parse(text) for text in getattr(args, "shapes", SHAPES)]
        check_settings(**settings)
    except ValueError as error:
        raise _UsageError(str(error)) from None
    for path in (args.out, args.plot):
        if path is not None and not path.parent.is_dir():
            raise _UsageError(f"the folder {path.parent} of {path} does not exist; make it first")
        if path is not None and path.is_dir():
            raise _UsageError(f"{path} is a folder; name a file")
    if args.plot is not None:
        timed = {mode for dtype in settings["dtypes"] for mode in measured(dtype, settings["modes"])}
        if timed == {"prologue"}:
            raise _UsageError("--plot draws rates of attention, and 'prologue' has none; add a mode or drop --plot")
        _pyplot()
    if not hasattr(args, "backends"):
        available = _available(["gluon", "triton"]) if torch.cuda.is_available() else {}
        settings["backends"] = [name for name, reason in available.items() if reason is None]
    rows = bench(
        shapes,
        **settings,
        seed=args.seed,
        say=(lambda text: None) if args.quiet else (lambda text: print(text, file=sys.stderr, flush=True)),
    )
    result = {
        "schema": 1,
        "package": "hone-kernels",
        "verb": f"bench {args.op}",
        "environment": environment(),
        "rows": rows,
    }
    if args.out is not None:
        _write(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=2) if args.json else table(rows), flush=True)
    if args.plot is not None:
        _plot(rows, args.plot)


def environment() -> dict[str, Any]:
    """What a result was measured on; ``HONE_COMMIT`` gives the commit of the code."""
    import torch

    has_gpu = torch.cuda.is_available()
    versions = {}
    for name in ("hone-kernels", "triton", "flash-attn", "flash-attn-3", "sageattention"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": os.environ.get("HONE_COMMIT"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if has_gpu else None,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "packages": versions,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text: time, rate, how many times faster than cuDNN's dense attention beside it, and error."""
    form = "{:<22}{:<15}{:<16}{:>8}  {:<26}{:>9}{:>15}{:>9}{:>10}"
    lines = [form.format("shape", "dtype", "mode", "density", "provider", "ms", "rate", "x cuDNN", "error")]
    for row in rows:
        rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['gbps']:.0f} GB/s"
        gain = "-" if row["speedup_over_dense"] is None else f"{row['speedup_over_dense']:.2f}"
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        names = (row["shape"], row["dtype"], row["mode"], f"{row['density']:.2f}", row["provider"])
        lines.append(form.format(*names, f"{row['ms_p50']:.3f}", rate, gain, error))
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise _UsageError("--plot needs matplotlib: pip install 'hone-kernels[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Rate on computed pairs against density: a flat line means time in proportion to density.

    A row of panels per dtype, a column per shape.
    """
    pyplot = _pyplot()
    rows = [row for row in rows if row["mode"] == "forward"] or [row for row in rows if "tflops" in row]
    shapes, dtypes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("shape", "dtype"))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    size = (3.6 * len(shapes) + 1.8, 3.2 * len(dtypes))
    figure, axes = pyplot.subplots(
        len(dtypes), len(shapes), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    entries = {}
    for (i, dtype), (j, shape) in itertools.product(enumerate(dtypes), enumerate(shapes)):
        axis = axes[i][j]
        mine = [row for row in rows if (row["shape"], row["dtype"]) == (shape, dtype)]
        for provider in dict.fromkeys(row["provider"] for row in mine):
            points = sorted((row["density"], row["tflops"]) for row in mine if row["provider"] == provider)
            if provider.endswith(" dense"):
                entries[provider] = axis.axhline(points[0][1], linestyle="--", linewidth=1, color="gray")
            else:
                color = f"C{providers.index(provider)}"
                (entries[provider],) = axis.plot(*zip(*points, strict=True), marker="o", color=color)
        axis.set_xscale("log")
        ticks = sorted({row["density"] for row in rows})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(f"{shape}, {dtype}", fontsize=9)
        axis.grid(alpha=0.3)
    # The axis is shared: its limit is set when every panel has its lines.
    axes[0][0].set_ylim(0, 1.05 * max(row["tflops"] for row in rows))
    figure.supxlabel("density (blocks computed)", fontsize=9)
    figure.supylabel("TFLOP/s on computed pairs", fontsize=9)
    figure.legend(entries.values(), entries.keys(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
