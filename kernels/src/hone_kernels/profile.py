"""The verb ``profile``: how busy the matrix units are in attention's forward, by Nsight Compute's hardware counters.

It runs itself under ``ncu`` once per case and keeps what that says of the matrix units, the multiprocessors and the
memory. Counters need the permission to read them; the clock is left as it is.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import logging
import shutil
import subprocess
import sys
from typing import Any

import torch
from hone_core.config import from_dict, to_dict
from hone_core.runs import Better, Report, Run

from hone_kernels.attention import block_sparse_attention
from hone_kernels.attention.bench import Shape, inputs, random_layout
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention
from hone_kernels.config import ProfileConfig
from hone_kernels.gpu import the_gpu

__all__ = ["counters", "prepare", "profile", "run_case"]

COUNTERS = {
    "matrix_units": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "multiprocessors": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "duration": "gpu__time_duration.sum",
}
"""Percent of what the hardware can sustain; the duration is in nanoseconds."""

SECONDS = 120
"""For one case."""

_log = logging.getLogger(__name__)


def prepare(cfg: ProfileConfig) -> ProfileConfig:
    """Check the shapes, and that ncu is there.

    Raises:
        ValueError: A shape is none.
        FileNotFoundError: There is no ncu.
    """
    for shape in cfg.shapes:
        Shape.parse(shape)
    if shutil.which("ncu") is None:
        raise FileNotFoundError("ncu (Nsight Compute) is not on the PATH")
    return cfg


def profile(cfg: ProfileConfig, run: Run) -> Report:
    """Count, and write rows into the run: a row per counter, ``variant`` is the kernel.

    Args:
        cfg: What to count.
        run: The run, entered.

    Raises:
        UnsupportedHardwareError: There is no CUDA device.
        RuntimeError: ncu failed on a case.
    """
    device = the_gpu(run.device)
    for shape, kind, density in itertools.product(cfg.shapes, cfg.kinds, cfg.densities):
        one = dataclasses.replace(cfg, shapes=(shape,), kinds=(kind,), densities=(density,))
        for name, value in _profile(one, device).items():
            unit = "ns" if name == "duration" else "%"
            better: Better = "lower" if name == "duration" else "none"
            labels: dict[str, Any] = {"shape": shape, "density": density}
            run.row(name, value, unit=unit, better=better, variant=kind, split="forward", labels=labels)
    return Report.of(run)


def _profile(cfg: ProfileConfig, device: torch.device) -> dict[str, float]:
    """Counters of the third launch of the attention kernel, in a process of its own."""
    command = [
        "ncu", "--csv", "--page", "raw", "--clock-control", "none", "--kernel-name", "regex:_forward_kernel",
        "--launch-skip", "2", "--launch-count", "1", "--section", "SpeedOfLight", "--section",
        "ComputeWorkloadAnalysis", sys.executable, "-P", "-m", __name__, json.dumps(to_dict(cfg)), str(device),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"ncu failed on {cfg}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    found = counters(done.stdout)
    _log.info("%s, %s, %g: %s", cfg.shapes[0], cfg.kinds[0], cfg.densities[0], found)
    return found


def counters(output: str) -> dict[str, float]:
    """``COUNTERS`` in what ncu printed.

    Raises:
        RuntimeError: It printed no table.
    """
    table = [line for line in output.splitlines() if line.startswith('"')]
    if len(table) < 3:
        raise RuntimeError(f"ncu gave no table: {output[-2000:]}")
    names, _units, values = csv.reader(io.StringIO("\n".join(table[:3])))
    found = dict(zip(names, values, strict=True))
    return {name: float(found[metric].replace(",", "")) for name, metric in COUNTERS.items()}


def run_case(cfg: ProfileConfig) -> None:
    """The first case of a config, so often that the profiled call is a warm one."""
    torch.manual_seed(cfg.seed)
    shape, kind = Shape.parse(cfg.shapes[0]), cfg.kinds[0]
    q, k, v = inputs(shape, torch.bfloat16)
    layout = random_layout(shape.heads, shape.tokens, cfg.densities[0])
    operands = quantize_qkv(q, k, v) if kind == "fp8 triton" else None
    for _ in range(3):
        if operands is not None:
            quantized_attention(operands, layout, backend="triton")
        elif kind != "fp8 triton":
            block_sparse_attention(q, k, v, layout, backend=kind)
    torch.cuda.synchronize()


if __name__ == "__main__":
    with torch.cuda.device(sys.argv[2]):
        run_case(from_dict(ProfileConfig, json.loads(sys.argv[1])))
