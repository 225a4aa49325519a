"""Time of drawing grids at real sizes with random weights: the release's loop, ours, and raster in the same engine.

Beside the times stands the least time in which the weights of all passes can be read from memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import UnsupportedHardwareError
from hone_core.runs import Report, Run
from hone_core.timing import Timing, check_values, measure
from hone_kernels.few_tokens import TOKENS
from hone_visual_ar.sampling import Sampling

from .checkpoints import SIZES, build
from .config import BenchConfig
from .generation import Decoding, GraphedDecoding
from .method import guide
from .models import tiny, tiny_tokenizer
from .release_loop import ReleaseLoop
from .transformer import (
    HEAD_NAMES,
    LlamaGenForImageGeneration,
    NARForImageGeneration,
    NARForVideoGeneration,
    compiled_pieces,
    output_name,
)

__all__ = ["BenchReport", "bench", "check_draws", "weight_bytes"]

Labels = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Result of ``bench``; as text, times beside the release's loop."""

    def __str__(self) -> str:
        lines = []
        times = {
            (row.labels["model"], row.labels["batch"], row.variant): row for row in self.rows if row.metric == "time"
        }
        floors = {
            (row.labels["model"], row.labels["batch"], row.variant): row.value
            for row in self.rows
            if row.metric == "weight_floor"
        }
        for key, row in times.items():
            model, batch, variant = key
            release = times[model, batch, "release"].value
            line = (
                f"{model:<10} batch {batch:<5}{variant:<16}{row.value:>10.2f} ms  {release / row.value:6.2f} x release"
            )
            if key in floors:
                line += f", weights alone {floors[key]:.2f} ms"
            lines.append(line)
        lines += [
            f"{row.labels['model']:<10} batch {row.labels['batch']:<5}{'decode':<16}{row.value:>10.2f} ms"
            for row in self.rows
            if row.metric == "decode"
        ]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def weight_bytes(model: Any) -> int:
    """Bytes of weights that every pass reads: all but the tables that rows are looked up in."""
    tables = {id(model.tok_embeddings.weight), *(id(p) for p in model.cls_embedding.parameters())}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)


def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Time every model and batch.

    Rows, each with labels ``model`` and ``batch``: ``time`` of a batch of grids (``ms``) and ``peak_memory``, of the
    variants ``release``, ``eager``, ``graphs`` (one for each step), ``compiled`` (graphs of compiled blocks), ``fused``
    (draws by one kernel besides), ``few`` (passes over few tokens by seven launches a block besides) and ``raster-...``
    of each; ``passes``; ``weight_floor``; ``decode`` of the tokenizer.

    Raises:
        ValueError: There is no such model.
        UnsupportedHardwareError: A published size, or graphs, are asked of a CPU.
        RuntimeError: The loops differ; no time is reported then.
    """
    device = resolve_device(run.device)
    sizes = [name for name, (kind, _) in SIZES.items() if kind in (NARForImageGeneration, NARForVideoGeneration)]
    for name in cfg.models:
        if name not in ("tiny", *sizes):
            raise ValueError(f"model must be of tiny, {', '.join(sizes)}; got {name!r}")
    if device.type == "cpu" and (set(cfg.models) != {"tiny"} or cfg.graphs):
        raise UnsupportedHardwareError(
            f"{', '.join(cfg.models)} needs a CUDA device, and graphs do", "no CUDA device", "--model tiny"
        )
    if "eager" not in cfg.modes and (device.type == "cpu" or cfg.graphs is False):
        raise UnsupportedHardwareError(f"--modes {' '.join(cfg.modes)} need graphs", "none", "--modes eager")
    with torch.no_grad():
        for name in cfg.models:
            # No release draws clips in raster order with these tokens.
            video = name != "tiny" and SIZES[name][0] is NARForVideoGeneration
            for kind in ("nar", "llamagen") if cfg.raster and not video else ("nar",):
                _Bench(cfg, run, device, name, kind).all()
    return BenchReport.of(run)


def check_draws(
    what: str, tokens: torch.Tensor, logits: torch.Tensor, uniform: torch.Tensor, *, tolerance: float
) -> float:
    """Whether codes are those that uniforms fall on; returns how far the farthest one lies outside of its code's share.

    Args:
        what: Drew them.
        tokens: ``[B, n]``.
        logits: ``[B, n, V]`` that they are drawn from.
        uniform: ``[B, n]``.
        tolerance: Mass by which a uniform may lie outside.

    Raises:
        RuntimeError: One lies farther; no time is reported then.
    """
    mass = logits.double().softmax(-1)
    high = mass.cumsum(-1).gather(-1, tokens[..., None])[..., 0]
    low = high - mass.gather(-1, tokens[..., None])[..., 0]
    outside = float(torch.maximum(low - uniform, uniform - high).clamp(min=0).max())
    if not outside < tolerance:
        raise RuntimeError(
            f"{what} is wrong on {tokens.device}: a uniform lies {outside:.2e} outside of its code's share, expected "
            f"below {tolerance:g}. No time is reported"
        )
    return outside


class _Bench:
    """One model at all batches."""

    def __init__(self, cfg: BenchConfig, run: Run, device: torch.device, name: str, kind: str) -> None:
        self.cfg, self.run, self.device, self.name = cfg, run, device, name
        self.prefix = "" if kind == "nar" else "raster-"
        self.dtype = resolve_dtype(cfg.dtype, device)
        if name == "tiny":
            model: Any = tiny(kind, seed=cfg.seed)
        else:
            # A raster model of M, which LlamaGen does not publish, is built like the others.
            cls, options = SIZES[name]
            if kind == "llamagen":
                cls = LlamaGenForImageGeneration
            if "num_classes" in options:
                options = {**options, "grid": (32, 32)}
            with torch.random.fork_rng(devices=[device]), torch.device(device):
                torch.manual_seed(cfg.seed)
                model = cls(**options)
                for head in HEAD_NAMES[model.heads]:
                    # A head of zeros, as training starts from, would draw evenly.
                    torch.nn.init.normal_(model.get_submodule(output_name(head)).weight, std=0.02)
        self.model = model.to(device, self.dtype).eval()
        self.graphs = device.type == "cuda" if cfg.graphs is None else cfg.graphs
        self.tolerance = 1e-4 if self.dtype == torch.float32 else 5e-2

    def clear(self) -> None:
        """Give memory back: graphs and caches hold each other."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def all(self) -> None:
        # Each size is compiled anew, and torch.compile gives up silently after some.
        compiled_pieces.cache_clear()
        torch._dynamo.reset()
        for batch in self.cfg.batches:
            given = self.given(batch)
            facts: Labels = {"model": self.name, "batch": batch, "dtype": str(self.dtype).removeprefix("torch.")}
            release = ReleaseLoop(self.model, self.cfg.guidance)
            self.check(release)
            self.time(f"{self.prefix}release", facts, partial(release, **given))
            for mode in (mode for mode in self.cfg.modes if self.graphs or mode == "eager"):
                self.ours(mode, batch, given, facts)
                self.clear()
            passes = len(self.model.order.steps)
            name = "raster" if self.prefix else "nar"
            self.run.row("passes", passes, unit="passes", better="lower", variant=name, labels=facts)
            if not self.prefix:
                self.decode(batch, facts)

    def given(self, batch: int) -> dict[str, torch.Tensor]:
        """Classes that count up, or random texts of a third of the words that there is room for."""
        if self.model.num_classes is not None:
            return {"labels": torch.arange(batch, device=self.device) % self.model.num_classes}
        generator = torch.Generator().manual_seed(self.cfg.seed)
        length, channels = self.model.cls_token_num, self.model.config.caption_dim
        words = (torch.arange(length) >= length - length // 3).expand(batch, -1)
        text = torch.randn(batch, length, channels, generator=generator) * words[..., None]
        return {"text": text.to(self.device, self.dtype), "words": words.to(self.device)}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Guided logits of tokens, teacher-forced."""
        given = self.given(len(tokens))
        conditional = self.model(tokens, **given).logits
        if self.cfg.guidance == 1:
            return conditional
        drop = torch.ones(len(tokens), dtype=torch.bool, device=self.device)
        return guide(conditional, self.model(tokens, **given, drop=drop).logits, self.cfg.guidance)

    def check(self, release: ReleaseLoop) -> None:
        generator = torch.Generator().manual_seed(self.cfg.seed)
        shape = (2, self.model.tokens)
        tokens = torch.randint(self.model.vocab_size, shape, generator=generator).to(self.device)
        _, got = release(**self.given(2), forced=tokens)
        assert got is not None
        check_values("the release's loop", got, self.forward(tokens), tolerance=self.tolerance)

    def ours(self, mode: str, batch: int, given: dict[str, torch.Tensor], facts: Labels) -> None:
        variant = f"{self.prefix}{mode}"
        kind: type[Decoding] = Decoding if mode == "eager" else GraphedDecoding
        options: dict[str, Any] = {"pieces": compiled_pieces()} if mode in ("compiled", "fused", "few") else {}
        fused = mode in ("fused", "few")
        options |= {"fused": fused, "few": TOKENS if mode == "few" else 0}
        run = kind(self.model, batch, sampling=Sampling(guidance=self.cfg.guidance), **options)

        def draw() -> torch.Tensor:
            run.load(self.model.condition(**given, guided=self.cfg.guidance != 1), range(batch))
            return run.run()

        tokens = draw()
        # The texts of a small batch are the first of a large one.
        want = self.forward(tokens[:2])
        if fused:
            check_draws(variant, tokens[:2], want, run.uniforms_raster()[:2], tolerance=self.tolerance)
        else:
            assert run.logits is not None
            last = list(self.model.order.steps[-1])
            check_values(variant, run.logits[:2], want[:, last], tolerance=self.tolerance)
        self.time(variant, facts, draw)
        if self.cfg.bandwidth is not None:
            floor = len(self.model.order.steps) * weight_bytes(self.model) / self.cfg.bandwidth / 1e9
            self.run.row("weight_floor", floor, unit="ms", better="lower", variant=variant, labels=facts)

    def time(self, variant: str, facts: Labels, work: Callable[[], object]) -> None:
        timing = measure(work, warmup=self.cfg.warmup, repeats=self.cfg.rounds, device=self.device)
        self.row("time", timing, variant, facts)
        if timing.peak_bytes is not None:
            peak = timing.peak_bytes / 2**30
            self.run.row("peak_memory", peak, unit="GiB", better="lower", variant=variant, labels=facts)

    def row(self, metric: str, timing: Timing, variant: str, facts: Labels) -> None:
        spread = (timing.ms_p80 - timing.ms_p20) / 2
        self.run.row(
            metric, timing.ms_p50, unit="ms", better="lower", n=timing.n, spread=spread, variant=variant, labels=facts
        )

    def decode(self, batch: int, facts: Labels) -> None:
        if self.name == "tiny":
            vae: Any = tiny_tokenizer(self.cfg.seed)
        else:
            video = isinstance(self.model, NARForVideoGeneration)
            vae = build("larp_l_long" if video else "vq_ds16", device=self.device)
        vae = vae.to(self.device, self.dtype).eval()
        shape = (self.model.tokens,) if len(self.model.grid) == 3 else self.model.grid
        codes = torch.zeros(batch, *shape, dtype=torch.long, device=self.device)
        self.row(
            "decode",
            measure(lambda: vae.decode(codes), warmup=1, repeats=min(5, self.cfg.rounds), device=self.device),
            "tokenizer",
            facts,
        )
