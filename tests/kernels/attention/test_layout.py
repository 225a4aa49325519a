"""BlockLayout: builders against boolean masks made by hand, and the message of each bad value."""

import pytest
import torch
from hone_kernels.attention import BlockLayout


def sizes(tokens, block):
    return [min(block, tokens - start) for start in range(0, tokens, block)]


def test_from_mask_and_back():
    mask = torch.rand(2, 3, 4, 7) < 0.4
    layout = BlockLayout.from_mask(mask, 200, 210, block_q=64, block_k=32)
    assert torch.equal(layout.to_mask(), mask)
    assert layout.kv_num.dtype == layout.kv_idx.dtype == torch.int32
    for b, h, i in [(0, 0, 0), (1, 2, 3)]:
        listed = layout.kv_idx[b, h, i, : layout.kv_num[b, h, i]]
        assert listed.tolist() == mask[b, h, i].nonzero().flatten().tolist()


def test_from_mask_width_is_checked():
    mask = torch.ones(1, 1, 2, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="more blocks than width"):
        BlockLayout.from_mask(mask, 64, 128, block_q=32, block_k=32, width=3)
    assert BlockLayout.from_mask(mask[..., :3].clone(), 64, 96, block_q=32, block_k=32, width=3).kv_idx.shape[-1] == 3


def test_dense_lists_everything():
    layout = BlockLayout.dense(130, 70, block_q=64, block_k=32)
    assert layout.kv_num.tolist() == [[[3, 3, 3]]]
    assert layout.kv_idx.tolist() == [[[[0, 1, 2]] * 3]]
    assert layout.density().item() == 1


def test_topk_keeps_the_best_and_the_forced():
    scores = torch.tensor([[[[0.1, 0.9, 0.3, 0.2], [0.4, 0.1, 0.2, 0.3]]]])
    layout = BlockLayout.from_topk(scores, 2, 64, 128, block_q=32, block_k=32)
    assert layout.kv_idx.tolist() == [[[[1, 2], [0, 3]]]]
    forced = torch.tensor([True, False, False, False])
    layout = BlockLayout.from_topk(scores, 2, 64, 128, block_q=32, block_k=32, forced=forced)
    assert layout.to_mask().tolist() == [[[[True, True, True, False], [True, False, False, True]]]]
    with pytest.raises(ValueError, match=r"keep must lie in \[1, 4\]"):
        BlockLayout.from_topk(scores, 5, 64, 128, block_q=32, block_k=32)


def test_transpose_exchanges_sides():
    mask = torch.rand(1, 2, 3, 5) < 0.5
    turned = BlockLayout.from_mask(mask, 90, 150, block_q=32, block_k=32).transpose()
    assert (turned.tokens_q, turned.tokens_k) == (150, 90)
    assert torch.equal(turned.to_mask(), mask.transpose(-1, -2))


@pytest.mark.parametrize("padded", [False, True])
def test_density_counts_tokens(padded):
    mask = torch.rand(2, 2, 3, 4) < 0.5
    keys = torch.tensor([[32, 5, 0, 3], [1, 32, 32, 4]], dtype=torch.int32) if padded else None
    layout = BlockLayout.from_mask(mask, 70, 100, block_q=32, block_k=32, k_valid=keys)
    per_batch = keys.tolist() if padded else [sizes(100, 32)] * 2
    total = 0.0
    for b in range(2):
        for h in range(2):
            kept = sum(
                mask[b, h, i, j].item() * q * k for i, q in enumerate(sizes(70, 32)) for j, k in enumerate(per_batch[b])
            )
            total += kept / (70 * sum(per_batch[b])) / 4
    assert layout.density().item() == pytest.approx(total, rel=1e-6)


def test_sliding_tile_window():
    layout = BlockLayout.sliding_tile((4, 4, 6), (2, 2, 2), (1, 3, 3))
    mask = layout.to_mask()[0, 0].view(2, 2, 3, 2, 2, 3)
    for f, h, w in [(0, 0, 0), (1, 1, 2), (0, 1, 1)]:
        expected = torch.zeros(2, 2, 3, dtype=torch.bool)
        # Two tiles along height and three along width: a window of three covers both, wherever it is centred.
        expected[f] = True
        assert torch.equal(mask[f, h, w], expected)
    assert layout.k_valid is None


def test_sliding_tile_is_shifted_in_at_the_border():
    mask = BlockLayout.sliding_tile((5, 1, 1), (1, 1, 1), (3, 1, 1)).to_mask()[0, 0]
    assert [row.nonzero().flatten().tolist() for row in mask] == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]


def test_sliding_tile_counts_ragged_tiles():
    layout = BlockLayout.sliding_tile((3, 2, 2), (2, 2, 2), (1, 1, 1))
    assert layout.k_valid.tolist() == [[8, 4]]
    assert (layout.tokens_q, layout.block_q) == (16, 8)
    with pytest.raises(ValueError, match="window must be odd"):
        BlockLayout.sliding_tile((4, 4, 4), (2, 2, 2), (2, 1, 1))


def test_values_of_lists_from_elsewhere_are_checked():
    num = torch.tensor([[[2, 1]]], dtype=torch.int32)
    good = torch.tensor([[[[0, 2], [1, 9]]]], dtype=torch.int32)
    layout = BlockLayout(num, good, 64, 96, 32, 32)
    assert layout.to_mask().tolist() == [[[[True, False, True], [False, True, False]]]]
    for bad, message in (
        ([[2, 0], [1, 0]], "ascending"),
        ([[0, 3], [1, 0]], r"kv_idx must lie in \[0, 3\).*got 3"),
        ([[1, 1], [1, 0]], "ascending"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockLayout(num, torch.tensor([[bad]], dtype=torch.int32), 64, 96, 32, 32)
    for counts, got in (([3, 1], 3), ([-1, 2], -1)):
        with pytest.raises(ValueError, match=rf"kv_num must lie in \[0, 2\], the width of kv_idx; got {got}"):
            BlockLayout(torch.tensor([[counts]], dtype=torch.int32), good, 64, 96, 32, 32)
    with pytest.raises(ValueError, match=r"k_valid must lie in \[0, 32\]"):
        BlockLayout(num, good, 64, 96, 32, 32, torch.tensor([[32, 33, 1]], dtype=torch.int32))
    BlockLayout(num + 1, good, 64, 96, 32, 32, check=False)


@pytest.mark.parametrize("padded", [False, True])
def test_flex_round_trip(padded):
    mask = torch.rand(1, 2, 3, 3) < 0.5
    mask[..., 0] = True
    keys = torch.tensor([[32, 7, 20]], dtype=torch.int32) if padded else None
    layout = BlockLayout.from_mask(mask, 96, 96, block_q=32, block_k=32, k_valid=keys)
    flex = layout.to_block_mask()
    if not padded:
        assert torch.equal(BlockLayout.from_block_mask(flex).to_mask(), mask)
        return
    with pytest.raises(ValueError, match="partial blocks"):
        BlockLayout.from_block_mask(flex)
    assert torch.equal(BlockLayout.from_block_mask(flex, partial="include").to_mask(), mask)
    b, h, q = (torch.tensor(0) for _ in range(3))
    assert [bool(flex.mask_mod(b, h, q, torch.tensor(k))) for k in (31, 38, 39, 83, 84)] == [
        True,
        True,
        False,
        True,
        False,
    ]


def test_scores_of_other_blocks_are_refused():
    # Sixteen blocks where there are three: the lists would point past the keys.
    with pytest.raises(ValueError, match=r"scores must end in \[NQ, NK\] = \[3, 3\] .* got \[1, 4, 3, 16\]"):
        BlockLayout.from_topk(torch.rand(1, 4, 3, 16), 3, 300, 300)
    with pytest.raises(ValueError, match="scores must be"):
        BlockLayout.from_topk(torch.rand(3, 3), 2, 300, 300)


@pytest.mark.parametrize("sizes", [{"block_q": 0}, {"block_k": -1}])
def test_blocks_must_have_a_size(sizes):
    for build in (BlockLayout.dense, lambda *n, **s: BlockLayout.from_topk(torch.rand(1, 1, 3, 3), 1, *n, **s)):
        with pytest.raises(ValueError, match=r"block_. must be positive"):
            build(300, 300, **sizes)


def test_layouts_can_be_compared_and_kept_in_sets():
    layout = BlockLayout.dense(100, 100)
    assert layout != BlockLayout.dense(100, 100)
    assert len({layout, layout}) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_num": torch.zeros(1, 1, 3, dtype=torch.int32)}, ValueError, "kv_num must be"),
        ({"kv_idx": torch.zeros(1, 2, 2, 4, dtype=torch.int32)}, ValueError, "kv_idx must be"),
        ({"kv_idx": torch.zeros(1, 1, 2, 4)}, TypeError, "int32"),
        ({"k_valid": torch.zeros(1, 3, dtype=torch.int32)}, ValueError, "k_valid must be"),
        ({"block_q": 0}, ValueError, "block_q must be positive"),
    ],
)
def test_bad_layouts(change, error, message):
    fields = dict(
        kv_num=torch.zeros(1, 1, 2, dtype=torch.int32),
        kv_idx=torch.zeros(1, 1, 2, 4, dtype=torch.int32),
        tokens_q=64,
        tokens_k=128,
        block_q=32,
        block_k=32,
    )
    with pytest.raises(error, match=message):
        BlockLayout(**(fields | change))
