"""``bench``: text to motion at published shapes, as released and as here.

Baseline is the loops of MoMask and MoGenTS re-created: conditional and unconditional passes one after the other, ranks
by two sorts, then a pass of each further level. Here both passes are one batch; on a CUDA device the whole generation,
draws included, is one graph, with the draws as one kernel of ``hone_kernels.guided_draw``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import UnsupportedHardwareError
from hone_core.runs import Report, Run
from hone_core.timing import check_values, measure_interleaved
from hone_kernels.backends import Backend
from torch import Tensor, nn

from .config import BenchConfig
from .decoding import Passes, guided, passes, unmask
from .method import Condition
from .mogents import MoGenTSTokenizer
from .published import MaskTransformer, MaskTransformer2D, ResidualTransformer, ResidualTransformer2D, refine
from .tokenizers import RVQVAE

__all__ = ["BenchReport", "Stream", "bench", "eager_loop", "eager_refine", "generated_tokens", "graphed"]

RESIDUAL_GUIDANCE = 5.0
"""MoMask's."""
END = 49407
"""CLIP's id of a text's end, which fills its 77 places."""


class Stream(NamedTuple):
    """Tokens of one kind.

    Attributes:
        mask: Transformer of the first level.
        residual: Of the further ones.
        parts: Columns.
    """

    mask: Any
    residual: Any
    parts: int


class Parts(NamedTuple):
    """What makes a motion of a text, random weights.

    Attributes:
        streams: Of tokens.
        tokenizer: Whose decoder makes features of them.
        text: CLIP ViT-B/32's text model, of a text's 77 ids.
    """

    streams: list[Stream]
    tokenizer: Any
    text: nn.Module


def _momask() -> Parts:
    return Parts([Stream(MaskTransformer(), ResidualTransformer(), 1)], RVQVAE(), _clip())


def _mogents() -> Parts:
    frames = Stream(MaskTransformer(aux=True), ResidualTransformer(aux=True), 1)
    return Parts([frames, Stream(MaskTransformer2D(), ResidualTransformer2D(), 6)], MoGenTSTokenizer(), _clip())


def _tiny() -> Parts:
    sizes = (64, 32, 48, 64, 2, 4)
    frames = Stream(MaskTransformer(*sizes), ResidualTransformer(*sizes, levels=3), 1)
    grid = Stream(MaskTransformer2D(*sizes), ResidualTransformer2D(*sizes, levels=3), 6)
    small = _clip(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return Parts([frames, grid], MoGenTSTokenizer(22, 64, 32, 64, 32, 16, 1, 3), small)


MODELS: dict[str, Callable[[], Parts]] = {"momask": _momask, "mogents": _mogents, "tiny": _tiny}


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Milliseconds of each way, and the shares of text encoder and decoder."""

    def __str__(self) -> str:
        lines = [f"{'batch':>5} {'what':<28} {'ms':>10} {'speedup':>8}"]
        base = {row.labels["batch"]: row.value for row in self.rows if row.variant == "released loop"}
        for row in self.rows:
            ways = row.variant not in ("text encoder", "decoder")
            share = f"{base[row.labels['batch']] / row.value:>8.2f}" if ways else ""
            lines.append(f"{row.labels['batch']:>5} {row.variant:<28} {row.value:>10.2f} {share}".rstrip())
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def eager_loop(
    model: Any, condition: Condition, valid: Tensor, parts: int, generator: torch.Generator, steps: int, scale: float
) -> Tensor:
    """MoMask's loop as its release writes it."""
    batch, time = valid.shape
    there = valid[..., None].expand(batch, time, parts)
    ids = torch.where(there, model.mask_id, model.mask_id + 1)
    scores = torch.where(there, 0.0, 1e5).flatten(1)
    gone = torch.ones(batch, dtype=torch.bool, device=valid.device)
    for step in torch.linspace(0, 1, steps).tolist():
        count = (math.cos(math.pi / 2 * step) * valid.sum(1) * parts).round().clamp(min=1)
        masked = (scores.argsort(dim=1).argsort(dim=1) < count[:, None]).view(ids.shape)
        ids = torch.where(masked, model.mask_id, ids)
        asked = model(ids, condition, valid)
        nothing = model(ids, condition.dropped(gone, gone), valid)
        logits = (nothing + (asked - nothing) * scale).float()
        odds = _likeliest(logits).softmax(-1)
        drawn = torch.multinomial(odds.flatten(0, 2), 1, generator=generator).view(ids.shape)
        ids = torch.where(masked, drawn, ids)
        sure = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
        scores = torch.where(masked, sure, torch.full_like(sure, 1e5)).flatten(1)
    return ids


def eager_refine(
    model: Any, ids: Tensor, condition: Condition, valid: Tensor, generator: torch.Generator, scale: float
) -> Tensor:
    """The further levels as the release draws them: two passes of each."""
    there = valid[..., None].expand_as(ids)
    found = torch.where(there, ids, model.pad_id)[..., None]
    gone = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(1, model.levels):
        asked = model(found, condition, valid)
        nothing = model(found, condition.dropped(gone, gone), valid)
        logits = _likeliest((nothing + (asked - nothing) * scale)[..., : model.codes].float())
        noise = torch.rand(logits.shape, generator=generator, device=ids.device).clamp(1e-20, 1)
        drawn = (logits - (-noise.log()).log()).argmax(-1)
        found = torch.cat([found, torch.where(there, drawn, model.pad_id)[..., None]], -1)
    return torch.where(there[..., None], found, -1)


def _likeliest(logits: Tensor, keep: float = 0.1) -> Tensor:
    values, at = logits.topk(math.ceil(keep * logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, at, values)


def released_tokens(
    streams: list[Stream], condition: Condition, valid: Tensor, generator: torch.Generator, steps: int, scale: float
) -> list[Tensor]:
    """All levels of every stream, as released."""
    found = []
    for mask, residual, parts in streams:
        ids = eager_loop(mask, condition, valid, parts, generator, steps, scale)
        found.append(eager_refine(residual, ids, condition, valid, generator, RESIDUAL_GUIDANCE))
    return found


def generated_tokens(
    streams: list[Stream],
    condition: Condition,
    valid: Tensor,
    generator: torch.Generator,
    steps: int,
    scale: float,
    backend: Backend = "auto",
) -> list[Tensor]:
    """All levels of every stream ``[B, T, P, levels]``, as here."""
    found = []
    for mask, residual, parts in streams:
        both = partial(_passes, mask, condition, valid, scale)
        ids = unmask(both, valid, parts, mask.mask_id, generator, steps=steps, backend=backend)
        found.append(refine(residual, ids, condition, valid, generator, guidance=RESIDUAL_GUIDANCE, backend=backend))
    return found


def _passes(model: Any, condition: Condition, valid: Tensor, scale: float, ids: Tensor) -> Passes:
    return passes(model, ids, condition, valid, scale, 1.0)


def _of_text(tokens_of: Callable[[Condition], list[Tensor]], text: Tensor) -> list[Tensor]:
    return tokens_of(Condition(text=text))


def graphed(
    call: Callable[[Tensor], list[Tensor]], example: Tensor, generator: torch.Generator
) -> Callable[[Tensor], list[Tensor]]:
    """A call of fixed shapes as one CUDA graph; what it returns is written over by the next call.

    Args:
        call: Of one tensor; it waits for nothing and copies nothing from the host.
        example: Like what it will be called with.
        generator: That it draws from; each replay goes on with it.
    """
    held = example.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        out = call(held)

    def replay(given: Tensor) -> list[Tensor]:
        held.copy_(given)
        graph.replay()
        return out

    return replay


def check_passes(
    model: Any, exact: Any, ids: Tensor, condition: Condition, valid: Tensor, scale: float, tolerance: float = 1e-4
) -> None:
    """See that both passes in one batch are those one after the other, and that the model's dtype is near float32.

    Guidance multiplies what rounding differs by, so it is compared in float32.

    Args:
        model: As it is timed.
        exact: The same in float32.
        ids: ``[B, T, P]``.
        condition: In the model's dtype.
        valid: ``[B, T]``.
        scale: Of the guidance.
        tolerance: Of float32; half precision has 3e-2.

    Raises:
        RuntimeError: They are not.
    """
    text, gone = condition.text, torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    assert text is not None
    told = Condition(text=text.float())
    asked, nothing = exact(ids, told, valid), exact(ids, told.dropped(gone, gone), valid)
    together = guided(exact, ids, told, valid, scale, 1.0)
    check_values("guidance in one batch", together, nothing + (asked - nothing) * scale, tolerance=tolerance)
    here = model(ids, condition, valid)
    near = tolerance if here.dtype == torch.float32 else 3e-2
    check_values(f"{type(model).__name__} in {str(here.dtype)[6:]}", here, asked, tolerance=near)


def check_tokens(
    name: str,
    found: Callable[[], list[Tensor]],
    wanted: Callable[[], list[Tensor]],
    generator: torch.Generator,
    seed: int,
) -> None:
    """See that two ways draw the same tokens from one seed.

    Raises:
        RuntimeError: They do not.
    """
    both = []
    for call in (found, wanted):
        generator.manual_seed(seed)
        both.append([ids.clone() for ids in call()])
    for one, other in zip(*both, strict=True):
        if not torch.equal(one, other):
            share = float((one != other).float().mean())
            raise RuntimeError(
                f"{name}: {share:.1%} of the tokens differ from those without a graph. No time is reported"
            )


def _clip(**sizes: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(eos_token_id=END, **sizes))


@torch.inference_mode()
def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Time whole generations with random weights, after the passes of each way are compared.

    Raises:
        UnsupportedHardwareError: Graphs are asked for without a CUDA device.
        RuntimeError: The ways differ.
    """
    device = resolve_device(run.device)
    if cfg.graphs and device.type != "cuda":
        raise UnsupportedHardwareError("CUDA graphs need a CUDA device", f"a {device.type} device", "--no-graphs")
    dtype = resolve_dtype(cfg.dtype, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        streams, tokenizer, encoder = MODELS[cfg.model]()
    exact = copy.deepcopy(streams)
    for module in (tokenizer, encoder, *(part for stream in streams for part in stream[:2])):
        module.eval().to(device, dtype)
    for batch in cfg.batches:
        draw = torch.Generator().manual_seed(cfg.seed)
        text = torch.randn(batch, 512, generator=draw).to(device, dtype)
        valid = torch.ones(batch, cfg.tokens, dtype=torch.bool, device=device)
        generator = torch.Generator(device).manual_seed(cfg.seed)
        condition = Condition(text=text)
        for stream, (full, _, parts) in zip(streams, exact, strict=True):
            ids = torch.randint(full.codes, (batch, cfg.tokens, parts), generator=draw).to(device)
            check_passes(stream.mask, full.eval().to(device), ids, condition, valid, cfg.guidance)

        options: dict[str, Any] = {"valid": valid, "generator": generator, "steps": cfg.steps, "scale": cfg.guidance}
        released = partial(released_tokens, streams, condition, **options)
        made = partial(_of_text, partial(generated_tokens, streams, **options))
        calls: dict[str, Callable[[], object]] = {"released loop": released, "one batch": partial(made, text)}
        if cfg.graphs:
            plain = partial(_of_text, partial(generated_tokens, streams, **options, backend="reference"))
            for name, call in (("one graph, torch's draws", plain), ("one graph, fused draws", made)):
                replay = graphed(call, text, generator)
                check_tokens(name, partial(replay, text), partial(call, text), generator, cfg.seed)
                calls[name] = partial(replay, text)
        levels = made(text)
        said = torch.randint(1000, (batch, 77), generator=draw).to(device)
        said[:, 20:] = END
        calls["text encoder"] = partial(encoder, said)
        held = [ids[:, :, 0] if parts == 1 else ids for ids, (_, _, parts) in zip(levels, streams, strict=True)]
        calls["decoder"] = partial(tokenizer.forward_decoder, *held)
        times = measure_interleaved(calls, warmup=2, rounds=cfg.rounds, seed=cfg.seed, device=device)
        for name, timing in times.items():
            run.row(
                "time", timing.ms_p50, unit="ms", better="lower", n=cfg.rounds, variant=name, labels={"batch": batch}
            )
    return BenchReport.of(run)
