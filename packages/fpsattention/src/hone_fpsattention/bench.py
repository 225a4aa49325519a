"""What FPSAttention costs and saves: one attention and one forward, beside dense attention on the same device.

The models are the published architectures with random weights, so time and memory mean something and pictures do not.
Dense attention is the fastest kernel that runs there: cuDNN's, and FlashAttention's where it is installed. Each time is
of the whole attention (prologue, kernel and what puts slots back), with its pieces beside it. Linear layers in E4M3 are
a variant of their own, never counted as attention.
"""

from __future__ import annotations

import gc
import importlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import MissingExtraError, UnsupportedHardwareError
from hone_core.runs import Report, Run
from hone_core.timing import Timing, check_values, measure_interleaved
from hone_kernels.attention import BlockLayout, block_sparse_attention
from hone_kernels.attention.bench import providers
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention
from hone_video.architectures import FULL_SIZE, full_size, tiny
from hone_video.workloads import HD_WORKLOADS, WORKLOADS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .config import BenchConfig, FPSAttentionConfig
from .method import Plan, fps_attention
from .models import attach, plan_for
from .windows import density

__all__ = ["BenchReport", "bench"]

_TOLERANCE = {False: 1e-2, True: 0.12}
"""Relative error (norm) of the attention against exact attention over the same keys, without and with E4M3: on random
data the format itself costs 5.5 %."""


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """What was measured; as text, times by part, beside the fastest dense kernel's."""

    def __str__(self) -> str:
        lines = []
        times = [row for row in self.rows if row.metric == "time"]
        for key in dict.fromkeys((row.split, str(row.labels.get("mode", ""))) for row in times):
            rows = [row for row in times if (row.split, str(row.labels.get("mode", ""))) == key]
            dense = min(row.value for row in rows if "dense" in row.variant)
            lines.append(f"{' '.join(key).strip()}, {rows[0].labels['model']}")
            for row in rows:
                of = f", part of {row.labels['of']}" if "of" in row.labels else f"  {dense / row.value:6.2f} x dense"
                lines.append(f"  {row.variant:<20} {row.value:>10.3f} ms +- {row.spread or 0:.2g}{of}")
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Measure, and write rows into the run.

    ``split`` of a row is the part; ``variant`` is a dense kernel, ``window``, ``e4m3``, ``e4m3 window``, or a piece of
    the last. Rows are ``time`` (``ms``), ``peak_memory`` (``GiB``, weights included), the densities of the window, and
    of a forward ``expected``: dense less what one attention saves, times the layers.

    Args:
        cfg: What to measure.
        run: The run, entered.

    Raises:
        UnsupportedHardwareError: A published size is asked of a CPU, or the GPU has no E4M3.
        MissingExtraError: Linear layers in E4M3 are asked for and torchao is not installed.
        RuntimeError: An attention differs from its reference on this device; no time is reported then.
    """
    device = resolve_device(run.device)
    work = (WORKLOADS | HD_WORKLOADS)[cfg.model]
    if device.type == "cpu" and work.model in FULL_SIZE:
        raise UnsupportedHardwareError(
            f"{cfg.model} at its published size needs a CUDA device", found="no CUDA device", use="tiny-wan"
        )
    if cfg.e4m3_linears:
        _check_linears(device)
    torch.manual_seed(cfg.seed)
    with torch.no_grad():
        _Bench(cfg, run, device).all()
    return BenchReport.of(run)


class _Bench:
    """The state that the parts share."""

    def __init__(self, cfg: BenchConfig, run: Run, device: torch.device) -> None:
        self.cfg, self.run, self.device = cfg, run, device
        self.work = (WORKLOADS | HD_WORKLOADS)[cfg.model]
        self.dtype = resolve_dtype(cfg.dtype, device)
        shape: Any = self.build(1, "meta").config
        self.heads, self.dim = shape.num_attention_heads, shape.attention_head_dim
        self.layers = FULL_SIZE[self.work.model][1]["num_layers"] if self.work.model in FULL_SIZE else 2
        self.saved: dict[str, float] = {}
        self.dense_attention = ""

    def all(self) -> None:
        if "attention" in self.cfg.parts:
            self.attention()
        if "forward" in self.cfg.parts:
            self.forward()

    def build(self, layers: int, device: torch.device | str) -> nn.Module:
        """The transformer, with so many layers."""
        if self.work.model in FULL_SIZE:
            return full_size(self.work.model, device=device, dtype=self.dtype, num_layers=layers)
        options = {} if self.work.kind == "wan" else {"max_text_seq_length": self.work.text_tokens}
        return tiny(self.work.kind, self.cfg.seed, num_layers=layers, **options).to(device)

    def plan(self, cfg: FPSAttentionConfig) -> Plan:
        return plan_for(cfg.regimes[0], cfg, self.work.grid, self.work.joint_text, self.device)

    def row(self, part: str, metric: str, value: float, variant: str, *, unit: str = "", **options: Any) -> None:
        better: Literal["none", "lower"] = "none" if metric.startswith("density") or metric == "expected" else "lower"
        labels = {"model": self.cfg.model, **options.pop("labels", {})}
        self.run.row(metric, value, unit=unit, better=better, variant=variant, split=part, labels=labels, **options)

    def times(self, part: str, timings: dict[str, Timing], **labels: Any) -> None:
        for variant, timing in timings.items():
            # Half the width between the 20th and the 80th percentile, which outliers do not reach.
            spread = (timing.ms_p80 - timing.ms_p20) / 2
            self.row(part, "time", timing.ms_p50, variant, unit="ms", n=timing.n, spread=spread, labels=labels)
            if timing.peak_bytes is not None and labels.get("of") is None:
                peak = timing.peak_bytes / 2**30
                self.row(part, "peak_memory", peak, variant, unit="GiB", labels=labels)

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # One attention.

    def attention(self) -> None:
        q, k, v = (
            torch.randn(1, self.work.tokens, self.heads, self.dim, device=self.device, dtype=self.dtype).transpose(1, 2)
            for _ in range(3)
        )
        variants = self.cfg.variants
        for name, cfg in variants.items():
            self.check(name, cfg, q, k, v)
        dense = self.dense_kernels()
        calls: dict[str, Callable[[], object]] = {name: partial(f, q, k, v) for name, f in dense.items()}
        for name, cfg in variants.items():
            calls[name] = partial(fps_attention, q, k, v, plan=self.plan(cfg), cfg=cfg)
        both = variants["e4m3 window"]
        plan = self.plan(both)
        options: Any = {"block": plan.block, "group": plan.groups, "smooth_k": both.smooth_k, "k_valid": plan.valid}
        operands = quantize_qkv(q, k, v, order=plan.slots, **options)
        slots = torch.randn(1, len(plan.slots), self.heads, self.dim, device=self.device, dtype=self.dtype)
        pieces: dict[str, Callable[[], object]] = {
            "prologue": lambda: quantize_qkv(q, k, v, order=plan.slots, **options),
            "kernel": lambda: quantized_attention(operands, plan.layout, out_dtype=self.dtype),
            "back from slots": lambda: slots.transpose(1, 2).index_select(2, plan.places),
        }
        timings = measure_interleaved(
            calls | pieces, warmup=3, rounds=self.cfg.rounds, seed=self.cfg.seed, device=self.device
        )
        self.times("attention", {name: timings[name] for name in calls}, heads=self.heads, dim=self.dim)
        self.times("attention", {name: timings[name] for name in pieces}, of="e4m3 window")
        self.dense_attention = min(dense, key=lambda name: timings[name].ms_p50)
        self.saved = {name: timings[self.dense_attention].ms_p50 - timings[name].ms_p50 for name in variants}
        for name, cfg in variants.items():
            window, text = cfg.regimes[0].window, self.work.joint_text
            found = density(self.work.grid, cfg.tile, window, border=cfg.border, text_tokens=text, block=cfg.block)
            for kind, value in found._asdict().items():
                self.row("attention", f"density_{kind}", value, name)
        self.clear()

    def dense_kernels(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """Dense attention by whatever runs here."""
        if self.device.type == "cpu":
            return {"dense": scaled_dot_product_attention}
        layout = BlockLayout.dense(self.work.tokens, self.work.tokens, device=self.device)
        found = providers(layout, self.dtype, ())
        return {name: found[name] for name in found if name.endswith("dense") and not name.startswith("sage")}

    def check(self, name: str, cfg: FPSAttentionConfig, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Values first: a wrong kernel is not timed."""
        plan = self.plan(cfg)
        # One head is enough, and the reference is slow: some rows of queries, over all of their keys.
        q, k, v = (x[:, :1] for x in (q, k, v))
        got = fps_attention(q, k, v, plan=plan, cfg=cfg)
        rows = torch.arange(0, len(plan.slots) // plan.block, max(1, len(plan.slots) // plan.block // 8))
        wide_q, wide_k, wide_v = (x.float().index_select(2, plan.slots) for x in (q, k, v))
        lists = plan.layout
        some = BlockLayout(
            lists.kv_num[:, :, rows].contiguous(), lists.kv_idx[:, :, rows].contiguous(), len(rows) * plan.block,
            lists.tokens_k, plan.block, plan.block, lists.k_valid,
        )  # fmt: skip
        slots = (rows[:, None] * plan.block + torch.arange(plan.block)).flatten().to(self.device)
        want = block_sparse_attention(wide_q[:, :, slots], wide_k, wide_v, some, backend="reference")
        place = torch.full((len(plan.slots),), -1, device=self.device)
        place[plan.places] = torch.arange(plan.tokens, device=self.device)
        kept = place[slots] >= 0
        check_values(
            f"{name} attention",
            got[:, :, place[slots[kept]]],
            want[:, :, kept],
            tolerance=_TOLERANCE[cfg.regimes[0].e4m3],
            advice="Run the tests of hone-kernels on this device",
        )

    # One forward.

    def forward(self) -> None:
        layers = self.cfg.layers or self.layers
        model = self.build(layers, self.device)
        inputs = self.model_inputs(model)
        labels: dict[str, Any] = {} if layers == self.layers else {"layers": f"{layers} of {self.layers}"}
        self.forwards(model, inputs, mode="eager", **labels)
        if self.cfg.compile_blocks:
            blocks: Any = model.blocks if self.work.kind == "wan" else model.transformer_blocks
            for block in blocks:
                block.compile(fullgraph=True)
            self.forwards(model, inputs, mode="compiled blocks", **labels)
            for block in blocks:
                block._compiled_call_impl = None
        if self.cfg.e4m3_linears:
            _round_linears(model)
            self.forwards(model, inputs, mode="eager, linear layers in E4M3", **labels)

    def forwards(self, model: nn.Module, inputs: dict[str, Any], **labels: Any) -> None:
        def call(cfg: FPSAttentionConfig | None) -> Callable[[], object]:
            def run() -> object:
                # Replacing the processors takes well under a millisecond, and keeps the variants in one random order.
                with nullcontext() if cfg is None else attach(model, cfg), self.dense_backend():
                    return model(**inputs, return_dict=False)[0]

            return run

        calls = {"dense": call(None)} | {name: call(cfg) for name, cfg in self.cfg.variants.items()}
        options: Any = {"rounds": self.cfg.forward_rounds, "seed": self.cfg.seed, "device": self.device}
        timings = measure_interleaved(calls, warmup=2, **options)
        self.times("forward", timings, **labels)
        for name, saved in self.saved.items():
            layers = self.cfg.layers or self.layers
            expected = timings["dense"].ms_p50 - layers * saved
            labels_of = {**labels, "dense": self.dense_attention}
            self.row("forward", "expected", expected, name, unit="ms", labels=labels_of)

    def dense_backend(self) -> Any:
        """CuDNN and nothing else on a GPU."""
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.device.type == "cuda" else nullcontext()

    def model_inputs(self, model: Any) -> dict[str, Any]:
        work, config = self.work, model.config
        like: Any = {"device": self.device, "dtype": self.dtype}
        frames, height, width = work.grid
        text = config.text_dim if work.kind == "wan" else config.text_embed_dim
        inputs: dict[str, Any] = {
            "timestep": torch.full((1,), 500, device=self.device),
            "encoder_hidden_states": torch.randn(1, work.text_tokens, text, **like),
        }
        if work.kind == "wan":
            shape = (1, config.in_channels, frames, 2 * height, 2 * width)
        else:
            shape = (1, frames, config.in_channels, 2 * height, 2 * width)
            angles = torch.rand(math.prod(work.grid), config.attention_head_dim, device=self.device)
            inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
        return {"hidden_states": torch.randn(shape, **like), **inputs}


def _check_linears(device: torch.device) -> None:
    """Whether linear layers can run in E4M3 here, before anything is timed."""
    try:
        importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise MissingExtraError("linears", "hone-fpsattention", "Linear layers in E4M3") from error
    if device.type == "cpu" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UnsupportedHardwareError(
            "torchao's linear layers in E4M3 need a GPU of compute capability 8.9",
            found=device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            use="bench without --e4m3-linears",
        )


def _round_linears(model: nn.Module) -> None:
    """Linear layers of the blocks in E4M3, weights and activations, by torchao."""
    torchao = importlib.import_module("torchao.quantization")
    torchao.quantize_(
        model,
        torchao.Float8DynamicActivationFloat8WeightConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and "blocks." in name,
    )
