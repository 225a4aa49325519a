"""What FP8 attention costs beside its forward: the options of its prologue, and gradients. Values first, then time.

The forward itself is timed beside everything else by ``hone_kernels.attention.bench`` with float8_e4m3fn.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from hone_core.runs import Run
from hone_core.timing import measure_interleaved
from torch import Tensor

from hone_kernels.attention import block_sparse_attention
from hone_kernels.attention.bench import SHAPES, Shape, random_layout, relative
from hone_kernels.backends import Backend
from hone_kernels.rows import timed

from .api import Delta, straight_through_attention
from .quantize import FP8Operands, quantize_qkv

__all__ = ["DENSITIES", "PROLOGUES", "bench", "check_prologue", "inputs", "rope_and_order", "shipped"]

DENSITIES = (0.5, 0.1)
"""Of the backward."""

PROLOGUES = {
    "wan-1.3b 480p": SHAPES["wan-1.3b 480p"],
    "cogvideox-5b": SHAPES["cogvideox-5b"],
    # Tensors that do not fit in a cache.
    "wan-14b 720p": Shape("wan-14b 720p", 40, 75600, 128, 40),
}
"""Shapes of the prologue; all but the largest are those of the backward."""

BACKENDS: tuple[Backend, Backend] = ("triton", "reference")
"""What is timed, and what its values are compared with."""

_FIELDS = ("q8", "k8", "v8", "q_scale", "k_scale", "v_scale")
_WARMUP = 3
_TOKENS_CHECKED = 4000
"""The reference's backward holds the whole map in memory."""


def shipped() -> dict[str, str]:
    """Launch settings that ship, as rows name them: of the forward by head size, and of the prologue."""
    from .triton import TILES
    from .triton_quantize import PROLOGUE, ROTATING

    return {f"forward d{dim}": str(tiles) for dim, tiles in TILES.items()} | {"prologue": f"{PROLOGUE}, {ROTATING}"}


def inputs(shape: Shape, n: int = 3) -> list[Tensor]:
    """Bfloat16 views ``[1, H, S, D]`` of ``[1, S, H, D]``, as models lay their tensors out."""
    make = (1, shape.tokens, shape.heads, shape.dim)
    return [torch.randn(make, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(n)]


def rope_and_order(tokens: int, dim: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Tables, and a permutation of tiles of 4 x 4 in rows of 52: what a video in tile order asks for."""
    angle = torch.rand(tokens, dim // 2, device="cuda") * 6
    place = torch.arange(tokens, device="cuda")
    row, column = place // 52, place % 52
    order = ((row // 4 * 13 + column // 4) * 16 + row % 4 * 4 + column % 4).argsort().to(torch.int32)
    return (angle.cos(), angle.sin()), order


def check_prologue(what: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative error of operands, in the order of ``FP8Operands``.

    Raises:
        RuntimeError: It is too large.
    """
    errors = {name: relative([g.float()], [w.float()]) for name, g, w in zip(_FIELDS, got, want, strict=False)}
    for name, error in errors.items():
        # A rotation that differs in its last bit may round the other way.
        if not error < 2e-3:
            raise RuntimeError(f"{what}: {name} is wrong, relative error {error:.2e}. No time is reported")
    return max(errors.values())


def bench(
    run: Run,
    shapes: Sequence[Shape],
    *,
    densities: Sequence[float] = DENSITIES,
    modes: Sequence[str] = ("backward", "prologue"),
    rounds: int = 20,
    seed: int = 0,
) -> None:
    """Measure, and write rows into the run.

    Args:
        run: The run, entered.
        shapes: Sequences; one that fits no cache has no backward.
        densities: Listed blocks over all blocks, of the backward.
        modes: ``backward``: with both deltas, beside bfloat16. ``prologue``: by its options, beside a device copy of as
            many bytes.
        rounds: Timed calls of each.
        seed: Of data, lists and order.

    Raises:
        RuntimeError: A value is wrong; no time is reported then.
    """
    for shape in shapes:
        torch.manual_seed(seed)
        if "backward" in modes and shape.name != "wan-14b 720p":
            _backward(run, shape, densities, rounds, seed)
        if "prologue" in modes:
            _prologue(run, shape, rounds, seed)
        gc.collect()
        torch.cuda.empty_cache()


def _labels(shape: Shape) -> dict[str, str | int]:
    return dict(shape=shape.name, heads=shape.heads, tokens=shape.tokens, dim=shape.dim, dtype="float8_e4m3fn")


def _backward(run: Run, shape: Shape, densities: Sequence[float], rounds: int, seed: int) -> None:
    q, k, v, dout = inputs(shape, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    kernel = f"forward d{shape.dim}"
    own: dict[str, Any] = dict(kernel=kernel, settings=shipped()[kernel])
    for density in densities:
        layout = random_layout(shape.heads, shape.tokens, density)
        errors = _check_gradients(shape, leaves, density)
        outs = {
            f"fp8, delta {delta}": straight_through_attention(q, k, v, layout, delta=delta) for delta in get_args(Delta)
        }
        outs["bf16"] = block_sparse_attention(q, k, v, layout)
        calls = {
            name: functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)
            for name, out in outs.items()
        }
        work = 10.0 * shape.dim * shape.heads * layout.density().item() * shape.tokens**2
        for name, timing in measure_interleaved(calls, warmup=_WARMUP, rounds=rounds, seed=seed).items():
            fields: dict[str, Any] = dict(work=work, error=errors.get(name), density=density, **_labels(shape))
            timed(run, name, timing, split="backward", **fields, **({} if name == "bf16" else own))


def _check_gradients(shape: Shape, leaves: Sequence[Tensor], density: float) -> dict[str, float]:
    """Errors of the gradients through two heads to exact attention's, beside what rounding alone makes of them."""
    tokens = min(shape.tokens, _TOKENS_CHECKED)
    few = q, k, v = tuple(x.detach()[:, :2, :tokens].requires_grad_() for x in leaves)
    layout = random_layout(2, tokens, density)
    dout = torch.randn_like(q)
    exact = exact_q, exact_k, exact_v = tuple(x.detach().float().requires_grad_() for x in few)
    out = block_sparse_attention(exact_q, exact_k, exact_v, layout, backend="reference")
    want = torch.autograd.grad(out, exact, dout.float())
    errors = {}
    for delta in get_args(Delta):
        grads = [
            torch.autograd.grad(straight_through_attention(q, k, v, layout, delta=delta, backend=name), few, dout)
            for name in BACKENDS
        ]
        error, emulated = (relative(got, want) for got in grads)
        if not error < 1.3 * emulated:
            raise RuntimeError(
                f"{shape.name}, delta {delta}: gradients are wrong, relative error {error:.2e}, emulation "
                f"{emulated:.2e}. No time is reported"
            )
        errors[f"fp8, delta {delta}"] = error
    return errors


def _prologue(run: Run, shape: Shape, rounds: int, seed: int) -> None:
    q, k, v = inputs(shape)
    rope, order = rope_and_order(shape.tokens, shape.dim)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "rope": dict(rope=rope),
        "rope, order": dict(rope=rope, order=order),
        "smooth_k": dict(smooth_k=True),
        "group 3": dict(group=3),
    }
    errors = {}
    for kind, options in kinds.items():
        part = [x[:, :1] for x in (q, k, v)]
        got, want = (_fields(quantize_qkv(*part, **options, backend=name)) for name in BACKENDS)
        errors[kind] = check_prologue(f"{shape.name}, {kind}", got, want)
    calls: dict[str, Callable[[], object]] = {
        kind: functools.partial(quantize_qkv, q, k, v, **options) for kind, options in kinds.items()
    }
    # What has to move: two bytes read and one written per element. A copy reads and writes as many of each.
    moved = 9 * q.numel()
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    calls["device copy"] = lambda: target.copy_(source)
    if shape.name != "wan-14b 720p":
        calls["torch, plain"] = lambda: quantize_qkv(q, k, v, backend="reference")
    own: dict[str, Any] = dict(kernel="prologue", settings=shipped()["prologue"])
    for name, timing in measure_interleaved(calls, warmup=_WARMUP, rounds=rounds, seed=seed).items():
        fields: dict[str, Any] = dict(work=moved, unit="GB/s", error=errors.get(name), **_labels(shape))
        timed(run, name, timing, split="prologue", **fields, **(own if name in kinds else {}))


def _fields(x: FP8Operands) -> list[Tensor]:
    return [getattr(x, name) for name in _FIELDS]
