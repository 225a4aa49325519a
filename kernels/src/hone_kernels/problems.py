"""What ``sanitize`` runs: small odd problems of every op that has a kernel, their values compared with the reference.

``PARTS`` lists them. On a CPU, under Triton's interpreter, all but attention's are soon done.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hone_kernels.attention import SUPPORT, BlockLayout, PooledKV, block_sparse_attention
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention
from hone_kernels.backends import Backend
from hone_kernels.block_scores import KINDS, block_scores
from hone_kernels.block_select import select_blocks
from hone_kernels.column_mass import column_mass
from hone_kernels.config import Part
from hone_kernels.decoding import (
    add_rms_norm,
    linear_of_one,
    paged_attention,
    rotate_append,
    rotate_attend,
    silu_mul,
)
from hone_kernels.draw_codes import draw_codes
from hone_kernels.few_tokens import attend_slots, gated_of_few
from hone_kernels.group_means import group_means
from hone_kernels.guided_draw import draw_tokens
from hone_kernels.kept_tokens import (
    add_change,
    draw_bits,
    gather_modulate,
    pack_tokens,
    spread_tokens,
    take_tokens,
    unpack_tokens,
)
from hone_kernels.logits import read_logits
from hone_kernels.nearest_points import nearest_points
from hone_kernels.plane_sweep import sweep_planes
from hone_kernels.prefix_attention import prefix_attention
from hone_kernels.pyramid_attention import FACTORS, pyramid_attention
from hone_kernels.ragged_decode import decode_attention
from hone_kernels.splat_blend import VALUES, blend_tiles, tile_lists
from hone_kernels.token_select import select_tokens

__all__ = ["GLUON", "PARTS", "run_part"]

GLUON: tuple[Part, ...] = ("attention", "pyramid_attention")
"""Parts that have a Gluon kernel; all have Triton's."""


def run_part(part: Part, backend: Backend, device: str) -> None:
    """Run the problems of a part; the caller has set the seed.

    Args:
        part: Which.
        backend: Whose kernels.
        device: Where they run, ``cuda``, or ``cpu`` under Triton's interpreter.

    Raises:
        RuntimeError: A value is wrong.
    """
    for problem in dict.fromkeys(PARTS[part].values()):
        problem(backend, device)


def _compare(
    what: str, backend: Backend, device: str, limit: float, call: Callable[..., Any], *given: Tensor | None
) -> None:
    """Compare what a call gives on the device with what the reference gives on the CPU, in float64 and of equal inputs.

    racecheck follows every access to shared memory, in torch's kernels too: so little as can be runs on the device.

    Args:
        what: For the message.
        backend: Handed to ``call`` first, before ``given``.
        device: Where that is.
        limit: Of the relative error of each tensor; those that are no floats must be equal.
        call: Returns one tensor or some; it may write to what it is given.
        given: On the CPU.
    """
    results = []
    lanes: tuple[tuple[Backend, str, torch.dtype | None], ...]
    lanes = ((backend, device, None), ("reference", "cpu", torch.float64))
    for name, place, wide in lanes:
        moved = [
            x if x is None else x.to(place, wide if wide and x.is_floating_point() else x.dtype, copy=True)
            for x in given
        ]
        found = call(name, *moved)
        results.append([x.detach().cpu() for x in ((found,) if isinstance(found, Tensor) else found)])
    for i, (mine, theirs) in enumerate(zip(*results, strict=True)):
        if mine.is_floating_point():
            _close(f"{what} [{i}]", [mine], [theirs.double()], [limit])
        elif not torch.equal(mine, theirs):
            raise RuntimeError(f"{what} [{i}]: other values")


def _between(what: str, got: Tensor, draw: Callable[[Tensor], Any], uniform: Tensor) -> None:
    """Check draws: rounding may decide between what the reference draws with a uniform a little lower or higher."""
    found = [draw((uniform + shift).clamp(0, 1 - 2**-24)) for shift in (-1e-5, 1e-5)]
    low, high = (x if isinstance(x, Tensor) else x[0] for x in found)
    if not bool(((got >= low) & (got <= high)).all()):
        raise RuntimeError(f"{what}: other draws")


def _close(what: str, got: Sequence[Tensor], want: Sequence[Tensor], limits: Sequence[float]) -> None:
    for i, (mine, theirs, limit) in enumerate(zip(got, want, limits, strict=True)):
        seen = theirs != -math.inf
        if not torch.equal(mine.double() == -math.inf, ~seen):
            raise RuntimeError(f"{what} [{i}]: another set of empty rows")
        error = ((mine.double() - theirs)[seen].norm() / theirs[seen].norm().clamp(min=1e-30)).item()
        if not error < limit:
            raise RuntimeError(f"{what} [{i}]: relative error {error:.2e} is not under {limit}")


def _half(device: str) -> torch.dtype:
    """bfloat16, or float16 on a CPU: in products Triton's interpreter takes bfloat16's bits for whole numbers."""
    return torch.float16 if device == "cpu" else torch.bfloat16


def _attention(backend: Backend, device: str) -> None:
    """Ragged ends, an empty row, padded blocks, grouped heads, pooled keys; forward and backward.

    Inputs and reference stay on the CPU: racecheck follows every access to shared memory, in torch's kernels too.
    """
    dims = [d for d in SUPPORT[backend].head_dims or () if d in (64, 128)]
    for dim, block, padded, pooled in itertools.product(dims, (64, 128), (False, True), (False, True)):
        q, dout = (torch.randn(2, 4, 301, dim).bfloat16() for _ in range(2))
        k, v = (torch.randn(2, 2, 277, dim).bfloat16() for _ in range(2))
        cols = -(-277 // block)
        mask = torch.rand(2, 4, -(-301 // block), cols) < 0.6
        mask[:, :, 1] = False
        valid = torch.randint(1, block + 1, (2, cols), dtype=torch.int32) if padded else None
        if valid is not None:
            valid[:, ::2] = block
        extra = [torch.randn(2, 2, 150, dim).bfloat16() for _ in range(2)] if pooled else []
        bias = [torch.randn(2, 2, 150)] if pooled else []
        for x in bias:
            x[0] = 1.5  # Gluon tells a bias that whole steps share from others
        results = []
        lanes: list[tuple[Backend, str, torch.dtype, bool]]
        lanes = [(backend, device, torch.bfloat16, True), ("reference", "cpu", torch.float64, True)]
        if backend == "gluon":  # sums q's gradient in whole numbers, or in float32
            lanes.insert(1, (backend, device, torch.bfloat16, False))
        for name, place, dtype, deterministic in lanes:
            layout = BlockLayout.from_mask(mask, 301, 277, block_q=block, block_k=block, k_valid=valid)
            tensors = {n: getattr(layout, n) for n in ("kv_num", "kv_idx", "k_valid")}
            moved: dict[str, Any] = {n: x if x is None else x.to(place) for n, x in tensors.items()}
            layout = dataclasses.replace(layout, **moved)
            leaves = [x.to(place, dtype).requires_grad_() for x in (q, k, v, *extra)]
            leaves += [x.to(place).requires_grad_() for x in bias]
            far = PooledKV(*leaves[3:]) if pooled else None
            given: dict[str, Any] = dict(pooled=far, return_lse=True, backend=name, deterministic=deterministic)
            out, lse = block_sparse_attention(leaves[0], leaves[1], leaves[2], layout, **given)
            grads = torch.autograd.grad(out, leaves, dout.to(place, dtype))
            results.append([x.detach().double().cpu() for x in (out, lse, *grads)])
        what = f"attention {backend} d{dim} block {block} padded {padded} pooled {pooled}"
        for got in results[:-1]:
            _close(what, got, results[-1], [2e-2] * len(got))


def _pyramid_attention(backend: Backend, device: str) -> None:
    """Every factor, a row without keys, ragged ends, grouped heads; forward and backward."""
    for dim in (64, 128):
        q, dout = (torch.randn(2, 4, 301, dim).bfloat16() for _ in range(2))
        k, v = (torch.randn(2, 2, 533, dim).bfloat16() for _ in range(2))
        factors = torch.tensor([0, *FACTORS], dtype=torch.int32)[torch.randint(5, (2, 4, 3, 5))]
        factors[:, :, 1] = 0
        factors[..., -1].clamp_(max=1)
        results = []
        lanes: tuple[tuple[Backend, str, torch.dtype], ...]
        lanes = ((backend, device, torch.bfloat16), ("reference", "cpu", torch.float64))
        for name, place, dtype in lanes:
            a, b, c = leaves = [x.to(place, dtype).requires_grad_() for x in (q, k, v)]
            out, lse = pyramid_attention(a, b, c, factors.to(place), return_lse=True, backend=name)
            grads = torch.autograd.grad(out, leaves, dout.to(place, dtype))
            results.append([x.detach().double().cpu() for x in (out, lse, *grads)])
        _close(f"pyramid_attention {backend} d{dim}", results[0], results[1], [2e-2] * 5)


def _attention_fp8(backend: Backend, device: str) -> None:
    """The prologue with and without all it can do, and the forward, on ragged ends and padded blocks."""
    from hone_kernels.attention_fp8.triton_quantize import dequantize_triton  # needs Triton

    for dim, block, everything in itertools.product((64, 128), (64, 128), (False, True)):
        q = torch.randn(2, 301, 4, dim).bfloat16().transpose(1, 2)
        k, v = (torch.randn(2, 301, 2, dim).bfloat16().transpose(1, 2) for _ in range(2))
        angle = torch.rand(301, dim // 2)
        blocks = -(-301 // block)
        mask = torch.rand(2, 4, blocks, blocks) < 0.6
        mask[:, :, 1] = False
        results = []
        lanes: tuple[tuple[Backend, str], ...] = ((backend, device), ("reference", "cpu"))
        for name, place in lanes:
            options: dict[str, Any] = {}
            if everything:
                tables = (angle.cos().to(place), angle.sin().to(place))
                valid = (torch.arange(2 * blocks, dtype=torch.int32).view(2, blocks) * 29 % block + 1).to(place)
                order = torch.arange(300, -1, -1, device=place)
                options = dict(rope=tables, order=order, smooth_k=True, k_valid=valid, group=2)
            x = quantize_qkv(q.to(place), k.to(place), v.to(place), block=block, backend=name, **options)
            sizes: dict[str, Any] = dict(block_q=block, block_k=block, k_valid=options.get("k_valid"))
            layout = BlockLayout.from_mask(mask.to(place), 301, 301, **sizes)
            out, lse = quantized_attention(x, layout, return_lse=True, backend=name)
            wide = x.dequantize()
            if name != "reference":  # as the backward makes it
                operands = (x.q8, x.k8, x.v8, x.q_scale, x.k_scale, x.v_scale)
                wide = dequantize_triton(*operands, block, torch.float32)
            results.append([y.double().cpu() for y in (*wide, out, lse)])
        # P is rounded against another maximum where tiles differ.
        what = f"attention_fp8 {backend} d{dim} block {block} everything {everything}"
        _close(what, results[0], results[1], [1e-2, 1e-2, 1e-2, 6e-2, 1e-2])


def _block_scores(backend: Backend, device: str) -> None:
    q = torch.randn(2, 4, 301, 64, device=device, dtype=_half(device))
    k = torch.randn(2, 2, 301, 64, device=device, dtype=_half(device))
    index = torch.arange(0, 320, 8, device=device, dtype=torch.int32).clamp(max=300).reshape(1, 1, 5, 8)
    for kind in KINDS:
        got = block_scores(q, k, index, index, kind=kind, backend=backend)
        want = block_scores(q.double(), k.double(), index, index, kind=kind, backend="reference")
        _close(f"block_scores {kind}", [got], [want.double()], [1e-3])
        for mass in (None, 0.9):
            select_blocks(got, backend=backend, min_keep=1, max_keep=4, mass=mass, keep_diagonal=True, forced=1)
    for exact in (True, False):
        results = []
        for name in (backend, "reference"):
            x = k.detach().requires_grad_()
            means = group_means(x, q[:, :2], 30, tokens=290, exact=exact, backend=name)
            (means[0] * means[1]).sum().backward()
            assert x.grad is not None
            results.append([*(y.double() for y in means), x.grad.double()])
        _close(f"group_means exact {exact}", results[0], results[1], [1e-2] * 3)


def _draw_codes(backend: Backend, device: str) -> None:
    logits = [torch.randn(4, 5, 1000, device=device) for _ in range(2)]
    weight = torch.tensor([[0.5, 0.5]] * 3 + [[1.0, 0.0], [0.0, 1.0]], device=device)
    uniform = torch.rand(2, 5, device=device)
    for top_k in (0, 7):
        options: dict[str, Any] = {"guidance": 2.0, "top_k": top_k}
        got = draw_codes(logits, weight, uniform, **options, backend=backend)
        known = functools.partial(draw_codes, logits, weight, **options, backend="reference")
        _between("draw_codes", got, known, uniform)


def _ragged_decode(backend: Backend, device: str) -> None:
    """Masses of odd lengths with padding and absent rows, selection by mass and by budget, caches with holes."""
    for dim in (64, 128):
        q = torch.randn(2, 6, 141, dim, device=device, dtype=torch.float16)
        k, v = (torch.randn(2, 2, 141, dim, device=device, dtype=torch.float16) for _ in range(2))
        real = torch.ones(2, 141, dtype=torch.bool, device=device)
        real[0, :37] = False
        rows = torch.arange(100, 141, device=device).repeat(2, 1)
        rows[:, :3] = -1
        got = column_mass(q, k, rows, real=real, backend=backend)
        want = column_mass(q.double(), k.double(), rows, real=real, backend="reference")
        _close(f"column_mass d{dim}", got, [x.double() for x in want], [1e-3, 1e-9, 1e-3])
        protected = torch.zeros_like(real)
        protected[:, -1] = True
        budget = torch.tensor([50, 7], device=device)
        given: dict[str, Any] = dict(real=real, protected=protected, budget=budget)
        mine, theirs = (select_tokens(got.rank, **given, backend=name) for name in (backend, "reference"))
        if not torch.equal(mine.keep, theirs.keep) or not torch.equal(mine.num, theirs.num):
            raise RuntimeError("token_select: another set of tokens")
        p = torch.tensor([0.9, 1.0], device=device)
        select_tokens(got.rank, real=real, protected=protected, mass=got.mass, p=p, backend=backend)
        valid = torch.rand(2, 141, device=device) < 0.5
        valid[1] = False
        out = decode_attention(q[:, :, :1], k, v, valid, backend=backend)
        exact = decode_attention(q[:, :, :1].double(), k.double(), v.double(), valid, backend="reference")
        _close(f"ragged_decode d{dim}", [out], [exact], [1e-2])


def _decoding(backend: Backend, device: str) -> None:
    """Norms, gates and layers of odd widths, of one token and of some, with each form of a layer once."""

    def norm(by: Backend, x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, 1e-6, backend=by)

    def layer(by: Backend, x: Tensor, weight: Tensor, *others: Tensor | None) -> Tensor:
        bias, normed, residual = others
        return linear_of_one(x[:1], weight, bias, norm=normed, residual=residual, gated=gated, backend=by)

    for dtype, tokens, width, gated in ((torch.bfloat16, 3, 77, False), (torch.float16, 1, 2051, True)):
        what = f"of {tokens} x {width}"
        x, residual = (torch.randn(tokens, width).to(dtype) for _ in range(2))
        scales = torch.rand(width).to(dtype)
        for other in (residual, None):
            _compare(f"add_rms_norm {what}", backend, device, 1e-2, norm, x, scales, other)
        both = torch.cat([x, residual], 1)
        _compare(f"silu_mul {what}", backend, device, 1e-2, lambda by, y: silu_mul(y, backend=by), both)
        weight = (torch.randn(22, width) * width**-0.5).to(dtype)
        bias, rest = torch.randn(22).to(dtype), torch.randn(1, 11 if gated else 22).to(dtype)
        for others in (
            ((None, scales, None), (bias, None, rest)) if gated else ((bias, scales, None), (None, None, rest))
        ):
            _compare(f"linear_of_one {what}", backend, device, 1e-2, layer, x, weight, *others)
    _pages(backend, device)


def _pages(backend: Backend, device: str) -> None:
    """Padding, rows of several lengths, pages of a block and of two, heads in groups or not.

    What lies behind a row's pages in the table is no page, and new tokens' slots are NaN where one launch does all.
    """

    def apart(by: Backend, qkv: Tensor, cos: Tensor, sin: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        positions, rows, table, keys, values, *norms = others
        where = (positions, rows, table[:, :width])
        named: dict[str, Any] = dict(zip(("q_norm", "k_norm"), norms, strict=True), backend=by)
        q = rotate_append(qkv, cos, sin, *where, keys, values, **named)
        out = paged_attention(q, keys, values, *where, scale=dim**-0.5, backend=by)
        return q, out * (positions.flatten() >= 0)[:, None, None], keys, values

    def at_once(by: Backend, qkv: Tensor, cos: Tensor, sin: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        positions, rows, table, keys, values, *norms = others
        counts = torch.zeros(len(rows) * keys.shape[1], dtype=torch.int32, device=keys.device)
        named: dict[str, Any] = dict(zip(("q_norm", "k_norm"), norms, strict=True), scale=dim**-0.5, backend=by)
        outs = [
            rotate_attend(qkv, cos, sin, positions, rows, table[:, :width], keys, values, counts, **named)
            * (positions >= 0)[..., None]
            for _ in range(2)
        ]
        return *outs, counts, keys, values

    for lengths, heads, heads_k, dim, page, tokens, normed in (
        ((37, 5, 16), 6, 2, 40, 16, 3, True),
        ((130,), 5, 1, 64, 128, 13, False),
        ((9,), 2, 2, 128, 64, 1, False),
    ):
        dtype, width = _half(device) if normed else torch.float16, -(-max(lengths) // page)
        table = torch.full((len(lengths), width + 1), 1 << 30, dtype=torch.int32)
        table[:, :width] = torch.randperm(len(lengths) * width).view(-1, width)
        # A tile of padding before, which has the first row as well.
        rows = torch.tensor([*([0] if normed else []), *range(len(lengths))], dtype=torch.int32)
        angles = torch.rand(max(lengths), dim // 2) * 6
        turns = (angles.cos().to(dtype), angles.sin().to(dtype))
        norms = [torch.rand(dim).to(dtype) if normed else None for _ in range(2)]
        for call, new in ((apart, tokens), (at_once, 1)):
            caches = [torch.randn(len(lengths) * width, heads_k, page, dim).to(dtype) for _ in range(2)]
            places = [[n - new + i for i in range(new)] for n in lengths]
            places[0][new // 2 + 1 :] = [-1] * (new - new // 2 - 1)
            positions = torch.tensor([*([[-1] * new] if normed else []), *places], dtype=torch.int32)
            if call is at_once:
                for length, line in zip(lengths, table.tolist(), strict=True):
                    for cache in caches:
                        cache[line[(length - 1) // page], :, (length - 1) % page] = torch.nan
            qkv = torch.randn(positions.numel(), (heads + 2 * heads_k) * dim).to(dtype)
            what = f"rows of {lengths} in pages of {page}, {new} new"
            _compare(what, backend, device, 2e-2, call, qkv, *turns, positions, rows, table, *caches, *norms)


def _few_tokens(backend: Backend, device: str) -> None:
    """Gated layers, and attention over slots of which those behind the last token are NaN; with words left out."""

    def slots(by: Backend, qkv: Tensor, keys: Tensor, values: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        cos, sin, words = others
        rope = None if cos is None or sin is None else (cos.float(), sin.float())
        out = attend_slots(qkv, rope, keys, values, begin, scale=dim**-0.5, words=words, backend=by)
        return out, keys.nan_to_num(9.0), values.nan_to_num(9.0)

    for dtype, tokens, width, outputs in ((_half(device), 3, 77, 11), (torch.float16, 33, 300, 37)):
        x, gate, up = ((torch.randn(n, width) * width**-0.25).to(dtype) for n in (tokens, outputs, outputs))
        what = f"gated_of_few {tokens} x {width} x {outputs}"
        _compare(what, backend, device, 1e-2, lambda by, *given: gated_of_few(*given, backend=by), x, gate, up)
    for dtype, begin, tokens, heads, heads_k, dim, rope, text in (
        (_half(device), 70, 5, 6, 2, 40, True, 0),
        (torch.float16, 0, 1, 2, 2, 64, True, 0),
        (torch.float16, 67, 26, 3, 1, 24, False, 19),
    ):
        qkv = torch.randn(2, tokens, (heads + 2 * heads_k) * dim).to(dtype)
        caches = [torch.randn(2, heads_k, begin + tokens + 3, dim).to(dtype) for _ in range(2)]
        for cache in caches:
            cache[:, :, begin:] = torch.nan
        angles = torch.rand(begin + tokens + 3, dim // 2) * 6
        turns = (angles.cos(), angles.sin()) if rope else (None, None)
        words = torch.rand(2, text) < 0.4 if text else None
        what = f"attend_slots {begin} + {tokens} d{dim}"
        _compare(what, backend, device, 2e-2, slots, qkv, *caches, *turns, words)


def _prefix_attention(backend: Backend, device: str) -> None:
    """Heads side by side in memory, steps that end within tiles, words left out; forward and backward."""

    def call(
        by: Backend, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, ...]:
        ends, words = others
        assert ends is not None
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = prefix_attention(q, k, v, ends, words=words, backend=by)
        return out, *torch.autograd.grad(out, leaves, weight)

    for dtype, heads, heads_k, dim, tokens, text in (
        (_half(device), 4, 2, 40, 77, 19),
        (torch.float16, 1, 1, 128, 129, 0),
    ):
        q, k, v, weight = (
            torch.randn(2, tokens, h, dim).to(dtype).transpose(1, 2) for h in (heads, heads_k, heads_k, heads)
        )
        ends = torch.arange(1, tokens + 1, dtype=torch.int32)
        for begin, end in itertools.pairwise((text, text + 1, text + 8, text + 50, tokens)):
            ends[begin:end] = end
        words = torch.rand(2, text) < 0.4 if text else None
        _compare(f"prefix_attention d{dim}", backend, device, 2e-2, call, q, k, v, weight, ends, words)


def _kept_tokens(backend: Backend, device: str) -> None:
    """Tokens out and back, in another order in memory and of odd sizes; a norm, a change, bits."""

    def move(by: Backend, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        most, kept = int(keep.sum(-1).max()), int(keep.sum())
        taken = take_tokens((q, k, v), order[:, :most], backend=by)
        back = spread_tokens(taken[0].transpose(1, 2).contiguous().transpose(1, 2), keep, backend=by)
        packed, ends, row = pack_tokens((q, v), order.int(), keep.sum(-1).int(), backend=by)
        unpacked = unpack_tokens(packed[0], keep, row, backend=by)
        return *taken, back, *(x[:kept] for x in packed), ends, row * keep, unpacked

    def gather(by: Backend, x: Tensor, idx: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return gather_modulate(x, idx, scale, shift, dtype=torch.bfloat16, backend=by)

    def change(by: Backend, x: Tensor, update: Tensor, gamma: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        return add_change(x, update, gamma, before, images=1, relative=len(x) > 1, backend=by)

    for dtype, batch, tokens, dim in ((torch.bfloat16, 3, 70, 24), (torch.float16, 1, 9, 7)):
        states = [torch.randn(batch, tokens, h, dim).to(dtype).transpose(1, 2) for h in (4, 2, 1)]
        keep = torch.rand(batch, tokens) < torch.linspace(0.3, 1.0, batch)[:, None]
        keep[:, -1] = True
        order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
        _compare(f"kept_tokens moves {dtype}", backend, device, 1e-6, move, *states, keep, order)
    for dtype, rows, tokens, kept, width in ((torch.bfloat16, 2, 9, 5, 77), (torch.float16, 1, 3, 1, 2051)):
        x, update, before = (torch.randn(rows, tokens, width).to(dtype) for _ in range(3))
        scale, shift = (torch.randn(rows, width) for _ in range(2))
        idx = torch.stack([torch.randperm(tokens)[:kept] for _ in range(rows)])
        apart = x.transpose(1, 2).contiguous().transpose(1, 2)
        _compare(f"gather_modulate {width}", backend, device, 1e-2, gather, apart, idx, scale, shift)
        _compare(f"add_change {width}", backend, device, 1e-2, change, x, update, scale, before)
    for guided, top_p in ((True, 0.97), (False, 0.0)):
        logits = 2 * torch.randn(2 * (1 + guided), 31, 11, 2).to(torch.bfloat16)
        tokens = 53 if guided else 31
        slot = torch.randint(31, (2, tokens)) if guided else None
        uniform = torch.rand(2, tokens, 11)
        named: dict[str, Any] = dict(guidance=3.0, temperature=0.8, top_p=top_p)
        moved = slot if slot is None else slot.to(device)
        got = draw_bits(logits.to(device), uniform.to(device), slot=moved, **named, backend=backend).cpu()
        known = functools.partial(draw_bits, logits, slot=slot, **named, backend="reference")
        _between("draw_bits", got, known, uniform)


def _logits(backend: Backend, device: str) -> None:
    """Rows apart in memory with NaN between them, some masked, some tied, one token alone; thresholds in one place."""

    def call(by: Backend, logits: Tensor, *threshold: Tensor) -> tuple[Tensor, ...]:
        limits = [x.float().expand(rows) for x in threshold]
        named: dict[str, Any] = dict(threshold=limits[0], gate=gate) if limits else {}
        return tuple(read_logits(logits[:, :vocabulary], **named, backend=by))

    for dtype, rows, vocabulary, gate in (
        (torch.bfloat16, 2, 2051, "entropy"),
        (torch.float16, 3, 7, "confidence"),
        (torch.float32, 1, 1025, None),
    ):
        logits = torch.full((rows, vocabulary + 3), torch.nan)
        logits[:, :vocabulary] = torch.randn(rows, vocabulary) * 3
        logits[0, : vocabulary // 2] = -torch.inf
        if rows > 1:
            logits[1, :vocabulary] = -torch.inf
            logits[1, vocabulary - 1] = 3.0
        if rows > 2:
            logits[2, vocabulary // 3 : vocabulary] = 60.0
        threshold = [torch.tensor([0.8])] if gate else []
        _compare(f"read_logits {vocabulary}", backend, device, 1e-4, call, logits.to(dtype), *threshold)


def _guided_draw(backend: Backend, device: str) -> None:
    """One to three settings, rows that tie and are masked, the likeliest few, and the likeliest alone."""
    for weights, dtype, vocabulary, keep, temperature in (
        ((1.0,), torch.float32, 1, 1, 1.0),
        ((-3.0, 4.0), torch.bfloat16, 129, 129, 0.0),
        ((-1.0, -2.0, 4.0), torch.float16, 70, 7, 0.7),
    ):
        logits = 3 * torch.randn(len(weights), 5, vocabulary)
        logits[:, 0] = 7.0
        logits[:, 1] = logits[:, 1].round()
        logits[-1, 2, : vocabulary // 2] = -torch.inf
        logits, uniform = logits.to(dtype), torch.rand(5)
        named: dict[str, Any] = dict(keep=keep, temperature=temperature)
        token, chance = draw_tokens(logits.to(device), weights, uniform.to(device), **named, backend=backend)
        known = functools.partial(draw_tokens, logits, weights, **named, backend="reference")
        token = token.cpu()
        _between(f"draw_tokens {vocabulary}", token, known, uniform)
        guided = sum(part * weight for part, weight in zip(logits.double(), weights, strict=True))
        assert isinstance(guided, Tensor)
        exact = guided.softmax(-1).gather(-1, token[:, None])[:, 0]
        _close(f"draw_tokens {vocabulary} chance", [chance.cpu()], [exact], [1e-3])


def _splat_blend(backend: Backend, device: str) -> None:
    """Lists of two pictures of 2 x 3 tiles, one of them empty; long lists, opaque and faint Gaussians; both ways."""

    def call(by: Backend, values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        leaf = values.requires_grad_()
        order, counts = tile_lists(values.detach()[:, VALUES - 1].view(2, -1), low, high, 2, 3)
        out = blend_tiles(leaf[:, :VALUES], order, counts, 2, 3, backend=by)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(out)
        return order, counts, out, torch.autograd.grad(out, leaf, weight)[0]

    a, c = (0.1 + 0.8 * torch.rand(94) for _ in range(2))
    b = (2 * torch.rand(94) - 1) * 0.9 * (a * c).sqrt()
    # Nothing reaches the last tile.
    place = torch.rand(94, 2) * torch.tensor([7.0, 8.0])
    values = torch.cat([place, torch.stack([a, b, c, torch.rand(94)], -1), torch.rand(94, 3), 1 + torch.rand(94, 3)], 1)
    values[:3, 5] = 1.0
    values[3, 5] = 0.003
    low, high = ((place + side).view(2, -1, 2) for side in (-4.5, 1.0))
    high = high.clamp(max=torch.tensor([8.0, 8.0]))
    _compare("splat_blend", backend, device, 1e-3, call, values, low.clamp(min=0), high)


def _plane_sweep(backend: Backend, device: str) -> None:
    """Odd pictures and numbers of channels and candidates, pixels behind a camera and outside; forward and backward."""

    def call(by: Backend, features: Tensor, others: Tensor, *geometry: Tensor) -> tuple[Tensor, Tensor]:
        leaf = features.requires_grad_()
        ray, shift, inverse = geometry
        out = sweep_planes(leaf, others, ray, shift, inverse, half=half, backend=by)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(out)
        return out, torch.autograd.grad(out, leaf, weight)[0]

    for views, count, channels, height, width, candidates, half in ((2, 1, 24, 3, 5, 9, 0.0), (3, 2, 5, 3, 3, 2, 0.5)):
        features = torch.randn(views, channels, height, width).to(memory_format=torch.channels_last)
        others = torch.stack([torch.tensor([i for i in range(views) if i != view])[:count] for view in range(views)])
        down, across = torch.meshgrid(torch.arange(height) + half, torch.arange(width) + half, indexing="ij")
        pixels = torch.stack([across, down, torch.ones_like(down)]).flatten(1)
        turn = torch.eye(3) + 0.05 * torch.randn(views, count, 3, 3) * torch.tensor([1.0, 1.0, 0.1])[:, None]
        shift = torch.randn(views, count, 3, 1) * torch.tensor([3.0, 3.0, 1.0])[:, None]
        # Candidates of each pixel, or of all together.
        inverse = 0.2 + torch.rand(views, candidates, *((1, 1) if half else (height, width)))
        what = f"sweep_planes {views} x {channels} x {height} x {width}"
        _compare(what, backend, device, 2e-3, call, features, others, turn @ pixels, shift, inverse)


def _nearest_points(backend: Backend, device: str) -> None:
    """Three of four columns, clouds of one point and of some blocks, points on a plane."""

    def call(by: Backend, points: Tensor, cloud: Tensor) -> tuple[Tensor, Tensor]:
        index, squared = nearest_points(points[:, :3], cloud[:, :3], backend=by)
        # Of several that are as near any may come.
        return squared, (points - cloud[index])[:, :3].square().sum(-1)

    for count, size in ((77, 301), (1, 1), (9, 130)):
        points, cloud = torch.rand(count, 4), torch.rand(size, 4)
        if count == 9:
            points[:, 2], cloud[:, 2] = 0.5, 0.5
        _compare(f"nearest_points {count} of {size}", backend, device, 1e-5, call, points, cloud)


PARTS: dict[Part, dict[str, Callable[[Backend, str], None]]] = {
    "attention": {"attention": _attention},
    "attention_fp8": {"attention_fp8": _attention_fp8},
    "block_scores": {"block_scores": _block_scores, "block_select": _block_scores, "group_means": _block_scores},
    "pyramid_attention": {"pyramid_attention": _pyramid_attention},
    "ragged_decode": {
        "draw_codes": _draw_codes,
        "column_mass": _ragged_decode,
        "token_select": _ragged_decode,
        "ragged_decode": _ragged_decode,
    },
    "decoding": {"decoding": _decoding, "few_tokens": _few_tokens, "prefix_attention": _prefix_attention},
    "kept_tokens": {"kept_tokens": _kept_tokens, "logits": _logits, "guided_draw": _guided_draw},
    "splat_blend": {"splat_blend": _splat_blend, "plane_sweep": _plane_sweep, "nearest_points": _nearest_points},
}
"""Of each part, which is one process under a tool: ops and what runs them; one problem may run several."""
