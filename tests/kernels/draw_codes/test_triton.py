import pytest
import torch
from hone_core.testing import nan_poison, requires_gpu
from hone_kernels.draw_codes import draw_codes

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")

CASES = [
    {},
    {"heads": 2},
    {"heads": 3, "guidance": 1.5},
    {"heads": 2, "guidance": 4.0, "temperature": 0.7, "top_k": 3},
    {"guidance": 2.0, "top_k": 1},
    {"top_k": 10_000},
]


def problem(images, tokens, vocabulary, *, heads=1, guidance=1.0, dtype=torch.float32, device="cpu", **options):
    """Logits of a grid of eighths, where ties are frequent; every weight of 0 to 1 is there."""
    rows = images * (1 + (guidance != 1))
    shape = (rows, tokens, vocabulary)
    logits = [torch.randint(-40, 40, shape, device=device).to(dtype) / 8 for _ in range(heads)]
    weight = torch.rand(tokens, heads, device=device)
    weight[0] = 0
    weight[0, -1] = 1
    uniform = torch.rand(images, tokens, device=device)
    return (logits, weight / weight.sum(1, keepdim=True), uniform), {"guidance": guidance, **options}


def compare(given, options):
    """The same codes, but where the uniform lies within rounding of a border."""
    from hone_kernels.draw_codes.triton import draw_codes_triton

    logits, weight, uniform = given
    guidance, temperature, top_k = (
        options.get(*pair) for pair in (("guidance", 1.0), ("temperature", 1.0), ("top_k", 0))
    )
    with nan_poison():
        got = draw_codes_triton(logits, weight, uniform, guidance, temperature, top_k)
    wide = [each.double() for each in logits]
    near = [
        draw_codes(wide, weight.double(), (uniform.double() + shift).clamp(0, 1 - 1e-9), **options, backend="reference")
        for shift in (-2e-6, 0.0, 2e-6)
    ]
    low, middle, high = near
    assert got.dtype == torch.int64
    assert bool(((got >= low) & (got <= high)).all())
    assert float((got == middle).float().mean()) > 0.97


@pytest.mark.interpret
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case):
    torch.manual_seed(0)
    compare(*problem(2, 4, 37, **case))


@pytest.mark.interpret
def test_interpreted_views_and_half_precision():
    torch.manual_seed(0)
    (logits, weight, uniform), options = problem(2, 3, 16, heads=2, guidance=2.0, dtype=torch.float16)
    compare(([each[:, :, ::2] for each in logits], weight, uniform), options)
    compare(([each.transpose(0, 1).contiguous().transpose(0, 1) for each in logits], weight, uniform), options)
    # A head of weight 0 is not read.
    poisoned = torch.full_like(logits[1], float("nan"))
    alone = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    from hone_kernels.draw_codes.triton import draw_codes_triton

    got = draw_codes_triton([logits[0], poisoned], alone, uniform, 2.0, 1.0, 0)
    assert torch.equal(got, draw_codes_triton([logits[0]], torch.ones(3, 1), uniform, 2.0, 1.0, 0))


@pytest.mark.compile
@pytest.mark.parametrize("vocabulary", [17, 8192, 16384])
def test_machine_code(vocabulary):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.draw_codes import triton

    with record_launches(triton, "_draw_kernel") as launches:
        for case in CASES[:4]:
            (logits, weight, uniform), options = problem(1, 2, vocabulary, dtype=torch.bfloat16, **case)
            triton.draw_codes_triton(logits, weight, uniform, options["guidance"], 0.9, options.get("top_k", 0))
    assert [compile_launch(launch).spills for launch in launches] == [0] * 4


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_gpu(case, dtype):
    torch.manual_seed(0)
    for images, tokens, vocabulary in ((1, 1, 17), (3, 5, 1000), (2, 16, 16384), (5, 7, 8192), (1, 2, 32768)):
        compare(*problem(images, tokens, vocabulary, dtype=dtype, device="cuda", **case))


@requires_gpu(min_sm=80)
def test_gpu_draws_follow_the_distribution_and_can_be_captured():
    shares = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.25], device="cuda")
    logits = shares.log().expand(1, 20_000, 5).contiguous()
    uniform, weight = torch.rand(1, 20_000, device="cuda"), torch.ones(20_000, 1, device="cuda")
    draw_codes([logits], weight, uniform, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = draw_codes([logits], weight, uniform, backend="triton")
    codes.zero_()
    graph.replay()
    found = torch.bincount(codes[0], minlength=5) / 20_000
    assert found[2] == 0
    assert float((found - shares).abs().max()) < 4 * (0.25 / 20_000) ** 0.5
