import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hone_blade.config import PRESETS, BladeConfig
from hone_blade.method import (
    adaptive_sparse_attention,
    mass_recall,
    pool_tokens,
    select_blocks,
    sparse_layout,
)
from hone_blade.prober import sample_index
from hone_blade.static import random_scores, window_scores
from hone_core.testing import assert_close, gradcheck, no_host_sync, requires_gpu
from hone_kernels.attention import block_sparse_attention
from hone_video.orders import inverse_order, reorder, token_order

SMALL = BladeConfig(block=16, samples=4, max_density=0.5, min_density=0.2)


def tensors(batch=1, heads=2, tokens=80, dim=8, kv_heads=None, dtype=torch.float64):
    shapes = (heads, kv_heads or heads, kv_heads or heads)
    return [torch.randn(batch, h, tokens, dim, dtype=dtype) for h in shapes]


def change(cfg=SMALL, **fields):
    return dataclasses.replace(cfg, **fields)


# ---- limits


@pytest.mark.parametrize("mask", ["adaptive", "window", "random", "dense"])
def test_density_one_is_dense_attention(mask):
    q, k, v = tensors(batch=2, heads=4, tokens=75, kv_heads=2)
    cfg = change(max_density=1.0, min_density=1.0, mask=mask)
    out, stats = adaptive_sparse_attention(q, k, v, cfg=cfg, grid=(3, 5, 5), return_stats=True, recall=True)
    assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    assert_close(stats.density, torch.ones(2, 4))
    assert_close(stats.recall, torch.ones(2, 4))


def test_density_one_does_not_care_about_order():
    q, k, v = tensors(tokens=60 + 5)
    order = token_order("gilbert", 3, 4, 5)
    cfg = change(max_density=1.0, min_density=1.0)
    out = adaptive_sparse_attention(*(reorder(x, order) for x in (q, k, v)), cfg=cfg, text_tokens=5)
    assert_close(reorder(out, inverse_order(order)), F.scaled_dot_product_attention(q, k, v))


def test_pooling_single_tokens_counts_every_key_twice_and_changes_nothing():
    # With all blocks kept and groups of one, each key stands twice in the softmax: the same average.
    q, k, v = tensors()
    cfg = change(max_density=1.0, min_density=1.0, pool=1)
    assert_close(adaptive_sparse_attention(q, k, v, cfg=cfg), F.scaled_dot_product_attention(q, k, v))


def test_dense_where_the_configuration_says_so():
    q, k, v = tensors()
    dense = F.scaled_dot_product_attention(q, k, v)
    for cfg, layer in ((change(min_tokens=81), 0), (change(dense_layers=(3,)), 3), (change(mask="dense"), 0)):
        assert_close(adaptive_sparse_attention(q, k, v, cfg=cfg, layer=layer), dense)
        assert float(sparse_layout(q, k, cfg=cfg, layer=layer).density()) == 1
    for cfg, layer in ((change(min_tokens=80), 0), (change(dense_layers=(3,)), 2)):
        assert float((adaptive_sparse_attention(q, k, v, cfg=cfg, layer=layer) - dense).abs().max()) > 1e-3


# ---- the two forms of ASA_G


def masked_logits(q, k, layout, scale):
    row, col = torch.arange(q.shape[2]) // layout.block_q, torch.arange(k.shape[2]) // layout.block_k
    keep = layout.to_mask()[:, :, row][..., col]
    return (q @ k.transpose(-1, -2) * scale).masked_fill(~keep, -torch.inf)


@pytest.mark.parametrize("pool_text", [False, True])
def test_asa_g_is_one_softmax_over_both_sets_of_keys(pool_text):
    q, k, v = tensors(batch=2, tokens=70)
    cfg = change(pool=6, pool_text=pool_text)
    got = adaptive_sparse_attention(q, k, v, cfg=cfg, text_tokens=7)
    layout = sparse_layout(q, k, cfg=cfg, text_tokens=7)
    assert float(layout.density()) < 0.8
    pooled = pool_tokens(k, v, 6, text_tokens=0 if pool_text else 7)
    scale = 8**-0.5
    extra = q @ pooled.k.transpose(-1, -2) * scale + pooled.bias.double()[:, :, None]
    weights = torch.cat([masked_logits(q, k, layout, scale), extra], dim=-1).softmax(-1)
    assert_close(got, weights @ torch.cat([v, pooled.v], dim=2), atol=1e-6)  # the bias is float32


def test_asa_g_is_the_release_s_merge_of_two_attentions():
    # alpha = sigmoid(l1 - l2 - ln n), out = alpha o1 + (1 - alpha) o2, with natural log-sum-exps and equal groups.
    q, k, v = tensors(tokens=96)
    cfg = change(pool=8)
    layout = sparse_layout(q, k, cfg=cfg)
    o1, l1 = block_sparse_attention(q, k, v, layout, return_lse=True)
    pooled = pool_tokens(k, v, 8)
    logits = q @ pooled.k.transpose(-1, -2) * 8**-0.5
    o2, l2 = logits.softmax(-1) @ pooled.v, logits.logsumexp(-1)
    alpha = (l1 - l2 - math.log(8)).sigmoid().unsqueeze(-1)
    assert_close(adaptive_sparse_attention(q, k, v, cfg=cfg), alpha * o1 + (1 - alpha) * o2, atol=1e-6)


# ---- pooling


def test_pooling_by_hand():
    x = torch.arange(1.0, 8.0, dtype=torch.float64).view(1, 1, 7, 1)
    exact = pool_tokens(x, -x, 3)
    assert_close(exact.k.flatten(), torch.tensor([2.0, 5.0, 7.0], dtype=torch.float64))
    assert torch.equal(exact.v, -exact.k)
    assert_close(exact.bias.flatten(), torch.tensor([3.0, 3.0, 1.0]).log())
    longer = torch.cat([x, x.new_full((1, 1, 1, 1), 13.0)], dim=2)
    filled = pool_tokens(longer, longer, 3, exact=False)
    assert_close(filled.k.flatten(), torch.tensor([2.0, 5.0, (7 + 13 + 13) / 3], dtype=torch.float64))
    assert_close(filled.bias.flatten(), torch.tensor([3.0, 3.0, 3.0]).log())
    # The last two tokens are text.
    assert_close(pool_tokens(x, x, 3, text_tokens=2).k.flatten(), torch.tensor([2.0, 4.5], dtype=torch.float64))
    assert_close(pool_tokens(x, x, 9).k.flatten(), torch.tensor([4.0], dtype=torch.float64))


@pytest.mark.parity
@pytest.mark.parametrize(("tokens", "n", "groups"), [(32760, 30, 1092), (17776, 15, 1186)])
def test_published_number_of_pooled_tokens(tokens, n, groups):
    x = torch.zeros(1, 1, tokens, 1)
    pooled = pool_tokens(x, x, n, exact=False)
    assert pooled.k.shape[2] == groups
    assert_close(pooled.bias, torch.full((1, 1, groups), math.log(n)))


def test_true_group_size_is_exact_for_equal_keys():
    # Seven equal keys with different values, in groups of 3, 3, 1: by their true sizes they average as seven do.
    v = torch.randn(1, 1, 7, 4, dtype=torch.float64)
    k = torch.ones_like(v)
    q = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    pooled = pool_tokens(k, v, 3)
    weights = (q @ pooled.k.transpose(-1, -2) + pooled.bias.double()[:, :, None]).softmax(-1)
    assert_close(weights @ pooled.v, v.mean(2, keepdim=True).expand(1, 1, 5, 4), atol=1e-6)
    filled = pool_tokens(k, v, 3, exact=False)
    weights = (q @ filled.k.transpose(-1, -2) + filled.bias.double()[:, :, None]).softmax(-1)
    assert float((weights @ filled.v - v.mean(2, keepdim=True)).abs().max()) > 1e-3


def test_pooling_in_half_precision_adds_in_single():
    k = torch.full((1, 1, 4096, 2), 3.0, dtype=torch.bfloat16)
    assert torch.equal(pool_tokens(k, k, 4096).k, k[:, :, :1])
    assert pool_tokens(k, k, 1000).k.dtype == torch.bfloat16


# ---- gradients


def test_pooled_bias_is_as_wide_as_the_keys():
    _, k, v = tensors()
    bias = pool_tokens(k, v, 7).bias
    assert torch.equal(bias.flatten(), torch.tensor([7.0] * 11 + [3.0], dtype=torch.float64).log())


def test_the_bias_of_a_geometry_is_one_tensor_that_any_mode_can_use():
    _, k, v = tensors()
    with torch.inference_mode():
        first = pool_tokens(k, v, 6).bias
    assert not first.is_inference()
    assert pool_tokens(k + 1, v, 6).bias is first
    assert pool_tokens(k, v, 5).bias is not first
    assert pool_tokens(k.float(), v.float(), 6).bias.dtype == torch.float32
    with torch._subclasses.FakeTensorMode() as mode:
        assert type(pool_tokens(*map(mode.from_tensor, (k, v)), 6).bias) is not torch.Tensor


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_through_attention_and_pooling(exact):
    q, k, v = tensors(heads=2, kv_heads=1, tokens=11, dim=3)
    cfg = BladeConfig(block=16, samples=4, pool=4, pool_exact=exact, max_density=1.0)

    def attend(q, k, v):
        return adaptive_sparse_attention(q, k, v, cfg=cfg, text_tokens=2)

    gradcheck(attend, q, k, v)


def test_gradients_where_blocks_are_dropped():
    q, k, v = tensors(heads=1, tokens=40, dim=3)
    cfg = change(pool=5, max_density=0.4)
    # The selection is piecewise constant: the same blocks are kept all along the difference quotient.
    gradcheck(lambda q, k, v: adaptive_sparse_attention(q, k, v, cfg=cfg), q, k, v)


def test_keys_that_are_not_kept_get_no_gradient_without_pooling():
    q, k, v = (x.requires_grad_() for x in tensors(tokens=64))
    cfg = change(max_density=0.25, min_density=0.25)
    layout = sparse_layout(q, k, cfg=cfg)
    out = adaptive_sparse_attention(q, k, v, cfg=cfg)
    out[:, :, :16].sum().backward()
    kept = layout.to_mask()[0, :, 0].repeat_interleave(16, dim=-1)
    assert torch.equal(v.grad[0].abs().sum(-1) > 0, kept)
    assert int(kept.sum()) == 2 * 16


# ---- selection


def test_selection_follows_the_configuration():
    scores = torch.tensor([[0.0, 0.6, 0.3, 0.1], [0.4, 0.0, 0.31, 0.29]], dtype=torch.float64)
    scores = scores[None, None].repeat(1, 1, 2, 1)  # four rows
    base = BladeConfig(block=16, samples=1, keep_diagonal=False, min_density=0.0, max_density=1.0, mass=0.85)

    def rows(cfg, **kwargs):
        idx, num, _ = select_blocks(scores, cfg, **kwargs)
        return [idx[0, 0, i, : num[0, 0, i]].tolist() for i in range(4)]

    assert rows(base) == [[1, 2], [0, 2, 3], [1, 2], [0, 2, 3]]
    assert rows(change(base, inclusive=False)) == [[1], [0, 2], [1], [0, 2]]
    assert rows(change(base, keep_diagonal=True)) == [[0, 1, 2], [0, 1, 2, 3], [1, 2], [0, 2, 3]]
    assert rows(change(base, max_density=0.5)) == [[1, 2], [0, 2], [1, 2], [0, 2]]
    assert rows(change(base, mass=0.1, min_density=0.5)) == [[1, 2], [0, 2], [1, 2], [0, 2]]
    assert rows(change(base, selection="topk", mass=0.1, max_density=0.5)) == [[1, 2], [0, 2], [1, 2], [0, 2]]
    assert rows(change(base, mask="random", mass=0.1, max_density=0.5)) == [[1, 2], [0, 2], [1, 2], [0, 2]]
    assert rows(change(base, max_density=0.25), text_blocks=1) == [[1, 3], [0, 3], [1, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("text_tokens", [1, 5, 16, 17])
def test_text_reads_and_is_read_by_everything(text_tokens):
    q, k, v = tensors(tokens=96 + text_tokens)
    cfg = change(max_density=0.2, min_density=0.0)
    mask = sparse_layout(q, k, cfg=cfg, text_tokens=text_tokens).to_mask()
    first = 96 // 16  # of the blocks with text
    assert bool(mask[:, :, first:].all())
    assert bool(mask[..., first:].all())
    assert not bool(mask[:, :, :first, :first].all())
    _, stats = adaptive_sparse_attention(q, k, v, cfg=cfg, text_tokens=text_tokens, return_stats=True)
    token_mask = mask[:, :, torch.arange(96 + text_tokens) // 16][..., torch.arange(96 + text_tokens) // 16]
    assert_close(stats.density, token_mask.double().mean((-1, -2)).float())
    left = sparse_layout(q, k, cfg=change(cfg, force_text=False), text_tokens=text_tokens)
    assert not bool(left.to_mask()[:, :, first:].all())


def test_a_block_half_of_text_is_a_text_block():
    q, k, _ = tensors(tokens=100)
    mask = sparse_layout(q, k, cfg=change(max_density=0.2, min_density=0.0), text_tokens=10).to_mask()
    assert bool(mask[..., 5:].all())  # text starts at token 90, in block 5
    assert not bool(mask[:, :, :5, 4].all())


def test_own_block_is_always_kept():
    q, k, _ = tensors(heads=8, tokens=320)
    cfg = change(max_density=0.1, min_density=0.1)
    mask = sparse_layout(q, k, cfg=cfg).to_mask()
    assert bool(mask.diagonal(dim1=-2, dim2=-1).all())
    assert torch.equal(mask.sum(-1), torch.full((1, 8, 20), 2))
    free = sparse_layout(q, k, cfg=change(cfg, keep_diagonal=False)).to_mask()
    assert not bool(free.diagonal(dim1=-2, dim2=-1).all())


# ---- static masks


def test_static_masks_have_the_density_asked_for():
    q, k, v = tensors(heads=3, tokens=4 * 8 * 8)
    for mask in ("window", "random"):
        cfg = change(max_density=0.25, mask=mask)
        _, stats = adaptive_sparse_attention(q, k, v, cfg=cfg, grid=(4, 8, 8), return_stats=True)
        assert_close(stats.density, torch.full((1, 3), 0.25))
        assert float(stats.clamped.sum()) == 0


def test_window_is_a_box_of_tiles_shifted_inwards_at_the_border():
    # 3 x 3 x 4 tiles of 1 x 4 x 4 tokens: of every row the twelve tiles that are nearest along the worst axis.
    cfg = BladeConfig(block=16, samples=4, order="tile", mask="window", max_density=12 / 36)
    scores = window_scores(cfg, (3, 12, 16))[0, 0]
    assert scores.shape == (36, 36)
    place = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), torch.arange(4), indexing="ij"), -1).view(
        36, 3
    )
    apart = (place[:, None] - place).abs() / torch.tensor([3, 3, 4])
    nearer = apart.amax(-1)
    for i in range(36):
        chosen = scores[i].topk(12).indices
        left_out = torch.ones(36, dtype=torch.bool).index_fill(0, chosen, False)
        assert float(nearer[i, chosen].max()) <= float(nearer[i, left_out].min()) + 1e-6
        assert int(chosen[0]) == i


def test_window_needs_the_grid():
    q, k, v = tensors(tokens=80)
    cfg = change(mask="window")
    with pytest.raises(ValueError, match="needs grid"):
        adaptive_sparse_attention(q, k, v, cfg=cfg)
    with pytest.raises(ValueError, match=r"grid \(3, 5, 5\) has 75 tokens, but the sequence 80 of video"):
        adaptive_sparse_attention(q, k, v, cfg=cfg, grid=(3, 5, 5))
    assert adaptive_sparse_attention(q, k, v, cfg=cfg, grid=(3, 5, 5), text_tokens=5).shape == q.shape


def test_random_scores_differ_by_layer_and_head_and_stay_the_same():
    scores = random_scores(6, 2, seed=1, layer=4)
    assert torch.equal(scores, random_scores(6, 2, seed=1, layer=4))
    assert not torch.equal(scores, random_scores(6, 2, seed=1, layer=5))
    assert not torch.equal(scores, random_scores(6, 2, seed=2, layer=4))
    assert not torch.equal(scores[:, 0], scores[:, 1])
    assert float(scores.min()) >= 0
    assert float(scores.max()) < 1


# ---- statistics


def test_recall_is_the_share_of_probability_on_kept_pairs():
    q, k, v = tensors(batch=2, heads=4, kv_heads=2, tokens=70)
    q = 3 * q
    cfg = change(pool=7)
    _, stats = adaptive_sparse_attention(q, k, v, cfg=cfg, return_stats=True, recall=True)
    layout = sparse_layout(q, k, cfg=cfg)
    col = torch.arange(70) // 16
    keep = layout.to_mask()[:, :, col][..., col]
    weights = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * 8**-0.5).softmax(-1)
    want = (weights * keep).sum(-1).mean(-1)
    assert_close(stats.recall, want.float())
    assert_close(mass_recall(q, k, layout), want.float())
    assert stats.pooled == pytest.approx(10 / 70)


def test_clamped_counts_the_rows_whose_threshold_was_cut():
    q, k, v = tensors(tokens=96)
    _, some = adaptive_sparse_attention(q, k, v, cfg=change(mass=0.5), return_stats=True)
    _, all_rows = adaptive_sparse_attention(q, k, v, cfg=change(mass=1.0), return_stats=True)
    assert_close(all_rows.clamped, torch.ones(1, 2))
    assert float(some.clamped.max()) < 1


@pytest.mark.parity
def test_threshold_of_the_release_in_16_bits():
    # Counts are the release's own, of these scores: its sum, rounded at each block, stops elsewhere than an exact one.
    row, column = torch.arange(8)[:, None], torch.arange(64)
    scores = ((row * 37 + column * 61) % 64 / 63).pow(1 + row / 2)
    cfg = dataclasses.replace(PRESETS["wan2.1-1.3b-official"].config, max_density=0.9)
    for dtype, counts in (
        (torch.bfloat16, [48, 44, 39, 36, 33, 30, 28, 26]),
        (torch.float32, [49, 44, 40, 36, 33, 30, 28, 26]),
    ):
        given = scores.to(dtype)
        given = torch.nn.functional.pad(given / given.sum(-1, keepdim=True), (0, 0, 0, 56))[None, None]
        assert select_blocks(given, cfg).kv_num[0, 0, :8].tolist() == counts


@pytest.mark.parity
@pytest.mark.parametrize("preset", ["wan2.1-1.3b-official", "cogvideox-5b-official"])
def test_official_masks_are_those_of_scores_and_sums_in_16_bits(preset):
    cfg = change(PRESETS[preset].config, block=16, samples=8, offsets="seeded")
    q, k = ((torch.randn(1, 2, 64 * 16, 32) / 4).bfloat16() for _ in range(2))  # diffuse
    kept = sparse_layout(q, k, cfg=cfg).to_mask()[0]
    sampled = []
    for side, x in (("q", q), ("k", k)):
        index = sample_index(64 * 16, 16, cfg.samples, "seeded", seed=cfg.seed, side=side)[0, 0].long()
        sampled.append(x[0, :, index].float())  # [H, blocks, samples, D]
    logits = torch.einsum("hird,hjsd->hirjs", *sampled) * 32**-0.5 / math.log(2)
    blocks = logits.amax(-1).bfloat16().float()  # of each row
    score = (blocks - logits.amax((-1, -2))[..., None]).exp2().amax(2).bfloat16()
    score = score / score.sum(-1, keepdim=True)
    low, high = cfg.keep_bounds(64)
    ranked, best = score.sort(dim=-1, descending=True)
    running = ranked.cumsum(-1)
    count = (running < cfg.mass * running[..., -1:]).sum(-1).clamp(low, high)
    want = torch.zeros_like(kept).scatter(-1, best, torch.arange(64) < count[..., None])
    # Ties, and so sorts, are many here; a number that rounds the other way moves a few blocks of its row.
    assert float((score == score.amax(-1, keepdim=True)).float().mean()) > 0.02
    assert float((kept & want).sum() / want.sum()) > 0.99
    exact = sparse_layout(q.float(), k.float(), cfg=cfg).to_mask()[0]
    assert float((exact & want).sum() / want.sum()) < 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tied_blocks_of_the_release_are_kept_from_all_over_the_video(dtype):
    # Diffuse heads: many blocks hold the largest logit of some row, and score exactly 1.
    q, k = (torch.randn(2, 4, 64 * 16, 16).to(dtype) for _ in range(2))
    cfg = change(
        score="official", samples=8, min_density=0.1, max_density=0.1, keep_diagonal=False, inclusive=False, pool=0
    )
    kept = sparse_layout(q, k, cfg=cfg).to_mask().double().mean((0, 1, 2))
    thirds = [float(part.sum() / kept.sum()) for part in (kept[:21], kept[21:43], kept[43:])]
    assert min(thirds) > 0.25, thirds


@pytest.mark.parametrize("text_tokens", [3, 20])
def test_clamped_leaves_text_blocks_out(text_tokens):
    q, k, v = tensors(tokens=80 + text_tokens)
    cfg = change(mass=1.0)
    _, stats = adaptive_sparse_attention(q, k, v, cfg=cfg, text_tokens=text_tokens, return_stats=True)
    # Every block of video is cut; those of text keep everything and do not count.
    assert torch.equal(stats.clamped, torch.ones(1, 2))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("preset", "tokens", "text", "dim", "blocks", "kept"),
    [("wan2.1-1.3b-official", 32760, 0, 32, 256, 43), ("cogvideox-5b-official", 17776, 226, 32, 139, 13)],
)
def test_published_density(preset, tokens, text, dim, blocks, kept):
    # Where the threshold asks for more than the upper clamp on every row, as it does here, the mask is a plain top-k.
    q, k = torch.randn(1, 1, tokens, dim), torch.randn(1, 1, tokens, dim)
    layout = sparse_layout(q, k, cfg=PRESETS[preset].config, text_tokens=text)
    forced = 2 if text else 0
    assert layout.num_k_blocks == blocks
    video = layout.kv_num[0, 0, : blocks - forced]
    assert kept <= int(video.min())
    assert int(video.max()) <= kept + forced
    if not text:
        assert 1 - kept / blocks - 1 / 30 == pytest.approx(0.798, abs=1e-3)  # as the paper reports it
    else:
        assert 0.81 < 1 - float(layout.to_mask().double().mean()) - 1 / 15 < 0.83  # 0.82 in the paper


# ---- robustness


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 100])
def test_odd_lengths(tokens):
    q, k, v = tensors(tokens=tokens)
    cfg = change(pool=7)
    out, stats = adaptive_sparse_attention(q, k, v, cfg=cfg, return_stats=True, recall=True)
    assert bool(out.isfinite().all())
    assert float(stats.recall.min()) > 0
    layout = sparse_layout(q, k, cfg=cfg)
    pooled = pool_tokens(k, v, 7)
    extra = q @ pooled.k.transpose(-1, -2) * 8**-0.5 + pooled.bias.double()[:, :, None]
    weights = torch.cat([masked_logits(q, k, layout, 8**-0.5), extra], dim=-1).softmax(-1)
    assert_close(out, weights @ torch.cat([v, pooled.v], dim=2), atol=1e-6)


@pytest.mark.parametrize("mask", ["adaptive", "pyramid", "window", "random"])
def test_batch_elements_are_independent(mask):
    q, k, v = tensors(batch=3, tokens=60)
    cfg = change(pool=0 if mask == "pyramid" else 5, mask=mask)
    whole = adaptive_sparse_attention(q, k, v, cfg=cfg, grid=(3, 4, 5), layer=2)
    for b in range(3):
        part = (x[b : b + 1] for x in (q, k, v))
        assert_close(whole[b], adaptive_sparse_attention(*part, cfg=cfg, grid=(3, 4, 5), layer=2)[0])


def test_same_call_same_result_and_other_layer_other_samples():
    q, k, v = tensors(tokens=160)
    cfg = change(max_density=0.3)
    first = adaptive_sparse_attention(q, k, v, cfg=cfg, layer=1)
    torch.rand(5)
    assert torch.equal(adaptive_sparse_attention(q, k, v, cfg=cfg, layer=1), first)
    assert not torch.equal(adaptive_sparse_attention(q, k, v, cfg=cfg, layer=2), first)


@pytest.mark.parametrize("offsets", ["seeded", "random"])
def test_gradient_checkpointing_recomputes_the_same_mask(offsets):
    cfg = change(offsets=offsets, max_density=0.3, pool=5)
    leaves = [x.requires_grad_() for x in tensors(tokens=160)]

    def attend(q, k, v):
        return adaptive_sparse_attention(q, k, v, cfg=cfg)

    grads = []
    for run in (attend, lambda *x: torch.utils.checkpoint.checkpoint(attend, *x, use_reentrant=False)):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "mask",
    [
        "adaptive",
        pytest.param("pyramid", marks=pytest.mark.slow),
        "dense",
        pytest.param("window", marks=pytest.mark.slow),
        pytest.param("random", marks=pytest.mark.slow),
    ],
)
def test_compiles_whole(mask):
    cfg = change(pool=0 if mask == "pyramid" else 5, mask=mask)

    def attend(q, k, v):
        text = q.shape[2] - 60
        return adaptive_sparse_attention(q, k, v, cfg=cfg, text_tokens=text, grid=(3, 4, 5), return_stats=True)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for tokens in (64, 70):  # the second length makes it dynamic
        leaves = [x.requires_grad_() for x in tensors(tokens=tokens)]
        got, want = compiled(*leaves), attend(*leaves)
        assert_close(got[0], want[0])
        assert_close(got[1].density, want[1].density)
        for mine, theirs in zip(
            torch.autograd.grad(got[0].sum(), leaves), torch.autograd.grad(want[0].sum(), leaves), strict=True
        ):
            assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["adaptive", "dense"])
def test_autocast_changes_nothing(mask, dtype):
    q, k, v = tensors(tokens=70, dtype=dtype)
    cfg = change(pool=8, mask=mask)
    want, want_stats = adaptive_sparse_attention(q, k, v, cfg=cfg, text_tokens=6, return_stats=True, recall=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, stats = adaptive_sparse_attention(q, k, v, cfg=cfg, text_tokens=6, return_stats=True, recall=True)
        pooled = pool_tokens(k, v, 8)
    assert got.dtype == pooled.k.dtype == dtype
    assert pooled.bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(pooled.k, pool_tokens(k, v, 8).k)
    assert torch.equal(got, want)
    for name in ("density", "clamped", "recall"):
        assert torch.equal(getattr(stats, name), getattr(want_stats, name))


# ---- on the device


@requires_gpu(min_sm=80)
@pytest.mark.parametrize(
    ("preset", "grid", "text", "dim"),
    [
        ("wan2.1-1.3b", (5, 14, 30), 0, 128),
        ("cogvideox-5b", (5, 14, 30), 77, 64),
        ("wan2.1-1.3b-free", (5, 9, 9), 0, 96),
    ],
)
def test_gpu_agrees_with_the_reference(preset, grid, text, dim):
    cfg = PRESETS[preset].config
    shape = (2, math.prod(grid) + text, 3, dim)
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)]
    dout, results = leaves.pop(), {}
    layouts = [
        sparse_layout(*leaves[:2], cfg=change(cfg, backend=name), text_tokens=text, layer=4)
        for name in ("triton", "reference")
    ]
    # A close call may go either way, since the two backends add in different orders.
    assert float((layouts[0].to_mask() ^ layouts[1].to_mask()).float().mean()) < 2e-3
    for name in ("triton", "reference"):
        copies = [x.detach().requires_grad_() for x in leaves]
        pooled = pool_tokens(*copies[1:], cfg.pool or 30, text_tokens=text)
        out = block_sparse_attention(*copies, layouts[1], pooled=pooled, backend=name)
        results[name] = (out, *torch.autograd.grad(out, copies, dout))
    for got, want in zip(results["triton"], results["reference"], strict=True):
        assert_close(got, want)


@requires_gpu(min_sm=80)
def test_gpu_waits_for_nothing_and_can_be_captured():
    cfg = PRESETS["cogvideox-5b"].config
    q, k, v = (torch.randn(1, 1800, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))

    def attend():
        return adaptive_sparse_attention(q, k, v, cfg=cfg, text_tokens=50, layer=1, return_stats=True, recall=True)

    want, stats = attend()  # compiles, and fills the table of sample positions
    with no_host_sync():
        out, again = attend()
    assert torch.equal(out, want)
    assert torch.equal(again.density, stats.density)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attend()
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


def test_bad_arguments():
    q, k, v = tensors(tokens=64)
    with pytest.raises(ValueError, match=r"k must be \[batch, heads, tokens, dim\]; got \[64, 8\]"):
        adaptive_sparse_attention(q, k[0, 0], v, cfg=SMALL)
    with pytest.raises(ValueError, match=r"as many queries as keys; got 32 and 64\. Leave cross-attention dense"):
        adaptive_sparse_attention(q[:, :, :32], k, v, cfg=SMALL)
    with pytest.raises(ValueError, match=r"text_tokens must lie in \[0, 64\), .*; got 64"):
        adaptive_sparse_attention(q, k, v, cfg=SMALL, text_tokens=64)
    for cfg in (SMALL, change(pool=4), change(mask="dense")):
        with pytest.raises(
            ValueError, match=r"k and v must have the same shape; got \[1, 2, 64, 8\] and \[1, 2, 60, 8\]"
        ):
            adaptive_sparse_attention(q, k, v[:, :, :60], cfg=cfg)
        with pytest.raises(ValueError, match=r"q must not be empty; got \[0, 2, 64, 8\]\. Skip the call"):
            adaptive_sparse_attention(q[:0], k[:0], v[:0], cfg=cfg)
        with pytest.raises(ValueError, match=r"q must not be empty; got \[1, 2, 0, 8\]"):
            adaptive_sparse_attention(*(x[:, :, :0] for x in (q, k, v)), cfg=cfg)
    with pytest.raises(ValueError, match="must be at least 1; got 0"):
        pool_tokens(k, v, 0)
    with pytest.raises(ValueError, match="there must be video tokens to pool"):
        pool_tokens(k, v, 4, text_tokens=64)
