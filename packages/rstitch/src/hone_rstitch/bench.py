"""What a step of each model takes, how much a gap adds, and what a stitched text makes of it.

Who writes is drawn, at a share and run length that the config says: weights may be random, and no entropy of theirs
means anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.runs import Report, Run
from hone_core.timing import measure_interleaved
from transformers import DynamicCache

from .config import LARGE, SMALL, BenchConfig, StitchConfig
from .generation import StitchOutput, stitch_generate
from .host import load_host
from .method import token_time
from .models import Pair
from .vocabulary import Vocabulary

__all__ = ["SHAPES", "BenchReport", "bench"]

SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    | {"intermediate_size": 8960, "vocab_size": 151936},
    "7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"intermediate_size": 18944, "vocab_size": 152064},
    "14b": {"hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8}
    | {"intermediate_size": 13824, "vocab_size": 152064},
    "32b": {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8}
    | {"intermediate_size": 27648, "vocab_size": 152064},
}
"""R1-Distill-Qwen's; QwQ-32B has the last."""


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Times of steps and gaps, rates of texts."""

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            batch = f"{row.labels['batch']:>3} x " if "batch" in row.labels else ""
            if row.metric == "read":
                lines.append(f"{row.variant:<5} reads {row.labels['gap']:>3} tokens in {row.value:8.2f} ms")
            elif row.metric in ("step", "floor"):
                what = {"step": "steps in", "floor": "memory allows"}[row.metric]
                lines.append(f"{batch}{row.variant:<5} {what} {row.value:8.3f} ms")
            elif row.metric == "graph":
                lines.append(f"{batch}{row.variant:<5} without the host {row.value:8.3f} ms, {row.labels['launches']}")
            elif row.metric == "rate":
                lines.append(f"{batch}{row.variant:<28} {row.value:8.1f} tokens/s")
            elif row.metric == "formula_rate":
                lines.append(f"{'formula with these steps':<28} {row.value:8.1f} tokens/s; who writes was drawn")
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Time steps, gaps and texts.

    Raises:
        RuntimeError: The loop and transformers' own do not write the same with the large model alone.
    """
    device = resolve_device(run.device)
    small, large, vocabulary = _models(cfg, device)
    if cfg.loop == "engine":
        from .rates import rates

        rates(cfg, run, Pair(small, large, None, None, vocabulary))
        return BenchReport.of(run)
    generator = torch.Generator().manual_seed(cfg.seed)
    ids = torch.randint(0, 10, (1, cfg.context), generator=generator).to(device)
    steps = [_read_times(model, ids, cfg, device, run, name) for model, name in ((small, "small"), (large, "large"))]
    drawn = StitchConfig(policy="random", share=cfg.share, run_length=cfg.run_length)
    shared = {"max_new_tokens": cfg.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    unknown = (vocabulary.to_small < 0).nonzero()[:, 0].tolist()
    options: dict[str, Any] = shared | {"attention_mask": torch.ones_like(ids)}
    # Ids that only the large model has are no choice in either loop.
    alone = options | {"suppress_tokens": [id for id in unknown if id not in vocabulary.eos] or None}

    def write(stitch: StitchConfig) -> StitchOutput:
        output = stitch_generate(
            large,
            small,
            ids,
            stitch=stitch,
            vocabulary=vocabulary,
            seed=cfg.seed,
            return_dict_in_generate=True,
            **options,
        )
        assert isinstance(output, StitchOutput), "a dict was asked for"
        return output

    calls = {
        "large, transformers": lambda: large.generate(ids, **alone),
        "large, this loop": lambda: write(StitchConfig(policy="large")).sequences,
        "small, this loop": lambda: write(StitchConfig(policy="small")).sequences,
        "stitched": lambda: write(drawn).sequences,
    }
    if not torch.equal(calls["large, transformers"](), calls["large, this loop"]()):
        raise RuntimeError("the loop and transformers' own write different texts with the large model alone")
    usage = write(drawn).usage[0]
    times = measure_interleaved(calls, warmup=2, rounds=cfg.rounds, seed=cfg.seed, device=device)
    for name, timing in times.items():
        run.row("text", timing.ms_p50, unit="ms", better="lower", n=cfg.rounds, variant=name)
        run.row("rate", 1000 * cfg.tokens / timing.ms_p50, unit="tokens/s", better="higher", variant=name)
    run.row("large_share", usage.share, better="none", n=cfg.tokens, variant="stitched")
    predicted = token_time(usage.share, 0.0, small=steps[SMALL], large=steps[LARGE])
    run.row("formula_rate", 1000 / predicted, unit="tokens/s", better="none", variant="stitched")
    return BenchReport.of(run)


def _models(cfg: BenchConfig, device: torch.device) -> tuple[Any, Any, Vocabulary]:
    if cfg.model == "tiny":
        pair = load_host(0, device=device)
        return pair.small, pair.large, pair.vocabulary
    from transformers import Qwen2Config, Qwen2ForCausalLM

    dtype, models = resolve_dtype(cfg.dtype, device), []
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(cfg.seed)
            for name in cfg.model.split("-"):
                config = Qwen2Config(**SHAPES[name], tie_word_embeddings=False, max_position_embeddings=131072)
                models.append(Qwen2ForCausalLM(config).eval())
    finally:
        torch.set_default_dtype(before)
    small, large = models
    return small, large, Vocabulary.shared(small.config.vocab_size, large.config.vocab_size, ())


@torch.no_grad()
def _read_times(model: Any, ids: torch.Tensor, cfg: BenchConfig, device: torch.device, run: Run, name: str) -> float:
    """Time of reading each gap after the context; returns that of the smallest, a step, in milliseconds."""
    from .generation import cache_argument

    argument = cache_argument(model)
    cache = DynamicCache(config=model.config)
    model(ids, use_cache=True, **{argument: cache})

    def read(gap: int) -> None:
        tokens = ids[:, :1].expand(-1, gap)
        model(tokens, use_cache=True, logits_to_keep=1, **{argument: cache}).logits.argmax(-1).tolist()
        cache.crop(-gap)

    gaps = sorted({1, *cfg.gaps})
    calls = {str(gap): (lambda gap=gap: read(gap)) for gap in gaps}
    times = measure_interleaved(calls, warmup=2, rounds=cfg.rounds, seed=cfg.seed, device=device)
    for gap in gaps:
        run.row(
            "read",
            times[str(gap)].ms_p50,
            unit="ms",
            better="lower",
            n=cfg.rounds,
            variant=name,
            labels={"gap": gap},
        )
    return times["1"].ms_p50
