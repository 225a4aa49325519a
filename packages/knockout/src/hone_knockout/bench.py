"""Exit and window at real sizes: prefill and decode time and memory beside what the operations allow.

Random weights of the published shapes. Only the decoder is timed, from embeddings to the logits of the last position:
the vision tower runs before it and is the same in every variant. A variant's prefill includes what it does once per
prompt (finding the layout, checking and building masks); the baseline is the model with nothing attached.
"""

from __future__ import annotations

import logging
import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_core.timing import Stopwatch, check_values, measure
from hone_lm.decoders import cache_keyword, cache_of
from hone_lm.layouts import TokenLayout, find_layouts
from torch import Tensor, nn

from .config import BenchConfig, Knockout, KnockoutConfig
from .flops import WORKLOADS, Flops, Workload, prefill_flops
from .local_attention import RegularFrames, frame_local_attention
from .method import blocked_pairs, causal_pairs, global_after
from .models import KnockoutHandle, attach

__all__ = ["BenchReport", "bench"]

log = logging.getLogger(__name__)

_VIDEO_ID = 6


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Times; as text, a table."""

    def __str__(self) -> str:
        values = {(row.metric, row.variant, row.labels["frames"]): row.value for row in self.rows}
        lines = ["frames  variant              prefill ms  speedup  bound  share  decode tok/s  peak GiB"]
        for metric, variant, frames in values:
            if metric != "prefill":
                continue
            ms = values[metric, variant, frames]
            speedup = values["prefill", "baseline", frames] / ms
            bound = values["flop_bound", variant, frames]
            peak = values.get(("peak_memory", variant, frames))
            lines.append(
                f"{frames:>6}  {variant:<19}  {ms:10.1f}  {speedup:6.2f}x  {bound:4.2f}x  {speedup / bound:5.0%}  "
                f"{values['decode', variant, frames]:12.1f}  {'-' if peak is None else f'{peak:8.2f}'}"
            )
        return "\n".join([*lines, f"results in {self.path}"])


def variants(work: Workload) -> dict[str, KnockoutConfig]:
    """What is compared."""
    layers = work.shape.layers
    return {
        "baseline": KnockoutConfig(),
        "exit": KnockoutConfig(exit=work.exit),
        "exit + window": KnockoutConfig(
            knockouts=(Knockout(kind="VT", layers=tuple(range(work.window))),), exit=work.exit
        ),
        "window everywhere": KnockoutConfig(knockouts=(Knockout(kind="VT", layers=tuple(range(layers))),)),
    }


def bound(work: Workload, frames: int, config: KnockoutConfig) -> Flops:
    """Operations of a variant's prefill."""
    window = max((len(item.layers) for item in config.knockouts), default=0)
    return prefill_flops(
        work.shape,
        prefix=work.prefix,
        frames=frames // work.source_frames,
        tokens_per_frame=work.tokens_per_frame,
        suffix=work.suffix,
        exit=config.exit,
        window=window,
    )


def layout_of(work: Workload, frames: int) -> TokenLayout:
    """Layout of the prompt."""
    count = frames // work.source_frames
    video = torch.arange(count).repeat_interleave(work.tokens_per_frame)
    frame = torch.cat([torch.full((work.prefix,), -1), video, torch.full((work.suffix,), -1)])
    end, stop = work.prefix + len(video), len(frame)
    spans = {"prefix": (0, work.prefix), "video": (work.prefix, end), "suffix": (end, stop), "last": (stop - 1, stop)}
    real = torch.ones_like(frame, dtype=torch.bool)
    return TokenLayout("bench", frame, real, source_frames=work.source_frames, spans=spans)


def build(cfg: BenchConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model of the real class with random weights; its vision tower is small, since it is not timed."""
    from transformers import LlavaOnevisionForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

    work = WORKLOADS[cfg.model]
    shape = work.shape
    text: dict[str, Any] = {
        "vocab_size": work.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads_k,
        "max_position_embeddings": 32768,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kind: Any
    vision: Any
    if cfg.model == "qwen2.5-vl-7b":
        from transformers import Qwen2_5_VLConfig

        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        vision = {"depth": 1, "hidden_size": 64, "out_hidden_size": shape.width, "intermediate_size": 64}
        vision |= {"num_heads": 2, "fullatt_block_indexes": [0]}
        ids = {"image_token_id": 5, "video_token_id": _VIDEO_ID, "vision_start_token_id": 7, "vision_end_token_id": 8}
        config = Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **ids)
        kind = Qwen2_5_VLForConditionalGeneration
    else:
        from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

        vision = SiglipVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        config = LlavaOnevisionConfig(
            text_config=Qwen2Config(**text), vision_config=vision, image_token_index=5, video_token_index=_VIDEO_ID
        )
        kind = LlavaOnevisionForConditionalGeneration
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(cfg.seed)
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    return model.eval()


@torch.no_grad()
def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Check the values, then time every variant at every length.

    Raises:
        RuntimeError: Exit and LV-K disagree, or frame-local attention and its mask do. No time is reported then.
    """
    target = resolve_device(run.device)
    dtype = resolve_dtype(cfg.dtype, target)
    work = WORKLOADS[cfg.model]
    check_kernel(work, target, dtype)
    # Exactly on a small model in float32, then as closely as 16 bits and 28 layers of random weights allow.
    small = BenchConfig(model="tiny", seed=cfg.seed)
    check(build(small, target, torch.float32), WORKLOADS["tiny"], target, torch.float32)
    model = build(cfg, target, dtype)
    check(model, work, target, dtype)
    plans = variants(work)
    with progress_bar(len(cfg.frames) * cfg.rounds * len(plans), desc=cfg.model, quiet=run.quiet) as bar:
        for frames in cfg.frames:
            layout = layout_of(work, frames)
            inputs, ids = _embeddings(layout, work, target, dtype, cfg.seed), _token_ids(layout, work, target)
            prefills: dict[str, list[float]] = {name: [] for name in plans}
            decodes: dict[str, list[float]] = {name: [] for name in plans}
            peaks: dict[str, int | None] = dict.fromkeys(plans)
            # Variants take turns, so that clocks and heat fall on all alike.
            for _ in range(cfg.rounds):
                for name, config in plans.items():
                    with _attached(model, config) as handle:
                        call = partial(_prefill, model, handle, inputs, ids, work)
                        timing = measure(call, warmup=1, repeats=1, device=target)
                        prefills[name].append(timing.ms_p50)
                        if timing.peak_bytes is not None:
                            peaks[name] = max(timing.peak_bytes, peaks[name] or 0)
                        out = _prefill(model, handle, inputs, ids, work, use_cache=True)
                        decodes[name].append(_decode_rate(model, out, inputs[:, -1:], cfg.decode_tokens))
                        del out
                    bar.update()
            base = bound(work, frames, plans["baseline"]).total
            labels = {"arch": cfg.model, "frames": frames, "tokens": len(layout.frame)}
            for name, config in plans.items():
                ms = prefills[name]
                spread = statistics.stdev(ms) if len(ms) > 1 else None
                common: dict[str, Any] = {"variant": name, "labels": labels}
                run.row(
                    "prefill", statistics.median(ms), unit="ms", better="lower", n=cfg.rounds, spread=spread, **common
                )
                rate = statistics.median(decodes[name])
                run.row("decode", rate, unit="tokens/s", better="higher", n=cfg.rounds * cfg.decode_tokens, **common)
                peak = peaks[name]
                if peak is not None:
                    run.row("peak_memory", peak / 2**30, unit="GiB", better="lower", **common)
                flops = bound(work, frames, config)
                run.row("prefill_tflop", flops.total / 1e12, unit="TFLOP", better="lower", **common)
                run.row("flop_bound", base / flops.total, better="none", **common)
            del inputs
            if target.type == "cuda":
                torch.cuda.empty_cache()
    return BenchReport.of(run)


@torch.no_grad()
def check_kernel(work: Workload, device: torch.device, dtype: torch.dtype) -> None:
    """Compare frame-local attention with masked attention in float32, at the heads of a workload.

    Raises:
        RuntimeError: They disagree.
    """
    shape, where = work.shape, RegularFrames(work.prefix, 4, work.tokens_per_frame)
    layout = layout_of(work, 4 * work.source_frames)
    generator = torch.Generator(device).manual_seed(2)
    tokens = len(layout.frame)
    q, k, v = (
        torch.randn(1, heads, tokens, shape.head_dim, generator=generator, device=device).to(dtype)
        for heads in (shape.heads, shape.heads_k, shape.heads_k)
    )
    allowed = causal_pairs(tokens, device) & ~blocked_pairs("VT", layout.frame.to(device))
    wide_k, wide_v = (x.float().repeat_interleave(shape.heads // shape.heads_k, 1) for x in (k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q.float(), wide_k, wide_v, attn_mask=allowed)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    error = check_values("frame-local attention", frame_local_attention(q, k, v, where), want, tolerance=tolerance)
    log.info("frame-local attention alone is right to %.1e (relative)", error)


@torch.no_grad()
def check(model: nn.Module, work: Workload, device: torch.device, dtype: torch.dtype) -> None:
    """Compare the fast paths with the masks that they stand for, on a short prompt.

    Raises:
        RuntimeError: They disagree.
    """
    layout = layout_of(work, 4 * work.source_frames)
    inputs = _embeddings(layout, work, device, dtype, 1)
    layers = work.shape.layers

    def logits(config: KnockoutConfig, *, masked: bool = False) -> Tensor:
        with attach(model, config) as handle, handle.using([layout]):
            handle.frame_local = not masked
            return model(inputs_embeds=inputs, logits_to_keep=1).logits.float()

    exit = logits(KnockoutConfig(exit=work.exit))
    blocked = logits(KnockoutConfig(knockouts=(Knockout(kind="LV", layers=global_after(work.exit, layers)),)))
    window = KnockoutConfig(knockouts=(Knockout(kind="VT", layers=tuple(range(work.window))),))
    local, mask = logits(window), logits(window, masked=True)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for name, got, want in (("exit for LV-K", exit, blocked), ("frame-local attention for its mask", local, mask)):
        error = check_values(name, got, want, tolerance=tolerance)
        log.info("%s is right to %.1e (relative)", name, error)
    moved = float((local - logits(KnockoutConfig())).norm() / mask.norm())
    if dtype == torch.float32 and moved < tolerance:
        raise RuntimeError("VT-K changes nothing here: the check would pass whatever the kernel does")


def _embeddings(layout: TokenLayout, work: Workload, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, len(layout.frame), work.shape.width)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def _token_ids(layout: TokenLayout, work: Workload, device: torch.device) -> Tensor:
    """Ids ``[1, tokens]`` with the placeholder of ``build`` at visual positions and a newline after them."""
    ids = torch.where(layout.frame >= 0, _VIDEO_ID, 3)
    if work.newline:
        ids[layout.spans["video"][1]] = _VIDEO_ID
    return ids[None].to(device)


def _attached(model: nn.Module, config: KnockoutConfig) -> AbstractContextManager[KnockoutHandle | None]:
    """What a variant attaches: nothing, if it is the baseline."""
    return nullcontext() if config == KnockoutConfig() else attach(model, config)


def _prefill(
    model: nn.Module, handle: KnockoutHandle | None, inputs: Tensor, ids: Tensor, work: Workload, **options: Any
) -> Any:
    """A prefill as a user pays for it: the layout is read off the ids, as it is where a prompt comes as such."""
    call = partial(model, inputs_embeds=inputs, logits_to_keep=1, **options)
    if handle is None:
        return call()
    with handle.using(find_layouts(model, {"input_ids": ids}, tokens_per_frame=work.tokens_per_frame)):
        return call()


def _decode_rate(model: nn.Module, out: Any, token: Tensor, tokens: int) -> float:
    """Tokens per second after a prefill that gave ``out``, each with the embedding ``token``; one more goes before."""
    cache = {cache_keyword(model): cache_of(out)}
    step = partial(model, inputs_embeds=token, **cache, logits_to_keep=1, use_cache=True)
    step()
    with Stopwatch(token.device) as watch:
        for _ in range(tokens):
            step()
    return tokens / watch.seconds
