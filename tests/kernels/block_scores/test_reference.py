import math

import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.block_scores import KINDS, block_scores, block_scores_reference


def block_index(tokens, block, samples, heads=1):
    """Own random offsets for every block and head; blocks short of tokens end in -1."""
    rows = []
    for start in range(0, tokens, block):
        valid = min(block, tokens - start)
        for _ in range(heads):
            taken = start + torch.randperm(valid)[:samples].sort().values
            rows.append(torch.nn.functional.pad(taken, (0, samples - len(taken)), value=-1))
    blocks = -(-tokens // block)
    return torch.stack(rows).view(blocks, heads, samples).transpose(0, 1)[None].to(torch.int32)


def brute_force(q, k, q_index, k_index, kind, scale):
    """Score by score, in Python numbers."""
    batch, heads = q.shape[:2]
    num_q, num_k = q_index.shape[2], k_index.shape[2]
    out = torch.zeros(batch, heads, num_q, num_k, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            queries, keys = q[b, h], k[b, h * k.shape[1] // heads]

            def of(index, block, b=b, h=h):
                row = index[b % index.shape[0], h % index.shape[1], block].tolist()
                return [token for token in row if token >= 0]

            for i in range(num_q):
                rows = []
                if kind == "mean":
                    own = queries[of(q_index, i)].mean(0)
                    logits = [scale * float(own @ keys[of(k_index, j)].mean(0)) for j in range(num_k)]
                    rows = [[math.exp(x) / sum(map(math.exp, logits)) for x in logits]]
                else:
                    for r in of(q_index, i):
                        logits = [[scale * float(queries[r] @ keys[c]) for c in of(k_index, j)] for j in range(num_k)]
                        every = [x for block in logits for x in block]
                        total = sum(map(math.exp, every))
                        if kind == "paper":
                            rows.append([max(math.exp(x) / total for x in block) for block in logits])
                        elif kind == "official":
                            rows.append([max(math.exp(x - max(every)) for x in block) for block in logits])
                        else:
                            rows.append([sum(math.exp(x) / total for x in block) for block in logits])
                pool = sum if kind == "lse" else max
                score = [pool(row[j] for row in rows) for j in range(num_k)]
                out[b, h, i] = torch.tensor(score, dtype=torch.float64) / sum(score)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_head", [False, True])
def test_brute_force(kind, per_head):
    q = torch.randn(2, 4, 30, 6, dtype=torch.float64)
    k = torch.randn(2, 2, 23, 6, dtype=torch.float64) * 2
    heads = 4 if per_head else 1
    q_index, k_index = block_index(30, 8, 3, heads), block_index(23, 8, 5, heads)
    got = block_scores(q, k, q_index, k_index, kind=kind, scale=0.7)
    assert got.dtype == torch.float64
    assert_close(got, brute_force(q, k, q_index, k_index, kind, 0.7))


def test_by_hand():
    # One query per block, keys (0, ln 2) and (ln 3): logits 0, ln 2 | ln 3.
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([0, math.log(2), math.log(3)], dtype=torch.float64).view(1, 1, 3, 1)
    q_index = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    k_index = torch.tensor([[[[0, 1], [2, -1]]]], dtype=torch.int32)

    def score(kind):
        return block_scores(q, k, q_index, k_index, kind=kind, scale=1.0).flatten()

    assert_close(score("paper"), torch.tensor([0.4, 0.6], dtype=torch.float64))  # 2/6 against 3/6
    assert_close(score("official"), torch.tensor([0.4, 0.6], dtype=torch.float64))  # 2/3 against 1
    assert_close(score("lse"), torch.tensor([0.5, 0.5], dtype=torch.float64))  # 3/6 against 3/6
    root = math.sqrt(2)
    assert_close(score("mean"), torch.tensor([root, 3], dtype=torch.float64) / (root + 3))


def test_official_gives_a_flat_row_as_much_say_as_a_sharp_one():
    # Row 0 looks at block 0 only, row 1 (zeros) at nothing in particular. The ratio score cannot tell; the paper's can.
    q = torch.tensor([[20.0, 0.0], [0.0, 0.01]], dtype=torch.float64).view(1, 1, 2, 2)
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).view(1, 1, 2, 2)
    q_index = torch.tensor([[[[0, 1]]]], dtype=torch.int32)
    k_index = torch.tensor([[[[0], [1]]]], dtype=torch.int32)
    official = block_scores(q, k, q_index, k_index, kind="official", scale=1.0).flatten()
    paper = block_scores(q, k, q_index, k_index, kind="paper", scale=1.0).flatten()
    assert_close(official, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert float(paper[0]) == pytest.approx(1 / 1.5025, rel=1e-4)


@pytest.mark.parity
def test_rounding_of_the_release():
    # The release keeps block maxima, ratios, their sum and scores in bfloat16: eight bits.
    q, k = torch.randn(1, 1, 64, 16), torch.randn(1, 1, 64, 16)
    index = torch.arange(64, dtype=torch.int32).view(1, 1, 8, 8)
    logits = (q @ k.transpose(-1, -2))[0, 0].view(8, 8, 8, 8)  # [block, row, block, key]
    largest = logits.amax((2, 3), keepdim=True)[..., 0]
    log2e = 1 / math.log(2)  # the release's logits are in base 2
    stored = (logits.amax(3) * log2e).bfloat16().float()
    ratio = (stored - largest * log2e).exp2().amax(1).bfloat16()
    want = (ratio / ratio.sum(-1, keepdim=True)).float()
    got = block_scores_reference(q, k, index, index, "official", 1.0, rounding=torch.bfloat16)
    # A number that lies between two bfloat16 may go either way.
    apart = (got[0, 0] / want - 1).abs()
    assert float(apart.max()) < 1 / 64
    assert float((apart > 0).float().mean()) < 0.05
    exact = block_scores_reference(q, k, index, index, "official", 1.0)
    assert 1e-4 < float((got - exact).abs().max()) < 2e-2


def test_blocks_without_tokens():
    q, k = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    index = torch.tensor([[[[0, 1], [-1, -1], [4, -1]]]], dtype=torch.int32)
    for kind in KINDS:
        got = block_scores(q, k, index, index, kind=kind)[0, 0]
        assert torch.equal(got[1], torch.zeros(3))
        assert torch.equal(got[:, 1], torch.zeros(3))
        assert_close(got[[0, 2]].sum(-1), torch.ones(2))


def test_extreme_logits_stay_finite():
    q = torch.full((1, 1, 4, 4), 300.0)
    k = torch.cat([torch.full((1, 1, 2, 4), 300.0), torch.full((1, 1, 2, 4), -300.0)], dim=2)
    index = torch.arange(4, dtype=torch.int32).view(1, 1, 2, 2)
    for kind in KINDS:
        got = block_scores(q, k, index, index, kind=kind)[0, 0]
        assert_close(got, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_batch_elements_are_independent():
    q, k = torch.randn(3, 2, 40, 8), torch.randn(3, 2, 40, 8)
    index = block_index(40, 8, 4)
    whole = block_scores(q, k, index, index, kind="paper")
    for b in range(3):
        assert_close(whole[b], block_scores(q[b : b + 1], k[b : b + 1], index, index, kind="paper")[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_opcheck():
    q, k = torch.randn(1, 4, 32, 8), torch.randn(1, 2, 32, 8)
    index = block_index(32, 8, 4)
    for kind in KINDS:
        torch.library.opcheck(
            torch.ops.hone_kernels.block_scores.default, (q, k, index, index, kind, 0.3, False, "reference")
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(kind, dtype):
    q, k, index = torch.randn(1, 4, 32, 8, dtype=dtype), torch.randn(1, 2, 32, 8, dtype=dtype), block_index(32, 8, 4)

    def score():
        return block_scores(q, k, index, index, kind=kind)

    torch.compiler.reset()  # a graph for each case is wanted here
    want, compiled = score(), torch.compile(score, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, traced = score(), compiled()
    assert got.dtype == traced.dtype == want.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(got, want)
    assert torch.equal(traced, want)


def test_compiles_whole():
    def score(q, k, index):
        return block_scores(q * 2, k, index, index, kind="lse") + 1

    q, k, index = torch.randn(1, 2, 32, 8, requires_grad=True), torch.randn(1, 2, 32, 8), block_index(32, 8, 4)
    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)
    assert_close(compiled(q, k, index), score(q, k, index))
    assert not score(q, k, index).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "max"}, ValueError, "kind must be one of"),
        ({"q": torch.zeros(4, 8)}, ValueError, r"q must be \[B, H, S, D\]; got 2 dimensions"),
        ({"k": torch.zeros(1, 2, 16, 4)}, ValueError, "must share head_dim; got 8 and 4"),
        ({"k": torch.zeros(1, 2, 16, 8, dtype=torch.half)}, TypeError, "must share a dtype"),
        ({"k": torch.zeros(1, 3, 16, 8)}, ValueError, "multiple of key heads; got 4 and 3"),
        ({"q_index": torch.zeros(1, 3, 2, 2, dtype=torch.int32)}, ValueError, r"q_index must be \[B or 1, H or 1"),
        ({"k_index": torch.zeros(1, 1, 2, 2)}, TypeError, "k_index must be int32"),
        ({"k_index": torch.zeros(1, 1, 0, 2, dtype=torch.int32)}, ValueError, "at least one token"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, ValueError, "cannot run this call: .* head_dim in .* got 8"),
    ],
)
def test_bad_arguments(change, error, message):
    index = torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    call = {"q": torch.zeros(1, 4, 16, 8), "k": torch.zeros(1, 2, 16, 8), "q_index": index, "k_index": index} | change
    with pytest.raises(error, match=message):
        block_scores(call.pop("q"), call.pop("k"), call.pop("q_index"), call.pop("k_index"), **call)
