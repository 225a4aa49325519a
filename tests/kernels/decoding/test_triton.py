import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.decoding.reference import (
    add_rms_norm_reference,
    linear_of_one_reference,
    paged_attention_reference,
    rotate_append_reference,
    silu_mul_reference,
)

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(got, want, dtype):
    assert_close(got.double(), want.double(), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def compare_rows(dtype, device, tokens, width):
    from hone_kernels.decoding.triton import add_rms_norm_triton, silu_mul_triton

    x, residual, weight = (torch.randn(s, device=device).to(dtype) for s in ((tokens, width), (tokens, width), width))
    with nan_poison():
        got = [add_rms_norm_triton(x, residual, weight, 1e-6), add_rms_norm_triton(x, None, weight, 1e-6)]
        product = silu_mul_triton(torch.cat([x, residual], 1))
    for mine, other in zip(got, (residual, None), strict=True):
        for a, b in zip(mine, add_rms_norm_reference(x, other, weight, 1e-6), strict=True):
            close(a, b, dtype)
    close(product, silu_mul_reference(torch.cat([x, residual], 1).double()), dtype)


def compare_pages(dtype, device, *, lengths, tokens, heads, heads_k, dim, page, norms=False, splits=None):
    """Rows of these lengths whose last ``tokens`` tokens are new; the last tile is padding in part."""
    from hone_kernels.decoding.triton import paged_attention_triton, rotate_append_triton

    width = -(-max(lengths) // page)
    count = len(lengths) * width + 1
    table = (torch.randperm(count - 1, device=device) + 1).int().view(len(lengths), width)
    positions = torch.tensor([[n - tokens + i for i in range(tokens)] for n in lengths]).int().to(device)
    positions[-1, tokens // 2 + 1 :] = -1
    rows = torch.arange(len(lengths), device=device).int().flip(0)
    positions = positions.flip(0)
    keys, values = (torch.randn(count, heads_k, page, dim, device=device).to(dtype) for _ in range(2))
    qkv = torch.randn(len(lengths) * tokens, (heads + 2 * heads_k) * dim, device=device).to(dtype)
    angles = torch.randn(max(lengths), dim // 2, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = [torch.rand(dim, device=device).to(dtype) if norms else None for _ in range(2)]
    mine, theirs = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    with nan_poison():
        q = rotate_append_triton(qkv, cos, sin, positions, rows, table, *mine, *weights, 1e-6)
    want = rotate_append_reference(qkv, cos, sin, positions, rows, table, *theirs, *weights, 1e-6)
    close(q, want, dtype)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, dtype)
    q = q.contiguous()
    with nan_poison():
        out = paged_attention_triton(q, *mine, positions, rows, table, dim**-0.5, splits=splits)
    exact = paged_attention_reference(q.double(), *(x.double() for x in mine), positions, rows, table, dim**-0.5)
    real = positions.flatten() >= 0
    close(out[real], exact[real], dtype)
    assert out.isfinite().all()


def compare_in_one(dtype, device, *, lengths, heads, heads_k, dim, page, norms=False, splits=None, rounds=2):
    """Rows with one new token each, the first of them padding; twice, since what is counted has to begin at zero."""
    from hone_kernels.decoding.triton import rotate_attend_triton

    width = -(-max(lengths) // page)
    table = torch.randperm(len(lengths) * width, device=device).int().view(len(lengths), width)
    positions = torch.tensor([[-1], *([n - 1] for n in lengths)]).int().to(device)
    rows = torch.tensor([0, *range(len(lengths))]).int().to(device)
    keys, values = (torch.randn(table.numel(), heads_k, page, dim, device=device).to(dtype) for _ in range(2))
    qkv = torch.randn(len(rows), (heads + 2 * heads_k) * dim, device=device).to(dtype)
    angles = torch.randn(max(lengths), dim // 2, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = [torch.rand(dim, device=device).to(dtype) if norms else None for _ in range(2)]
    counts = torch.zeros(len(rows) * heads_k, dtype=torch.int32, device=device)
    where, exact = (positions, rows, table), [keys.double(), values.double()]
    wide = [None if x is None else x.double() for x in (cos, sin, *weights)]
    q = rotate_append_reference(qkv.double(), *wide[:2], *where, *exact, *wide[2:], 1e-6)
    want = paged_attention_reference(q, *exact, *where, dim**-0.5)
    # The new token's slots hold whatever was there: nothing of it may be seen.
    for length, pages in zip(lengths, table.tolist(), strict=True):
        for cache in (keys, values):
            cache[pages[(length - 1) // page], :, (length - 1) % page] = torch.nan
    for _ in range(rounds):
        with nan_poison():
            out = rotate_attend_triton(
                qkv, cos, sin, *where, keys, values, counts, *weights, 1e-6, dim**-0.5, splits=splits
            )
        assert out.isfinite().all()
        close(out[1:], want[1:], dtype)
        assert not counts.any()
    for mine, theirs in zip((keys, values), exact, strict=True):
        close(mine, theirs, dtype)


def compare_one(dtype, device, width, outputs):
    from hone_kernels.decoding.triton import linear_of_one_triton

    x, norm = torch.randn(1, width, device=device).to(dtype), torch.rand(width, device=device).to(dtype)
    weight = (torch.randn(outputs, width, device=device) * width**-0.5).to(dtype)
    bias, residual = (torch.randn(outputs, device=device).to(dtype) for _ in range(2))
    exact = [y.double() for y in (x, weight, bias, norm, residual[None])]
    want = [
        linear_of_one_reference(exact[0], exact[1], exact[2], exact[3], 1e-6, None, False),
        linear_of_one_reference(exact[0], exact[1], None, None, 1e-6, exact[4], False),
        linear_of_one_reference(exact[0], exact[1], None, exact[3], 1e-6, None, True),
        linear_of_one_reference(exact[0], exact[1], exact[2], None, 1e-6, exact[4][:, : outputs // 2], True),
    ]
    for tile in (None, (2, 512, 2)):
        with nan_poison():
            got = [
                linear_of_one_triton(x, weight, bias, norm, 1e-6, None, False, tile=tile),
                linear_of_one_triton(x, weight, None, None, 1e-6, residual[None], False, tile=tile),
                linear_of_one_triton(x, weight, None, norm, 1e-6, None, True, tile=tile),
                linear_of_one_triton(x, weight, bias, None, 1e-6, residual[None, : outputs // 2], True, tile=tile),
            ]
        for mine, theirs in zip(got, want, strict=True):
            close(mine, theirs, dtype)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("dtype", "whole"),
    [(torch.float32, True), (torch.float16, False), pytest.param(torch.float16, True, marks=pytest.mark.slow)],
    ids=str,
)
def test_interpreted(dtype, whole):
    shape = dict(heads=6, heads_k=2, dim=16, page=16)
    if not whole:  # each kernel once
        compare_rows(dtype, "cpu", 3, 40)
        compare_one(dtype, "cpu", 40, 10)
        compare_pages(dtype, "cpu", lengths=[37, 5, 16], tokens=3, splits=3, norms=True, **shape)
        compare_in_one(dtype, "cpu", lengths=[37, 1, 16], splits=3, norms=True, **shape)
        return
    compare_rows(dtype, "cpu", 3, 40)
    compare_rows(dtype, "cpu", 1, 600)
    compare_one(dtype, "cpu", 40, 10)
    compare_one(dtype, "cpu", 1300, 6)
    for splits in (None, 1, 3):
        compare_pages(dtype, "cpu", lengths=[37, 5, 16], tokens=1, splits=splits, **shape)
        compare_in_one(dtype, "cpu", lengths=[37, 1, 16, 49], splits=splits, norms=splits == 3, **shape)
    compare_in_one(dtype, "cpu", lengths=[130, 30], heads=5, heads_k=1, dim=10, page=128)
    compare_pages(dtype, "cpu", lengths=[70, 33, 12, 20], tokens=12, norms=True, **shape)
    # Heads that are no power of two, a page of several blocks, more query lines than a tile holds.
    compare_pages(dtype, "cpu", lengths=[130, 30], tokens=24, heads=4, heads_k=1, dim=10, page=128)


@pytest.mark.compile
@pytest.mark.parametrize(("heads", "heads_k", "tokens"), [(12, 2, 1), (28, 4, 16), (40, 8, 4)])
def test_machine_code(heads, heads_k, tokens):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.decoding import triton

    bf16 = torch.bfloat16
    kernels = ("_norm_kernel", "_silu_kernel", "_rotate_kernel", "_attention_kernel", "_merge_kernel")
    kernels += ("_attend_kernel", *["_linear_kernel"] * 3)
    keys = torch.zeros(9, heads_k, 64, 128, dtype=bf16)
    positions, rows, table = torch.zeros(2, tokens).int(), torch.zeros(2).int(), torch.zeros(2, 40).int()
    qkv = torch.zeros(2 * tokens, (heads + 2 * heads_k) * 128, dtype=bf16)
    angles = torch.zeros(100, 64, dtype=bf16)
    with record_launches(triton, *kernels) as launches:
        triton.add_rms_norm_triton(qkv[:, :1536], qkv[:, :1536], qkv[0, :1536], 1e-6)
        triton.silu_mul_triton(qkv)
        q = triton.rotate_append_triton(qkv, angles, angles, positions, rows, table, keys, keys, None, None, 1e-6)
        triton.paged_attention_triton(q, keys, keys, positions, rows, table, 0.1, splits=8)
        new, counts = (positions[:, :1].contiguous(), rows, table), torch.zeros(2 * heads_k).int()
        triton.rotate_attend_triton(
            qkv[:2], angles, angles, *new, keys, keys, counts, None, None, 1e-6, 0.1, splits=8, overlap=True
        )
        one, weight = qkv[:1, :1536].contiguous(), torch.zeros(2048, 1536, dtype=bf16)
        rest = dict(norm=one[0], eps=1e-6, overlap=True)
        triton.linear_of_one_triton(one, weight, weight[:, 0].contiguous(), residual=None, gated=False, **rest)
        triton.linear_of_one_triton(one, weight, None, residual=None, gated=True, **rest)
        rest |= dict(norm=None, residual=weight[:, 0].contiguous()[None])
        triton.linear_of_one_triton(one, weight, None, gated=False, **rest)
    assert [launch.name for launch in launches] == list(kernels)
    built = [compile_launch(launch) for launch in launches]
    assert [one.spills for one in built] == [0] * 9
    assert built[3].count("HMMA") + built[3].count("HGMMA") > 0


@pytest.mark.compile
def test_one_output_compiles():
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.decoding import triton

    x = torch.zeros(1, 40)
    with record_launches(triton, "_linear_kernel") as launches:
        triton.linear_of_one_triton(x, x, None, None, 1e-6, None, False)
        triton.linear_of_one_triton(x, torch.cat([x, x]), None, None, 1e-6, None, True)
    assert [compile_launch(launch).spills for launch in launches] == [0, 0]


@pytest.mark.interpret
def test_what_lies_apart_in_memory_is_refused():
    from hone_kernels.decoding import (
        add_rms_norm,
        linear_of_one,
        paged_attention,
        rotate_append,
        rotate_attend,
        silu_mul,
    )

    x, angles, cache = torch.zeros(2, 8), torch.zeros(9, 2), torch.zeros(1, 1, 16, 4)
    # Rows of a table may lie apart.
    where = dict(positions=torch.zeros(2, 1).int(), rows=torch.zeros(2).int(), table=torch.zeros(2, 3).int()[:, :2])
    pages = dict(qkv=torch.zeros(2, 12), cos=angles, sin=angles, keys=cache, values=cache, **where)
    counts = torch.zeros(2, dtype=torch.int32)
    calls = [
        (add_rms_norm, dict(x=x, residual=x, weight=x[0], eps=1e-6)),
        (silu_mul, dict(gate_up=x)),
        (linear_of_one, dict(x=x[:1], weight=x, bias=x[0, :2], norm=x[0], residual=x[:1, :2])),
        (rotate_append, pages | dict(q_norm=x[0, :4], k_norm=x[0, :4])),
        (rotate_attend, pages | dict(counts=counts, scale=1.0)),
        (paged_attention, dict(q=torch.zeros(2, 1, 4), keys=cache, values=cache, scale=1.0, **where)),
    ]
    for op, given in calls:
        op(**given, backend="triton")
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                broken = given | {name: torch.stack([value, value], -1)[..., 0]}
                with pytest.raises(ValueError, match=rf"the kernel reads .*{name} as contiguous memory"):
                    op(**broken, backend="triton")
    with pytest.raises(ValueError, match=r"reads rows as contiguous memory; got \[2\] with strides \[0\]"):
        rotate_append(**pages | dict(rows=torch.zeros(1).int().expand(2)), backend="triton")


def test_more_tokens_than_a_launch_takes_are_refused():
    from hone_kernels.decoding.triton import silu_mul_triton

    with pytest.raises(ValueError, match=r"one launch takes at most 65,535 tokens; got 65,536\. Call it for parts"):
        silu_mul_triton(torch.zeros(65_536, 2))


@requires_gpu(min_sm=80)
@pytest.mark.parametrize(("dtype", "heads", "heads_k"), [(torch.bfloat16, 28, 4), (torch.float32, 32, 8)])
def test_gpu(dtype, heads, heads_k):
    # Each new shape is a compilation, which is what these tests take their time for.
    for tokens, width in ((1, 1536), (33, 5120), (2, 40)):
        compare_rows(dtype, "cuda", tokens, width)
    shape = dict(heads=heads, heads_k=heads_k, dim=128, page=64)
    compare_one(dtype, "cuda", 1536, 2048)
    compare_one(dtype, "cuda", 8960, 1538)
    for splits in (None, 5):
        compare_in_one(
            dtype, "cuda", lengths=[3000, 1, 64, 65, 700], splits=splits, norms=splits == 5, rounds=50, **shape
        )
    compare_pages(dtype, "cuda", lengths=[3000], tokens=1, **shape)
    compare_pages(dtype, "cuda", lengths=[1000, 64, 65, 7, 2049], tokens=4, norms=heads == 32, **shape)
    compare_pages(dtype, "cuda", lengths=[130, 30], tokens=24, heads=4, heads_k=1, dim=10, page=128)


def test_splits():
    from hone_kernels.decoding.triton import splits_of

    assert splits_of(2, 4096, 64, 132) == 32
    assert splits_of(2, 100, 64, 132) == 2
    assert splits_of(1000, 4096, 64, 132) == 1
    assert splits_of(64, 4096, 64, 132) == 5
