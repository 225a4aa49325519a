import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.decoding import (
    add_rms_norm,
    linear_of_one,
    paged_attention,
    rotate_append,
    rotate_attend,
    silu_mul,
)
from torch.nn import functional as F


def test_norm_of_a_sum():
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert_close(total, x + residual)
    assert_close(normed, F.rms_norm(x + residual, (8,), weight, 1e-6))
    assert torch.equal(add_rms_norm(x, None, weight, 1e-6)[1], x)


def test_silu_mul():
    x = torch.randn(3, 8, dtype=torch.float64)
    assert_close(silu_mul(x), F.silu(x[:, :4]) * x[:, 4:])


def test_rows_on_pages_are_rows_alone():
    """Tokens of three rows, read in pieces, against dense attention over each row with its own rotation."""
    torch.manual_seed(0)
    heads, heads_k, dim, page = 4, 2, 8, 4
    lengths = [11, 3, 7]
    qkv = [torch.randn(n, (heads + 2 * heads_k) * dim, dtype=torch.float64) for n in lengths]
    angles = torch.randn(16, dim // 2, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    table = torch.tensor([[5, 2, 7, 0], [1, 0, 0, 0], [6, 3, 0, 0]], dtype=torch.int32)
    keys, values = (torch.zeros(8, heads_k, page, dim, dtype=torch.float64) for _ in range(2))
    got = [torch.zeros(n, heads, dim, dtype=torch.float64) for n in lengths]
    read = [0, 0, 0]
    # In each call every row reads up to so many tokens; the third row sits one out.
    for takes in ((4, 3, 0), (1, 0, 4), (6, 0, 3)):
        rows = [row for row, n in enumerate(takes) if n]
        positions = torch.full((len(rows), 6), -1, dtype=torch.int32)
        flat = torch.full((len(rows), 6, qkv[0].shape[1]), 99.0, dtype=torch.float64)
        for at, row in enumerate(rows):
            n = takes[row]
            positions[at, :n] = torch.arange(read[row], read[row] + n)
            flat[at, :n] = qkv[row][read[row] : read[row] + n]
        at_rows = torch.tensor(rows, dtype=torch.int32)
        q = rotate_append(flat.flatten(0, 1), cos, sin, positions, at_rows, table, keys, values)
        out = paged_attention(q, keys, values, positions, at_rows, table, scale=0.3).view(len(rows), 6, heads, dim)
        assert out.isfinite().all()
        for at, row in enumerate(rows):
            n = takes[row]
            got[row][read[row] : read[row] + n] = out[at, :n]
            read[row] += n
    assert read == lengths
    for row, n in enumerate(lengths):
        q, k, v = qkv[row].view(n, -1, dim).split([heads, heads_k, heads_k], 1)
        c, s = (torch.cat([x, x], -1)[:n, None] for x in (cos, sin))
        turn = lambda x: x * c + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * s  # noqa: E731, B023
        dense = F.scaled_dot_product_attention(
            turn(q).transpose(0, 1), turn(k).transpose(0, 1), v.transpose(0, 1), is_causal=True, scale=0.3,
            enable_gqa=True,
        )  # fmt: skip
        assert_close(got[row], dense.transpose(0, 1))
    # Nothing was written by padding: slots beyond a row's length are as they were.
    assert not keys[1, :, 3].any()
    assert not keys[4].any()


def test_norms_of_heads():
    qkv, cos, sin = torch.randn(1, 4 * 6), torch.ones(2, 3), torch.zeros(2, 3)
    caches = torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 4, 6)
    where = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1).int()
    weights = torch.rand(6), torch.rand(6)
    q = rotate_append(qkv, cos, sin, *where, *caches, q_norm=weights[0], k_norm=weights[1], eps=1e-6)
    assert_close(q[0], F.rms_norm(qkv.view(4, 6)[:2], (6,), weights[0], 1e-6))
    assert_close(caches[0][0, 0, 0], F.rms_norm(qkv.view(4, 6)[2], (6,), weights[1], 1e-6))
    assert torch.equal(caches[1][0, 0, 0], qkv.view(4, 6)[3])


def test_bad_shapes_are_named():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"expected x and residual \[T, C\] and weight \[C\]; got \[2, 4\], None"):
        add_rms_norm(x, None, torch.zeros(3), 1e-6)
    with pytest.raises(ValueError, match=r"gate_up must be \[T, 2 C\]; got \[2, 3\]"):
        silu_mul(x[:, :3])
    cache, one, table = torch.zeros(1, 1, 4, 4), torch.zeros(2, 1).int(), torch.zeros(1, 1).int()
    with pytest.raises(ValueError, match=r"qkv must be \[2, \(H \+ 2 \* 1\) \* 4\]"):
        rotate_append(x, x[:, :2], x[:, :2], one, one[:, 0], table, cache, cache)
    with pytest.raises(ValueError, match=r"cos and sin must be \[positions, D / 2\], D even; .* for D 3"):
        rotate_append(torch.zeros(2, 9), x[:, :1], x[:, :1], one, one[:, 0], table, cache[..., :3], cache[..., :3])
    where = (x[:, :2], x[:, :2], one, one[:, 0], table, cache, cache)
    with pytest.raises(ValueError, match="expected q_norm and k_norm, or neither"):
        rotate_append(torch.zeros(2, 12), *where, k_norm=torch.ones(4))
    with pytest.raises(ValueError, match=r"q must be \[2, H, 4\]"):
        paged_attention(x, cache, cache, one, one[:, 0], table, scale=1.0)
    with pytest.raises(ValueError, match=r"keys and values must be \[pages, HK, page, D\]"):
        paged_attention(x[:, None], cache, cache[0], one, one[:, 0], table, scale=1.0)
    with pytest.raises(ValueError, match=r"expected positions \[tiles, tokens\]"):
        paged_attention(x[:, None], cache, cache, one, one, table, scale=1.0)


def test_a_layer_of_one_token_with_its_surroundings():
    x, weight, bias, norm = torch.randn(1, 6), torch.randn(8, 6), torch.randn(8), torch.rand(6)
    residual = torch.randn(1, 4)
    plain = F.linear(F.rms_norm(x, (6,), norm, 1e-6), weight, bias)
    assert_close(linear_of_one(x, weight, bias, norm=norm), plain)
    gated = F.silu(plain[:, :4]) * plain[:, 4:] + residual
    assert_close(linear_of_one(x, weight, bias, norm=norm, residual=residual, gated=True), gated)
    with pytest.raises(ValueError, match=r"x must be \[1, 6\]"):
        linear_of_one(torch.zeros(2, 6), weight)
    with pytest.raises(ValueError, match="the residual must have the output's shape"):
        linear_of_one(x, weight, residual=residual)


def test_one_token_a_row_in_one_launch():
    one, cache = torch.zeros(1, 1, dtype=torch.int32), torch.randn(2, 1, 16, 4)
    qkv, angles, table = torch.randn(1, 3 * 4), torch.randn(3, 2), torch.tensor([[1]], dtype=torch.int32)
    keys, values, counts = cache.clone(), cache.flip(0), torch.zeros(1, dtype=torch.int32)
    where = (one + 2, one[0], table)
    seen = rotate_attend(qkv, angles.cos(), angles.sin(), *where, keys, values, counts, scale=0.5)
    other = (cache.clone(), cache.flip(0))
    q = rotate_append(qkv, angles.cos(), angles.sin(), *where, *other)
    assert_close(seen, paged_attention(q, *other, *where, scale=0.5))
    assert_close(keys, other[0])
    assert not torch.equal(keys[1, :, 2], cache[1, :, 2])
    with pytest.raises(ValueError, match=r"counts int32 \[1\] at least; got 1 and torch.int64 \[1\]"):
        rotate_attend(qkv, angles, angles, *where, keys, values, counts.long(), scale=0.5)
    two = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="one token a tile"):
        rotate_attend(qkv.repeat(2, 1), angles, angles, two, one[0], table, keys, values, counts, scale=0.5)
