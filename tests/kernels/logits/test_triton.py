import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.logits import LogitSignals, read_logits

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def some_logits(rows, vocabulary, dtype, device="cpu", spread=4.0):
    """Rows that are smooth, peaked, masked, tied and forced, apart in memory."""
    logits = torch.full((rows, vocabulary + 3), torch.nan, device=device, dtype=dtype)[:, :vocabulary]
    logits.copy_(torch.randn(rows, vocabulary, device=device) * spread)
    logits[0, torch.rand(vocabulary, device=device) < 0.9] = -torch.inf
    logits[0, vocabulary // 2] = 1.0
    if rows > 1:
        logits[1] = -torch.inf
        logits[1, vocabulary - 1] = 3.0
    if rows > 2:
        logits[2, vocabulary // 3 :] = 60.0  # many tie for the first place
    if rows > 3:
        logits[3] = 7.0
    return logits


def compare(logits, size, threshold=None, gate="entropy", piece=None, **options):
    from hone_kernels.logits.triton import read_logits_triton

    # Below the registered op, whose dispatch the poison does not reach through.
    with nan_poison():
        got = LogitSignals(*read_logits_triton(logits, size, threshold, gate, piece=piece, **options))
    want = read_logits(logits.double(), size=size, threshold=threshold, gate=gate, backend="reference")
    assert_close(got.entropy.double(), want.entropy, atol=1e-5, rtol=0)
    assert_close(got.confidence.double(), want.confidence, atol=1e-6, rtol=1e-5)
    assert torch.equal(got.token, want.token)
    assert torch.equal(got.forced, want.forced)
    if threshold is not None:
        signal = want.entropy if gate == "entropy" else want.confidence
        close = (signal - threshold).abs() < 1e-6
        assert torch.equal(got.uncertain | close, want.uncertain | close)
        assert want.uncertain.any()
        assert not want.uncertain.all()
    else:
        assert not got.uncertain.any()


def test_more_rows_than_a_launch_takes_are_refused():
    from hone_kernels.logits.triton import read_logits_triton

    with pytest.raises(ValueError, match=r"one launch takes at most 65,535 rows; got 65,536\. Call it for parts"):
        read_logits_triton(torch.zeros(65_536, 2), 2, None, "entropy")


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("dtype", "whole"),
    [
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.float16, False),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.slow),
        pytest.param(torch.float16, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_interpreted(dtype, whole):
    # A dtype is what is loaded; all after that is in float32.
    logits = some_logits(5, 2500, dtype)
    threshold = torch.tensor([0.1, 0.0, 0.99, 0.5, 0.95])
    compare(logits, 2400, threshold)
    # Fewer entries than a piece; one threshold for all rows, in one place of memory.
    compare(some_logits(4, 7, dtype), 7, torch.tensor(0.5).expand(4))
    if whole:
        compare(logits, 2500)
        compare(logits, 2400, threshold, gate="confidence")
        compare(some_logits(2, 1024, dtype), 1024, piece=512)  # pieces exactly


@pytest.mark.interpret
def test_interpreted_broken_logits():
    from hone_kernels.logits.triton import read_logits_triton

    logits = torch.randn(3, 2000)
    logits[0, 1500], logits[1, 3] = torch.nan, torch.inf
    with pytest.warns(RuntimeWarning, match="invalid value"):
        entropy, confidence, *_ = read_logits_triton(logits, 2000, None, "entropy", piece=512)
    assert entropy.isnan().tolist() == confidence.isnan().tolist() == [True, True, False]


@pytest.mark.compile
@pytest.mark.parametrize("rows", [1, 4, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_machine_code(rows, dtype):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.logits import triton

    with record_launches(triton, "_pieces_kernel", "_join_kernel") as launches:
        for overlap in (False, True):
            logits = torch.zeros(rows, 151936, dtype=dtype)
            triton.read_logits_triton(logits, 151936, torch.zeros(rows), "entropy", overlap=overlap)
    built = [compile_launch(launch) for launch in launches]
    assert [one.spills for one in built] == [0] * 4
    # The second kernel waits for the first where it starts before its end, and only there.
    assert [one.ptx.count("griddepcontrol") for one in built] == [0, 0, 1, 1]


@requires_gpu(min_sm=80)
def test_gpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, vocabulary in ((1, 151936), (5, 152064), (64, 32003), (200, 1000), (3, 5)):
            for spread in (0.1, 4.0, 20.0):
                logits = some_logits(rows, vocabulary, dtype, "cuda", spread)
                compare(logits, vocabulary)
                if rows > 3:
                    entropy = read_logits(logits, backend="reference").entropy
                    threshold = torch.full((rows,), float(entropy.median()) - 1e-3, device="cuda")
                    compare(logits, vocabulary, threshold)
    for piece in (512, 8192):
        logits = some_logits(5, 32003, torch.bfloat16, "cuda")
        compare(logits, 32003, piece=piece, overlap=False)
        if torch.cuda.get_device_capability()[0] >= 9:
            compare(logits, 32003, piece=piece, overlap=True)


@requires_gpu(min_sm=80)
def test_gpu_capturable():
    logits = torch.randn(4, 151936, device="cuda", dtype=torch.bfloat16)
    threshold = torch.full((4,), 0.5, device="cuda")
    want = read_logits(logits, threshold=threshold)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = read_logits(logits, threshold=threshold)
    got.entropy.zero_()
    graph.replay()
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
