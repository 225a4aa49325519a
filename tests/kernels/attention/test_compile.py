"""Every shipped configuration compiled for sm_90 without a GPU, and its machine code read."""

import pytest
import torch
from hone_kernels.attention import BlockLayout
from hone_kernels.compile import compile_launch, record_launches

triton_kernels = pytest.importorskip("hone_kernels.attention.triton", reason="Triton is for Linux only")
gluon_kernels = pytest.importorskip("hone_kernels.attention.gluon_sm90", reason="Triton is for Linux only")
KERNELS = ("_forward_kernel", "_rows_kernel", "_dq_kernel", "_dkv_kernel")


def launches(monkeypatch, dim, dtype, tokens, pooled, padded, tiles=None, sm=90):
    monkeypatch.setattr(triton_kernels, "_sm", lambda x: sm)
    q = torch.empty(1, 2, tokens, dim, dtype=dtype)
    lse = torch.empty(1, 2, tokens)
    layout = BlockLayout.dense(tokens, tokens)
    columns = layout.transpose()
    valid = torch.ones(1, layout.num_k_blocks, dtype=torch.int32) if padded else None
    extra = (torch.empty(1, 2, 100, dim, dtype=dtype),) * 2 + (torch.empty(1, 2, 100),) if pooled else (None,) * 3
    lists = (layout.kv_num, layout.kv_idx)
    with record_launches(triton_kernels, *KERNELS) as recorded:
        triton_kernels.attention_forward(q, q, q, *lists, valid, *extra, 128, 128, 0.1, tiles)
        triton_kernels.attention_backward(
            q, lse, q, q, q, q, lse, *lists, columns.kv_num, columns.kv_idx, valid, *extra, 128, 128, 0.1
        )
    return recorded


@pytest.mark.compile
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize(("pooled", "padded"), [(False, False), (True, False), (False, True)])
def test_half_precision_uses_the_matrix_units(monkeypatch, dim, pooled, padded):
    recorded = launches(monkeypatch, dim, torch.bfloat16, 2056, pooled, padded)
    assert [x.name for x in recorded] == [*KERNELS] + ["_dkv_kernel"] * pooled
    for launch in recorded:
        code = compile_launch(launch)
        assert code.spills == 0, launch
        assert not code.serialized, launch
        if launch.name != "_rows_kernel":
            assert code.count("HGMMA") > 0, launch
            assert (code.count("UTMALDG") > 0) == (dim != 96), launch


@pytest.mark.compile
def test_whole_blocks_and_float16(monkeypatch):
    for launch in launches(monkeypatch, 128, torch.float16, 2048, False, False):
        code = compile_launch(launch)
        assert code.spills == 0
        assert not code.serialized


@pytest.mark.compile
def test_the_lane_sees_spills_and_serialised_matrix_products(monkeypatch):
    """Configurations known to be bad are reported as such, so that the tests above can fail."""
    serialised = triton_kernels.Tiles(128, 128, 4, 3)
    assert compile_launch(launches(monkeypatch, 64, torch.bfloat16, 2048, False, False, serialised)[0]).serialized
    spilling = triton_kernels.Tiles(64, 64, 4, 2, descriptors=True, registers=96)
    assert compile_launch(launches(monkeypatch, 128, torch.bfloat16, 2048, False, False, spilling)[0]).spills > 0


@pytest.mark.compile
@pytest.mark.parametrize("dim", [64, 128])
def test_older_gpus_fit_in_shared_memory(monkeypatch, dim):
    for launch in launches(monkeypatch, dim, torch.bfloat16, 2056, False, False, sm=80):
        code = compile_launch(launch, sm=80)
        assert code.spills == 0, launch
        assert code.shared_bytes <= 99 * 1024, launch  # what consumer GPUs of that generation give a program


def gluon_launches(monkeypatch, dim, block_q, block_k, pooled=False, padded=False, dtype=torch.bfloat16, config=None):
    monkeypatch.setattr(gluon_kernels, "_multiprocessors", lambda x: 132)
    q = torch.empty(1, 4, 1000, dim, dtype=dtype)
    k = torch.empty(1, 2, 1000, dim, dtype=dtype)
    layout = BlockLayout.dense(1000, 1000, block_q=block_q, block_k=block_k)
    valid = torch.ones(1, layout.num_k_blocks, dtype=torch.int32) if padded else None
    extra = (torch.empty(1, 2, 100, dim, dtype=dtype),) * 2 + (torch.empty(1, 2, 100),) if pooled else (None,) * 3
    lists = (layout.kv_num, layout.kv_idx)
    with record_launches(
        gluon_kernels, "_count_kernel", "_schedule_kernel", "_bias_kernel", "_forward_kernel"
    ) as recorded:
        gluon_kernels.attention_forward(q, k, k, *lists, valid, *extra, block_q, block_k, 0.1, config)
    return recorded


@pytest.mark.compile
@pytest.mark.parametrize(("dim", "block_q"), list(gluon_kernels.CONFIGS))
@pytest.mark.parametrize("block_k", [128, 64])
@pytest.mark.parametrize(("pooled", "padded"), [(False, False), (True, False), (True, True)])
def test_gluon(monkeypatch, dim, block_q, block_k, pooled, padded):
    *helpers, launch = gluon_launches(monkeypatch, dim, block_q, block_k, pooled, padded)
    assert [x.name for x in helpers] == ["_count_kernel", "_schedule_kernel"] + ["_bias_kernel"] * pooled
    code = compile_launch(launch)
    check_gluon(code, dim, block_q, launch.arguments["BN"])
    # Masks and biases at once leave a scalar of a consumer without a register.
    assert code.spills <= (16 if pooled and padded else 0)


def check_gluon(code, dim, block_q, keys):
    assert not code.serialized
    # Products of a step, in the loop and once before and after it, for each consumer.
    assert code.count("HGMMA") == (keys + dim) // 16 * 2 * (block_q // 64)
    assert code.count("UTMALDG") > 0
    assert code.count("UTMASTG") == block_q // 64
    assert code.count("USETMAXREG") > 0
    # What a multiprocessor gives one program of two consumers, or each of two of one.
    assert code.shared_bytes <= (227 if block_q == 128 else 113) * 1024
    assert hand_overs(code.ptx) >= 4 * (block_q // 64)


def hand_overs(ptx):
    """Count the arrivals by which warps hand memory to those of another role.

    One thread arrives for all, so a barrier has to lie between what the others read and wrote and the arrival.
    """
    count, waited = 0, False
    for line in ptx.splitlines():
        if "bar.sync" in line or "bar.warp.sync" in line or "barrier.sync" in line:
            waited = True
        elif any(access in line for access in ("ld.shared", "st.shared", "ldmatrix", "stmatrix", "wgmma.mma_async")):
            waited = False
        elif "mbarrier.arrive.shared::cta" in line:
            assert waited, line
            count += 1
    return count


def test_an_arrival_without_a_barrier_is_seen():
    write, arrive = "st.shared.b32 [%r1], %r2;", "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];"
    assert hand_overs("\n".join([write, "bar.warp.sync -1;", arrive])) == 1
    with pytest.raises(AssertionError):
        hand_overs("\n".join(["bar.sync 0, 128;", write, arrive]))


@pytest.mark.compile
def test_gluon_float16_and_padded(monkeypatch):
    launch = gluon_launches(monkeypatch, 128, 128, 128, padded=True, dtype=torch.float16)[-1]
    code = compile_launch(launch)
    check_gluon(code, 128, 128, 128)
    assert code.spills == 0


@pytest.mark.compile
def test_gluon_helpers(monkeypatch):
    for launch in gluon_launches(monkeypatch, 64, 128, 128, pooled=True)[:-1]:
        assert compile_launch(launch).spills == 0
