import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.few_tokens.reference import attend_slots_reference, gated_of_few_reference

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


def close(got, want, dtype):
    assert_close(got.double(), want.double(), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def compare_gated(dtype, device, tokens, width, outputs, tile=None):
    from hone_kernels.few_tokens.triton import gated_of_few_triton

    x = torch.randn(tokens, width, device=device).to(dtype)
    gate, up = ((torch.randn(outputs, width, device=device) * width**-0.5).to(dtype) for _ in range(2))
    with nan_poison():
        got = gated_of_few_triton(x, gate, up, tile=tile)
    close(got, gated_of_few_reference(x.double(), gate.double(), up.double()), dtype)


def compare_slots(
    dtype, device, *, rows, begin, tokens, heads, heads_k, dim, slots, text=0, rope=True, tile=(64, 3, 4)
):
    from hone_kernels.few_tokens.triton import attend_slots_triton

    qkv = torch.randn(rows, tokens, (heads + 2 * heads_k) * dim, device=device).to(dtype)
    angles = torch.randn(slots, dim // 2, device=device)
    table = (angles.cos(), angles.sin()) if rope else None
    keys, values = (torch.randn(rows, heads_k, slots, dim, device=device).to(dtype) for _ in range(2))
    words = None
    if text:
        words = torch.rand(rows, text, device=device) < 0.4
    # The new tokens' slots and those behind them hold whatever was there: nothing of it may be seen.
    for cache in (keys, values):
        cache[:, :, begin:] = torch.nan
    exact = [keys.double(), values.double()]
    with nan_poison():
        out = attend_slots_triton(qkv, table, keys, values, begin, dim**-0.5, words, tile=tile)
    wide = None if table is None else tuple(x.double() for x in table)
    want = attend_slots_reference(qkv.double(), wide, *exact, begin, dim**-0.5, words)
    close(out, want, dtype)
    for mine, theirs in zip((keys, values), exact, strict=True):
        close(mine[:, :, : begin + tokens], theirs[:, :, : begin + tokens], dtype)
        assert mine[:, :, begin + tokens :].isnan().all()


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted(dtype):
    compare_gated(dtype, "cpu", 1, 40, 10)
    compare_gated(dtype, "cpu", 3, 300, 37, (16, 16, 2, 2))
    compare_gated(dtype, "cpu", 33, 64, 20)
    shape = dict(heads=4, heads_k=2, dim=16, slots=90)
    compare_slots(dtype, "cpu", rows=2, begin=0, tokens=1, **shape)
    compare_slots(dtype, "cpu", rows=2, begin=1, tokens=2, **shape)
    compare_slots(dtype, "cpu", rows=2, begin=70, tokens=17, **shape)
    compare_slots(dtype, "cpu", rows=2, begin=32, tokens=3, text=20, tile=(16, 2, 4), **shape)
    # More lines of queries than a tile holds, and heads that are no power of two.
    compare_slots(dtype, "cpu", rows=1, begin=9, tokens=40, heads=3, heads_k=1, dim=10, slots=60, rope=False)


@pytest.mark.interpret
def test_what_lies_apart_in_memory_is_refused():
    from hone_kernels.few_tokens import attend_slots, gated_of_few

    x, cache, angles = torch.zeros(2, 12), torch.zeros(2, 1, 5, 4), torch.zeros(5, 2)
    calls = [
        (gated_of_few, dict(x=x, gate=x, up=x)),
        (attend_slots, dict(qkv=x[:, None], keys=cache, values=cache, words=torch.ones(2, 2).bool())),
    ]
    options = [{}, dict(rope=(angles, angles), begin=2, scale=1.0)]
    for (op, given), rest in zip(calls, options, strict=True):
        op(**given, **rest, backend="triton")
        for name, value in given.items():
            broken = given | {name: torch.stack([value, value], -1)[..., 0]}
            with pytest.raises(ValueError, match=f"the kernel reads {name} as contiguous memory"):
                op(**broken, **rest, backend="triton")
    with pytest.raises(ValueError, match="the kernel reads sin as contiguous memory"):
        attend_slots(**calls[1][1], **rest | dict(rope=(angles, angles.mT.contiguous().mT)), backend="triton")


@pytest.mark.compile
@pytest.mark.parametrize(("tokens", "rope"), [(3, True), (16, True), (32, False)])
def test_machine_code(tokens, rope):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.few_tokens import triton

    bf16 = torch.bfloat16
    qkv = torch.zeros(2, tokens, 3 * 1024, dtype=bf16)
    cache = torch.zeros(2, 16, 257, 64, dtype=bf16)
    angles, words = torch.zeros(257, 32), torch.zeros(2, 7, dtype=torch.bool)
    x, weight = torch.zeros(2 * tokens, 1024, dtype=bf16), torch.zeros(2816, 1024, dtype=bf16)
    with record_launches(triton, "_gated_kernel", "_slots_kernel") as launches:
        triton.gated_of_few_triton(x, weight, weight)
        table = (angles, angles) if rope else None
        triton.attend_slots_triton(qkv, table, cache, cache, 100, 0.1, None if rope else words, overlap=True)
    built = [compile_launch(launch) for launch in launches]
    assert [one.spills for one in built] == [0, 0]
    for one in built:
        assert one.count("HMMA") + one.count("HGMMA") > 0
    # The dependent launch, and lines that are asked for ahead of it.
    ptx = built[1].ptx
    assert 0 < ptx.index("prefetch.global.L2") < ptx.index("griddepcontrol.wait")


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu(dtype):
    # Each new shape is a compilation, which is what these tests take their time for.
    for tokens, width, outputs in ((2, 1024, 2816), (31, 1536, 4096), (64, 768, 2048), (5, 40, 10)):
        compare_gated(dtype, "cuda", tokens, width, outputs)
    shape = dict(heads=16, heads_k=16, dim=64, slots=300)
    for begin, tokens in ((0, 1), (1, 1), (7, 4), (240, 16), (200, 32)):
        compare_slots(dtype, "cuda", rows=2, begin=begin, tokens=tokens, **shape)
    compare_slots(dtype, "cuda", rows=4, begin=200, tokens=9, text=120, **shape)
    compare_slots(dtype, "cuda", rows=2, begin=100, tokens=62, heads=6, heads_k=2, dim=100, slots=200, rope=False)
