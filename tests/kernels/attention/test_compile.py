"""Every shipped configuration compiled for sm_90 without a GPU, and its machine code read."""

import re

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


# What hand_overs follows: one line of PTX, its predicate and its comment taken off.
LABEL, BRANCH = re.compile(r"(\$L\w+):"), re.compile(r"(@!?%p\d+\s+)?(bra|brx\.idx|ret|exit)\b.*?(\$L\w+)?;")
TABLE = re.compile(r"(\$L\w+):\s*\.branchtargets([^;]*);")


def hand_overs(ptx):
    """Count the arrivals by which warps hand memory to those of another role, and check what stands before each.

    One thread arrives for all. So on every path to an arrival

    - a barrier of the warps lies behind what they read from and wrote to shared memory, and
    - a ``wgmma.wait_group 0`` lies behind every matrix product, and behind that wait, since each warp waits for its own
      products only, a barrier of more than one warp.

    It follows branches (``bra``, ``brx.idx``), loops with their second and later turns included. It does not know which
    buffer a product or an arrival is about, nor how many threads a barrier is for: a product in flight forbids every
    arrival, also one that releases another buffer, and any ``bar.sync`` counts. It does not look into the loops of
    inline assembly, in which a warp waits for an ``mbarrier``, and what the tensor-memory engine reads is none of its
    business: ``cp.async.bulk`` has waits of its own.
    """
    ptx = TABLE.sub(lambda x: f"{x[1]}: .branchtargets {' '.join(x[2].split())};", re.sub("//.*", "", ptx))
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {x[1]: i for i, line in enumerate(lines) if (x := LABEL.match(line))}
    # Products not committed, groups in flight, products without a barrier, accesses without one. More is worse, so
    # where paths meet the worst of each counts.
    states = {0: (0, 0, 0, 1)}
    queue, arrivals = [0], set()
    while queue:
        at = queue.pop()
        line, (open_, groups, products, accesses) = lines[at], states[at]
        if "wgmma.mma_async" in line:
            open_, products = 1, 1
        elif "wgmma.commit_group" in line:
            open_, groups = 0, min(groups + 1, 8)
        elif wait := re.search(r"wgmma\.wait_group\S*\s+(\d+)", line):
            products, groups = max(products, min(groups, 1)), min(groups, int(wait[1]))
        elif "bar.warp.sync" in line:
            accesses = 0
        elif "bar.sync" in line or "barrier.sync" in line:
            products = accesses = 0
        elif any(x in line for x in ("ld.shared", "st.shared", "ldmatrix", "stmatrix")):
            accesses = 1
        elif "mbarrier.arrive.shared::cta" in line:
            assert not (open_ or groups or products or accesses), f"line {at + 1}: {line}"
            arrivals.add(at)
        after, branch = [at + 1], BRANCH.match(line)
        if branch:
            after = after if branch[1] else []
            if branch[2] == "brx.idx":
                after += [labels[x.strip(" ;")] for x in lines[labels[branch[3]]].split(".branchtargets")[1].split(",")]
            elif branch[3]:
                after.append(labels[branch[3]])
        for x in after:
            state = (open_, groups, products, accesses)
            worst = tuple(map(max, state, states.get(x, state)))
            if x < len(lines) and states.get(x) != worst:
                states[x] = worst
                queue.append(x)
    return len(arrivals)


WRITE, PRODUCT = "st.shared.b32 [%r1], %r2;", "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;"
COMMIT, BARRIER = "wgmma.commit_group.sync.aligned;", "bar.sync 0, 128;"
WAIT, WAIT_1 = "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;"
ARRIVE = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];"


@pytest.mark.parametrize(
    "lines",
    [
        [WRITE, "bar.warp.sync -1;", ARRIVE],
        [PRODUCT, COMMIT, WAIT, BARRIER, ARRIVE],
        [PRODUCT, COMMIT, PRODUCT, COMMIT, WAIT_1, WAIT, BARRIER, ARRIVE],
        [PRODUCT, COMMIT, "@%p2 bra $L_2;", WAIT, "bra.uni $L_1;", "$L_2:", WAIT, "$L_1:", BARRIER, ARRIVE],
    ],
)
def test_hand_overs_with_waits_and_barriers_are_counted(lines):
    assert hand_overs("\n".join(lines)) == 1


@pytest.mark.parametrize(
    "lines",
    [
        [BARRIER, WRITE, ARRIVE],
        [PRODUCT, COMMIT, BARRIER, ARRIVE],  # the product still reads
        [PRODUCT, COMMIT, WAIT_1, BARRIER, ARRIVE],
        [PRODUCT, WAIT, BARRIER, ARRIVE],  # never committed, so not awaited
        [PRODUCT, COMMIT, BARRIER, WAIT, ARRIVE],  # awaited by the arriving thread's warp only
        [PRODUCT, COMMIT, WAIT, "bar.warp.sync -1;", ARRIVE],
        [PRODUCT, COMMIT, WAIT, BARRIER, PRODUCT, COMMIT, ARRIVE],
        [PRODUCT, COMMIT, "@%p2 bra $L_1;", WAIT, "$L_1:", BARRIER, ARRIVE],  # one path leaves the wait out
        [BARRIER, "$L_1:", BARRIER, ARRIVE, PRODUCT, COMMIT, "@%p2 bra $L_1;", WAIT],  # of the turn before
        [PRODUCT, COMMIT, "$L_0: .branchtargets", "$L_1,", "$L_2;", "brx.idx %r1, $L_0;", "$L_2:", WAIT, "$L_1:",
         BARRIER, ARRIVE],
    ],
)  # fmt: skip
def test_hand_overs_without_a_wait_or_a_barrier_are_seen(lines):
    with pytest.raises(AssertionError, match="mbarrier.arrive"):
        hand_overs("\n".join(lines))


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
