from itertools import pairwise

import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.few_tokens import TOKENS, attend_slots, gated_of_few
from torch.nn import functional as F


def test_a_gated_layer():
    x, gate, up = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 6), (8, 6), (8, 6)))
    plain = x @ gate.T
    assert_close(gated_of_few(x, gate, up), plain * plain.sigmoid() * (x @ up.T))


@pytest.mark.parametrize("heads_k", [1, 3])
def test_slots_step_by_step_are_attention_by_one_mask(heads_k):
    """Three steps, against dense attention under the mask of their order; a text's padding is hidden."""
    torch.manual_seed(0)
    heads, dim, rows, text = 3, 8, 2, 4
    steps = [0, 4, 7, 9]
    slots = steps[-1]
    qkv = torch.randn(rows, slots, (heads + 2 * heads_k) * dim, dtype=torch.float64)
    angles = torch.randn(slots, dim // 2, dtype=torch.float64)
    rope = (angles.cos(), angles.sin())
    words = torch.tensor([[False, True, True, True], [False, False, False, True]])
    keys, values = (torch.full((rows, heads_k, slots, dim), torch.nan, dtype=torch.float64) for _ in range(2))
    got = []
    for begin, end in pairwise(steps):
        seen = words if begin else None
        got.append(attend_slots(qkv[:, begin:end], rope, keys, values, begin, scale=0.3, words=seen))
    q, k, v = qkv.view(rows, slots, -1, dim).transpose(1, 2).split([heads, heads_k, heads_k], 1)
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (
        torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
        for x in (q, k)
    )
    step = torch.tensor([0] * 4 + [1] * 3 + [2] * 2)
    mask = (step[None] <= step[:, None]).expand(rows, -1, -1).clone()
    mask[:, text:, :text] &= words[:, None]
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=0.3, enable_gqa=True)
    assert_close(torch.cat(got, 1), dense.transpose(1, 2).flatten(2))
    assert_close(keys, k)
    assert_close(values, v)


def test_bad_shapes_are_named():
    x, weight = torch.zeros(2, 4), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"gate and up \[N, C\]; got \[2, 4\], \[3, 4\] and \[2, 4\]"):
        gated_of_few(x, weight, x)
    with pytest.raises(ValueError, match="expected 1 to 64 tokens; got 65"):
        gated_of_few(torch.zeros(TOKENS + 1, 4), weight, weight)
    qkv, cache = torch.zeros(2, 3, 12), torch.zeros(2, 1, 5, 4)
    with pytest.raises(ValueError, match=r"expected qkv \[R, n, .*; got \[2, 3, 12\], \[1, 1, 5, 4\]"):
        attend_slots(qkv, None, cache[:1], cache[:1], 0, scale=1.0)
    with pytest.raises(ValueError, match=r"qkv must have \(H \+ 2 \* 1\) \* 4 channels"):
        attend_slots(qkv[..., :8], None, cache, cache, 0, scale=1.0)
    with pytest.raises(ValueError, match="expected 1 to 64 tokens in 5 slots; got 3 from 3 on"):
        attend_slots(qkv, None, cache, cache, 3, scale=1.0)
    with pytest.raises(ValueError, match=r"rope must be two tables \[5, D / 2\], D even; got .* for D 4"):
        attend_slots(qkv, (x, x), cache, cache, 0, scale=1.0)
    with pytest.raises(ValueError, match=r"D even; got \[\[5, 1\], \[5, 1\]\] for D 3"):
        attend_slots(qkv[..., :9], (torch.zeros(5, 1),) * 2, cache[..., :3], cache[..., :3], 0, scale=1.0)
    with pytest.raises(ValueError, match=r"words must be bool \[2, T\], T at most 0; got torch.bool \[2, 1\]"):
        attend_slots(qkv, None, cache, cache, 0, scale=1.0, words=torch.ones(2, 1).bool())
    with pytest.raises(ValueError, match=r"words must be bool \[2, T\], T at most 1; got torch.int64"):
        attend_slots(qkv, None, cache, cache, 1, scale=1.0, words=torch.ones(2, 1).long())
