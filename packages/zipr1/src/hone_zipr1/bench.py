"""What selection saves in prefill and decoding, and what arithmetic allows.

Weights may be random: every layer keeps a set share of the prompt, chosen by the probe rows' attention as ever, so that
the work is that of the method and its time does not depend on what the attention looks like.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.runs import Report, Run
from hone_core.timing import Timing, check_values, measure_interleaved
from hone_lm.decoders import cache_keyword
from torch import Tensor
from transformers import DynamicCache

from . import method
from .cache import Chosen, Kept, sparse_layers
from .config import BenchConfig, SparseConfig
from .host import load_host
from .models import attach, budgets, choose, masses, packs, selected_attention
from .sample import stored_bytes

__all__ = ["SHAPES", "BenchReport", "bench", "decode_bound", "prefill_bound"]

SHAPES: dict[str, dict[str, int]] = {
    "qwen2.5-vl-3b": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 2, "intermediate_size": 11008},
    "qwen2.5-vl-7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "intermediate_size": 18944},
}
VOCABULARY = 152064
DENSE = "dense"
CAPTURED = ", captured"
FLASH = "dense, FlashAttention 3"
_ByRatio = dict[float | None, Any]
"""None: dense."""


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Times of prefill, decoding and one layer's attention."""

    def __str__(self) -> str:
        lines = []
        for split in dict.fromkeys(row.split for row in self.rows):
            rows = {(row.metric, row.variant): row for row in self.rows if row.split == split}
            lines.append(split)
            width = max(len(variant) for metric, variant in rows if metric == "decode")
            for name in dict.fromkeys(variant for _, variant in rows):
                if ("decode", name) not in rows:
                    lines.append(f"{'':13}one layer: {rows['attention', name].value:.3f} ms {name}")
                    continue
                text = f"  {name:<{width}} "
                if ("prefill", name) in rows:
                    text += f"prefill {rows['prefill', name].value:9.2f} ms, "
                text += f"a decoding step {rows['decode', name].value:7.2f} ms"
                plain = name.removesuffix(CAPTURED)
                dense = DENSE + name[len(plain) :]
                text += f", cache {rows['cache', plain].value:9.2f} MiB"
                if name != dense:
                    gains = [
                        f"{rows[phase, dense].value / rows[phase, name].value:.2f}x of at most "
                        f"{rows[f'{phase}_bound', plain].value:.2f}x in {phase}"
                        for phase in ("prefill", "decode")
                        if (phase, name) in rows
                    ]
                    text += f"; {', '.join(gains)}"
                lines.append(text)
                if ("selection", name) in rows:
                    layer = {metric: rows[metric, name].value for metric in ("selection", "attention")}
                    lines.append(
                        f"{'':13}one layer: choosing {layer['selection']:.3f} ms, attention "
                        f"{layer['attention']:.3f} ms, dense {rows['attention', DENSE].value:.3f} ms"
                    )
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Time every length, batch and ratio.

    Raises:
        RuntimeError: The attention of kept tokens is not that under a mask.
    """
    device = resolve_device(run.device)
    model = _model(cfg, device)
    generator = torch.Generator().manual_seed(cfg.seed)
    for tokens in cfg.tokens:
        for batch in cfg.batches:
            if cfg.decode_only:
                _decoding(cfg, run, model, batch, tokens)
                continue
            ids = torch.randint(10, 200, (batch, tokens), generator=generator).to(device)
            _whole(cfg, run, model, ids)
            _layer(cfg, run, model, batch, tokens)
    return BenchReport.of(run)


def _selection(cfg: BenchConfig, ratio: float | None) -> SparseConfig:
    if ratio is None:
        return SparseConfig(p=1.0)
    return SparseConfig(policy="top-k", ratio=ratio, recent=cfg.recent, random=cfg.random, protect="none")


def _name(ratio: float | None) -> str:
    return DENSE if ratio is None else f"tau {ratio:g}"


@contextmanager
def _side_by_side(cfg: BenchConfig, model: Any) -> Iterator[_ByRatio]:
    """The model, dense, and by each ratio one of the same weights that keeps it.

    What is compared is timed in turn: a card that has worked for a second is slower, and a host is now this fast, now
    that.
    """
    weights = {id(x): x for x in (*model.parameters(), *model.buffers())}
    models: _ByRatio = {None: model} | {ratio: copy.deepcopy(model, dict(weights)) for ratio in cfg.ratios}
    with ExitStack() as attached:
        for ratio in cfg.ratios:
            attached.enter_context(attach(models[ratio], _selection(cfg, ratio)))
        yield models


def _steps(cfg: BenchConfig, run: Run, models: _ByRatio, caches: _ByRatio, batch: int, tokens: int) -> None:
    """Times of a decoding step of every variant, and what its cache holds."""
    split, device = f"{tokens} tokens, batch {batch}", models[None].device
    calls = {_name(ratio): partial(_decode, models[ratio], cache, batch, tokens) for ratio, cache in caches.items()}
    _rows(cfg, run, "decode", measure_interleaved(calls, warmup=2, rounds=cfg.rounds, device=device), split)
    for ratio, cache in caches.items():
        stored = stored_bytes(cache) / 2**20
        run.row("cache", stored, unit="MiB", better="lower", variant=_name(ratio), split=split)
        if cfg.captured:
            plain = _said(models[ratio], cache, batch, tokens)
            _captured(cfg, run, models[None], cache, batch, tokens, ratio, plain)


@torch.no_grad()
def _whole(cfg: BenchConfig, run: Run, model: Any, ids: Tensor) -> None:
    batch, tokens = ids.shape
    split = f"{tokens} tokens, batch {batch}"
    keyword = cache_keyword(model)

    def prefill(model: Any) -> Any:
        cache = DynamicCache()
        sparse_layers(cache, model.config.get_text_config().num_hidden_layers)
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **{keyword: cache})
        return cache

    with _side_by_side(cfg, model) as models:
        calls = {_name(ratio): partial(prefill, other) for ratio, other in models.items()}
        times = measure_interleaved(calls, warmup=2, rounds=cfg.rounds, device=ids.device)
        _rows(cfg, run, "prefill", times, split)
        _steps(cfg, run, models, {ratio: prefill(other) for ratio, other in models.items()}, batch, tokens)
    text = model.config.get_text_config()
    for ratio in cfg.ratios:
        bound = prefill_bound(text, tokens, ratio)
        run.row("prefill_bound", bound, unit="x", better="none", variant=_name(ratio), split=split)
    _decode_bounds(cfg, run, model, batch, tokens)


def _step(model: Any, cache: Any, batch: int, tokens: int) -> Tensor:
    """Logits after one token more, at the place of the first one after the prompt."""
    position = torch.full((3, batch, 1), tokens, device=model.device)
    last = torch.full((batch, 1), 10, device=model.device)
    return model(input_ids=last, use_cache=True, position_ids=position, **{cache_keyword(model): cache}).logits


def _decode(model: Any, cache: Any, batch: int, tokens: int) -> Tensor:
    """One step after the prompt, which is taken back."""
    logits = _step(model, cache, batch, tokens)
    cache.crop(-1)
    return logits


def _said(model: Any, cache: Any, batch: int, tokens: int) -> Tensor:
    """Logits of three steps, which are taken back; of captured ones the third is replayed."""
    found = torch.stack([_step(model, cache, batch, tokens) for _ in range(3)])
    cache.crop(-3)
    return found


def _captured(
    cfg: BenchConfig, run: Run, model: Any, cache: Any, batch: int, tokens: int, ratio: float | None, plain: Tensor
) -> None:
    """Times of captured steps, each a token further than the one before.

    Raises:
        RuntimeError: The logits of the first three are not those of plain steps.
    """
    with attach(model, replace(_selection(cfg, ratio), captured=True)):
        step = partial(_step, model, cache, batch, tokens)
        found = torch.stack([step() for _ in range(3)])
        check_values("captured steps", found, plain, tolerance=5e-2 if model.dtype != torch.float32 else 1e-3)
        times = measure_interleaved({_name(ratio) + CAPTURED: step}, warmup=3, rounds=cfg.rounds, device=model.device)
    _rows(cfg, run, "decode", times, f"{tokens} tokens, batch {batch}")


def _decode_bounds(cfg: BenchConfig, run: Run, model: Any, batch: int, tokens: int) -> None:
    for ratio in cfg.ratios:
        bound = decode_bound(model.config.get_text_config(), tokens, batch, ratio, model.dtype.itemsize)
        split = f"{tokens} tokens, batch {batch}"
        run.row("decode_bound", bound, unit="x", better="none", variant=_name(ratio), split=split)


@torch.no_grad()
def _decoding(cfg: BenchConfig, run: Run, model: Any, batch: int, tokens: int) -> None:
    """Decoding from caches of random keys and values."""
    with _side_by_side(cfg, model) as models:
        caches = {ratio: _filled(cfg, model, batch, tokens, ratio) for ratio in models}
        _steps(cfg, run, models, caches, batch, tokens)
    _decode_bounds(cfg, run, model, batch, tokens)


def _filled(cfg: BenchConfig, model: Any, batch: int, tokens: int, ratio: float | None) -> Any:
    """A cache of random numbers, whole or of samples that keep a share, from a half to one and a half of the ratio."""
    text, device = model.config.get_text_config(), model.device
    shape = (batch, text.num_key_value_heads, tokens, text.hidden_size // text.num_attention_heads)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    cache = DynamicCache()
    sparse_layers(cache, text.num_hidden_layers)
    for layer in range(text.num_hidden_layers):
        keys, values = (torch.randn(shape, generator=generator, device=device, dtype=model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
        if ratio is not None:
            cache.layers[layer].evict(Kept.of(_unequal(batch, tokens, ratio, generator, device)), tokens)
    return cache


def _unequal(batch: int, tokens: int, ratio: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random tokens ``[batch, tokens]``, of the samples between a half and one and a half of a ratio."""
    spread = torch.linspace(0.5, 1.5, batch, device=device) if batch > 1 else torch.ones(1, device=device)
    order = torch.rand(batch, tokens, generator=generator, device=device).argsort(-1).argsort(-1)
    return order < (spread * ratio * tokens).ceil()[:, None]


@torch.no_grad()
def _layer(cfg: BenchConfig, run: Run, model: Any, batch: int, tokens: int) -> None:
    """Choosing and attending of one layer, apart."""
    text = model.config.get_text_config()
    heads, heads_k = text.num_attention_heads, text.num_key_value_heads
    dim, device = text.hidden_size // heads, model.device
    generator = torch.Generator(device).manual_seed(cfg.seed)

    def draw(count: int) -> Tensor:
        return torch.randn(batch, count, tokens, dim, generator=generator, device=device).to(model.dtype)

    query, key, value = draw(heads), draw(heads_k), draw(heads_k)
    real = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    last = torch.zeros_like(real)
    last[:, -1] = True
    rows = method.probe_rows(tokens, cfg.recent, cfg.random).int().to(device).repeat(batch, 1)
    split = f"{tokens} tokens, batch {batch}"

    def chosen(budget: Tensor | None) -> Chosen:
        mass, rank = masses(query, key, real=None, rows=rows)
        return choose(mass, rank, None, budget, real, last)

    attending: dict[str, Any] = {
        DENSE: partial(F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=heads != heads_k)
    }
    if (flash := flash_attention_3()) is not None and device.type == "cuda":
        attending[FLASH] = partial(flash, *(x.transpose(1, 2) for x in (query, key, value)), causal=True)
    choosing: dict[str, Any] = {}
    for ratio in cfg.ratios:
        # Of a whole prefill, once.
        _, budget = budgets(1.0, ratio, real)
        found = chosen(budget)
        packed = packs(query, found)
        few = slice(0, min(tokens, 1024))
        q, k, v = (x[:, :, few] for x in (query, key, value))
        keep = found.keep[:, few]
        check_values(
            f"attention of {ratio:g} of the tokens",
            selected_attention(q, k, v, keep, packed=packed),
            selected_attention(q.float(), k.float(), v.float(), keep, masked=True),
            tolerance=2e-2 if model.dtype != torch.float32 else 1e-3,
        )
        attending[_name(ratio)] = partial(selected_attention, query, key, value, found, packed=packed)
        if cfg.unequal:
            ragged = Chosen(_unequal(batch, tokens, ratio, generator, device))
            ragged = Chosen(ragged.keep, *ragged.located())
            both = [partial(selected_attention, query, key, value, ragged, packed=packed) for packed in (False, True)]
            check_values("packed attention", both[1](), both[0](), tolerance=2e-2)
            attending |= zip((f"{_name(ratio)}, filled up", f"{_name(ratio)}, packed"), both, strict=True)
        choosing[_name(ratio)] = partial(chosen, budget)
    _rows(cfg, run, "attention", measure_interleaved(attending, warmup=2, rounds=cfg.rounds, device=device), split)
    _rows(cfg, run, "selection", measure_interleaved(choosing, warmup=2, rounds=cfg.rounds, device=device), split)


def flash_attention_3() -> Callable[..., Any] | None:
    """FlashAttention 3 on ``[batch, tokens, heads, dim]``, where one of its packages is installed."""
    for package in ("flash_attn_interface", "fa3_fwd_interface"):
        if find_spec(package) is not None:
            return import_module(package).flash_attn_func
    return None


def _rows(cfg: BenchConfig, run: Run, metric: str, times: dict[str, Timing], split: str) -> None:
    for name, timing in times.items():
        labels = {"ms_p20": timing.ms_p20, "ms_p80": timing.ms_p80}
        run.row(
            metric, timing.ms_p50, unit="ms", better="lower", n=cfg.rounds, variant=name, split=split, labels=labels
        )
        if timing.peak_bytes is not None and metric == "prefill":
            peak = timing.peak_bytes / 2**30
            run.row("prefill_peak", peak, unit="GiB", better="lower", variant=name, split=split)


def _linear(text: Any) -> int:
    """Weights of the decoder's layers."""
    dim = text.hidden_size // text.num_attention_heads
    attention = text.hidden_size * dim * 2 * (text.num_attention_heads + text.num_key_value_heads)
    return text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def prefill_bound(text: Any, tokens: int, ratio: float) -> float:
    """Most that prefill can gain by arithmetic, where attention falls by the square of the ratio and nothing else does.

    Args:
        text: Config of the decoder.
        tokens: Of the prompt.
        ratio: Share of them that is kept.
    """
    linear = 2 * _linear(text) * tokens
    attention = 2 * tokens**2 * text.hidden_size * text.num_hidden_layers  # causal: half of the pairs
    return (linear + attention) / (linear + ratio**2 * attention)


def decode_bound(text: Any, tokens: int, batch: int, ratio: float, width: int) -> float:
    """Most that a decoding step can gain by the bytes that it reads: the layers' weights once, and every cache.

    Bytes count alike, and nothing else counts. It is no bound on times where a cache is read slower than weights are:
    what is not read of it then saves more time than as many bytes of weights take.

    Args:
        text: Config of the decoder.
        tokens: In each cache.
        batch: Caches.
        ratio: Share of the tokens that is kept.
        width: Bytes of a number.
    """
    weights = width * _linear(text)
    dim = text.hidden_size // text.num_attention_heads
    cache = batch * tokens * 2 * text.num_key_value_heads * dim * width * text.num_hidden_layers
    return (weights + cache) / (weights + ratio * cache)


def _model(cfg: BenchConfig, device: torch.device) -> Any:
    dtype = resolve_dtype(cfg.dtype, device)
    if cfg.model == "tiny":
        return load_host(device).model.to(dtype)
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    shape = SHAPES[cfg.model]
    pairs = shape["hidden_size"] // shape["num_attention_heads"] // 2
    section = [pairs // 4, 3 * pairs // 8, 3 * pairs // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    config = Qwen2_5_VLConfig(
        text_config=shape | {"vocab_size": VOCABULARY, "max_position_embeddings": 131072, "rope_parameters": rope},
        # Prompts are text: no tower is run.
        vision_config={"depth": 0, "hidden_size": 64, "out_hidden_size": shape["hidden_size"], "num_heads": 2}
        | {"intermediate_size": 64, "fullatt_block_indexes": []},
    )
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(cfg.seed)
            model = Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    return model
