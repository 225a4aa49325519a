"""Block-sparse attention beside the strongest alternatives on this machine: values first, then time.

One call per shape, mode, density, data type and provider. Rates count the query-key pairs of listed blocks only, so a
rate that holds at low density means time in proportion to density. Dense providers ignore the lists: their time is what
a sparse one has to beat, and their rate is that of the dense product, whatever the density beside which they ran.

Every call of ours, of others over lists, and of dense ones beside lists of all blocks, is compared with the reference,
at its own density and mode, before it is timed; its ``error`` is what that gave. ``dense`` of a row names the fastest
dense provider that ran beside it.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hone_core.runs import Run
from hone_core.timing import Timing, measure_host, measure_interleaved
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hone_kernels import launch
from hone_kernels.attention_fp8 import SUPPORT as FP8_SUPPORT
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention, straight_through_attention
from hone_kernels.attention_fp8.reference import attention_fp8_reference
from hone_kernels.rows import DENSE, timed

from .api import SUPPORT, Backend, PooledKV, block_sparse_attention
from .layout import BlockLayout
from .peers import DENSE_PEERS, LISTED_PEERS, Attend, cudnn, dense_fp8, dense_peer, flex, listed_peer

__all__ = ["SHAPES", "Shape", "bench", "cudnn", "dense_kernels", "flex", "providers", "random_layout", "relative"]

FP8 = torch.float8_e4m3fn

_log = logging.getLogger(__name__)

_LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Relative error (norm) against the reference above which no time is reported."""

_DEVICE = "cuda"

_WARMUP = 3

_HEADS_CHECKED = 2
"""Heads whose values are compared: the reference is slow."""

_PAIRS_CHECKED = 1 << 31
"""Pairs of a query and a key in a comparison: two heads of 32,768 tokens. Of more, as many queries as that allows."""

_PAIRS_AT_ONCE = 1 << 24
"""Pairs that the reference holds in memory."""


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

HOST = Shape("2x256x128", 2, 256, 128, 2)
"""So small that the device waits for the host."""


def bench(
    run: Run,
    shapes: Sequence[Shape],
    *,
    densities: Sequence[float],
    dtypes: Sequence[torch.dtype],
    backends: Sequence[Backend],
    modes: Sequence[str],
    memory: Sequence[str] = ("BHSD",),
    block: int = 128,
    rounds: int = 20,
    seed: int = 0,
) -> None:
    """Measure, and write rows into the run.

    Args:
        run: The run, entered.
        shapes: Sequences.
        densities: Listed blocks over all blocks, each in (0, 1]; blocks are random, own ones per head and row.
        dtypes: Of q, k and v; float8_e4m3fn rounds bfloat16 ones.
        backends: Ours, by name. One that cannot take a shape or dtype is left out there, and the log says why.
        modes: ``forward``, ``forward pooled``, ``backward`` or ``prologue``, what FP8 needs before its forward:
            rounding q, k and v. One that a dtype does not have is left out there: pooled keys are 16-bit only. Of
            ``host`` the rows are ``host_us``: what a call of each of these costs the host, at ``HOST`` instead of the
            shapes.
        memory: Orders of q, k and v in memory: ``BHSD``, or ``BSHD``, as projections leave them.
        block: Block size on both sides.
        rounds: Timed calls of each.
        seed: Of data, lists and order.

    Raises:
        RuntimeError: Nothing can run, or a backend's values are wrong; no time is reported then.
    """
    if any(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes):
        small = BlockLayout.dense(128, 128, device=_DEVICE)
        peers = {name: dense_peer(name) for name in DENSE_PEERS} | {n: listed_peer(n, small) for n in LISTED_PEERS}
        for name, found in peers.items():
            if isinstance(found, str):
                _log.info("%s is left out: %s", name, found)
    timed_modes = [mode for mode in modes if mode != "host"]
    jobs = [(shape, dtype, order, timed_modes) for shape in shapes for dtype in dtypes for order in memory]
    if "host" in modes:
        jobs += [(HOST, dtype, "BSHD", ["forward", "forward pooled", "backward", "prologue"]) for dtype in dtypes]
    for shape, dtype, order, some in jobs:
        host = shape is HOST
        torch.manual_seed(seed)
        layouts = {
            density: random_layout(shape.heads, shape.tokens, density, block)
            for density in ([1.0] if host else densities)
        }
        q, k, v = inputs(shape, torch.bfloat16 if dtype == FP8 else dtype, memory=order)
        usable: list[Backend] = []
        for name in backends:
            support = (FP8_SUPPORT if dtype == FP8 else SUPPORT).get(name)
            reason: str | None = "it has no FP8 kernel"
            if support is not None:
                reason = support.reason(q.device, q.dtype, head_dim=shape.dim, block_q=block, block_k=block)
            if reason is None:
                usable.append(name)
            else:
                _log.info("%s, %s: no backend %r, since %s", shape.name, dtype, name, reason)
        labels: dict[str, Any] = dict(
            shape=shape.name, heads=shape.heads, tokens=shape.tokens, dim=shape.dim,
            dtype=str(dtype).removeprefix("torch."), block=block, memory=order,
        )  # fmt: skip
        absent = "forward pooled" if dtype == FP8 else "prologue"
        for mode in some:
            if mode == absent:
                continue
            calls, facts = (_prologue if mode == "prologue" else _attention)(
                mode, shape, dtype, layouts, (q, k, v), usable
            )
            if host:
                if mode == "forward" and dtype != FP8:
                    calls["sdpa"] = functools.partial(scaled_dot_product_attention, q, k, v)
                    facts["sdpa"] = _Fact("torch sdpa dense", 1.0, None, 0.0)
                for key, call in calls.items():
                    timing = measure_host(call, warmup=_WARMUP, repeats=rounds)
                    spread = (timing.ms_p80 - timing.ms_p20) / 2 * 1e3
                    options: Any = dict(unit="us", better="lower", spread=spread, n=rounds)
                    kept = {"kept_launches": launch.KEEP}
                    run.row(
                        "host_us",
                        timing.ms_p50 * 1e3,
                        variant=facts[key].name,
                        split=mode,
                        labels=labels | kept,
                        **options,
                    )
            else:
                timings = measure_interleaved(calls, warmup=_WARMUP, rounds=rounds, seed=seed)
                best = _fastest(facts, timings)
                for key, timing in timings.items():
                    fact = facts[key]
                    named: dict[str, Any] = {"dense": best[fact.density]} if best.get(fact.density) else {}
                    options = dict(work=fact.work, unit=fact.unit, error=fact.error, density=fact.density)
                    timed(run, fact.name, timing, split=mode, **options, **labels, **named)
            del calls
            gc.collect()
            torch.cuda.empty_cache()
    if not run.rows:
        raise RuntimeError("nothing was timed: none of these backends, and no other provider, takes these inputs here")


@dataclass(frozen=True)
class _Fact:
    """What a timed call is.

    Attributes:
        name: Of the provider.
        density: Of the lists beside which it ran.
        error: Against the reference, where it was compared.
        work: Operations or bytes.
        unit: Of the rate.
    """

    name: str
    density: float
    error: float | None
    work: float
    unit: str = "TFLOP/s"


def _fastest(facts: dict[str, _Fact], timings: dict[str, Timing]) -> dict[float, str]:
    """The fastest dense provider beside the lists of each density."""
    found: dict[float, str] = {}
    for key in sorted((key for key in timings if facts[key].name.endswith(" dense")), key=lambda x: timings[x].ms_p50):
        found.setdefault(facts[key].density, facts[key].name)
    return found


def _attention(
    mode: str,
    shape: Shape,
    dtype: torch.dtype,
    layouts: dict[float, BlockLayout],
    qkv: tuple[Tensor, Tensor, Tensor],
    backends: Sequence[Backend],
) -> tuple[dict[str, Callable[[], Any]], dict[str, _Fact]]:
    """All densities and providers of one mode: what is to be timed, and what it is."""
    backward, groups = mode == "backward", 0
    pooled = None
    if mode == "forward pooled":
        groups = math.ceil(shape.tokens / 30)
        _, far_k, far_v = inputs(shape, dtype, groups)
        pooled = PooledKV(far_k, far_v, torch.tensor(30.0, device=_DEVICE).log())
    leaves = [x.detach().requires_grad_(backward) for x in qkv]
    dout = torch.randn_like(qkv[0])
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, _Fact] = {}
    for density, layout in layouts.items():
        if dtype == FP8:
            found = _fp8_providers(layout, qkv, backends, backward)
        else:
            found = providers(layout, dtype, backends, pooled=pooled, backward=backward)
        check = None
        pairs = layout.density().item() * shape.tokens**2
        for name, attend in found.items():
            key, ours, error = f"{name} {density}", name.startswith("hone "), None
            try:
                if backward:
                    out = attend(*leaves)
                    call: Callable[[], Any] = functools.partial(
                        torch.autograd.grad, out, leaves, dout, retain_graph=True
                    )
                else:
                    call = functools.partial(attend, *leaves)
                # Of dense ones the values are those of lists of all blocks.
                whole = name.endswith(" dense") and density == 1 and pooled is None
                if ours or name in LISTED_PEERS or whole:
                    check = check or _Check(dtype, qkv, layout, pooled, dout if backward else None)
                    got = torch.autograd.grad(out, leaves, check.dout, retain_graph=True) if backward else [call()]
                    error = check(f"{name}, {mode}", got)
                else:
                    call()
            except Exception as error_of_a_peer:
                if ours or name == DENSE:
                    raise
                _log.warning("%s is left out of %s, %s: %s", name, shape.name, mode, error_of_a_peer)
                continue
            seen = shape.tokens**2 if name.endswith(" dense") else pairs + shape.tokens * groups
            # Two matrix products forward, five backward, two operations a multiply-add.
            work = (10 if backward else 4) * shape.dim * shape.heads * seen
            calls[key], facts[key] = call, _Fact(name, density, error, work)
    return calls, facts


def _prologue(
    mode: str,
    shape: Shape,
    dtype: torch.dtype,
    layouts: dict[float, BlockLayout],
    qkv: tuple[Tensor, Tensor, Tensor],
    backends: Sequence[Backend],
) -> tuple[dict[str, Callable[[], Any]], dict[str, _Fact]]:
    """Rounding q, k and v to E4M3, beside a device copy of as many bytes: two read and one written an element."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)  # [B, S, H, D], as projections leave them
    calls: dict[str, Callable[[], Any]] = {
        f"hone {name}": functools.partial(quantize_qkv, q, k, v, backend=name) for name in backends
    }
    errors = {}
    if calls:
        part = _first_heads((q, k, v))
        emulated = quantize_qkv(*part, backend="reference").dequantize()
        for name, call in calls.items():
            got = _first_heads(call().dequantize())
            errors[name] = _checked(f"{name}, {mode}", got, part, 1.3 * relative(emulated, part), q)
    moved = 3 * sum(x.numel() for x in (q, k, v))
    source = torch.empty(moved // 2, dtype=torch.uint8, device=_DEVICE)
    target = torch.empty_like(source)
    calls["device copy"] = lambda: target.copy_(source)
    return calls, {name: _Fact(name, 1.0, errors.get(name), moved, "GB/s") for name in calls}


def _fp8_providers(
    layout: BlockLayout, qkv: tuple[Tensor, Tensor, Tensor], backends: Sequence[Backend], backward: bool
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The FP8 forward on operands that are there, the same with its prologue, or the training op; dense in bfloat16."""

    def train(name: Backend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: straight_through_attention(q, k, v, layout, backend=name)

    def forward(name: Backend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        operands = quantize_qkv(*qkv, backend=name)
        return lambda q, k, v: quantized_attention(operands, layout, backend=name)

    def whole(name: Backend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: quantized_attention(quantize_qkv(q, k, v, backend=name), layout, backend=name)

    if backward:
        found = {f"hone {name}": train(name) for name in backends}
    else:
        found = {f"hone {name}": forward(name) for name in backends}
        found |= {f"hone {name} and prologue": whole(name) for name in backends}
        peer = dense_fp8(*qkv)
        if not isinstance(peer, str):
            found["flash-attn 3 fp8 dense"] = peer
    return found | dense_kernels(torch.bfloat16, backward=backward)


def providers(
    layout: BlockLayout,
    dtype: torch.dtype,
    backends: Sequence[Backend],
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

    def ours(name: Backend, **options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: block_sparse_attention(q, k, v, layout, pooled=pooled, backend=name, **options)

    found = {f"hone {name}": ours(name) for name in backends} | dense_kernels(dtype, backward=backward)
    if backward and "gluon" in backends and layout.block_k == 128:
        found["hone gluon in any order"] = ours("gluon", deterministic=False)
    if pooled is None and dtype in (torch.bfloat16, torch.float16):
        peers = {name: listed_peer(name, layout, backward) for name in LISTED_PEERS}
        found |= {name: peer for name, peer in peers.items() if not isinstance(peer, str)}
    # FlexAttention compiles another kernel for a ragged end, its tiles at head size 128 do not fit blocks of 64, and
    # pooled keys are beyond a block mask.
    whole = not (layout.tokens_q % layout.block_q or layout.tokens_k % layout.block_k)
    if pooled is None and whole and layout.block_q % 128 == layout.block_k % 128 == 0:
        found["flex"] = flex(layout)
    return found


def dense_kernels(dtype: torch.dtype, *, backward: bool = False) -> dict[str, Attend]:
    """Dense attention by whatever runs here, by name: cuDNN's, and others' where they are installed."""
    if dtype not in (torch.bfloat16, torch.float16):
        return {}
    peers = {name: dense_peer(name, backward) for name in DENSE_PEERS}
    return {DENSE: cudnn} | {name: peer for name, peer in peers.items() if not isinstance(peer, str)}


def inputs(
    shape: Shape, dtype: torch.dtype, tokens_k: int | None = None, memory: str = "BHSD"
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[1, H, S, D]``, in memory so or, as projections leave them, ``BSHD``."""

    def one(heads: int, tokens: int) -> Tensor:
        x = torch.randn(1, heads, tokens, shape.dim, device=_DEVICE, dtype=dtype)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if memory == "BSHD" else x

    keys = (shape.heads_k, tokens_k or shape.tokens)
    return one(shape.heads, shape.tokens), one(*keys), one(*keys)


def random_layout(heads: int, tokens: int, density: float, block: int = 128) -> BlockLayout:
    """Lists of as many random blocks in every row, own ones per head."""
    cols = math.ceil(tokens / block)
    scores = torch.rand(1, heads, cols, cols, device=_DEVICE)
    return BlockLayout.from_topk(scores, max(1, round(cols * density)), tokens, tokens, block_q=block, block_k=block)


def _first_heads(qkv: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The heads of q, k and v whose values are compared."""
    q, k, v = qkv
    group = q.shape[1] // k.shape[1]
    heads_k = -(-_HEADS_CHECKED // group)
    return q[:, : heads_k * group], k[:, :heads_k], v[:, :heads_k]


class _Check:
    """What the first heads have to give: the output of queries spread over the sequence, or the gradients through them.

    Attributes:
        dout: For gradients, ``dout`` with zeros at the queries that do not take part.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        qkv: tuple[Tensor, Tensor, Tensor],
        layout: BlockLayout,
        pooled: PooledKV | None,
        dout: Tensor | None,
    ) -> None:
        # Rounding in float32 would count against a float32 kernel.
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        few = _first_heads(qkv)
        self.heads, self.q, self.dout = few[0].shape[1], qkv[0], dout
        self.chunks = list(_chunks(layout, self.heads))
        self.queries = torch.cat([queries for queries, _ in self.chunks])
        if dout is not None:
            taken = torch.zeros(layout.tokens_q, 1, device=dout.device, dtype=dout.dtype)
            taken[self.queries] = 1
            self.dout = dout * taken
        if pooled is not None:
            heads_k = few[1].shape[1]
            pooled = PooledKV(pooled.k[:, :heads_k].to(wide), pooled.v[:, :heads_k].to(wide), pooled.bias)

        def exact(q: Tensor, k: Tensor, v: Tensor, lists: BlockLayout) -> Tensor:
            return block_sparse_attention(q, k, v, lists, pooled=pooled, backend="reference")

        def rounded(q: Tensor, k: Tensor, v: Tensor, lists: BlockLayout) -> Tensor:
            return attention_fp8_reference(q, k, v, lists, q.shape[3] ** -0.5)[0]

        self.want = self._reference(exact, tuple(x.to(wide) for x in few))
        if dtype == FP8:
            # It may be off by 1.3 times as much as its emulation, whose gradient is the exact one at rounded operands.
            operands = quantize_qkv(*few, backend="reference").dequantize()
            emulated = self._reference(rounded if dout is None else exact, operands)
            self.limit = 1.3 * relative(emulated, self.want)
        else:
            self.limit = _LIMITS[dtype]

    def _reference(
        self, attend: Callable[[Tensor, Tensor, Tensor, BlockLayout], Tensor], qkv: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """The output, or the gradients of q, k and v, some rows at a time."""
        q, k, v = qkv
        if self.dout is None:
            return [torch.cat([attend(q[:, :, at], k, v, lists) for at, lists in self.chunks], dim=2)]
        k, v = (x.detach().requires_grad_() for x in (k, v))
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for at, lists in self.chunks:
            rows = q[:, :, at].detach().requires_grad_()
            dout = self.dout[:, : self.heads, at].to(rows.dtype)
            grads = torch.autograd.grad(attend(rows, k, v, lists), (rows, k, v), dout)
            dq.append(grads[0])
            dk += grads[1]
            dv += grads[2]
        return [torch.cat(dq, dim=2), dk, dv]

    def __call__(self, what: str, got: Sequence[Tensor]) -> float:
        """The largest relative error of what a call over all heads gave.

        Raises:
            RuntimeError: It is above the limit.
        """
        rows = got[0][:, : self.heads, self.queries]
        rest = [x[:, : want.shape[1]] for x, want in zip(got[1:], self.want[1:], strict=True)]
        return _checked(what, [rows, *rest], self.want, self.limit, self.q)


def _chunks(layout: BlockLayout, heads: int) -> Iterator[tuple[Tensor, BlockLayout]]:
    """Queries and their lists for the first heads, in parts that fit in memory: all, or as many as ``_PAIRS_CHECKED``.

    Rows of blocks are spread evenly over the sequence, the first and the last among them.
    """
    pairs = heads * layout.block_q * layout.tokens_k
    last = layout.num_q_blocks - 1
    count = min(last + 1, max(2, _PAIRS_CHECKED // pairs))
    rows = torch.arange(count, device=layout.device) * last // max(1, count - 1)
    within = torch.arange(layout.block_q, device=layout.device)
    for part in rows.split(max(1, _PAIRS_AT_ONCE // pairs)):
        queries = (part[:, None] * layout.block_q + within).flatten()
        queries = queries[queries < layout.tokens_q]
        lists = layout.kv_num[:, :heads, part], layout.kv_idx[:, :heads, part]
        yield queries, BlockLayout(*lists, len(queries), layout.tokens_k, layout.block_q, layout.block_k)


def relative(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative error (norm); NaN if one is."""
    pairs = [(g.double(), w.double()) for g, w in zip(got, want, strict=True)]
    return float(torch.stack([(g - w).norm() / w.norm() for g, w in pairs]).max())


def _checked(what: str, got: Sequence[Tensor], want: Sequence[Tensor], limit: float, q: Tensor) -> float:
    error = relative(got, want)
    if not error < limit:
        raise RuntimeError(
            f"{what} is wrong at {list(q.shape)}, {q.dtype}: relative error {error:.2e}, expected below {limit:.2e}. "
            "No time is reported; run the tests of hone-kernels on this device."
        )
    return error
