"""What BLADE costs and saves: one attention, one forward, one video, each beside dense attention on the same device.

The models are the published architectures with random weights, so time and memory mean something and pictures do not.
Dense attention on a GPU is cuDNN's, the fastest that torch has, and FlashAttention's where it is installed; nothing
falls back to another one in silence. A video is the real pipeline's denoising loop on given text embeddings, without
text encoder and VAE, whose cost is the same with every attention; dense ones take the kernel whose forward is fastest.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline, ModelMixin, UniPCMultistepScheduler, WanPipeline
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import UnsupportedHardwareError
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_core.timing import Stopwatch, Timing, check_values, measure_host, measure_interleaved
from hone_kernels.attention import block_sparse_attention
from hone_kernels.attention.bench import dense_kernels
from hone_video.architectures import FULL_SIZE, full_size, tiny
from hone_video.attachment import reorder_patches
from hone_video.handle import VideoHandle, attach_kernel
from hone_video.orders import token_order
from hone_video.workloads import WORKLOADS, Workload
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .config import TDM_PRESETS, BenchConfig, BladeConfig, Part
from .meter import Meter
from .method import adaptive_sparse_attention, pool_tokens, select_blocks, sparse_layout
from .models import BladeHandle, LayerStats, attach
from .objective import Objective
from .prober import probe
from .scheduler import TDMScheduler
from .trio import Trio

__all__ = ["BenchReport", "bench"]

_SPARSE_EVERYWHERE: dict[str, Any] = {"dense_layers": (), "dense_steps": 0, "min_tokens": 0}
"""What makes no layer, step or length dense."""

PUBLISHED_BATCH, GPUS = 80, 8
"""Videos of an update in the release, and the GPUs that the paper names."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Context = Callable[[], AbstractContextManager[Any]]

_TOLERANCE = 2e-2
"""Relative error (norm) of bfloat16 attention against the float32 reference that still passes."""


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Everything that was measured, printed as a table."""

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            notes = [f"{key} {value}" for key, value in row.labels.items() if key != "model"]
            spread = "" if row.spread is None else f" +- {row.spread:.3g}"
            lines.append(
                f"{row.split:<10} {row.metric:<12} {row.variant:<10} {row.value:>10.3f} {row.unit}{spread}"
                + (f"   ({', '.join(notes)})" if notes else "")
            )
        return "\n".join(lines)


def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Measure, and write rows into the run.

    ``split`` of a row is the part; ``variant`` is ``dense`` (cuDNN's on a GPU) or another dense kernel, ``asa`` or
    ``asa_g``, or a piece of ``asa_g`` or of an update. Rows are times (``ms`` and ``s``) and ``peak_memory`` (``GiB``,
    weights included). A speed-up is two rows.

    Args:
        cfg: What to measure.
        run: The run, entered.

    Raises:
        UnsupportedHardwareError: A published size, or what the host of a GPU takes, is asked of a CPU.
        ValueError: The preset leaves a sparse variant dense at this model's size.
        RuntimeError: An attention differs from its reference on this device (no time is reported then), cuDNN cannot
            run the dense attention, or a video came out not finite.
    """
    device = resolve_device(run.device)
    if device.type == "cpu" and cfg.model in FULL_SIZE:
        small = [name for name in WORKLOADS if name not in FULL_SIZE]
        raise UnsupportedHardwareError(
            f"{cfg.model} at its published size needs a CUDA device", found="no CUDA device", use=" or ".join(small)
        )
    if "host" in cfg.parts and device.type != "cuda":
        raise UnsupportedHardwareError(
            "part host is of what a GPU does not wait for", found="no CUDA device", use="the other parts"
        )
    _Bench(cfg, run, device, run.quiet).all()
    return BenchReport.of(run)


class _Bench:
    """The state that the parts share."""

    def __init__(self, cfg: BenchConfig, run: Run, device: torch.device, quiet: bool) -> None:
        self.cfg, self.run, self.device, self.quiet = cfg, run, device, quiet
        self.work, self.dtype = WORKLOADS[cfg.model], resolve_dtype(cfg.dtype, device)
        self.whole = cfg.variants
        # One attention and one forward stand for the sparse ones of a video, so nothing in them is left dense.
        self.variants = {
            name: None if settings is None else replace(settings, **_SPARSE_EVERYWHERE)
            for name, settings in self.whole.items()
        }
        left_out = [name for name, none in _SPARSE_EVERYWHERE.items() if getattr(cfg.attention, name) != none]
        self.note = {"preset_without": ", ".join(left_out)} if left_out else {}
        self.dense = self.dense_kernels()
        self.fastest: str | None = None

    def all(self) -> None:
        torch.manual_seed(self.cfg.seed)
        with torch.no_grad(), _dense_backend(self.device):
            self.check()
            if "attention" in self.cfg.parts:
                self.attention()
            if "host" in self.cfg.parts:
                self.host()
            if "forward" in self.cfg.parts or "e2e" in self.cfg.parts:
                self.model = self.build()
                if "forward" in self.cfg.parts:
                    self.forward()
                if "e2e" in self.cfg.parts:
                    self.videos()
                del self.model
                self.clear()
        if "training" in self.cfg.parts:
            self.training()

    def row(self, part: Part, metric: str, value: float, unit: str, variant: str, **options: Any) -> None:
        labels = {"model": self.cfg.model, **options.pop("labels", {})}
        self.run.row(metric, value, unit=unit, better="lower", variant=variant, split=part, labels=labels, **options)

    def times(self, part: Part, timings: dict[str, Timing], **given: Any) -> None:
        for variant, timing in timings.items():
            labels = given if variant in self.dense or variant == "permutation" else {**given, **self.note}
            # Half the width between the 20th and the 80th percentile, which outliers do not reach.
            spread = (timing.ms_p80 - timing.ms_p20) / 2
            self.row(part, "time", timing.ms_p50, "ms", variant, n=timing.n, spread=spread, labels=labels)
            if timing.peak_bytes is not None and variant in self.dense | self.variants:
                self.row(part, "peak_memory", timing.peak_bytes / 2**30, "GiB", variant, labels=labels)

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def heads(self) -> tuple[int, int, int]:
        """Heads, channels of a head, layers."""
        model = self.build("meta")
        config = model.config
        return config.num_attention_heads, config.attention_head_dim, config.num_layers

    def build(self, device: torch.device | str | None = None) -> ModelMixin:
        device = self.device if device is None else device
        if self.work.model in FULL_SIZE:
            return full_size(self.work.model, device=device, dtype=self.dtype)
        options = {} if self.work.kind == "wan" else {"max_text_seq_length": self.work.text_tokens}
        return tiny(self.work.kind, self.cfg.seed, **options).to(device=device, dtype=self.dtype)

    def dense_kernels(self) -> dict[str, Attend]:
        """Dense attention by whatever runs here, the model's own kernel first."""
        own: dict[str, Attend] = {"dense": scaled_dot_product_attention}
        if self.device.type != "cuda":
            return own
        return own | {name: call for name, call in dense_kernels(self.dtype).items() if name.startswith("flash")}

    def dense_contexts(self) -> dict[str, Context]:
        """The dense model by each kernel: cuDNN's through the model's own code, others in its place."""
        others = {name: partial(attach_kernel, self.model, call) for name, call in self.dense.items()}
        return {**others, "dense": nullcontext}

    def check(self) -> None:
        """Values first: a wrong kernel is not timed."""
        heads, dim, _ = self.heads()
        q, k, v = _inputs(min(heads, 2), 1000, dim, self.device, self.dtype)
        exact = (q.float() @ k.float().mT * dim**-0.5).softmax(dim=-1) @ v.float()
        for name, attend in self.dense.items():
            check_values(name, attend(q, k, v), exact, tolerance=_TOLERANCE)
        for name, cfg in self.variants.items():
            if cfg is None:
                continue
            layout = sparse_layout(q, k, cfg=cfg, grid=(10, 10, 10))
            pooled = pool_tokens(k, v, cfg.pool) if cfg.pool else None
            got = block_sparse_attention(q, k, v, layout, pooled=pooled, backend=cfg.backend)
            wide_q, wide_k, wide_v = (x.float() for x in (q, k, v))
            wide_pooled = pool_tokens(wide_k, wide_v, cfg.pool) if cfg.pool else None
            want = block_sparse_attention(wide_q, wide_k, wide_v, layout, pooled=wide_pooled, backend="reference")
            advice = "Run the tests of hone-kernels on this device"
            check_values(f"{name} attention", got, want, tolerance=_TOLERANCE, advice=advice)

    # One attention.

    def host(self) -> None:
        """Of one eager layer, at a size at which nothing hides it."""
        heads, dim, _ = self.heads()
        q, k, v = _inputs(min(heads, 2), 1000, dim, self.device, self.dtype)
        calls: dict[str, Callable[[], object]] = {"dense": lambda: scaled_dot_product_attention(q, k, v)}
        for name, cfg in self.variants.items():
            if cfg is not None:
                calls[name] = partial(adaptive_sparse_attention, q, k, v, cfg=cfg, grid=(10, 10, 10))
        labels = {"tokens": q.shape[2], "heads": q.shape[1], "dim": dim}
        for name, call in calls.items():
            timing = measure_host(call, repeats=self.cfg.rounds)
            spread = (timing.ms_p80 - timing.ms_p20) / 2 * 1e3
            self.row("host", "host_us", timing.ms_p50 * 1e3, "us", name, n=timing.n, spread=spread, labels=labels)
        self.clear()

    def attention(self) -> None:
        work = self.work
        heads, dim, layers = self.heads()
        q, k, v = _inputs(heads, work.tokens, dim, self.device, self.dtype)
        place: dict[str, Any] = {"text_tokens": work.joint_text, "grid": work.grid}
        calls: dict[str, Callable[[], object]] = {name: partial(call, q, k, v) for name, call in self.dense.items()}
        layouts = {}
        for name, cfg in self.variants.items():
            if cfg is not None:
                layouts[name] = sparse_layout(q, k, cfg=cfg, **place)
                _check_sparse(name, float(layouts[name].density().mean()))
                calls[name] = partial(adaptive_sparse_attention, q, k, v, cfg=cfg, **place)
        # The pieces of asa_g, each on inputs that are ready.
        cfg = self.variants["asa_g"]
        assert cfg is not None
        text_blocks = -(-work.tokens // cfg.block) - (work.tokens - work.joint_text) // cfg.block
        text_blocks = text_blocks if work.joint_text and cfg.force_text else 0
        scores, layout = probe(q, k, cfg), layouts["asa_g"]
        pool: dict[str, Any] = {"text_tokens": 0 if cfg.pool_text else work.joint_text, "exact": cfg.pool_exact}
        pooled = pool_tokens(k, v, cfg.pool, **pool)
        pieces: dict[str, Callable[[], object]] = {
            "prober": lambda: probe(q, k, cfg),
            "selection": lambda: select_blocks(scores, cfg, text_blocks=text_blocks),
            "pooling": lambda: pool_tokens(k, v, cfg.pool, **pool),
            "kernel": lambda: block_sparse_attention(q, k, v, layout, pooled=pooled, backend=cfg.backend),
        }
        permutation = _permutation(work, heads * dim, dim, cfg, self.device, self.dtype)
        timings = measure_interleaved(
            {**calls, **pieces, "permutation": permutation},
            warmup=3,
            rounds=self.cfg.rounds,
            seed=self.cfg.seed,
            device=self.device,
        )
        self.times("attention", {name: timings[name] for name in calls}, tokens=work.tokens, heads=heads, dim=dim)
        self.times("attention", {name: timings[name] for name in pieces}, of="asa_g")
        self.times("attention", {"permutation": timings["permutation"]}, of="a whole forward", layers=layers)
        shares = [("density", name, float(found.density().mean())) for name, found in layouts.items()]
        shares.append(("pooled", "asa_g", pooled.k.shape[2] / work.tokens))
        for metric, name, share in shares:
            labels = {"model": self.cfg.model, **self.note}
            self.run.row(metric, share, better="none", variant=name, split="attention", labels=labels)
        self.clear()

    # One forward.

    def forward(self) -> None:
        sparse: dict[str, Context]
        sparse = {name: partial(attach, self.model, cfg) for name, cfg in self.variants.items() if cfg is not None}
        dense = self.dense_contexts()
        timings = self.forwards(dense | sparse)
        self.times("forward", timings, mode="eager")
        self.fastest = min(dense, key=lambda name: timings[name].ms_p50)
        if self.cfg.compile_blocks:
            blocks = self.model.blocks if self.work.kind == "wan" else self.model.transformer_blocks
            for block in blocks:
                block.compile(fullgraph=True)
            # Kernels of others may not compile without a graph break.
            self.times("forward", self.forwards({"dense": nullcontext, **sparse}, warmup=2), mode="compiled blocks")
            for block in blocks:
                block._compiled_call_impl = None

    def forwards(self, contexts: dict[str, Context], warmup: int = 1) -> dict[str, Timing]:
        inputs = self.model_inputs()

        def call(context: Context) -> Callable[[], object]:
            def run() -> object:
                # Replacing the processors takes well under a millisecond, and keeps the variants in one random order.
                with context():
                    return self.model(**inputs, return_dict=False)[0]

            return run

        calls = {name: call(context) for name, context in contexts.items()}
        options: dict[str, Any] = {"rounds": self.cfg.forward_rounds, "seed": self.cfg.seed, "device": self.device}
        return measure_interleaved(calls, warmup=warmup, **options)

    def model_inputs(self) -> dict[str, Any]:
        work, config = self.work, self.model.config
        like: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        frames, height, width = work.grid
        inputs: dict[str, Any] = {
            "timestep": torch.full((1,), 500, device=self.device),
            "encoder_hidden_states": self.text(),
        }
        if work.kind == "wan":
            shape = (1, config.in_channels, frames, 2 * height, 2 * width)
        else:
            shape = (1, frames, config.in_channels, 2 * height, 2 * width)
            angles = torch.rand(math.prod(work.grid), config.attention_head_dim, device=self.device)
            inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
        return {"hidden_states": torch.randn(shape, **like), **inputs}

    def text(self) -> Tensor:
        width = self.model.config.text_dim if self.work.kind == "wan" else self.model.config.text_embed_dim
        return torch.randn(1, self.work.text_tokens, width, device=self.device, dtype=self.dtype)

    # One update of a distillation.

    def training(self) -> None:
        """Of one video, by part, with what the published batch would take on eight GPUs without communication."""
        cfg, work, device = self.cfg, self.work, self.device
        self.model = self.build()
        inputs = self.model_inputs()
        given = {key: value for key, value in inputs.items() if key == "image_rotary_emb"}

        def call(model: nn.Module, state: Tensor, time: Tensor, text: Tensor) -> Tensor:
            return model(
                hidden_states=state.to(self.dtype),
                timestep=time,
                encoder_hidden_states=text,
                return_dict=False,
                **given,
            )[0].float()

        family = "wan2.1-1.3b" if work.kind == "wan" else "cogvideox-5b"
        tdm = TDM_PRESETS[family].config
        process = TDMScheduler.from_config(self.scheduler(few=False).config, eta=tdm.eta)
        settings = self.variants["asa_g"]
        assert settings is not None
        with attach(self.model, settings) as handle:
            trio = Trio(self.model, call, handle, rank=cfg.lora_rank, seed=cfg.seed)
            self.model.enable_gradient_checkpointing()
            self.model.train()
            meters = [Meter(device) for _ in range(cfg.updates + 1)]
            optimisers = [
                torch.optim.AdamW(adapter.parameters, 1e-4, betas=(0.0, 0.95), fused=device.type == "cuda")
                for adapter in (trio.student, trio.fake)
            ]
            with progress_bar(len(meters), desc=f"{cfg.model} updates", quiet=self.quiet) as bar:
                for meter in meters:
                    self._update(Objective(trio, process, tdm, section=meter), optimisers, meter, inputs)
                    bar.update()
        names = tuple(meters[0].seconds)
        labels = {"batch": 1, "rank": cfg.lora_rank, "rollout_steps": tdm.student_steps, **self.note}
        means = {}
        for name in names:
            found = [meter.seconds[name] for meter in meters[1:]]
            spread = statistics.stdev(found) if len(found) > 1 else None
            means[name] = statistics.fmean(found)
            self.row("training", "seconds", means[name], "s", name, n=len(found), spread=spread, labels=labels)
            peaks = [meter.peak[name] for meter in meters[1:] if name in meter.peak]
            if peaks:
                self.row("training", "peak_memory", max(peaks) / 2**30, "GiB", name, labels=labels)
        self.row("training", "seconds", sum(means.values()), "s", "update", n=cfg.updates, labels=labels)
        share = PUBLISHED_BATCH // GPUS
        published = share * (sum(means.values()) - means["optimiser"]) + means["optimiser"]
        note = {**labels, "batch": PUBLISHED_BATCH, "gpus": GPUS, "computed": "from the parts, no communication"}
        self.row("training", "seconds", published, "s", "update of the published batch", labels=note)
        del self.model
        self.clear()

    def _update(
        self,
        objective: Objective,
        optimisers: list[torch.optim.AdamW],
        meter: Meter,
        inputs: dict[str, Any],
    ) -> None:
        """One update of both, the fake score first, as ``distill-pipeline`` does it."""
        device = self.device
        generator = torch.Generator().manual_seed(self.cfg.seed)
        noise, text = inputs["hidden_states"].float(), inputs["encoder_hidden_states"]
        student, fake = optimisers
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            with meter("rollout"):
                states = objective.states(text, noise, generator)
            drawn = [objective.draw(len(text), generator, device) for _ in range(2)]
            with meter("fake"):
                objective.fake_loss(text, states, drawn[0], generator).mean().backward()
            with meter("optimiser"):
                self._apply(fake)
            with meter("student"):
                loss, _ = objective.student_loss(text, torch.zeros_like(text), states, drawn[1], generator)
                loss.mean().backward()
            with meter("optimiser"):
                self._apply(student)

    @staticmethod
    def _apply(optimiser: torch.optim.AdamW) -> None:
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    # Whole denoising loops.

    def videos(self) -> None:
        cfg = self.cfg
        contexts = self.dense_contexts()
        if self.fastest is None:  # part forward is not asked for
            self.fastest = "dense"
            if len(contexts) > 1:
                timings = self.forwards(contexts)
                self.fastest = min(contexts, key=lambda name: timings[name].ms_p50)
        dense = self.fastest
        # Many guided steps, no guidance, few steps, sparse: each row changes one thing.
        loops = [
            (dense, cfg.steps, True, 1),
            (dense, cfg.steps, False, 1),
            (dense, cfg.few_steps, False, cfg.repeats),
            ("asa", cfg.few_steps, False, cfg.repeats),
            ("asa_g", cfg.few_steps, False, cfg.repeats),
        ]
        pipe, text = self.pipeline(), [self.text(), self.text()]
        measured = [steps if cfg.max_steps is None else min(steps, cfg.max_steps) for _, steps, _, _ in loops]
        total = sum(steps * loop[3] for steps, loop in zip(measured, loops, strict=True))
        with progress_bar(total, desc=f"{cfg.model} steps", quiet=self.quiet) as bar:
            for (variant, steps, guided, repeats), run_steps in zip(loops, measured, strict=True):
                settings = self.whole.get(variant)
                attached: AbstractContextManager[BladeHandle | VideoHandle[None] | None]
                attached = contexts[variant]() if settings is None else attach(pipe, settings)
                with attached as handle:
                    few = steps == cfg.few_steps
                    # Two steps of each kind that there is, so that nothing is compiled while time is taken.
                    warm = min(run_steps, 2 + (0 if settings is None else settings.dense_steps))
                    recorded: AbstractContextManager[list[LayerStats]]
                    recorded = handle.record() if isinstance(handle, BladeHandle) else nullcontext([])
                    with recorded as stats:
                        self.video(pipe, text, warm, guided, few, None)
                    if isinstance(handle, BladeHandle):
                        found = [float(row.stats.density.mean()) for row in stats]
                        _check_sparse(variant, statistics.fmean(found) if found else 1.0)
                    runs = [self.video(pipe, text, run_steps, guided, few, bar.update) for _ in range(repeats)]
                scale = steps / run_steps
                seconds = [scale * value for value, _ in runs]
                labels = {"steps": steps, "nfe": steps * (2 if guided else 1), "guidance": "yes" if guided else "no"}
                if settings is not None and settings.dense_steps:
                    labels["sparse_steps"] = steps - settings.dense_steps
                if run_steps < steps:
                    labels["measured_steps"] = run_steps
                spread = statistics.stdev(seconds) if repeats > 1 else None
                mean = statistics.fmean(seconds)
                self.row("e2e", "seconds", mean, "s", variant, n=repeats, spread=spread, labels=labels)
                if peaks := [value for _, value in runs if value is not None]:
                    peak = max(peaks) / 2**30
                    self.row("e2e", "peak_memory", peak, "GiB", variant, labels=labels)

    def pipeline(self) -> Any:
        kind = WanPipeline if self.work.kind == "wan" else CogVideoXPipeline
        pipe = kind(
            tokenizer=None, text_encoder=None, vae=None, scheduler=self.scheduler(few=False), transformer=self.model
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def scheduler(self, *, few: bool) -> Any:
        if self.work.kind == "wan":
            own = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        else:
            own = CogVideoXDPMScheduler(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                snr_shift_scale=1.0,
                clip_sample=False,
                timestep_spacing="trailing",
            )
        return TDMScheduler.from_config(own.config) if few else own

    def video(
        self,
        pipe: Any,
        text: list[Tensor],
        run_steps: int,
        guided: bool,
        few: bool,
        step_done: Callable[[], None] | None,
    ) -> tuple[float, int | None]:
        """Seconds and peak bytes of one loop; ``few`` takes the distilled model's sampler."""
        pipe.scheduler = self.scheduler(few=few)
        generator = torch.Generator(self.device).manual_seed(self.cfg.seed)
        if isinstance(pipe.scheduler, TDMScheduler):
            pipe.scheduler.generator = generator

        def after(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step_done is not None:
                step_done()
            return values

        with Stopwatch(self.device) as watch:
            latents = pipe(
                prompt_embeds=text[0],
                negative_prompt_embeds=text[1] if guided else None,
                guidance_scale=self.cfg.guidance if guided else 1.0,
                num_inference_steps=run_steps,
                generator=generator,
                output_type="latent",
                callback_on_step_end=after,
                **self.work.size,
            ).frames
        if not latents.isfinite().all():
            raise RuntimeError(f"the latents of {run_steps} steps are not finite; no time is reported")
        return watch.seconds, watch.peak_bytes


def _check_sparse(name: str, density: float) -> None:
    if not density < 1:
        raise ValueError(
            f"{name} must compute a part of the query-key pairs; its density is {density:g}, which is dense attention. "
            "Take a preset that leaves something out at this model's size"
        )


def _dense_backend(device: torch.device) -> AbstractContextManager[None]:
    """Of torch's own attention, allow cuDNN's and nothing else on a GPU."""
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else nullcontext()


def _inputs(heads: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v ``[1, H, S, D]`` as the models make them: views of ``[1, S, H, D]``."""
    return [torch.randn(1, tokens, heads, dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]


def _permutation(
    work: Workload, channels: int, dim: int, cfg: BladeConfig, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """What token order costs a forward: latents (Wan) or tokens, and rotary tables, into curve order; output back."""
    order, inverse = (
        token_order(cfg.order, *work.grid, device=device, tile=cfg.tile, inverse=inverse) for inverse in (False, True)
    )
    tables = [torch.randn(len(order), dim, device=device) for _ in range(2)]
    frames, height, width = work.grid
    latents = torch.randn(1, 16, frames, 2 * height, 2 * width, device=device, dtype=dtype)
    hidden = None if work.kind == "wan" else torch.randn(1, work.tokens, channels, device=device, dtype=dtype)
    where = torch.cat([torch.arange(work.joint_text, device=device), order + work.joint_text])

    def run() -> object:
        gathered = [table.index_select(0, order) for table in tables]
        if hidden is None:
            tokens = reorder_patches(latents, order, work.grid, (1, 2, 2))
        else:
            tokens = hidden.index_select(1, where)
        return tokens, gathered, reorder_patches(latents, inverse, work.grid, (1, 2, 2))

    return run
