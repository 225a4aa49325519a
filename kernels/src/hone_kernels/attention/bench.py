"""Block-sparse attention beside the strongest alternatives on this machine: values first, then time.

One row per shape, mode, density, data type and provider. Rates count the query-key pairs of listed blocks only, so a
rate that holds at low density means time in proportion to density. Dense providers ignore the lists: their time is what
a sparse one has to beat, and their rate is that of the dense product, whatever the density beside which they ran.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hone_kernels.timing import Times, interleaved

from .api import SUPPORT, PooledKV, block_sparse_attention, why_not
from .fp8 import block_sparse_attention_fp8, fp8_block_sparse_attention, fp8_why_not, quantize_qkv
from .layout import BlockLayout

__all__ = ["DENSE", "MODES", "SHAPES", "Shape", "bench", "providers"]

MODES = ("forward", "forward pooled", "backward", "prologue")
"""``prologue`` is what FP8 needs before its forward: rounding q, k and v. Pooled keys are 16-bit only."""

FP8 = torch.float8_e4m3fn

DENSE = ("cudnn dense", "flash-attn dense", "sageattention dense")
"""Providers that compute every pair."""

_LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Relative error (norm) against the float32 reference above which no time is reported."""

_DEVICE = "cuda"

_HEADS_CHECKED = 2
"""Heads whose values are compared: the reference is slow."""


@dataclass(frozen=True)
class Shape:
    """Self-attention over one sequence.

    Attributes:
        name: For the table.
        heads: Query heads.
        tokens: Length of the sequence.
        dim: Head size.
        heads_k: Key heads.
    """

    name: str
    heads: int
    tokens: int
    dim: int
    heads_k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """A name in ``SHAPES``, or heads, tokens and head size such as ``12x32768x128``.

        Raises:
            ValueError: It is neither.
        """
        if text in SHAPES:
            return SHAPES[text]
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(
                f"a shape is one of {', '.join(SHAPES)} or HEADSxTOKENSxHEAD_SIZE such as 12x32768x128; got {text!r}"
            )
        heads, tokens, dim = map(int, parts)
        return cls(text, heads, tokens, dim, heads)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan-1.3b 480p", 12, 32768, 128, 12),
        Shape("wan-1.3b 480p ragged", 12, 32760, 128, 12),
        Shape("cogvideox-5b", 48, 17792, 64, 48),
        Shape("cogvideox-5b ragged", 48, 17776, 64, 48),
    )
}
"""Wan2.1-1.3B and CogVideoX-5B at 480p: cut to a multiple of 128, and whole."""


def bench(
    shapes: list[Shape],
    *,
    densities: list[float],
    dtypes: list[torch.dtype],
    backends: list[str],
    modes: list[str] | None = None,
    block: int = 128,
    rounds: int = 20,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measure, and return rows for a results file.

    Args:
        shapes: Sequences.
        densities: Listed blocks over all blocks, each in (0, 1]; blocks are random, own ones per head and row.
        dtypes: Of q, k and v; float8_e4m3fn rounds bfloat16 ones.
        backends: Ours, by name. One that cannot take a shape or dtype is left out there, and ``say`` gets the reason.
        modes: Of ``MODES``; all if None. One that a dtype does not have is left out there.
        block: Block size on both sides.
        rounds: Timed calls of each.
        seed: Of data, lists and order.
        say: Gets a line per row as it is measured.

    Raises:
        RuntimeError: There is no CUDA device, or a backend's values are wrong; no time is reported then.
        ValueError: A density, mode or backend is not one.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("attention is timed on a CUDA device; torch finds none here")
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"a density lies in (0, 1]; got {density}")
    for kind, got, known in (("mode", modes or [], MODES), ("backend", backends, SUPPORT)):
        if unknown := sorted(set(got) - set(known)):
            raise ValueError(f"no {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for dtype in dtypes:
            torch.manual_seed(seed)
            layouts = {density: _random_layout(shape, density, block) for density in densities}
            q, k, v = _inputs(shape, torch.bfloat16 if dtype == FP8 else dtype)
            usable = []
            for name in backends:
                reason = (
                    fp8_why_not(name, q, (block, block)) if dtype == FP8 else why_not(name, q, layouts[densities[0]])
                )
                if reason is None:
                    usable.append(name)
                else:
                    say(f"{shape.name}, {dtype}: no backend {name!r}, since {reason}")
            check = _fp8_error if dtype == FP8 else _error
            errors = {name: check(name, q, k, v, layouts[min(densities)]) for name in usable}
            for mode in modes or MODES:
                if mode == ("forward pooled" if dtype == FP8 else "prologue"):
                    continue
                measure = _prologue if mode == "prologue" else _attention
                for fields, times in measure(mode, shape, dtype, layouts, (q, k, v), usable, rounds, seed):
                    row = dict(
                        op="attention", shape=shape.name, heads=shape.heads, tokens=shape.tokens, dim=shape.dim,
                        dtype=str(dtype).removeprefix("torch."), block=block, mode=mode, **fields, **asdict(times),
                    )  # fmt: skip
                    row["error"] = errors.get(row["provider"].removeprefix("hone ").removesuffix(" and prologue"))
                    rate = f"{row['tflops']:6.0f} TFLOP/s" if "tflops" in row else f"{row['gbps']:6.0f} GB/s"
                    say(
                        f"{shape.name}  {row['dtype']}  {mode}  {row['provider']:22} {row['density']:5.2f} "
                        f"{row['ms_p50']:9.3f} ms {rate}"
                    )
                    rows.append(row)
                gc.collect()
                torch.cuda.empty_cache()
    return rows


def _attention(
    mode: str,
    shape: Shape,
    dtype: torch.dtype,
    layouts: dict[float, BlockLayout],
    qkv: tuple[Tensor, Tensor, Tensor],
    backends: list[str],
    rounds: int,
    seed: int,
) -> Iterator[tuple[dict[str, Any], Times]]:
    """All densities and providers of one mode in one interleaved run: fields of a row, and its times."""
    backward, groups = mode == "backward", 0
    pooled = None
    if mode == "forward pooled":
        groups = math.ceil(shape.tokens / 30)
        pooled = PooledKV(*_inputs(shape, dtype, groups)[1:], torch.tensor(30.0, device=_DEVICE).log())
    leaves = [x.detach().requires_grad_(backward) for x in qkv]
    dout = torch.randn_like(qkv[0])
    calls: dict[str, Callable[[], object]] = {}
    facts: dict[str, tuple[str, float]] = {}
    for density, layout in layouts.items():
        if dtype == FP8:
            found = _fp8_providers(layout, qkv, backends, backward)
        else:
            found = providers(layout, dtype, backends, pooled=pooled, backward=backward)
        for name, attend in found.items():
            key = f"{name} {density}"
            facts[key] = (name, density)
            if backward:
                out = attend(*leaves)
                calls[key] = functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)
            else:
                calls[key] = functools.partial(attend, *leaves)
    pairs = {density: layout.density().item() * shape.tokens**2 for density, layout in layouts.items()}
    for key, times in interleaved(calls, rounds=rounds, seed=seed).items():
        name, density = facts[key]
        seen = shape.tokens**2 if name in DENSE else pairs[density] + shape.tokens * groups
        # Two matrix products forward, five backward, two operations a multiply-add.
        work = (10 if backward else 4) * shape.dim * shape.heads * seen
        yield dict(density=density, provider=name, tflops=work / times.ms_p50 / 1e9), times


def _prologue(
    mode: str,
    shape: Shape,
    dtype: torch.dtype,
    layouts: dict[float, BlockLayout],
    qkv: tuple[Tensor, Tensor, Tensor],
    backends: list[str],
    rounds: int,
    seed: int,
) -> Iterator[tuple[dict[str, Any], Times]]:
    """Rounding q, k and v to E4M3, beside a device copy of as many bytes: two read and one written an element."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)  # [B, S, H, D], as projections leave them
    calls: dict[str, Callable[[], object]] = {
        f"hone {name}": functools.partial(quantize_qkv, q, k, v, backend=name) for name in backends
    }
    moved = 3 * sum(x.numel() for x in (q, k, v))
    source = torch.empty(moved // 2, dtype=torch.uint8, device=_DEVICE)
    target = torch.empty_like(source)
    calls["device copy"] = lambda: target.copy_(source)
    for name, times in interleaved(calls, rounds=rounds, seed=seed).items():
        yield dict(density=1.0, provider=name, gbps=moved / times.ms_p50 / 1e6), times


def _fp8_providers(
    layout: BlockLayout, qkv: tuple[Tensor, Tensor, Tensor], backends: list[str], backward: bool
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The FP8 forward on operands that are there, the same with its prologue, or the training op; cuDNN in bfloat16."""

    def train(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: block_sparse_attention_fp8(q, k, v, layout, backend=name)

    def forward(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        operands = quantize_qkv(*qkv, backend=name)
        return lambda q, k, v: fp8_block_sparse_attention(operands, layout, backend=name)

    def whole(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: fp8_block_sparse_attention(quantize_qkv(q, k, v, backend=name), layout, backend=name)

    if backward:
        found = {f"hone {name}": train(name) for name in backends}
    else:
        found = {f"hone {name}": forward(name) for name in backends}
        found |= {f"hone {name} and prologue": whole(name) for name in backends}
    return found | {"cudnn dense": _cudnn}


def providers(
    layout: BlockLayout,
    dtype: torch.dtype,
    backends: list[str],
    *,
    pooled: PooledKV | None = None,
    backward: bool = False,
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What can run here: our backends by name, and others that are installed and can take these inputs.

    Args:
        layout: Lists; also for FlexAttention, as its block mask.
        dtype: Of q, k and v.
        backends: Ours.
        pooled: Further keys, which only ours can take in the same pass.
        backward: Whether gradients must flow.
    """

    def ours(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: block_sparse_attention(q, k, v, layout, pooled=pooled, backend=name)

    found = {f"hone {name}": ours(name) for name in backends}
    if dtype in (torch.bfloat16, torch.float16):
        found["cudnn dense"] = _cudnn
        if importlib.util.find_spec("flash_attn_interface"):
            found["flash-attn dense"] = _flash_attn
        if importlib.util.find_spec("sageattention") and not backward:
            found["sageattention dense"] = _sageattention
    # FlexAttention compiles another kernel for a ragged end, its tiles at head size 128 do not fit blocks of 64, and
    # pooled keys are beyond a block mask.
    whole = not (layout.tokens_q % layout.block_q or layout.tokens_k % layout.block_k)
    if pooled is None and whole and layout.block_q % 128 == layout.block_k % 128 == 0:
        mask = layout.to_block_mask()
        found["flex"] = lambda q, k, v: _flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return found


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = importlib.import_module("flash_attn_interface").flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _sageattention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return importlib.import_module("sageattention").sageattn(q, k, v, tensor_layout="HND")


@functools.cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def _inputs(shape: Shape, dtype: torch.dtype, tokens_k: int | None = None) -> list[Tensor]:
    """q, k, v ``[1, H, S, D]``."""
    sizes = ((shape.heads, shape.tokens), *[(shape.heads_k, tokens_k or shape.tokens)] * 2)
    return [torch.randn(1, heads, tokens, shape.dim, device=_DEVICE, dtype=dtype) for heads, tokens in sizes]


def _random_layout(shape: Shape, density: float, block: int) -> BlockLayout:
    cols = math.ceil(shape.tokens / block)
    scores = torch.rand(1, shape.heads, cols, cols, device=_DEVICE)
    keep = max(1, round(cols * density))
    return BlockLayout.from_topk(scores, keep, shape.tokens, shape.tokens, block_q=block, block_k=block)


def _few(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout
) -> tuple[tuple[Tensor, Tensor, Tensor], BlockLayout, Tensor]:
    """The first heads, their lists, and their output by the float32 reference."""
    group = q.shape[1] // k.shape[1]
    heads_k = -(-_HEADS_CHECKED // group)
    few = BlockLayout(
        layout.kv_num[:, : heads_k * group], layout.kv_idx[:, : heads_k * group], layout.tokens_q, layout.tokens_k,
        layout.block_q, layout.block_k,
    )  # fmt: skip
    part = (q[:, : heads_k * group], k[:, :heads_k], v[:, :heads_k])
    return part, few, block_sparse_attention(*(x.float() for x in part), few, backend="reference")


def _error(backend: str, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> float:
    """Relative error (norm) of the first heads against the float32 reference.

    Raises:
        RuntimeError: It is above the limit of the data type.
    """
    part, few, want = _few(q, k, v, layout)
    got = block_sparse_attention(*part, few, backend=backend)
    return _checked(backend, got, want, _LIMITS[q.dtype], q)


def _fp8_error(backend: str, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> float:
    """The same of FP8, which may be off by 1.3 times as much as its emulation."""
    part, few, want = _few(q, k, v, layout)
    operands = quantize_qkv(*part, backend=backend)
    got, emulated = (fp8_block_sparse_attention(operands, few, backend=name) for name in (backend, "reference"))
    return _checked(backend, got, want, 1.3 * float((emulated.float() - want).norm() / want.norm()), q)


def _checked(backend: str, got: Tensor, want: Tensor, limit: float, q: Tensor) -> float:
    error = float((got.float() - want).norm() / want.norm())
    if not error < limit:
        raise RuntimeError(
            f"backend {backend!r} is wrong at {list(q.shape)}, {q.dtype}: relative error {error:.2e}, expected below "
            f"{limit:.2e}. No time is reported; run the tests of hone-kernels on this device."
        )
    return error
