import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.block_select import select_blocks


def kept(selected, row=0):
    """Block numbers of one row of the first head."""
    idx, num, _ = selected
    return idx[0, 0, row, : int(num[0, 0, row])].tolist()


def one_row(*scores, dtype=torch.float64):
    return torch.tensor(scores, dtype=dtype).view(1, 1, 1, -1)


def brute_force(row, i, num_q, *, min_keep, max_keep, mass, inclusive, keep_diagonal, forced):
    """Blocks of one row and whether it was clamped, in Python numbers."""
    num_k = len(row)
    if forced and i >= num_q - forced:
        return list(range(num_k)), False
    ranked = sorted(range(num_k), key=lambda j: (not (keep_diagonal and j == i), -row[j], j))
    wanted, reached = 0, 0.0
    if mass is None:
        wanted = max_keep
    else:
        while wanted < num_k:
            reached += row[ranked[wanted]]
            wanted += 1
            if reached >= mass * sum(row):
                break
        wanted -= not inclusive
    chosen = set(ranked[: min(max(wanted, min_keep), max_keep)]) | set(range(num_k - forced, num_k))
    return sorted(chosen), wanted > max_keep


@pytest.mark.parity
@pytest.mark.parametrize(
    ("mass", "inclusive", "want"),
    [(0.79, False, [0]), (0.95, False, [0, 1]), (0.79, True, [0, 1]), (0.95, True, [0, 1, 2])],
)
def test_threshold_by_hand(mass, inclusive, want):
    scores = one_row(0.5, 0.3, 0.15, 0.05)
    assert kept(select_blocks(scores, max_keep=4, mass=mass, inclusive=inclusive)) == want
    # Only shares matter, not the total, and not where the blocks stand.
    assert kept(select_blocks(3 * scores, max_keep=4, mass=mass, inclusive=inclusive)) == want
    turned = select_blocks(scores.flip(-1), max_keep=4, mass=mass, inclusive=inclusive)
    assert kept(turned) == [3 - j for j in reversed(want)]


def test_clamps_by_hand():
    scores = one_row(0.05, 0.5, 0.15, 0.3)
    low = select_blocks(scores, min_keep=3, max_keep=4, mass=0.5)
    assert kept(low) == [1, 2, 3]
    assert not bool(low.clamped)
    high = select_blocks(scores, max_keep=2, mass=0.94)
    assert kept(high) == [1, 3]
    assert bool(high.clamped)
    assert high.kv_idx.shape[-1] == 2
    # Exactly as many as allowed is not clamped.
    assert not bool(select_blocks(scores, max_keep=3, mass=0.94).clamped)
    assert kept(select_blocks(scores, max_keep=4, mass=1.0)) == [0, 1, 2, 3]
    assert not bool(select_blocks(scores, max_keep=4, mass=1.0).clamped)


def test_topk_and_ties_by_hand():
    scores = one_row(0.25, 0.5, 0.25, 0.25)
    assert kept(select_blocks(scores, max_keep=2)) == [0, 1]
    assert kept(select_blocks(scores, max_keep=3)) == [0, 1, 2]
    assert kept(select_blocks(torch.zeros_like(scores), max_keep=2, mass=0.9)) == [0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_k", [1, 7, 64, 139])
def test_spread_ties_favour_no_place(num_k, dtype):
    keep = max(1, num_k // 4)
    got = select_blocks(torch.ones(1, 1, 256, num_k, dtype=dtype), max_keep=keep, spread_ties=True)
    assert bool((got.kv_num == keep).all())
    often = torch.bincount(got.kv_idx.flatten(), minlength=num_k) / 256
    assert float((often - keep / num_k).abs().max()) < 0.05
    for row in got.kv_idx[0, 0].tolist():
        third = num_k / 3
        counts = [sum(part <= block / third < part + 1 for block in row) for part in range(3)]
        assert max(counts) - min(counts) <= 3
    # Ties alone: a larger score goes first.
    scores = torch.ones(1, 1, 4, 7, dtype=dtype)
    scores[..., 5] = 2
    assert all(5 in row for row in select_blocks(scores, max_keep=2, spread_ties=True).kv_idx[0, 0].tolist())


def test_sum_in_16_bits():
    # 0.9 + 0.0013 is 0.9 again in bfloat16, so a long tail of small scores never reaches the threshold.
    scores = torch.full((1, 1, 1, 76), 0.1 / 75)
    scores[..., 0] = 0.9
    exact = select_blocks(scores, max_keep=76, mass=0.95)
    running = scores.bfloat16().sort(descending=True).values.cumsum(-1)
    want = int((running < 0.95 * running[..., -1:]).sum()) + 1
    narrow = select_blocks(scores.bfloat16(), max_keep=76, mass=0.95)
    assert int(narrow.kv_num) == want
    assert int(exact.kv_num) == 39


def test_diagonal_takes_the_place_of_the_last_ranked():
    scores = torch.tensor([[0.0, 0.5, 0.3, 0.2], [0.0, 0.5, 0.3, 0.2]], dtype=torch.float64).expand(1, 1, 2, 4)
    plain = select_blocks(scores, max_keep=2)
    assert [kept(plain, row) for row in (0, 1)] == [[1, 2], [1, 2]]
    own = select_blocks(scores, max_keep=2, keep_diagonal=True)
    assert [kept(own, row) for row in (0, 1)] == [[0, 1], [1, 2]]


def test_forced_blocks_by_hand():
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).expand(1, 1, 4, 4)
    got = select_blocks(scores, max_keep=1, mass=0.99, forced=1)
    assert [kept(got, row) for row in range(4)] == [[0, 3], [0, 3], [0, 3], [0, 1, 2, 3]]
    assert got.clamped.flatten().tolist() == [True, True, True, False]
    # A forced block that was chosen anyway counts once.
    assert kept(select_blocks(scores.flip(-1), max_keep=1, forced=1)) == [3]


@pytest.mark.parametrize("mass", [None, 0.3, 0.9])
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("keep_diagonal", [True, False])
@pytest.mark.parametrize("forced", [0, 2])
def test_brute_force(mass, inclusive, keep_diagonal, forced):
    scores = torch.rand(2, 3, 7, 9, dtype=torch.float64) ** 3
    rule = {"min_keep": 2, "max_keep": 5, "mass": mass, "inclusive": inclusive}
    rule |= {"keep_diagonal": keep_diagonal, "forced": forced}
    got = select_blocks(scores, **rule)
    assert got.kv_idx.shape == (2, 3, 7, 9 if forced else 5)
    assert got.kv_idx.dtype == got.kv_num.dtype == torch.int32
    for b in range(2):
        for h in range(3):
            for i in range(7):
                want, clamped = brute_force(scores[b, h, i].tolist(), i, 7, **rule)
                count = int(got.kv_num[b, h, i])
                assert got.kv_idx[b, h, i, :count].tolist() == want
                assert not got.kv_idx[b, h, i, count:].any()
                assert bool(got.clamped[b, h, i]) == clamped


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_opcheck_and_compile():
    scores = torch.rand(1, 2, 4, 6)
    for mass, forced in ((None, 0), (0.9, 1)):
        arguments = (scores, 1, 3, mass, True, True, forced, False, "reference")
        torch.library.opcheck(torch.ops.hone_kernels.select_blocks.default, arguments)
    compiled = torch.compile(lambda x: select_blocks(x * 2, max_keep=3, mass=0.9), backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(scores), select_blocks(scores, max_keep=3, mass=0.9), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(3, 3)}, ValueError, r"scores must be \[B, H, NQ, NK\]"),
        ({"max_keep": 10}, ValueError, r"max_keep <= 9 \(key blocks\) must hold; got min_keep=1, max_keep=10"),
        ({"min_keep": 4}, ValueError, "got min_keep=4, max_keep=3"),
        ({"min_keep": 0}, ValueError, "got min_keep=0"),
        ({"mass": 1.5}, ValueError, "mass is a share"),
        ({"forced": 8}, ValueError, r"forced must lie in \[0, 7\]"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, ValueError, "needs a CUDA device"),
        (
            {"scores": torch.zeros(1, 1, 7, 9, dtype=torch.int32)},
            ValueError,
            r"it takes torch\.float64, torch\.float32, torch\.bfloat16, torch\.float16; got torch\.int32",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    call = {"scores": torch.zeros(1, 1, 7, 9), "max_keep": 3} | change
    with pytest.raises(error, match=message):
        select_blocks(call.pop("scores"), **call)
