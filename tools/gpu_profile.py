"""How busy the matrix units are in block-sparse attention, by Nsight Compute's hardware counters.

    python tools/gpu_profile.py --out results/kernels/profile_h200.json

runs itself under ``ncu`` once per case and keeps what it says of the matrix units, the multiprocessors and the memory.
Counters need the permission to read them; the clock is left as it is.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from gpu_attention import SHAPES, inputs
from hone_core.environment import environment
from hone_kernels.attention import block_sparse_attention
from hone_kernels.attention.bench import random_layout
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention

CASES = {
    f"{shape}, {kind}, keep {density:g}": (shape, kind, density)
    for shape in ("wan-1.3b 480p", "cogvideox-5b")
    for kind in ("gluon", "triton", "fp8 triton")
    for density in (1.0, 0.1)
}
# Percent of what the hardware can sustain; the duration is in nanoseconds.
COUNTERS = {
    "matrix_units": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "multiprocessors": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "duration_ns": "gpu__time_duration.sum",
}


def run_case(name: str) -> None:
    """The case, so often that the profiled call is a warm one."""
    shape, kind, density = CASES[name]
    heads, tokens, dim = SHAPES[shape]
    q, k, v = inputs(heads, tokens, dim)
    layout = random_layout(heads, tokens, density)
    if kind == "fp8 triton":
        operands = quantize_qkv(q, k, v)
        call = lambda: quantized_attention(operands, layout, backend="triton")  # noqa: E731
    else:
        call = lambda: block_sparse_attention(q, k, v, layout, backend=kind)  # noqa: E731
    for _ in range(3):
        call()
    torch.cuda.synchronize()


def profile(name: str) -> dict[str, float]:
    """Counters of the third launch of the attention kernel."""
    command = [
        "ncu", "--csv", "--page", "raw", "--clock-control", "none", "--kernel-name", "regex:_forward_kernel",
        "--launch-skip", "2", "--launch-count", "1", "--section", "SpeedOfLight", "--section",
        "ComputeWorkloadAnalysis", sys.executable, *(["-P"] if sys.flags.safe_path else []), __file__, "--case", name,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    table = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or len(table) < 3:
        sys.exit(f"ncu failed on {name!r}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    names, _units, values = csv.reader(io.StringIO("\n".join(table[:3])))
    found = dict(zip(names, values, strict=True))
    return {name: float(found[metric].replace(",", "")) for name, metric in COUNTERS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        torch.manual_seed(0)
        run_case(args.case)
        return
    if args.out is None:
        parser.error("--out is missing")
    if shutil.which("ncu") is None:
        sys.exit("ncu (Nsight Compute) is not on the PATH")
    rows = []
    for name in args.cases:
        shape, kind, density = CASES[name]
        counters = profile(name)
        print(name, counters, flush=True)
        rows.append({"op": "attention", "shape": shape, "provider": kind, "density": density, **counters})
    result = {
        "schema": 1, "package": "hone-kernels", "verb": "attention profile", "environment": environment(), "rows": rows,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
