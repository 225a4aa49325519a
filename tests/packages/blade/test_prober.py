import pytest
import torch
from hone_blade import prober
from hone_blade.config import BladeConfig
from hone_blade.prober import hash_numbers, probe, sample_index, sample_offsets
from hone_core.testing import assert_close
from hone_kernels.block_scores import block_scores


def test_strided_by_hand():
    # The middles of four stretches of eight.
    assert sample_offsets(32, 4, "strided", block=32).tolist() == [4, 12, 20, 28]
    assert sample_offsets(32, 32, "strided", block=32).tolist() == list(range(32))
    assert sample_offsets(10, 4, "strided", block=32).tolist() == [1, 3, 6, 8]
    assert sample_offsets(3, 4, "strided", block=32).tolist() == [0, 1, 2, -1]


def test_seeded_offsets_are_distinct_ascending_and_stay_the_same():
    draws = [
        sample_offsets(128, 16, "seeded", block=128, layer=layer, side=side) for layer in range(20) for side in "qk"
    ]
    for draw in draws:
        assert bool((draw.diff() > 0).all())
        assert int(draw[0]) >= 0
        assert int(draw[-1]) < 128
    assert len({tuple(draw.tolist()) for draw in draws}) == 40
    other = sample_offsets(128, 16, "seeded", block=128, seed=1)
    assert not torch.equal(other, draws[0])
    # Kept as numbers: another draw in a later version would change every mask.
    assert sample_offsets(32, 4, "seeded", block=32).tolist() == [2, 11, 20, 25]


def test_seeded_offsets_favour_no_position():
    counts = torch.zeros(32)
    for layer in range(1000):
        counts[sample_offsets(32, 8, "seeded", block=32, layer=layer)] += 1
    # Binomial with mean 250 and deviation 14.
    assert float(counts.min()) > 190
    assert float(counts.max()) < 310


def test_hash_numbers_are_uniform():
    x = hash_numbers(torch.arange(20_000), 3, "q", 5).double() / 2**63
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    assert float(x.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(x.var()) == pytest.approx(1 / 12, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1])) < 0.03
    assert not torch.equal(hash_numbers(torch.arange(9), 3, "q", 5), hash_numbers(torch.arange(9), 5, "q", 3))


def test_index_of_blocks():
    index = sample_index(100, 32, 8, "seeded", layer=2)
    assert index.shape == (1, 1, 4, 8)
    assert index.dtype == torch.int32
    offsets = sample_offsets(32, 8, "seeded", block=32, layer=2)
    for block in range(3):
        assert torch.equal(index[0, 0, block].long(), 32 * block + offsets)
    assert index[0, 0, 3].tolist() == [96, 97, 98, 99, -1, -1, -1, -1]
    assert sample_index(100, 32, 8, "seeded", layer=2) is index
    whole = sample_index(40, 32, 32, "strided")[0, 0]
    assert whole[0].tolist() == list(range(32))
    assert whole[1].tolist() == [*range(32, 40), *[-1] * 24]


def test_index_kept_is_bounded():
    first = sample_index(64, 32, 4, "seeded", layer=0)
    for layer in range(1, 1100):
        sample_index(64, 32, 4, "seeded", layer=layer)
    again = sample_index(64, 32, 4, "seeded", layer=0)
    assert again is not first
    assert torch.equal(again, first)
    assert sample_index(64, 32, 4, "strided", layer=1) is sample_index(64, 32, 4, "strided", layer=2)


def in_fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@pytest.mark.parametrize("mode", [torch.inference_mode, in_fake_mode, lambda: torch.device("meta")])
@pytest.mark.parametrize("method", ["seeded", "strided"])
def test_index_serves_later_callers_whatever_mode_the_first_was_in(method, mode):
    tokens = 50 + len(mode.__name__)  # of this case alone
    with mode():
        sample_index(tokens, 16, 4, method)
    index = sample_index(tokens, 16, 4, method)
    assert index.device.type == "cpu"
    assert not index.is_inference()
    assert index[0, 0, 1].sub(16).tolist() == sample_offsets(16, 4, method, block=16).tolist()


def test_random_index_is_the_release_s_draw():
    index = prober._random_index(2, 3, 70, 32, 8, torch.device("cpu"))
    assert index.shape == (2, 3, 3, 8)
    # The same offsets in every full block; the last block is filled up with its last token.
    assert torch.equal(index[:, :, 1], index[:, :, 0] + 32)
    assert torch.equal(index[:, :, 2], (index[:, :, 0] + 64).clamp(max=69))
    assert not torch.equal(index[0], index[1])
    assert all(len(set(index[b, h, 0].tolist())) == 8 for b in range(2) for h in range(3))
    torch.manual_seed(3)
    first = prober._random_index(1, 1, 64, 32, 8, torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, prober._random_index(1, 1, 64, 32, 8, torch.device("cpu")))
    with pytest.raises(ValueError, match="drawn at each call"):
        sample_index(64, 32, 8, "random")


@pytest.mark.parametrize("score", ["paper", "official", "mean", "lse"])
def test_probe_scores_the_drawn_samples(score):
    cfg = BladeConfig(block=16, samples=4, score=score, seed=7)
    q, k = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8)
    if score == "mean":
        index = [sample_index(50, 16, 16, "strided")] * 2
    else:
        index = [sample_index(50, 16, 4, "seeded", seed=7, layer=3, side=side) for side in "qk"]
    want = block_scores(q, k, *index, kind=score, scale=0.4)
    assert torch.equal(probe(q, k, cfg, layer=3, scale=0.4), want)
    assert_close(want.sum(-1), torch.ones(2, 4, 4))


def test_probe_repeats_itself_unless_told_not_to():
    q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8)
    for offsets, same in (("seeded", True), ("strided", True), ("random", False)):
        cfg = BladeConfig(block=16, samples=4, offsets=offsets)
        assert torch.equal(probe(q, k, cfg), probe(q, k, cfg)) is same
