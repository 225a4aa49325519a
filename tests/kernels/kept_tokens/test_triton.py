from functools import partial

import pytest
import torch
from hone_core.testing import nan_poison, requires_gpu
from hone_kernels.kept_tokens import (
    add_change,
    draw_bits,
    gather_modulate,
    pack_tokens,
    spread_tokens,
    take_tokens,
    unpack_tokens,
)

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def gather_case(rows, tokens, kept, channels, dtype=torch.float32, device="cpu"):
    x, scale, shift = (torch.randn(s, device=device) for s in ((rows, tokens, channels), *[(rows, channels)] * 2))
    idx = torch.stack([torch.randperm(tokens, device=device)[:kept].sort().values for _ in range(rows)])
    return x.to(dtype), idx, scale, shift


def change_case(rows, tokens, channels, dtype=torch.float32, device="cpu"):
    x, update, before = (torch.randn(rows, tokens, channels, device=device) for _ in range(3))
    return x, update.to(dtype), torch.randn(rows, channels, device=device), before


def draw_case(images, tokens, kept, width, guided, device="cpu"):
    logits = 2 * torch.randn(images * (1 + guided), kept, width, 2, device=device)
    slot = torch.randint(0, kept, (images, tokens), device=device)
    return logits, torch.rand(images, tokens, width, device=device), slot


def compare_gather(case, dtype):
    from hone_kernels.kept_tokens.triton import gather_modulate_triton

    with nan_poison():
        got = gather_modulate_triton(*case, dtype, 1e-6)
    want = gather_modulate(*case, dtype=dtype, backend="reference")
    assert torch.equal(got[0], want[0])
    assert got[1].dtype == dtype
    tolerance = {"rtol": 1.6e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got[1], want[1], **tolerance)


def compare_change(case, images, relative):
    from hone_kernels.kept_tokens.triton import add_change_triton

    with nan_poison():
        got = add_change_triton(*case, images, relative)
    want = add_change(*case, images=images, relative=relative, backend="reference")
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def compare_draw(logits, uniform, slot, top_p):
    from hone_kernels.kept_tokens.triton import draw_bits_triton

    got = draw_bits_triton(logits, uniform, slot, 3.0, 0.8, top_p)
    options = {"slot": slot, "guidance": 3.0, "temperature": 0.8, "top_p": top_p, "backend": "reference"}
    want = draw_bits(logits, uniform, **options)
    # Where a draw or a share lies on the edge, rounding may decide: nudged by a millionth, the reference moves too.
    edge = torch.zeros_like(want, dtype=torch.bool)
    for nudge in (-1e-6, 1e-6):
        edge |= draw_bits(logits, uniform + nudge, **options) != want
        if top_p:
            edge |= draw_bits(logits, uniform, **options | {"top_p": top_p + nudge}) != want
    assert torch.equal(got[~edge], want[~edge])
    assert int(edge.sum()) <= 2 + edge.numel() // 10_000
    assert 0.2 < float(got.float().mean()) < 0.8


def move_case(batch, heads, tokens, dim, share, dtype=torch.float32, device="cpu"):
    """Queries, keys and values as a model lays them, a head beside the other, of which not all samples keep as many."""
    states = [torch.randn(batch, tokens, h, dim, device=device).to(dtype).transpose(1, 2) for h in heads]
    keep = torch.rand(batch, tokens, device=device) < torch.linspace(share, 1.0, batch, device=device)[:, None]
    keep[:, -1:] = True
    most = int(keep.sum(-1).max())
    return states, keep, (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[:, :most]


def compare_moves(states, keep, idx):
    from hone_kernels.kept_tokens.triton import spread_tokens_triton, take_tokens_triton

    with nan_poison():
        taken = take_tokens_triton(states, idx)
    for one, other in zip(taken, take_tokens(states, idx, backend="reference"), strict=True):
        assert torch.equal(one, other)
    # As an attention of a library gives it.
    x = taken[0].transpose(1, 2).contiguous().transpose(1, 2)
    with nan_poison():
        back = spread_tokens_triton(x, keep)
    assert torch.equal(back, spread_tokens(x, keep, backend="reference"))
    assert torch.equal(back, states[0] * keep[:, None, :, None])
    assert back.transpose(1, 2).is_contiguous()


def compare_packs(states, keep, _):
    from hone_kernels.kept_tokens.triton import pack_tokens_triton, unpack_tokens_triton

    idx, num = (~keep).to(torch.uint8).argsort(dim=-1, stable=True).int(), keep.sum(-1).int()
    with nan_poison():
        packed, ends, row = pack_tokens_triton(states, idx, num)
    wanted = pack_tokens(states, idx, num, backend="reference")
    assert torch.equal(ends, wanted.ends)
    assert torch.equal(row[keep], wanted.row[keep])
    for one, other in zip(packed, wanted.states, strict=True):
        assert torch.equal(one[: ends[-1]], other[: ends[-1]])
        if one.is_floating_point() and ends[-1] < len(one):
            assert one[ends[-1] :].isnan().all()  # there is room, of which nothing was touched
    with nan_poison():
        back = unpack_tokens_triton(packed[0], keep, row)
    assert torch.equal(back, unpack_tokens(packed[0], keep, row, backend="reference"))
    assert torch.equal(back, states[0] * keep[:, None, :, None])
    assert back.transpose(1, 2).is_contiguous()


def small_cases(device="cpu"):
    compare_packs(*move_case(3, (4, 2, 2), 70, 16, 0.3, device=device))
    compare_packs(*move_case(1, (3, 1), 9, 6, 0.5, torch.bfloat16, device=device))
    compare_packs(*move_case(2, (2,), 65, 16, 1.0, device=device))
    compare_packs(*move_case(3, (2,), 0, 16, 1.0, device=device))
    compare_moves(*move_case(2, (4, 2, 2), 70, 16, 0.3, device=device))
    compare_moves(*move_case(1, (3, 1), 9, 6, 0.5, torch.bfloat16, device=device))
    compare_moves(*move_case(1, (2,), 5, 16, 1.0, device=device))
    compare_gather(gather_case(2, 9, 5, 48, device=device), torch.float32)
    compare_gather(gather_case(1, 6, 6, 64, torch.bfloat16, device=device), torch.bfloat16)
    compare_gather(gather_case(2, 4, 0, 32, device=device), torch.float32)
    compare_change(change_case(2, 5, 48, device=device), 1, False)
    compare_change(change_case(2, 3, 64, torch.bfloat16, device=device), 2, True)
    compare_change(change_case(1, 3, 20, device=device), 0, False)
    for guided in (False, True):
        compare_draw(*draw_case(2, 37, 20, 12, guided, device), 0.0)
        compare_draw(*draw_case(2, 37, 20, 12, guided, device), 0.97)
    logits, uniform, _ = draw_case(1, 8, 8, 12, True, device)
    compare_draw(logits, uniform, None, 0.0)


@pytest.mark.interpret
def test_interpreted():
    small_cases()


@pytest.mark.compile
@pytest.mark.parametrize("channels", [768, 2048, 3584])
def test_machine_code(channels):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.kept_tokens import triton

    names = ("_gather_kernel", "_change_kernel", "_draw_kernel")
    with record_launches(triton, *names) as launches:
        triton.gather_modulate_triton(*gather_case(2, 9, 5, channels), torch.bfloat16, 1e-6)
        triton.add_change_triton(*change_case(2, 5, channels, torch.bfloat16), 1, False)
        triton.add_change_triton(*change_case(2, 5, channels, torch.bfloat16), 1, True)
        for guided in (False, True):
            logits, uniform, slot = draw_case(1, 64, 40, 32, guided)
            triton.draw_bits_triton(logits, uniform, slot, 3.0, 1.0, 0.97)
            triton.draw_bits_triton(logits, uniform[:, :40], None, 3.0, 1.0, 0.0)
    assert [compile_launch(launch).spills for launch in launches] == [0] * 7


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_machine_code_of_moves(dtype):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.kept_tokens import triton

    states, keep, idx = move_case(2, (28, 4, 4), 640, 128, 0.3, dtype)
    places, num = torch.zeros_like(keep, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    with record_launches(triton, "_take_kernel", "_spread_kernel", "_pack_kernel") as launches:
        triton.take_tokens_triton(states, idx)
        triton.take_tokens_triton(states[1:], idx)
        triton.spread_tokens_triton(states[0], keep)
        packed, _, row = triton.pack_tokens_triton(states, places, num)
        triton.unpack_tokens_triton(packed[0], keep, row)
    found = [compile_launch(launch) for launch in launches]
    assert [one.spills for one in found] == [0] * 5
    # 16 bytes at a time.
    assert all("LDG.E.128" in one.sass and "STG.E.128" in one.sass for one in found)


@requires_gpu(min_sm=80)
def test_gpu():
    small_cases("cuda")
    for dtype in (torch.bfloat16, torch.float32):
        compare_moves(*move_case(3, (28, 4, 4), 4107, 128, 0.2, dtype, "cuda"))
        compare_moves(*move_case(2, (16, 2), 2048, 96, 0.2, dtype, "cuda"))
        compare_packs(*move_case(3, (28, 4, 4), 4107, 128, 0.2, dtype, "cuda"))
        compare_packs(*move_case(65, (16, 2), 257, 96, 0.2, dtype, "cuda"))
    for channels in (768, 2048, 3584):
        compare_gather(gather_case(2, 4096, 1792, channels, device="cuda"), torch.bfloat16)
        compare_change(change_case(2, 1792, channels, torch.bfloat16, device="cuda"), 1, False)
    compare_gather(gather_case(16, 4107, 1791, 2048, device="cuda"), torch.float32)
    compare_draw(*draw_case(8, 4096, 1792, 32, True, "cuda"), 0.97)
    compare_draw(*draw_case(1, 4107, 1791, 56, True, "cuda"), 0.0)


@requires_gpu(min_sm=80)
def test_gpu_repeats_and_is_captured():
    x, idx, scale, shift = gather_case(2, 1600, 700, 2048, device="cuda")
    others = change_case(2, 700, 2048, torch.bfloat16, device="cuda")
    logits, uniform, slot = draw_case(1, 1600, 700, 32, True, "cuda")
    calls = (
        partial(gather_modulate, x, idx, scale, shift, dtype=torch.bfloat16),
        partial(add_change, *others, images=1),
        partial(draw_bits, logits, uniform, slot=slot, guidance=4.0, top_p=0.97),
    )
    for call in calls:
        want = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call()
        graph.replay()
        for one, other in zip(
            (got,) if torch.is_tensor(got) else got, (want,) if torch.is_tensor(want) else want, strict=True
        ):
            assert torch.equal(one, other)
