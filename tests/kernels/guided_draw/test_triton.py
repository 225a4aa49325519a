import pytest
import torch
from hone_core.testing import nan_poison, requires_gpu
from hone_kernels.guided_draw import draw_tokens

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
WEIGHTS = {1: (1.0,), 2: (-3.0, 4.0), 3: (-1.0, -2.0, 4.0)}


def some_logits(settings, rows, vocabulary, dtype=torch.float32, device="cpu"):
    """Rows that are smooth, peaked, tied and masked."""
    logits = 3 * torch.randn(settings, rows, vocabulary, device=device)
    if rows > 3:
        logits[:, 0] *= 20
        logits[:, 1] = 7.0  # all tie
        logits[:, 2] = logits[:, 2].round()  # many tie
        logits[-1, 3, : vocabulary // 2] = -torch.inf
    return logits.to(dtype)


def compare(logits, keep, temperature):
    from hone_kernels.guided_draw.triton import draw_tokens_triton

    weights = WEIGHTS[len(logits)]
    uniform = torch.rand(logits.shape[1], device=logits.device)
    with nan_poison():
        token, chance = draw_tokens_triton(logits, weights, uniform, keep, temperature)
    options = {"keep": keep, "temperature": temperature, "backend": "reference"}
    want, _ = draw_tokens(logits, weights, uniform, **options)
    # Where a draw lies on the edge of two tokens, rounding may decide: nudged a little, the reference moves too.
    edge = torch.zeros_like(want, dtype=torch.bool)
    for nudge in (-3e-6, 3e-6):
        edge |= draw_tokens(logits, weights, (uniform + nudge).clamp(0, 1 - 2**-24), **options)[0] != want
    assert torch.equal(token[~edge], want[~edge])
    assert int(edge.sum()) <= 2 + len(edge) // 200
    # Which token it is is known, so its probability can be compared wherever it was drawn.
    guided = sum(part * weight for part, weight in zip(logits.double(), weights, strict=True))
    exact = guided.softmax(-1).gather(-1, token[:, None])[:, 0]
    torch.testing.assert_close(chance.double(), exact, rtol=3e-4, atol=1e-7)


def cases(device="cpu", step=1):
    """Every ``step``-th way to draw of each kind of logits, so that two kinds have each at a step of 2."""
    draws = ((7, 1.0), (70, 1.0), (1, 1.0), (7, 0.7), (7, 0.0), (69, 2.0))
    kinds = ((1, torch.float32), (2, torch.bfloat16), (3, torch.float16), (2, torch.float32))
    for at, (settings, dtype) in enumerate(kinds):
        logits = some_logits(settings, 9, 70, dtype, device)
        for keep, temperature in draws[at % step :: step]:
            compare(logits, keep, temperature)
    # A vocabulary that fills a block, and one of a single token.
    compare(some_logits(2, 5, 128, device=device), 13, 1.0)
    compare(some_logits(2, 5, 1, device=device), 1, 1.0)
    compare(some_logits(1, 0, 9, device=device), 3, 1.0)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_interpreted(step):
    cases(step=step)


@pytest.mark.interpret
def test_interpreted_last_draw_is_some_token():
    from hone_kernels.guided_draw.triton import draw_tokens_triton

    logits = torch.full((1, 2, 300), -torch.inf)
    logits[..., :3] = 0.1
    token, _ = draw_tokens_triton(logits, (1.0,), torch.tensor([1 - 2**-24, 1.0]), 300, 1.0)
    assert token.tolist() == [2, 2]


@pytest.mark.compile
def test_machine_code():
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.guided_draw import triton

    with record_launches(triton, "_draw_kernel") as launches:
        # MoMask, MoGenTS, text and music, and the largest row.
        for settings, vocabulary, keep, temperature, dtype in (
            (2, 512, 52, 1.0, torch.bfloat16),
            (2, 256, 26, 1.0, torch.float32),
            (3, 256, 26, 1.0, torch.float16),
            (1, 4096, 410, 1.0, torch.float32),
            (2, 512, 52, 0.0, torch.bfloat16),
        ):
            logits = torch.zeros(settings, 4, vocabulary, dtype=dtype)
            triton.draw_tokens_triton(logits, WEIGHTS[settings], torch.zeros(4), keep, temperature)
    assert [compile_launch(launch).spills for launch in launches] == [0] * 5


@requires_gpu(min_sm=80)
def test_gpu():
    cases("cuda")
    for settings, rows, vocabulary, keep in ((2, 49, 512, 52), (2, 256 * 294, 256, 26), (3, 999, 256, 26)):
        for dtype in (torch.float32, torch.bfloat16):
            compare(some_logits(settings, rows, vocabulary, dtype, "cuda"), keep, 1.0)
    compare(some_logits(1, 77, 4096, device="cuda"), 410, 0.9)


@requires_gpu(min_sm=80)
def test_gpu_repeats_and_is_captured():
    logits, uniform = some_logits(2, 49, 512, torch.bfloat16, "cuda"), torch.rand(49, device="cuda")
    want = draw_tokens(logits, (-3.0, 4.0), uniform, keep=52)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = draw_tokens(logits, (-3.0, 4.0), uniform, keep=52)
    got[0].zero_()
    graph.replay()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
