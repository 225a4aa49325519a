import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.few_tokens import Block, BlocksOfFew
from hone_kernels.few_tokens.reference import blocks_of_few_reference

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def given(dtype, device, *, rows, begin, tokens, heads, hidden, slots, layers, dim=16, text=0, rope=True):
    """Blocks, caches whose slots from ``begin`` on hold no numbers, a rotation, words of a text, and inputs."""
    width = heads * dim

    def drawn(*shape):
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

    def norm():
        return (torch.rand(width, device=device) + 0.5).to(dtype)

    blocks = [
        Block(
            norm(), drawn(3 * width, width), drawn(width, width), norm(), drawn(hidden, width), drawn(hidden, width),
            drawn(width, hidden),
        )
        for _ in range(layers)
    ]  # fmt: skip
    caches = [[torch.randn(rows, heads, slots, dim, device=device).to(dtype) for _ in blocks] for _ in range(2)]
    for cache in (*caches[0], *caches[1]):
        cache[:, :, begin:] = torch.nan
    angles = torch.randn(slots, dim // 2, device=device)
    words = torch.rand(rows, text, device=device) < 0.4 if text else None
    x = torch.randn(rows, tokens, width, device=device).to(dtype)
    return blocks, caches, (angles.cos(), angles.sin()) if rope else None, words, x


def close(got, want, caches, exact, end, dtype):
    assert_close(got.double(), want.double(), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    for mine, theirs in zip([*caches[0], *caches[1]], [*exact[0], *exact[1]], strict=True):
        assert_close(mine[:, :, :end].double(), theirs[:, :, :end].double(), atol=TOLERANCES[dtype], rtol=0.1)
        assert mine[:, :, end:].isnan().all()


def interpreted(dtype, *, begin, tokens, **shape):
    """One program does it all: it waits for nobody, which an interpreter could not do."""
    from hone_kernels.few_tokens.triton_blocks import blocks_of_few_triton

    blocks, caches, rope, words, x = given(dtype, "cpu", begin=begin, tokens=tokens, **shape)
    exact = [[cache.double() for cache in each] for each in caches]
    table = [[at.data_ptr() for at in (*block, k, v)] for block, k, v in zip(blocks, *caches, strict=True)]
    scale = caches[0][0].shape[-1] ** -0.5
    with nan_poison():
        got = blocks_of_few_triton(
            x, torch.tensor(table), torch.zeros(1, dtype=torch.int32), rope, words, begin, heads=shape["heads"],
            hidden=shape["hidden"], slots=shape["slots"], eps=1e-5, scale=scale, programs=1,
        )  # fmt: skip
    wide = [Block(*(weight.double() for weight in block)) for block in blocks]
    turn = None if rope is None else (rope[0].double(), rope[1].double())
    want = blocks_of_few_reference(x.double(), wide, *exact, turn, begin, 1e-5, scale, words)
    close(got, want, caches, exact, begin + tokens, dtype)


@pytest.mark.interpret
def test_interpreted():
    torch.manual_seed(0)
    shape = dict(heads=4, hidden=200, layers=2)
    interpreted(torch.float32, rows=2, begin=0, tokens=1, slots=3, **shape)
    interpreted(torch.float32, rows=2, begin=5, tokens=3, slots=40, **shape)
    interpreted(torch.float32, rows=1, begin=30, tokens=20, slots=60, rope=False, **shape)
    # More slots than are looked at at once, and more inputs than a chunk has.
    interpreted(torch.float16, rows=2, begin=270, tokens=9, slots=300, text=20, heads=2, hidden=600, layers=1)


def test_blocks_as_their_definition():
    """By hand, with one head: norm, rotation, a softmax over all slots so far, gated layer, sums."""
    torch.manual_seed(1)
    shape = dict(rows=1, begin=2, tokens=2, heads=1, hidden=24, slots=5, layers=2)
    blocks, caches, rope, _, x = given(torch.float32, "cpu", **shape)
    old = [[cache[0, 0, :2].clone() for cache in each] for each in caches]
    got = BlocksOfFew(blocks, *caches, rope=rope, eps=1e-5, scale=0.25)(x, 2)
    cos, sin = (table[2:4].repeat_interleave(2, 1) for table in rope)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turn(x):
        return x * cos + torch.stack([-x[:, 1::2], x[:, ::2]], -1).flatten(1) * sin

    x = x[0]
    for number, (first, qkv, out, second, gate, up, down) in enumerate(blocks):
        q, k, v = (norm(x, first) @ qkv.T).split(16, 1)
        keys, values = torch.cat([old[0][number], turn(k)]), torch.cat([old[1][number], v])
        x = x + (turn(q) @ keys.T * 0.25).softmax(1) @ values @ out.T
        gated = norm(x, second) @ gate.T
        x = x + (gated * gated.sigmoid() * (norm(x, second) @ up.T)) @ down.T
        assert_close(got[number, 0], x, atol=1e-5, rtol=1e-5)
        assert_close(caches[0][number][0, 0, :4], keys, atol=1e-5, rtol=1e-5)


def test_bad_shapes_are_named():
    blocks, caches, rope, _, x = given(
        torch.float32, "cpu", rows=2, begin=2, tokens=2, heads=2, hidden=24, slots=30, layers=2
    )
    options = dict(rope=rope, eps=1e-5, scale=1.0)
    whole = BlocksOfFew(blocks, *caches, **options)
    with pytest.raises(ValueError, match=r"expected contiguous x \[2, n, 32\]; got \[1, 2, 32\]"):
        whole(x[:1], 2)
    with pytest.raises(ValueError, match="expected 1 to 32 tokens in all, in 30 slots; got 2 x 17 from 2 on"):
        whole(torch.zeros(2, 17, 32), 2)
    with pytest.raises(ValueError, match="in 30 slots; got 2 x 2 from 29 on"):
        whole(x, 29)
    with pytest.raises(ValueError, match=r"words must be \[2, T\], T at most 2; got \[2, 3\]"):
        whole(x, 2, torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match=r"expected weights \[\(32,\), \(96, 32\)"):
        BlocksOfFew([blocks[0], blocks[1]._replace(up=blocks[1].down)], *caches, **options)
    with pytest.raises(ValueError, match="weights and caches must be contiguous"):
        BlocksOfFew([blocks[0], blocks[1]._replace(out=blocks[1].out.T)], *caches, **options)
    with pytest.raises(ValueError, match=r"expected caches \[2, 2, 30, 16\]; got \[\[2, 2, 29, 16\]"):
        BlocksOfFew(blocks, [caches[0][0], caches[0][1][:, :, 1:]], caches[1], **options)
    with pytest.raises(ValueError, match=r"heads of 16, 32, 64 or 128 channels and a hidden width .* got 8 and 24"):
        BlocksOfFew(blocks, *([cache[..., :8] for cache in each] for each in caches), **options)
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call"):
        BlocksOfFew(blocks, *caches, **options, backend="triton")


@pytest.mark.compile
@pytest.mark.parametrize("tokens", [8, 16])
def test_machine_code(tokens):
    """Weights are on their way to registers while a program waits, and more lines are asked for."""
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.few_tokens import triton_blocks

    x = torch.zeros(2, tokens, 1024, dtype=torch.bfloat16)
    angles, count = torch.zeros(257, 32), torch.zeros(1, dtype=torch.int32)
    with record_launches(triton_blocks, "_blocks_kernel") as launches:
        triton_blocks.blocks_of_few_triton(
            x, torch.zeros(25, 9, dtype=torch.int64), count, (angles, angles), None, 100, heads=16, hidden=2816,
            slots=257, eps=1e-5, scale=0.1, programs=132,
        )  # fmt: skip
    assert launches[0].options["launch_cooperative_grid"]
    built = compile_launch(launches[0])
    # Addresses that every block needs are kept aside, which is read from the first cache.
    assert built.spills < 2048
    assert built.count("HMMA") > 0
    waits = [at for at in range(len(built.ptx)) if built.ptx.startswith("ld.acquire.gpu.global.u32", at)]
    assert len(waits) == 5
    for wait, arrived in zip(waits, [0, *waits], strict=False):
        assert "ld.global.v4.b32" in built.ptx[arrived:wait]
    assert built.ptx.count("atom.global.gpu.release.add") == 5


@requires_gpu(min_sm=80)
@pytest.mark.parametrize(
    ("heads", "hidden", "rows", "begin", "tokens", "text"),
    [
        (16, 2816, 2, 0, 1, 0),
        (16, 2816, 2, 240, 16, 0),
        (20, 3584, 2, 700, 5, 120),
        (24, 4096, 1, 31, 32, 0),
        (3, 72, 3, 9, 2, 0),
    ],
)
def test_gpu(heads, hidden, rows, begin, tokens, text):
    """Many launches one after the other, as graphs too: programs wait for each other at each product."""
    shape = dict(heads=heads, hidden=hidden, rows=rows, begin=begin, tokens=tokens, text=text)
    blocks, caches, rope, words, x = given(
        torch.bfloat16, "cuda", slots=begin + tokens + 3, layers=3, dim=64, rope=heads != 24, **shape
    )
    exact = [[cache.double() for cache in each] for each in caches]
    whole = BlocksOfFew(blocks, *caches, rope=rope, eps=1e-5, scale=0.125)
    assert whole.backend == "triton"
    with nan_poison():
        got = whole(x, begin, words)
    wide = [Block(*(weight.double() for weight in block)) for block in blocks]
    turn = None if rope is None else (rope[0].double(), rope[1].double())
    want = blocks_of_few_reference(x.double(), wide, *exact, turn, begin, 1e-5, 0.125, words)
    close(got, want, caches, exact, begin + tokens, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = [whole(x, begin, words) for _ in range(10)]
    for _ in range(20):
        graph.replay()
    assert all(torch.equal(each, got) for each in again)
    assert int(whole._count) == 0
