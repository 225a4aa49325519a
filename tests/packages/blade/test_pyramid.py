import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hone_blade.config import BladeConfig, Comparison
from hone_blade.method import adaptive_sparse_attention, sparse_layout
from hone_blade.pyramid import pyramid_attention, pyramid_density, pyramid_factors, similarity_cap
from hone_core.testing import assert_close, gradcheck, no_host_sync, requires_gpu

PYRAMID = BladeConfig(mask="pyramid", block=16, samples=4, levels=(0.3, 0.5, 0.7, 0.9), min_density=0.0)


def change(**fields):
    return dataclasses.replace(PYRAMID, **fields)


def tensors(batch=1, heads=2, tokens=80, dim=8, kv_heads=None, dtype=torch.float64):
    shapes = (heads, kv_heads or heads, kv_heads or heads)
    return [torch.randn(batch, h, tokens, dim, dtype=dtype) for h in shapes]


def by_definition(q, k, v, factors, block):
    """Query by query: the keys, pooled or not, that its block reads, in one softmax with ln r on their logits."""
    out, group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        logits, values = [], []
        for j in range(factors.shape[-1]):
            r = int(factors[b, h, i // block, j])
            keys, worth = (x[b, h // group, j * block : (j + 1) * block] for x in (k, v))
            for start in range(0, len(keys), r) if r else ():
                logits.append(q[b, h, i] @ keys[start : start + r].mean(0) * q.shape[-1] ** -0.5 + math.log(r))
                values.append(worth[start : start + r].mean(0))
        out[b, h, i] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


def mixed(batch, heads, tokens, block):
    blocks = -(-tokens // block)
    factors = torch.tensor([0, 1, 2, 4, 8], dtype=torch.int32)[torch.randint(5, (batch, heads, blocks, blocks))]
    factors.diagonal(dim1=-2, dim2=-1).clamp_(min=1)
    if tokens % block:
        factors[..., -1].clamp_(max=1)
    return factors


@pytest.mark.parametrize(("tokens", "kv_heads"), [(64, 2), (75, 1), (11, 2)])
def test_one_softmax_over_keys_at_their_factors(tokens, kv_heads):
    q, k, v = tensors(batch=2, tokens=tokens, kv_heads=kv_heads)
    factors = mixed(2, 2, tokens, 16)
    assert_close(pyramid_attention(q, k, v, factors, PYRAMID), by_definition(q, k, v, factors, 16))


def test_gradients_are_exact():
    q, k, v = (x.requires_grad_() for x in tensors(heads=1, tokens=37, dim=4))
    factors = torch.tensor([[4, 2, 1], [8, 1, 0], [0, 8, 1]], dtype=torch.int32)[None, None]
    gradcheck(lambda *x: pyramid_attention(*x, factors, PYRAMID), q, k, v)


@pytest.mark.parametrize("tokens", [64, 75])
def test_factor_one_everywhere_is_dense_attention(tokens):
    q, k, v = tensors(heads=4, kv_heads=2, tokens=tokens)
    for selection in ("threshold", "topk"):
        cfg = change(levels=(1.0, 1.0, 1.0, 1.0), selection=selection)
        out, stats = adaptive_sparse_attention(q, k, v, cfg=cfg, return_stats=True, recall=True)
        assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
        assert_close(stats.density, torch.ones(1, 4))
        assert_close(stats.recall, torch.ones(1, 4))


def test_equal_keys_lose_nothing_by_pooling():
    q, k, v = tensors(tokens=64)
    k, v = (x[:, :, ::8].repeat_interleave(8, dim=2) for x in (k, v))
    cfg = change(levels=(0.0, 0.0, 0.0, 1.0))
    out, stats = adaptive_sparse_attention(q, k, v, cfg=cfg, return_stats=True)
    assert_close(out, F.scaled_dot_product_attention(q, k, v))
    assert_close(stats.density, torch.full((1, 2), 1 / 8))
    assert_close(stats.levels, torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(1, 2, 4))


def factors_of(row, cfg, **options):
    scores = torch.tensor(row).view(1, 1, 1, -1).repeat(1, 1, len(row), 1)
    k = torch.zeros(1, 1, 16 * len(row), 4)
    return pyramid_factors(scores, k, cfg, **options)[0][0, 0]


def test_factors_by_hand():
    cfg = change(keep_diagonal=False)
    # before each block: 0, .5, .75, .875, .9375
    row = [0.5, 0.25, 0.125, 0.0625, 0.0625]
    assert factors_of(row, cfg)[0].tolist() == [1, 4, 8, 8, 0]
    # Of equal blocks the first.
    assert factors_of(row[::-1], cfg)[0].tolist() == [8, 0, 8, 4, 1]
    # The paper's sum is with the block: .5, .75, .875, .9375, 1.
    assert factors_of(row, change(keep_diagonal=False, inclusive=False, min_density=0.0))[0].tolist() == [1, 8, 8, 0, 0]
    assert factors_of([0.95, 0.05], change(keep_diagonal=False, inclusive=False))[0].tolist() == [1, 0]
    # At least two of five at factor 1.
    assert factors_of(row, change(keep_diagonal=False, min_density=0.4, max_density=0.5))[0].tolist() == [1, 1, 8, 8, 0]


def test_counted_factors_by_hand():
    cfg = change(selection="topk", levels=(0.2, 0.4, 0.6, 0.8), keep_diagonal=False)
    assert factors_of([0.1, 0.5, 0.4, 0.3, 0.2], cfg)[0].tolist() == [0, 1, 2, 4, 8]
    own = dataclasses.replace(cfg, keep_diagonal=True)
    assert factors_of([0.1, 0.5, 0.4, 0.3, 0.2], own).diagonal().tolist() == [1] * 5
    assert factors_of([0.1, 0.5, 0.4, 0.3, 0.2], own)[0].tolist() == [1, 2, 4, 8, 0]
    # 0.29 of 100 blocks are 29, though 100 * 0.29 is a little less in float64.
    share = dataclasses.replace(cfg, levels=(0.0, 0.0, 0.0, 0.29))
    assert int((factors_of([1.0] * 100, share)[0] > 0).sum()) == 29
    # Fewer blocks than a share of them: the best one, at the finest factor that is allowed.
    assert factors_of(
        [0.1, 0.5], change(selection="topk", levels=(0.0, 0.0, 0.1, 0.1), keep_diagonal=False)
    ).tolist() == [
        [0, 4],
        [0, 4],
    ]


def test_text_and_the_short_last_block_are_read_whole():
    q, k, v = tensors(tokens=75)
    cfg = change(levels=(0.0, 0.0, 0.0, 1.0))
    short = pyramid_factors(torch.full((1, 2, 5, 5), 0.2), k, cfg)[0]
    assert short[0, 0].tolist() == [[8, 8, 8, 8, 1]] * 5
    text = pyramid_factors(torch.full((1, 2, 5, 5), 0.2), k, cfg, text_blocks=2)[0]
    assert text[0, 0].tolist() == [[8, 8, 8, 1, 1]] * 3 + [[1] * 5] * 2
    out = adaptive_sparse_attention(q, k, v, cfg=cfg, text_tokens=20)
    assert_close(out[:, :, 48:], F.scaled_dot_product_attention(q, k, v)[:, :, 48:])


def test_similarity_cap_by_hand():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    same, halves, alternating = [a] * 16, ([a] * 4 + [b] * 4) * 2, [a, b] * 8
    k = torch.stack([*same, *halves, *alternating, a])[None, None]
    cfg = change(similarity=(0.5, 0.5, 0.5))
    assert similarity_cap(k, cfg).tolist() == [[[8, 4, 1, 1]]]
    # A smaller factor need not pass: groups of 4 begin and end alike, pairs do not.
    k = torch.stack([a, b, b, a] * 4)[None, None]
    assert similarity_cap(k, cfg).tolist() == [[[8]]]
    assert similarity_cap(k, change(similarity=(0.5, 0.5, 1.0))).tolist() == [[[4]]]


def test_the_cap_makes_blocks_finer_and_never_reads_what_is_skipped():
    _, k, _ = tensors(tokens=64)
    scores = torch.rand(1, 2, 4, 4)
    free, none = pyramid_factors(scores, k, PYRAMID)
    capped, share = pyramid_factors(scores, k, change(similarity=(1.0, 1.0, 1.0)))
    assert none.tolist() == [[0.0, 0.0]]
    assert torch.equal(capped, (free > 0).int())
    assert_close(share, ((free > 1).sum((-1, -2)) / (free > 0).sum((-1, -2))).float())


def test_a_cap_is_that_of_the_heads_own_keys():
    """Four query heads on two heads of keys, of which the first's are alike and the second's alternate."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    k = torch.stack([torch.stack([a] * 32), torch.stack([a, b] * 16)])[None]
    cfg = change(levels=(0.0, 0.0, 0.0, 1.0), similarity=(0.5, 0.5, 0.5))
    factors, share = pyramid_factors(torch.rand(1, 4, 2, 2), k, cfg)
    assert factors[0, :, 0, 0].tolist() == [8, 8, 1, 1]
    assert share.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_density_counts_products():
    factors = torch.tensor([[2, 1], [0, 1]], dtype=torch.int32)[None, None]
    # 16 and 5 tokens: 16 queries on 8 pooled and 5 keys, 5 queries on 5
    assert float(pyramid_density(factors, 21, 16)) == pytest.approx((16 * 13 + 5 * 5) / 21**2)


@pytest.mark.parametrize("density", [0.1, 0.125, 0.1875, 0.25, 0.5, 0.6, 0.9, 1.0])
def test_a_comparison_s_pyramid_costs_what_its_blocks_do(density):
    configs = Comparison(density=density, pool=64).configs(1024)
    k = torch.zeros(1, 1, 1024, 8)
    factors = pyramid_factors(torch.rand(1, 1, 32, 32), k, configs["psa"])[0]
    asked = configs["asa"].keep_bounds(32)[1] / 32
    assert asked - 1 / 32 < float(pyramid_density(factors, 1024, 32)) <= asked + 1e-6


def test_the_layout_is_of_what_is_read():
    q, k, _ = tensors()
    layout = sparse_layout(q, k, cfg=PYRAMID)
    assert 0.3 < float(layout.density()) < 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": (0.5, 0.4, 0.7, 0.8)}, "ascending shares"),
        ({"levels": (0.5, 0.6, 0.7)}, "must be 4 ascending"),
        ({"levels": (0.0, 0.0, 0.0, 0.0)}, "the last above 0"),
        ({"levels": (0.5, 0.6, 0.7, 1.1)}, r"in \[0, 1\]"),
        ({"similarity": (0.5,)}, "a cosine for each of"),
        ({"pool": 8}, "pool must be 0"),
    ],
)
def test_wrong_pyramids_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        change(**fields)


@requires_gpu(min_sm=80)
@pytest.mark.parametrize(("tokens", "dim"), [(2048, 128), (2177, 64)])
def test_gpu_agrees_with_the_reference(tokens, dim):
    shape = (1, tokens, 2, dim)
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)]
    dout, results = leaves.pop(), {}
    factors = mixed(1, 2, tokens, 128).cuda()
    for name in ("triton", "reference"):
        copies = [x.detach().requires_grad_() for x in leaves]
        out = pyramid_attention(*copies, factors, change(block=128, backend=name))
        results[name] = (out, *torch.autograd.grad(out, copies, dout))
    for got, want in zip(results["triton"], results["reference"], strict=True):
        assert_close(got, want)


@requires_gpu(min_sm=80)
def test_gpu_waits_for_nothing():
    q, k, v = (torch.randn(1, 2, 2177, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    cfg = change(block=128, samples=16, similarity=(0.7, 0.65, 0.6))

    def attend():
        return adaptive_sparse_attention(q, k, v, cfg=cfg, text_tokens=50)

    want = attend()  # compiles, and fills the table of sample positions
    with no_host_sync():
        out = attend()
    assert torch.equal(out, want)
