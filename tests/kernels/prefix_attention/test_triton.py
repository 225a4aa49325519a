import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.prefix_attention import prefix_attention, prefix_attention_reference

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
TOLERANCES = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


def compare(dtype, device, *, batch=2, heads=2, heads_k=2, tokens=70, dim=16, steps=(), text=0):
    """Values and gradients against float64; memory as a projection of ``[B, S, heads, D]`` leaves it."""
    make = lambda h: torch.randn(batch, tokens, h, dim, device=device).to(dtype).transpose(1, 2)  # noqa: E731
    given = [make(heads), make(heads_k), make(heads_k)]
    ends = torch.arange(1, tokens + 1, dtype=torch.int32)
    begin = 0
    for size in steps:
        ends[text + begin : text + begin + size] = text + begin + size
        begin += size
    ends, words = ends.to(device), None
    if text:
        words = torch.arange(text, device=device) >= torch.arange(batch, device=device)[:, None] * 3 + 1
    mine = [x.clone().requires_grad_() for x in given]
    theirs = [x.double().requires_grad_() for x in given]
    weight = torch.randn(batch, heads, tokens, dim, device=device).to(dtype)
    with nan_poison():
        out = prefix_attention(*mine, ends, words=words, backend="triton")
        got = torch.autograd.grad(out, mine, weight)
    wanted = prefix_attention_reference(*theirs, ends, words, dim**-0.5)
    exact = torch.autograd.grad(wanted, theirs, weight.double())
    tolerance = TOLERANCES[dtype]
    assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    for a, b in zip(got, exact, strict=True):
        # Sums over heads and rows: errors are of their size.
        assert_close(a.double(), b, atol=tolerance * max(1.0, float(b.abs().max())), rtol=tolerance)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted(dtype):
    compare(dtype, "cpu", steps=(1, 2, 3, 40, 20, 4))
    compare(dtype, "cpu", batch=1, heads=4, heads_k=2, tokens=33, dim=10, steps=(33,))
    compare(dtype, "cpu", tokens=90, text=40, steps=(1, 9, 40))


@pytest.mark.compile
@pytest.mark.parametrize(("dim", "text"), [(64, True), (128, False)])
def test_machine_code(dim, text):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.prefix_attention import triton

    q, ends = torch.zeros(2, 16, 257, dim, dtype=torch.bfloat16), torch.arange(1, 258, dtype=torch.int32)
    words = torch.ones(2, 120, dtype=torch.bool) if text else None
    with record_launches(triton, "_forward_kernel", "_queries_kernel", "_keys_kernel") as launches:
        out, lse = triton.prefix_forward(q, q, q, ends, words, 0.1)
        triton.prefix_backward(q, q, q, ends, words, 0.1, out, lse, out)
    built = [compile_launch(launch) for launch in launches]
    assert [one.spills for one in built] == [0] * 3
    for one in built:
        assert one.count("HGMMA") + one.count("HMMA") > 0


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu(dtype):
    square = [*range(1, 17), *range(15, 0, -1)]
    compare(dtype, "cuda", heads=4, heads_k=4, tokens=257, dim=64, text=1, steps=square)
    compare(dtype, "cuda", heads=6, heads_k=2, tokens=376, dim=64, text=120, steps=square)
    compare(dtype, "cuda", heads=3, heads_k=1, tokens=100, dim=100, steps=(30, 70))
