import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.ragged_decode import decode_attention

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def case(batch, heads, heads_k, tokens, dim, dtype, device="cpu"):
    """Caches apart in memory, of another length for each sample, with a hole; NaN where nothing is valid."""
    q = torch.randn(batch, heads, 1, dim, device=device).to(dtype)
    k, v = (torch.randn(batch, tokens, heads_k, dim, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    at = torch.arange(tokens, device=device)
    stops = torch.linspace(0, tokens, batch + 1, device=device)[1:]
    valid = (at < stops[:, None] * 0.7) | (at >= tokens - 2)
    valid[0, : tokens // 2] = False
    # As a cache has them, with room behind.
    valid = torch.cat([valid, torch.ones_like(valid[:, :1]).expand(-1, 5)], 1)[:, :tokens]
    for x in (k, v):
        x.transpose(1, 2)[~valid] = torch.nan
    return q, k, v, valid


def compare(q, k, v, valid, **options):
    from hone_kernels.ragged_decode.triton import decode_attention_triton

    with nan_poison():
        got = decode_attention_triton(q, k, v, valid, q.shape[-1] ** -0.5, **options)
    k, v = (x.double().masked_fill(~valid[:, None, :, None], 0) for x in (k, v))
    want = decode_attention(q.double(), k, v, valid, backend="reference")
    limit = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[q.dtype]
    assert_close(got.double(), want, atol=limit, rtol=limit)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted(dtype):
    compare(*case(3, 4, 2, 150, 16, dtype))
    compare(*case(2, 6, 2, 200, 16, dtype), programs=4)
    compare(*case(1, 1, 1, 5, 32, dtype))
    q, k, v, valid = case(2, 2, 1, 70, 16, dtype)
    valid[1] = False
    compare(q, k, v, valid)


@pytest.mark.interpret
@pytest.mark.parametrize("op", ["column_mass", "token_select", "ragged_decode"])
def test_what_the_profiler_runs(monkeypatch, op):
    from hone_kernels import profile as module
    from hone_kernels.config import ProfileConfig

    monkeypatch.setattr(module, "_DEVICE", "cpu")
    found = module._tokens(ProfileConfig(op=op, shapes=("2x4x2x70x16",)))()
    out = found if isinstance(found, torch.Tensor) else found[0]
    assert len(out) == 2
    assert out.isfinite().all()


@pytest.mark.compile
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float32, 128)])
def test_machine_code(dtype, dim):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.ragged_decode import triton

    q, k = torch.zeros(8, 28, 1, dim, dtype=dtype), torch.zeros(8, 4, 5000, dim, dtype=dtype)
    with record_launches(triton, "_pieces_kernel", "_join_kernel") as launches:
        triton.decode_attention_triton(q, k, k, torch.ones(8, 5000, dtype=torch.bool), 0.1)
    found = [compile_launch(launch) for launch in launches]
    assert [one.spills for one in found] == [0, 0]
    # Keys and values are on their way to shared memory while others are worked on.
    assert found[0].count("LDGSTS") >= 16


@requires_gpu(min_sm=80)
def test_gpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for sizes in ((1, 28, 4, 5120, 128), (64, 28, 4, 1001, 128), (3, 16, 2, 333, 64), (2, 4, 4, 7, 32)):
            compare(*case(*sizes, dtype, "cuda"))
            compare(*case(*sizes, dtype, "cuda"), programs=10_000)


@requires_gpu(min_sm=80)
def test_gpu_capturable():
    call = case(4, 8, 2, 700, 64, torch.bfloat16, "cuda")
    want = decode_attention(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode_attention(*call)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
