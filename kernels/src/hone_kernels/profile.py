"""The verb ``profile``: how busy a kernel keeps matrix units and memory, by Nsight Compute's hardware counters.

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
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from hone_core.config import from_dict, to_dict
from hone_core.runs import Better, Report, Run

from hone_kernels.attention import block_sparse_attention
from hone_kernels.attention.bench import Shape, inputs, random_layout
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention
from hone_kernels.column_mass import column_mass
from hone_kernels.column_mass.bench import parse
from hone_kernels.config import Kind, ProfileConfig
from hone_kernels.gpu import the_gpu
from hone_kernels.ragged_decode import decode_attention
from hone_kernels.token_select import select_tokens

__all__ = ["counters", "prepare", "profile", "run_case"]

COUNTERS = {
    "matrix_units": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "multiprocessors": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "duration": "gpu__time_duration.sum",
}
"""Percent of what the hardware can sustain; the duration is in nanoseconds."""

MEMORY = {"dram": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"}
"""Also of the ops whose keys come from memory."""

KERNELS = {
    "column_mass": ("_lse_kernel", "_mass_kernel"),
    "token_select": ("_select_kernel",),
    "ragged_decode": ("_pieces_kernel",),
}

_SHAPES = {
    "attention": ("wan-1.3b 480p", "cogvideox-5b"),
    "ragged_decode": ("1x28x4x16384x128", "32x28x4x16384x128"),
}
_QWEN = ("1x28x4x16384x128", "8x28x4x16384x128")

_DEVICE = "cuda"

SECONDS = 120
"""For one case."""

_log = logging.getLogger(__name__)


def prepare(cfg: ProfileConfig) -> ProfileConfig:
    """Complete the config, check the shapes, and that ncu is there.

    Raises:
        ValueError: A shape is none.
        FileNotFoundError: There is no ncu.
    """
    cfg = dataclasses.replace(cfg, shapes=cfg.shapes or _SHAPES.get(cfg.op, _QWEN))
    if cfg.op == "attention":
        cfg = dataclasses.replace(cfg, kinds=cfg.kinds or get_args(Kind), densities=cfg.densities or (1.0, 0.1))
    for shape in cfg.shapes:
        (Shape.parse if cfg.op == "attention" else parse)(shape)
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
    if cfg.op != "attention":
        for shape, kernel in itertools.product(cfg.shapes, KERNELS[cfg.op]):
            found = _profile(dataclasses.replace(cfg, shapes=(shape,)), device, kernel)
            _rows(run, found, variant=kernel.strip("_").removesuffix("_kernel"), split=cfg.op, labels={"shape": shape})
        return Report.of(run)
    for shape, kind, density in itertools.product(cfg.shapes, cfg.kinds, cfg.densities):
        one = dataclasses.replace(cfg, shapes=(shape,), kinds=(kind,), densities=(density,))
        found = _profile(one, device, "_forward_kernel")
        _rows(run, found, variant=kind, split="forward", labels={"shape": shape, "density": density})
    return Report.of(run)


def _rows(run: Run, found: dict[str, float], **fields: Any) -> None:
    for name, value in found.items():
        unit = "ns" if name == "duration" else "%"
        better: Better = "lower" if name == "duration" else "none"
        run.row(name, value, unit=unit, better=better, **fields)


def _profile(cfg: ProfileConfig, device: torch.device, kernel: str) -> dict[str, float]:
    """Counters of the third launch of a kernel, in a process of its own."""
    command = [
        "ncu", "--csv", "--page", "raw", "--clock-control", "none", "--kernel-name", f"regex:{kernel}",
        "--launch-skip", "2", "--launch-count", "1", "--section", "SpeedOfLight", "--section",
        "ComputeWorkloadAnalysis", sys.executable, "-P", "-m", __name__, json.dumps(to_dict(cfg)), str(device),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"ncu failed on {cfg}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    found = counters(done.stdout, COUNTERS if cfg.op == "attention" else COUNTERS | MEMORY)
    _log.info("%s, %s: %s", cfg, kernel, found)
    return found


def counters(output: str, wanted: Mapping[str, str]) -> dict[str, float]:
    """Counters in what ncu printed.

    Args:
        output: Of ncu.
        wanted: Name to ncu's.

    Raises:
        RuntimeError: It printed no table.
    """
    table = [line for line in output.splitlines() if line.startswith('"')]
    if len(table) < 3:
        raise RuntimeError(f"ncu gave no table: {output[-2000:]}")
    names, _units, values = csv.reader(io.StringIO("\n".join(table[:3])))
    found = dict(zip(names, values, strict=True))
    return {name: float(found[metric].replace(",", "")) for name, metric in wanted.items()}


def run_case(cfg: ProfileConfig) -> None:
    """The first case of a config, so often that the profiled call is a warm one."""
    torch.manual_seed(cfg.seed)
    if cfg.op != "attention":
        call = _tokens(cfg)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        return
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


def _tokens(cfg: ProfileConfig) -> Callable[[], object]:
    """A call of column_mass, token_select or ragged_decode."""
    batch, heads, heads_k, tokens, dim = parse(cfg.shapes[0])
    given: dict[str, Any] = dict(device=_DEVICE, dtype=torch.float16)
    k, v = (torch.randn(batch, heads_k, tokens, dim, **given) for _ in range(2))
    every = torch.ones(batch, tokens, dtype=torch.bool, device=_DEVICE)
    if cfg.op == "ragged_decode":
        q = torch.randn(batch, heads, 1, dim, **given)
        return lambda: decode_attention(q, k, v, every, backend="triton")
    if cfg.op == "column_mass":
        q = torch.randn(batch, heads, tokens, dim, **given)
        last = min(64, tokens)
        drawn = torch.randperm(tokens - last, device=_DEVICE)[:64].sort().values
        rows = torch.cat([drawn, torch.arange(tokens - last, tokens, device=_DEVICE)]).expand(batch, -1)
        return lambda: column_mass(q, k, rows, backend="triton")
    mass = torch.rand(batch, tokens, device=_DEVICE)
    p, protected = torch.full((batch,), 0.975, device=_DEVICE), ~every
    return lambda: select_tokens(mass, real=every, protected=protected, mass=mass, p=p, backend="triton")


if __name__ == "__main__":
    with torch.cuda.device(sys.argv[2]):
        run_case(from_dict(ProfileConfig, json.loads(sys.argv[1])))
