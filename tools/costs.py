"""Write docs/costs.md's tables: what work costs on 1, 8 and 1,000 GPUs, from the measured parts in results/.

    python tools/costs.py            write them
    python tools/costs.py --check    fail where the page differs

Work that is independent (videos, requests) is shared out whole, so that rates grow with the GPUs and the time of one
item stays. A forward that GPUs share is what divides plus what does not, by its times on one GPU and on two.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from tables import TableError, documents, fields, fits
from workspace import ROOT, report

PAGE = "docs/costs.md"
MARKER = re.compile(r"^<!-- costs: (?P<name>\w+) -->\n.*?^<!-- /costs -->$", re.M | re.S)
GPUS = (1, 8, 1000)
STEPS, BRANCHES = 50, 2
"""Of a video as its model is published: denoising steps, and forwards of guidance in each."""


def measured(file: str, where: dict[str, Any], root: Path = ROOT) -> float:
    """The one value that fits.

    Raises:
        TableError: None does, or several do.
    """
    package, _, name = file.partition("/")
    (document,) = documents([name], root / "results" / package, root).values()
    found = [row["value"] for row in map(fields, document["rows"]) if fits(row, where)]
    if len(found) != 1:
        raise TableError(f"results/{file}: {len(found)} results fit {where}; expected one")
    return float(found[0])


def shared(one: float, two: float, count: int) -> float:
    """Time of a forward by ``count`` GPUs, from that by one and by two: a part that divides, and a rest that does not.

    Raises:
        ValueError: Two are slower than one, or more than twice as fast.
    """
    rest = 2 * two - one
    if not 0 <= rest <= one:
        raise ValueError(f"expected one / 2 <= two <= one; got {one} and {two}")
    return (one - rest) / count + rest


def independent(root: Path = ROOT) -> list[list[str]]:
    """Rows of work that is shared out whole; behind each its file."""
    rows = []
    for what, file, where, engine in [
        (
            "videos of Wan2.1-1.3B at 480p, 50 guided dense steps by FlashAttention 3",
            "blade/bench_wan2.1-1.3b.json",
            {"metric": "seconds", "split": "e2e", "nfe": 100},
            "torchrun",
        ),
        (
            "the same in 8 sparse steps, after distillation",
            "blade/bench_wan2.1-1.3b.json",
            {"metric": "seconds", "split": "e2e", "variant": "asa_g"},
            "torchrun",
        ),
        (
            "prompts of that distillation, one a GPU and update",
            "blade/bench_wan2.1-1.3b_training.json",
            {"metric": "seconds", "variant": "update"},
            "accelerate",
        ),
        (
            "prefills of 32 frames by Qwen2.5-VL-7B's decoder",
            "knockout/bench_qwen2.5-vl-7b.json",
            {"metric": "prefill", "variant": "baseline", "frames": 32},
            "-",
        ),
        (
            "the same, its visual tokens leaving on the way",
            "knockout/bench_qwen2.5-vl-7b.json",
            {"metric": "prefill", "variant": "exit", "frames": 32},
            "-",
        ),
    ]:
        seconds = measured(file, where, root) / (1000 if where["metric"] == "prefill" else 1)
        rates = [f"{_number(3600 / seconds * count)}" for count in GPUS]
        rows.append([what, f"{seconds:.3g} s", *rates, engine, file])
    for what, variant, batch in [
        ("tokens of a 7B model alone, 64 requests a GPU", "large", 64),
        ("tokens stitched with a 1.5B model, 1 request a GPU", "stitched", 1),
    ]:
        file = "rstitch/engine_7b_h200.json"
        rate = measured(file, {"metric": "rate", "variant": variant, "batch": batch, "large_batch": 1}, root)
        rates = [_number(3600 * rate * count) for count in GPUS]
        rows.append([what, f"{1000 / rate * batch:.3g} ms", *rates, "hone-rstitch serve", file])
    return rows + batched(root)


def batched(root: Path = ROOT) -> list[list[str]]:
    """Further rows of such work, of calls that make several at a time and are timed in milliseconds."""
    nar, zip_, splat = (
        "nar/bench_l_h200.json",
        "zipr1/bench_decode_h200.json",
        "zpressor/bench_depthsplat_256x448_h200.json",
    )
    prompts = {"metric": "decode", "split": "20480 tokens, batch 64"}
    infinity = "sparsevar/bench_infinity-2b_batch1_h200.json"
    motion, step = "motion_anything/bench_momask_h200.json", "pmloss/step_h200.json"
    six = {"metric": "time", "split": "step", "views": 6}
    rows = []
    for what, file, where, batch in [
        ("images of NAR-L in raster order, 64 at a time", nar, {"metric": "time", "variant": "raster-fused"}, 64),
        ("the same by diagonals", nar, {"metric": "time", "variant": "fused"}, 64),
        ("images of 1024 px by Infinity-2B", infinity, {"metric": "time", "variant": "dense"}, 1),
        ("the same by SparseVAR, 60 % left out of three scales", infinity, {"metric": "time", "variant": "sparse"}, 1),
        ("tokens by Qwen2.5-VL-7B, 64 prompts of 20,480 tokens", zip_, prompts | {"variant": "dense, captured"}, 64),
        ("the same, a quarter of each prompt kept", zip_, prompts | {"variant": "tau 0.25, captured"}, 64),
        ("scenes of 36 pictures by DepthSplat", splat, {"metric": "forward", "views": 36, "variant": "host alone"}, 1),
        ("the same through ZPressor", splat, {"metric": "forward", "views": 36, "variant": "host with ZPressor"}, 1),
        ("training steps of DepthSplat, 6 views", step, six | {"variant": "pictures alone"}, 1),
        ("the same with PM-Loss", step, six | {"variant": "with the term"}, 1),
        ("motions by MoMask as released, 32 at a time", motion, {"metric": "time", "variant": "released loop"}, 32),
        ("the same as one graph", motion, {"metric": "time", "variant": "one graph, fused draws"}, 32),
    ]:
        ms = measured(file, where | ({"batch": batch} if file in (nar, motion) else {}), root)
        rates = [_number(3_600_000 / ms * batch * count) for count in GPUS]
        rows.append([what, f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s", *rates, "-", file])
    return rows


def together(root: Path = ROOT) -> list[list[str]]:
    """Rows of forwards that GPUs share; behind each its file."""
    rows = []
    file = "fpsattention/parallel_wan2.1-14b-720p.json"
    # Times are of 4 of 40 layers.
    video = STEPS * BRANCHES * 10
    for variant, name in [("dense", "dense, cuDNN"), ("window", "window"), ("e4m3 window", "window and E4M3")]:
        where = {"metric": "time", "split": "parallel", "variant": variant}
        one, two = (measured(file, where | {"processes": count}, root) / 1000 for count in (1, 2))
        times = [f"{video * shared(one, two, count):.0f} s" for count in (1, 2, 8)]
        rate = 3600 / (video * shared(one, two, 8)) * GPUS[-1] / 8
        rows.append([name, *times, f"{one / shared(one, two, 8):.1f}", _number(rate), file])
    return rows


TABLES = {
    "independent": (
        ["what", "one takes", "an hour of 1 GPU", "of 8", "of 1,000", "carried there by"],
        independent,
    ),
    "together": (
        ["Wan2.1-14B at 720p", "1 GPU", "2", "8", "speed-up of 8", "videos an hour of 1,000, by eights"],
        together,
    ),
}


def _number(value: float) -> str:
    """Three digits that count, thousands apart."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def update(text: str, root: Path = ROOT) -> str:
    """The page with its tables written anew."""
    if sorted(match["name"] for match in MARKER.finditer(text)) != sorted(TABLES):
        raise TableError(f"{PAGE}: expected each of the tables {', '.join(TABLES)} once")

    def write(match: re.Match[str]) -> str:
        titles, make = TABLES[match["name"]]
        align = ["---", *["---:"] * (len(titles) - 1)]
        rows = make(root)
        lines = "".join("| " + " | ".join(line) + " |\n" for line in [titles, align, *(row[:-1] for row in rows)])
        files = ", ".join(f"`results/{file}`" for file in dict.fromkeys(row[-1] for row in rows))
        return f"<!-- costs: {match['name']} -->\n{lines}\n*From {files}.*\n<!-- /costs -->"

    return MARKER.sub(write, text)


def main() -> int:
    """Write the page, or say that it differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    page = ROOT / PAGE
    text = page.read_text(encoding="utf-8")
    try:
        written = update(text)
    except TableError as error:
        return report([str(error)], "costs")
    if check and written != text:
        return report([f"{PAGE} differs from results/; run python tools/costs.py"], "costs")
    if not check:
        page.write_text(written, encoding="utf-8")
    return report([], "costs")


if __name__ == "__main__":
    raise SystemExit(main())
