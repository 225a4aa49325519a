import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.group_means import SUPPORT, group_means

TRITON = SUPPORT["triton"]

# Triton's interpreter turns run-time loop bounds into Python integers in a way that NumPy 2.3 frowns on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def tensors(batch=2, heads=2, tokens=70, dim=32, dtype=torch.float32, device="cpu", layout="BSHD"):
    """k and v as models lay them out, or heads first."""
    shape = (batch, tokens, heads, dim) if layout == "BSHD" else (batch, heads, tokens, dim)
    x = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
    return [y.transpose(1, 2) if layout == "BSHD" else y for y in x]


def brute_force(x, n, tokens, exact):
    """Group by group, with the copies of the last token written out."""
    groups = []
    for first in range(0, tokens, n):
        rows = [*range(first, min(first + n, tokens))]
        if not exact:
            rows += [tokens - 1] * (n - len(rows))
        groups.append(sum(x[:, :, row] for row in rows) / len(rows))
    return torch.stack(groups, 2)


CASES = [
    # tokens, of them averaged, n, exact
    (21, 21, 7, True),
    (23, 20, 8, True),
    (23, 20, 8, False),
    (6, 6, 1, True),
    (5, 4, 9, True),
    (5, 4, 9, False),
    (90, 89, 70, True),
    (90, 89, 70, False),
    (131, 130, 1, True),  # of more than one program
    (5, 5, 2**30, True),
    (5, 5, 300, False),
]


@pytest.mark.parametrize(("tokens", "some", "n", "exact"), CASES)
def test_brute_force(tokens, some, n, exact):
    k, v = (x.double().requires_grad_() for x in tensors(tokens=tokens, dim=4))
    got = group_means(k, v, n, tokens=some, exact=exact)
    want = [brute_force(x, n, some, exact) for x in (k, v)]
    for mine, its in zip(got, want, strict=True):
        assert mine.dtype == torch.float64
        assert_close(mine, its)
    grads = [torch.randn_like(x) for x in got]
    for mine, its in zip(
        torch.autograd.grad(got, (k, v), grads), torch.autograd.grad(want, (k, v), grads), strict=True
    ):
        assert_close(mine, its)


@pytest.mark.slow
def test_gradcheck():
    k, v = (x.double().requires_grad_() for x in tensors(1, 2, 7, 3))
    assert torch.autograd.gradcheck(lambda k, v: group_means(k, v, 3, tokens=5, exact=False), (k, v))
    assert torch.autograd.gradgradcheck(lambda k, v: group_means(k, v, 3, tokens=5), (k, v))


def compare(k, v, n, some, exact):
    from hone_kernels.group_means.triton import group_means_backward_triton, group_means_triton

    sizes = (n, some, some % n if exact and some % n else n)
    # Below the registered op, whose dispatch the poison does not reach through.
    with nan_poison():
        means = group_means_triton(k, v, *sizes)
        grads = [torch.randn(x.shape, device=k.device).to(k.dtype) for x in means]
        got = group_means_backward_triton(*grads, k, v, *sizes)
    leaves = [x.double().detach().requires_grad_() for x in (k, v)]
    want = group_means(*leaves, n, tokens=some, exact=exact, backend="reference")
    its = torch.autograd.grad(want, leaves, [g.double() for g in grads])
    for x, y in zip((*means, *got), (*want, *its), strict=True):
        assert x.dtype == k.dtype
        # Sums are float32: what is off is the last rounding.
        assert_close(x, y.to(k.dtype).double(), dtype=k.dtype)
    assert [x.stride() for x in got] == [torch.empty_like(x).stride() for x in (k, v)]
    assert all((x[:, :, some:] == 0).all() for x in got)


@pytest.mark.interpret
@pytest.mark.parametrize(("tokens", "some", "n", "exact"), CASES)
def test_interpreted(tokens, some, n, exact):
    compare(*tensors(tokens=tokens), n, some, exact)


@pytest.mark.interpret
@pytest.mark.parametrize("dim", [5, 96])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_interpreted_sizes_and_layouts(dim, dtype):
    compare(*tensors(tokens=15, dim=dim, dtype=dtype), 6, 13, False)
    k, v = tensors(1, 2, 15, dim, dtype)
    compare(k, v.contiguous(), 6, 15, True)
    compare(k[:, :1].expand(2, 3, -1, -1), torch.randn(2, 3, 15, dim).to(dtype), 6, 15, True)


@pytest.mark.interpret
def test_interpreted_gradients_through_the_op():
    k, v = (x.requires_grad_() for x in tensors(1, 2, 10))
    weight = torch.randn(1, 2, 4, 32)
    grads = {}
    for backend in ("triton", "reference"):
        means = group_means(k, v, 3, backend=backend)
        # A gradient of one of them only, and that of a mean, which repeats one value.
        grads[backend] = torch.autograd.grad((means[0] * weight).sum() + means[1].mean(), (k, v))
    for mine, its in zip(grads["triton"], grads["reference"], strict=True):
        assert_close(mine, its)
    only = torch.autograd.grad(group_means(k, v.detach(), 3, backend="triton")[0].sum(), k)[0]
    assert_close(only, torch.autograd.grad(group_means(k, v.detach(), 3, backend="reference")[0].sum(), k)[0])
    (grad,) = torch.autograd.grad(group_means(k, v, 3, backend="triton")[0].sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match=r"group_means_backward|does not require grad"):
        grad.sum().backward()


@pytest.mark.interpret
def test_interpreted_transposed_channels():
    k, v = (torch.randn(1, 2, 16, 20).transpose(2, 3) for _ in range(2))
    for mine, its in zip(group_means(k, v, 6, backend="triton"), group_means(k, v, 6), strict=True):
        assert_close(mine, its)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("dtype", "dim", "n"),
    [
        (torch.bfloat16, 128, 30),
        (torch.bfloat16, 64, 27),  # the last group has one token: Triton makes constants of ones
        pytest.param(torch.float32, 128, 4096, marks=pytest.mark.slow),
        pytest.param(torch.float16, 96, 16, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 5, 1, marks=pytest.mark.slow),
    ],
)
def test_machine_code(dtype, dim, n):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.group_means import triton

    k = torch.zeros(1, 2, 1000, dim, dtype=dtype)
    with record_launches(triton, "_means_kernel", "_spread_kernel") as launches:
        means = triton.group_means_triton(k, k, n, 1000, 1000 % n or n)
        triton.group_means_backward_triton(*means, k, k, n, 1000, 1000 % n or n)
    assert [x.name for x in launches] == ["_means_kernel", "_spread_kernel"]
    for launch in launches:
        built = compile_launch(launch)
        assert built.spills == 0, built.name
        assert dim < 64 or built.count(r"LDG\.E\.(64|128)") > 0, built.name


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.interpret
def test_interpreted_opcheck():
    k, v = (x.requires_grad_() for x in tensors(1, 1, 5))
    torch.library.opcheck(torch.ops.hone_kernels.group_means.default, (k, v, 3, 5, 2))


def test_autocast_changes_nothing():
    k, v = (x.bfloat16() for x in tensors(tokens=4096))
    want = group_means(k, v, 4096)
    with torch.autocast("cpu", torch.float16):
        got = group_means(k, v, 4096)
    for mine, its in zip(got, want, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, its)


def test_compiles_whole():
    def run(k, v):
        return sum(x.sum(2) for x in group_means(k * 2, v, 6, tokens=65, exact=False))

    k, v = tensors()
    torch.compiler.reset()
    assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(k, v), run(k, v))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(4, 8)}, ValueError, r"k must be \[B, HK, S, D\]"),
        ({"k": torch.zeros(1, 2, 0, 8)}, ValueError, "an entry along every axis"),
        ({"v": torch.zeros(1, 2, 15, 8)}, ValueError, "must share shape and device"),
        ({"v": torch.zeros(1, 2, 16, 8, dtype=torch.half)}, TypeError, "must share a dtype"),
        ({"n": 0}, ValueError, "n, the tokens of a group, must be at least 1; got 0"),
        ({"tokens": 17}, ValueError, "must be 1 to 16; got 17"),
        ({"tokens": 0}, ValueError, "must be 1 to 16; got 0"),
        ({"backend": "gluon"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments(change, error, message):
    call = {"k": torch.zeros(1, 2, 16, 8), "v": torch.zeros(1, 2, 16, 8), "n": 4} | change
    with pytest.raises(error, match=message):
        group_means(**call)


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("dtype", TRITON.dtypes, ids=str)
@pytest.mark.parametrize("dim", [5, 64, 96, 128])
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_gpu(dtype, dim, layout):
    for tokens, some, n, exact in [*CASES, (1000, 990, 30, True), (1000, 990, 30, False)]:
        compare(*tensors(2, 3, tokens, dim, dtype, "cuda", layout), n, some, exact)


@requires_gpu(min_sm=80)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # inductor's own
def test_gpu_plans_gradients_graph_and_compile():
    calls = [tensors(1, 12, 1000, 128, torch.bfloat16, "cuda") for _ in range(3)]
    for k, v in calls:  # the second and the third go by a plan
        for x, y in zip(group_means(k, v, 30), group_means(k, v, 30, backend="reference"), strict=True):
            assert_close(x, y.double(), dtype=torch.bfloat16)
    for k, v in calls:
        leaves = (k.detach().requires_grad_(), v.detach().requires_grad_())
        got, want = (
            torch.autograd.grad([x.float().square().sum() for x in group_means(*leaves, 30, backend=name)], leaves)
            for name in ("triton", "reference")
        )
        for x, y in zip(got, want, strict=True):
            assert_close(x, y.double(), dtype=torch.bfloat16)
    k, v = calls[0]
    want = group_means(k, v, 30)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = group_means(k, v, 30)
    for x in captured:
        x.zero_()
    graph.replay()
    compiled = torch.compile(lambda k, v: group_means(k, v, 30), fullgraph=True)(k, v)
    for x, y, z in zip(captured, compiled, want, strict=True):
        assert torch.equal(x, z)
        assert torch.equal(y, z)
    torch.library.opcheck(torch.ops.hone_kernels.group_means.default, (k, v, 30, 1000, 10))


@requires_gpu(min_sm=80, min_gb=20)
def test_gpu_offsets_beyond_32_bits():
    k = torch.randn(6, 75_600, 40, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    got = group_means(k, k, 30)[0][5:, 39:]
    part = k[5:, 39:].contiguous()
    assert_close(got, group_means(part, part, 30, backend="reference")[0].double(), dtype=torch.bfloat16)
