import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.block_scores import KINDS, SUPPORT, block_scores

TRITON = SUPPORT["triton"]

# Triton's interpreter turns run-time loop bounds into Python integers in a way that NumPy 2.3 frowns on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def block_index(tokens, block, samples, batch=1, heads=1, device="cpu"):
    """Own random offsets for every batch element, head and block; blocks short of tokens end in -1."""
    start = torch.arange(0, tokens, block).unsqueeze(-1)
    offsets = torch.rand(batch, heads, len(start), block).topk(samples).indices.sort().values
    index = start + offsets
    return torch.where(index < tokens, index, -1).to(device, torch.int32)


def inputs(shape, dtype, device="cpu"):
    """q and k as views into [B, S, H, D], as models lay them out."""
    batch, heads, heads_k, tokens_q, tokens_k, dim = shape
    q = torch.randn(batch, tokens_q, heads, dim, device=device).transpose(1, 2)
    k = torch.randn(batch, tokens_k, heads_k, dim, device=device).transpose(1, 2)
    return q.to(dtype), k.to(dtype)


def compare(q, k, q_index, k_index, kind):
    from hone_kernels.block_scores.triton import block_scores_triton

    # Below the registered op, whose dispatch the poison does not reach through.
    with nan_poison():
        got = block_scores_triton(q, k, q_index, k_index, kind, q.shape[-1] ** -0.5)
    want = block_scores(q.double(), k.double(), q_index, k_index, kind=kind, backend="reference")
    # The inputs are the same numbers in both, and logits are accumulated in float32: no allowance for their dtype.
    assert_close(got, want, dtype=torch.float32, what=f"{kind} {q.dtype}")


CASES = [
    # batch, heads, key heads, queries, keys, head size; block, samples of a query block, of a key block
    ((2, 2, 1, 150, 133, 64), 32, 4, 4),
    ((1, 1, 1, 70, 100, 96), 32, 5, 6),
    ((1, 2, 2, 64, 96, 32), 32, 16, 8),
    ((1, 1, 1, 20, 300, 32), 64, 1, 64),
]


@pytest.mark.interpret
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted(case, kind):
    shape, block, per_q, per_k = case
    q, k = inputs(shape, torch.float32)
    compare(q, k, block_index(shape[3], block, per_q, *shape[:2]), block_index(shape[4], block, per_k), kind)


@pytest.mark.interpret
def test_interpreted_half_and_head_groups(monkeypatch):
    from hone_kernels.block_scores import triton

    # Scratch for one head at a time: the other heads must still find their own rows.
    monkeypatch.setattr(triton, "_SCRATCH_BYTES", 1)
    q, k = inputs((2, 2, 2, 48, 48, 32), torch.float16)
    index = block_index(48, 16, 4, 2, 2)
    for kind in ("paper", "lse"):
        compare(q, k, index, index, kind)


@pytest.mark.interpret
def test_interpreted_rounding_of_the_release():
    q, k = inputs((1, 2, 1, 96, 64, 32), torch.float16)
    index = [block_index(tokens, 16, 4, 1, 2) for tokens in (96, 64)]
    got, want = (
        block_scores(3 * q, k, *index, kind="official", rounded=True, backend=backend)
        for backend in ("triton", "reference")
    )
    exact = block_scores(3 * q, k, *index, kind="official", backend="reference")
    assert torch.equal(got, got.half().float())
    # A number that lies between two of 16 bits may go either way.
    assert float((got != want).float().mean()) < 0.1
    assert float((got / want - 1).abs().max()) < 2e-3
    assert float((got != exact).float().mean()) > 0.5


@pytest.mark.interpret
def test_interpreted_blocks_without_tokens():
    q, k = inputs((1, 1, 1, 8, 8, 32), torch.float32)
    index = torch.tensor([[[[0, 1], [-1, -1], [4, -1]]]], dtype=torch.int32)
    for kind in KINDS:
        compare(q, k, index, index, kind)


@pytest.mark.interpret
def test_interpreted_extreme_logits():
    q = torch.full((1, 1, 64, 32), 30.0)
    k = torch.cat([torch.full((1, 1, 32, 32), 30.0), torch.full((1, 1, 32, 32), -30.0)], dim=2)
    index = torch.arange(64, dtype=torch.int32).view(1, 1, 2, 32)
    for kind in KINDS:
        got = block_scores(q, k, index, index, kind=kind, backend="triton")[0, 0]
        assert_close(got, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), what=kind)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("dtype", "dim", "samples", "kind"),
    [
        (torch.bfloat16, 128, 16, "paper"),
        pytest.param(torch.bfloat16, 128, 32, "official", marks=pytest.mark.slow),
        (torch.float16, 96, 24, "lse"),
        pytest.param(torch.bfloat16, 64, 16, "lse", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 32, 16, "paper", marks=pytest.mark.slow),
        pytest.param(torch.float32, 128, 16, "paper", marks=pytest.mark.slow),
        (torch.bfloat16, 128, 128, "mean"),
        pytest.param(torch.bfloat16, 128, 128, "lse", marks=pytest.mark.slow),
        (torch.float32, 96, 128, "paper"),  # the most that must fit
    ],
)
def test_machine_code(dtype, dim, samples, kind):
    from hone_kernels.block_scores import triton
    from hone_kernels.compile import compile_launch, record_launches

    q, index = torch.zeros(1, 2, 1000, dim, dtype=dtype), torch.zeros(1, 1, 8, samples, dtype=torch.int32)
    names = ("_row_stats_kernel", "_reduce_rows_kernel", "_block_mean_kernel")
    with record_launches(triton, *names) as launches:
        triton.block_scores_triton(q, q, index, index, kind, 1.0, kind == "official")
    for launch in launches:
        built = compile_launch(launch)
        assert built.spills == 0, built.name
        # Two blocks of threads share an SM, so that one computes while the other waits.
        assert built.shared_bytes <= (113 << 10 if samples <= 32 or kind == "mean" else 227 << 10), built.name
        if built.name == "_row_stats_kernel":
            assert built.count(r"HGMMA[\w.]*") > 0


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("dtype", TRITON.dtypes)
@pytest.mark.parametrize("dim", TRITON.head_dims)
@pytest.mark.parametrize("kind", KINDS)
def test_gpu(dtype, dim, kind):
    for shape, block, per_q, per_k in (
        ((2, 4, 2, 1000, 1100, dim), 128, 16, 16),
        ((1, 2, 2, 1500, 129, dim), 64, 5, 24),
        ((1, 1, 1, 1, 700, dim), 128, 1, 128),
    ):
        q, k = inputs(shape, dtype, "cuda")
        q_index = block_index(shape[3], block, per_q, *shape[:2], "cuda")
        compare(q, k, q_index, block_index(shape[4], block, per_k, device="cuda"), kind)


@requires_gpu(min_sm=80)
def test_gpu_deterministic_and_capturable():
    q, k = inputs((1, 4, 4, 4000, 4000, 128), torch.bfloat16, "cuda")
    index = block_index(4000, 128, 16, device="cuda")
    want = block_scores(q, k, index, index)
    assert torch.equal(block_scores(q, k, index, index), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = block_scores(q, k, index, index)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
    torch.library.opcheck(
        torch.ops.hone_kernels.block_scores.default, (q, k, index, index, "paper", 0.1, False, "triton")
    )


@requires_gpu(min_sm=80, min_gb=20)
def test_gpu_offsets_beyond_32_bits():
    # 40 heads x 75,600 tokens x 128 in the layout of the model: the last head of the sixth starts past 2**31.
    q = torch.randn(6, 75_600, 40, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    index = block_index(75_600, 128, 8, device="cuda")
    got = block_scores(q, q, index, index)
    part = q[5:, 39:].contiguous()
    assert_close(got[5:, 39:], block_scores(part, part, index, index))
