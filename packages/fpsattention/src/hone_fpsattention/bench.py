"""What FPSAttention costs and saves: one attention, one forward and a denoising loop, beside dense attention there.

The models are the published architectures with random weights, so time and memory mean something and pictures do not.
Dense attention is cuDNN's, and FlashAttention 3's and 4's where they are installed: what counts is the fastest. Each
time is of the whole attention (prologue and kernel), with its pieces beside it. Linear layers in E4M3 are a variant of
their own, never counted as attention.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from hone_core.devices import resolve_device, resolve_dtype, use_device
from hone_core.errors import UnsupportedHardwareError
from hone_core.runs import Report, Run
from hone_core.timing import Stopwatch, Timing, check_values, measure_interleaved
from hone_kernels.attention import BlockLayout, block_sparse_attention
from hone_kernels.attention.bench import dense_kernels
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention
from hone_kernels.attention_fp8.reference import rotate
from hone_video.architectures import FULL_SIZE, full_size, tiny
from hone_video.handle import attach_kernel
from hone_video.workloads import HD_WORKLOADS, WORKLOADS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .config import PRESETS, BenchConfig, FPSAttentionConfig, Regime
from .inputs import check_launch
from .linears import check_linears, round_linears
from .method import Plan, fps_attention
from .models import attach, plan_for
from .windows import density

__all__ = ["BenchReport", "bench"]

log = logging.getLogger(__name__)

DENSE = Regime(e4m3=False)
"""What dense kernels are compared with."""

_BLOCKS = (["blocks"], ["transformer_blocks"], ["single_transformer_blocks"])
"""Where models keep their blocks."""

_TOLERANCE = {False: 1e-2, True: 0.12}
"""Relative error (norm) of the attention against exact attention over the same keys, without and with E4M3: on random
data the format itself costs 5.5 %."""

_ROUNDING = {True: 1e-4, False: 3e-2}
"""Relative error of a forward in several processes against one, in float32 and in 16 bits: matrix products of another
shape add in another order, at every layer, and E4M3 makes a last bit an eighth of a value now and then."""


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
    the last; in a loop also ``schedule``, the regimes of the model's preset. Rows are ``time`` (``ms``),
    ``peak_memory`` (``GiB``; of one attention with q, k and v, where q's may be taken, of a forward with the weights),
    the densities of the window, ``prologue_share`` of an attention, ``attention_share`` of a dense forward, and of a
    forward ``expected``: dense less what one attention saves, times the layers.

    Args:
        cfg: What to measure.
        run: The run, entered.

    Raises:
        UnsupportedHardwareError: A published size is asked of a CPU, or the GPU has no E4M3.
        ValueError: Several processes were launched for parts of one, or the reverse.
        MissingExtraError: Linear layers in E4M3 are asked for and torchao is not installed.
        RuntimeError: An attention differs from its reference on this device; no time is reported then.
    """
    device = resolve_device(run.device)
    work = (WORKLOADS | HD_WORKLOADS)[cfg.model]
    if device.type == "cpu" and work.model in FULL_SIZE:
        raise UnsupportedHardwareError(
            f"{cfg.model} at its published size needs a CUDA device", found="no CUDA device", use="tiny-wan"
        )
    check_launch(cfg)
    if cfg.e4m3_linears:
        check_linears(device)
    torch.manual_seed(cfg.seed)
    with torch.no_grad():
        _Bench(cfg, run, device).all()
    return BenchReport.of(run)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Bench:
    """The state that the parts share."""

    def __init__(self, cfg: BenchConfig, run: Run, device: torch.device) -> None:
        self.cfg, self.run, self.device = cfg, run, device
        self.work = (WORKLOADS | HD_WORKLOADS)[cfg.model]
        # The tiny models are float32.
        self.dtype = resolve_dtype(cfg.dtype if self.work.model in FULL_SIZE else "float32", device)
        shape: Any = self.build(1, "meta").config
        self.heads, self.dim = shape.num_attention_heads, shape.attention_head_dim
        published = FULL_SIZE[self.work.model][1] if self.work.model in FULL_SIZE else {"num_layers": 2}
        self.layers = published["num_layers"] + published.get("num_single_layers", 0)
        self.one: dict[str, float] = {}  # milliseconds of one attention
        self.dense = self.dense_kernels()

    def all(self) -> None:
        if "attention" in self.cfg.parts:
            self.attention()
        if "forward" in self.cfg.parts:
            self.forward()
        if "loop" in self.cfg.parts:
            self.loop()
        if "parallel" in self.cfg.parts:
            self.parallel()

    def build(self, layers: int, device: torch.device | str) -> nn.Module:
        """The transformer, with so many layers; of HunyuanVideo's a third has two streams, as published."""
        options: dict[str, Any] = {"num_layers": layers}
        if self.work.kind == "hunyuan":
            options = {"num_layers": -(-layers // 3), "num_single_layers": layers - -(-layers // 3)}
        if self.work.model in FULL_SIZE:
            return full_size(self.work.model, device=device, dtype=self.dtype, **options)
        if self.work.kind == "cogvideox":
            options["max_text_seq_length"] = self.work.text_tokens
        return tiny(self.work.kind, self.cfg.seed, **options).to(device)

    def plan(self, cfg: FPSAttentionConfig) -> Plan:
        return plan_for(cfg.regimes[0], cfg, self.work.grid, self.work.joint_text, self.device)

    def row(self, part: str, metric: str, value: float, variant: str, *, unit: str = "", **options: Any) -> None:
        better: Literal["none", "lower"] = "lower" if metric in ("time", "peak_memory", "prologue_share") else "none"
        labels = {"model": self.cfg.model, **options.pop("labels", {})}
        self.run.row(metric, value, unit=unit, better=better, variant=variant, split=part, labels=labels, **options)

    def times(self, part: str, timings: dict[str, Timing], *, peak: bool = True, **labels: Any) -> None:
        for variant, timing in timings.items():
            # Half the width between the 20th and the 80th percentile, which outliers do not reach.
            spread = (timing.ms_p80 - timing.ms_p20) / 2
            self.row(part, "time", timing.ms_p50, variant, unit="ms", n=timing.n, spread=spread, labels=labels)
            if timing.peak_bytes is not None and peak:
                self.row(part, "peak_memory", timing.peak_bytes / 2**30, variant, unit="GiB", labels=labels)

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # One attention.

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random, in memory as projections leave them."""
        shape = (1, self.work.tokens, self.heads, self.dim)
        like: Any = {"device": self.device, "dtype": self.dtype}
        return tuple(torch.randn(shape, **like).transpose(1, 2) for _ in range(3))  # type: ignore[return-value]

    def attention(self) -> None:
        q, k, v = self.qkv()
        variants = self.cfg.variants
        calls: dict[str, Attend] = dict(self.dense)
        exact = self.cfg.attention.constant(DENSE)
        for name, call in self.dense.items():
            self.check(name, call, exact, q, k, v)
        for name, cfg in variants.items():
            calls[name] = partial(fps_attention, plan=self.plan(cfg), cfg=cfg)
            self.check(f"{name} attention", calls[name], cfg, q, k, v)
        pieces = self.pieces(variants["e4m3 window"], q, k, v)
        timings = measure_interleaved(
            {name: partial(call, q, k, v) for name, call in calls.items()} | pieces,
            warmup=2, rounds=self.cfg.rounds, seed=self.cfg.seed, device=self.device,
        )  # fmt: skip
        self.times("attention", {name: timings[name] for name in calls}, peak=False, heads=self.heads, dim=self.dim)
        self.times("attention", {name: timings[name] for name in pieces}, peak=False, of="e4m3 window")
        self.one = {name: timings[name].ms_p50 for name in calls}
        share = timings["prologue"].ms_p50 / self.one["e4m3 window"]
        self.row("attention", "prologue_share", share, "e4m3 window")
        for name, cfg in variants.items():
            window, text = cfg.regimes[0].window, self.work.joint_text
            found = density(self.work.grid, cfg.tile, window, border=cfg.border, text_tokens=text, block=cfg.block)
            for kind, value in found._asdict().items():
                self.row("attention", f"density_{kind}", value, name)
        del q, k, v, pieces
        if self.device.type == "cuda":
            self.peaks(calls)

    def pieces(self, cfg: FPSAttentionConfig, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
        """What the attention is made of, and what the rotary embedding adds to the prologue or costs apart from it."""
        plan = self.plan(cfg)
        prologue = partial(
            quantize_qkv, q, k, v, order=plan.slots, block=plan.block, group=plan.groups, longest=plan.longest,
            smooth_k=cfg.smooth_k, for_lse=False, k_valid=plan.valid,
        )  # fmt: skip
        angle = torch.rand(plan.tokens, self.dim // 2, device=self.device) * 6
        rope = (angle.cos(), angle.sin())
        operands, out = prologue(), torch.empty_like(q)
        return {
            "prologue": prologue,
            "kernel": lambda: quantized_attention(operands, plan.layout, out=out, order=plan.slots),
            "prologue, rotating": partial(prologue, rope=rope),
            "rotation apart": lambda: (rotate(q, *rope), rotate(k, *rope)),
        }

    def peaks(self, calls: dict[str, Attend]) -> None:
        """The most memory of one attention with its q, k and v; ours may take that of q."""
        for name, call in calls.items():
            self.clear()
            before = torch.cuda.memory_allocated(self.device)
            q, k, v = self.qkv()
            options = {} if name in self.dense else {"overwrite_q": True}
            with Stopwatch(self.device) as watch:
                call(q, k, v, **options)
            del q, k, v
            assert watch.peak_bytes is not None
            self.row("attention", "peak_memory", (watch.peak_bytes - before) / 2**30, name, unit="GiB")
        self.clear()

    def dense_kernels(self) -> dict[str, Attend]:
        """Dense attention by whatever runs here."""
        if self.device.type == "cpu":
            return {"dense": scaled_dot_product_attention}
        return {name: call for name, call in dense_kernels(self.dtype).items() if not name.startswith("sage")}

    @property
    def fastest(self) -> str:
        """Of the dense kernels."""
        return min(self.dense, key=lambda name: self.one.get(name, math.inf))

    def check(self, name: str, attend: Attend, cfg: FPSAttentionConfig, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Values first: a wrong kernel is not timed."""
        plan = self.plan(cfg)
        # One head is enough, and the reference is slow: some rows of queries, over all of their keys.
        q, k, v = (x[:, :1] for x in (q, k, v))
        got = attend(q, k, v)
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
            name,
            got[:, :, place[slots[kept]]],
            want[:, :, kept],
            tolerance=_TOLERANCE[cfg.regimes[0].e4m3],
            advice="Run the tests of hone-kernels on this device",
        )

    # One forward, and a loop of them.

    def forward(self) -> None:
        layers = self.cfg.layers or self.layers
        model = self.build(layers, self.device)
        inputs = self.model_inputs(model)
        labels: dict[str, Any] = {} if layers == self.layers else {"layers": f"{layers} of {self.layers}"}
        linears = ", linear layers in E4M3"
        dense = self.dense_contexts(model)
        self.forwards(model, inputs, dense, mode="eager", **labels)
        if self.cfg.compile_blocks:
            self.compiled(model, inputs, mode="compiled blocks", **labels)
        if self.cfg.e4m3_linears:
            round_linears(model)
            self.forwards(model, inputs, dense, mode=f"eager{linears}", **labels)
            if self.cfg.compile_blocks:
                self.compiled(model, inputs, mode=f"compiled blocks{linears}", **labels)
        del model, inputs
        self.clear()

    def compiled(self, model: Any, inputs: dict[str, Any], **labels: Any) -> None:
        blocks = [block for name, block in model.named_modules() if name.split(".")[:-1] in _BLOCKS]
        for block in blocks:
            block.compile(fullgraph=True)
        # Kernels of others may not compile without a graph break.
        self.forwards(model, inputs, {"dense": self.dense_contexts(model)["dense"]}, **labels)
        for block in blocks:
            block._compiled_call_impl = None

    def dense_contexts(self, model: nn.Module) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        """The dense model by each kernel: cuDNN's through the model's own code, others in its place."""
        found: dict[str, Callable[[], AbstractContextManager[Any]]] = {"dense": nullcontext}
        if self.work.kind == "hunyuan":
            # Its own mask hides nothing here, and no fast kernel takes one.
            first = next(iter(self.dense.values()))
            found["dense"] = partial(attach_kernel, model, first)
        for name, attend in self.dense.items():
            if name.startswith("flash"):
                found[name] = partial(attach_kernel, model, attend)
        return found

    def forwards(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        dense: dict[str, Callable[[], AbstractContextManager[Any]]],
        **labels: Any,
    ) -> None:
        def call(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], object]:
            def run() -> object:
                # Replacing the processors takes well under a millisecond, and keeps the variants in one random order.
                with context(), self.dense_backend():
                    return model(**inputs, return_dict=False)[0]

            return run

        contexts = dense | {name: partial(attach, model, cfg) for name, cfg in self.cfg.variants.items()}
        calls = {name: call(context) for name, context in contexts.items()}
        options: Any = {"rounds": self.cfg.forward_rounds, "seed": self.cfg.seed, "device": self.device}
        timings = measure_interleaved(calls, warmup=1, **options)
        self.times("forward", timings, **labels)
        if not self.one:
            return
        best = min(dense, key=lambda name: timings[name].ms_p50)
        # The kernel that the dense model ran with.
        kernel = best if best in self.one else "cudnn dense"
        attention = self.one[kernel]
        total, layers = timings[best].ms_p50, self.cfg.layers or self.layers
        labels = {**labels, "dense": kernel}
        self.row("forward", "attention_share", layers * attention / total, best, labels=labels)
        for name in self.cfg.variants:
            expected = total - layers * (attention - self.one[name])
            self.row("forward", "expected", expected, name, unit="ms", labels=labels)

    def dense_backend(self) -> Any:
        """CuDNN and nothing else on a GPU, but in HunyuanVideo, whose text has a mask before it joins the video."""
        if self.device.type != "cuda" or self.work.kind == "hunyuan":
            return nullcontext()
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)

    def loop(self) -> None:
        """All denoising steps of a video, without text encoder and VAE, which stay as they are."""
        from diffusers import UniPCMultistepScheduler

        layers = self.cfg.layers or self.layers
        model = self.build(layers, self.device)
        inputs = self.model_inputs(model)
        schedule = PRESETS[self.cfg.schedule].config
        # HunyuanVideo is distilled for guidance; the others run twice a step.
        branches = 1 if self.work.kind == "hunyuan" else 2
        dense = self.dense_contexts(model)
        contexts = {name: dense[name] for name in ("dense", self.fastest) if name in dense}
        contexts |= {name: partial(attach, model, cfg) for name, cfg in self.cfg.variants.items()}
        contexts["schedule"] = partial(attach, model, schedule)

        def run(steps: int | None) -> None:
            scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=schedule.shift
            )
            scheduler.set_timesteps(self.cfg.loop_steps, device=self.device)
            latents = inputs["hidden_states"]
            for t in scheduler.timesteps[:steps]:
                given = {**inputs, "hidden_states": latents.to(self.dtype), "timestep": t.expand(1)}
                for _ in range(branches):
                    velocity = model(**given, return_dict=False)[0]
                latents = scheduler.step(velocity, t, latents, return_dict=False)[0]

        labels: dict[str, Any] = {"steps": self.cfg.loop_steps, "forwards": branches * self.cfg.loop_steps}
        if layers != self.layers:
            labels["layers"] = f"{layers} of {self.layers}"
        for name, context in contexts.items():
            with context(), self.dense_backend():
                run(1)
                with Stopwatch(self.device) as watch:
                    run(None)
            self.row("loop", "time", watch.seconds * 1e3, name, unit="ms", n=1, labels=labels)
        del model, inputs
        self.clear()

    def parallel(self) -> None:
        """One forward by each process alone, and by all together under diffusers' Ulysses."""
        import torch.distributed as dist
        from diffusers import ContextParallelConfig

        use_device(self.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "cpu:gloo")
        layers, count = self.cfg.layers or self.layers, dist.get_world_size()
        model: Any = self.build(layers, self.device)
        inputs = self.model_inputs(model)
        labels: dict[str, Any] = {} if layers == self.layers else {"layers": f"{layers} of {self.layers}"}
        contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {"dense": nullcontext}
        contexts |= {name: partial(attach, model, cfg) for name, cfg in self.cfg.variants.items()}

        def call(name: str) -> Tensor:
            with contexts[name](), self.dense_backend():
                return model(**inputs, return_dict=False)[0]

        # The call that is compared warms up.
        options: Any = {"rounds": self.cfg.forward_rounds, "seed": self.cfg.seed, "device": self.device, "warmup": 0}
        calls = {name: partial(call, name) for name in contexts}
        log.info("each process alone: %s", ", ".join(contexts))
        alone = {name: call(name) for name in contexts}
        self.times("parallel", measure_interleaved(calls, **options), mode="alone", processes=1, **labels)
        uneven = bool(self.heads % count or self.work.tokens % count)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count, ulysses_anything=uneven))
        log.info("%d processes together", count)
        tolerance = _ROUNDING[self.dtype == torch.float32]
        for name in contexts:
            error = check_values(f"{name} in {count} processes", call(name), alone[name], tolerance=tolerance)
            self.row("parallel", "relative_error", error, name, labels={"processes": count, **labels})
        self.times("parallel", measure_interleaved(calls, **options), mode="together", processes=count, **labels)

    def model_inputs(self, model: Any) -> dict[str, Any]:
        work, config = self.work, model.config
        like: Any = {"device": self.device, "dtype": self.dtype}
        frames, height, width = work.grid
        text = config.text_dim if work.kind == "wan" else config.text_embed_dim
        inputs: dict[str, Any] = {
            "timestep": torch.full((1,), 500, device=self.device),
            "encoder_hidden_states": torch.randn(1, work.text_tokens, text, **like),
        }
        shape = (1, config.in_channels, frames, 2 * height, 2 * width)
        if work.kind == "hunyuan":
            inputs["encoder_attention_mask"] = torch.ones(1, work.text_tokens, **like)
            inputs["pooled_projections"] = torch.randn(1, config.pooled_projection_dim, **like)
            inputs["guidance"] = torch.full((1,), 6000.0, **like)
        if work.kind == "cogvideox":
            shape = (1, frames, config.in_channels, 2 * height, 2 * width)
            angles = torch.rand(
                math.prod(work.grid), config.attention_head_dim // 2, device=self.device
            ).repeat_interleave(2, dim=1)
            inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
        return {"hidden_states": torch.randn(shape, **like), **inputs}
