"""Kernels compiled ahead of time, without a GPU, and their machine code read.

Every head size in bfloat16 for compute capability 9.0, and of the other blocks, float32 and 8.0 a selection, SPILLS.
What is marked slow is the rest of the grid: the plain run compiles each kernel at its commonest configuration and with
everything at once. ``hone-kernels spills`` compiles any other combination.
"""

import re

import pytest
import torch
import triton
from hone_kernels.compile import (
    attention_launches,
    compile_launch,
    gluon_backward_launches,
    gluon_launches,
    pyramid_launches,
)

triton_kernels = pytest.importorskip("hone_kernels.attention.triton", reason="Triton is for Linux only")
gluon_backward = pytest.importorskip("hone_kernels.attention.gluon_backward_sm90", reason="Triton is for Linux only")
gluon_kernels = pytest.importorskip("hone_kernels.attention.gluon_sm90", reason="Triton is for Linux only")
NEWER = not triton.__version__.startswith("3.6.")  # of the two versions that the tests run with
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = ("_forward_kernel", "_rows_kernel", "_dq_kernel", "_dkv_kernel")
SHAPES = [(False, False), (True, False), (False, True), (True, True)]  # pooled, padded


def unless(quick, *values):
    """Parameters of a test, slow unless they are among the quick ones."""
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("dim", "pooled", "padded"),
    [
        unless((dim, *shape) in ((128, False, False), (96, True, True)), dim, *shape)
        for dim in (32, 64, 96, 128)
        for shape in SHAPES
    ],
)
def test_half_precision_uses_the_matrix_units(dim, pooled, padded):
    recorded = attention_launches(BF16, dim, pooled=pooled, padded=padded)
    assert [x.name for x in recorded] == [*KERNELS] + ["_dkv_kernel"] * pooled
    for launch in recorded:
        code = compile_launch(launch)
        # Triton 3.8 needs a few registers more than the cap of this forward allows.
        most = 32 if NEWER and (launch.label, dim, pooled, padded) == ("forward", 64, True, False) else 0
        assert code.spills <= most, launch
        assert not code.serialized, launch
        if launch.name != "_rows_kernel":
            assert code.count("HGMMA") > 0, launch
            assert (code.count("UTMALDG") > 0) == (dim != 96), launch


@pytest.mark.compile
@pytest.mark.slow
def test_whole_blocks_and_float16():
    for launch in attention_launches(FP16, 128, tokens=2048):
        code = compile_launch(launch)
        assert code.spills == 0
        assert not code.serialized


# (sm, dtype, head size, block_q, block_k, pooled, padded) -> bytes that kernels spill with Triton 3.6 and with 3.8;
# kernels not named: none.
SPILLS = {
    (90, BF16, 128, 64, 64, False, False): ({"forward": 12}, {"forward": 24}),
    (90, BF16, 128, 64, 64, True, False): ({"forward": 12}, {"forward": 24}),
    (90, BF16, 128, 64, 64, True, True): ({"forward": 16}, {}),
    (90, BF16, 128, 32, 32, True, False): ({}, {}),
    (90, BF16, 128, 32, 128, True, True): ({}, {}),
    (90, BF16, 128, 128, 32, True, False): ({}, {}),
    (90, BF16, 64, 32, 128, True, False): ({}, {}),
    (90, FP32, 32, 128, 128, True, True): ({}, {}),
    (90, FP32, 32, 32, 32, True, True): ({"dq": 8}, {"dq": 8}),
    (90, FP32, 64, 128, 128, True, False): ({}, {}),
    (90, FP32, 96, 128, 128, True, True): ({}, {}),
    (90, FP32, 128, 128, 128, True, False): ({}, {"dkv pooled": 28}),
    (80, BF16, 32, 128, 128, True, False): ({"dq": 8}, {}),
    (80, BF16, 64, 128, 128, False, False): ({}, {}),
    (80, BF16, 64, 128, 128, True, False): ({"forward": 24, "dq": 32}, {}),
    (80, BF16, 64, 128, 64, True, True): ({"dq": 24}, {}),
    (80, BF16, 64, 32, 128, True, False): ({"forward": 8}, {}),
    (80, BF16, 96, 128, 128, True, False): ({}, {}),
    (80, BF16, 128, 128, 128, False, False): ({}, {}),
    (80, BF16, 128, 128, 128, True, True): ({}, {}),
    (80, BF16, 128, 128, 32, False, True): ({"dq": 8}, {}),
    (80, BF16, 128, 32, 32, True, False): ({}, {}),
    (80, FP32, 32, 128, 128, True, False): ({"forward": 16}, {}),
    (80, FP32, 128, 128, 128, True, True): ({"forward": 12}, {}),
    (80, FP32, 128, 128, 128, False, True): ({"dq": 24}, {"dq": 8}),
}
QUICK = {(90, BF16, 128, 64, 64, True, True), (80, BF16, 64, 128, 128, True, False)}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("sm", "dtype", "dim", "block_q", "block_k", "pooled", "padded"), [unless(x in QUICK, *x) for x in SPILLS], ids=str
)
def test_what_spills(sm, dtype, dim, block_q, block_k, pooled, padded):
    allowed = SPILLS[sm, dtype, dim, block_q, block_k, pooled, padded][NEWER]
    for launch in attention_launches(dtype, dim, block_q, block_k, pooled=pooled, padded=padded, sm=sm):
        code = compile_launch(launch, sm)
        assert code.spills <= allowed.get(launch.label, 0), launch
        assert not code.serialized, launch
        # What consumer GPUs before Hopper give a program, and Hopper itself.
        assert code.shared_bytes <= (227 if sm >= 90 else 99) * 1024, launch


@pytest.mark.compile
def test_the_lane_sees_spills_and_serialised_matrix_products():
    """Configurations known to be bad are reported as such, so that the tests above can fail."""
    serialised = triton_kernels.Tiles(128, 128, 4, 3)
    assert compile_launch(attention_launches(BF16, 64, tokens=2048, tiles=serialised)[0]).serialized
    spilling = triton_kernels.Tiles(64, 64, 4, 2, descriptors=True, registers=96)
    assert compile_launch(attention_launches(BF16, 128, tokens=2048, tiles=spilling)[0]).spills > 0


QUICK_GLUON = {(128, 128, 128, False, False), (128, 128, 128, True, False), (64, 64, 64, True, True)}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("dim", "block_q", "block_k", "pooled", "padded"),
    [
        unless((*sizes, block_k, *shape) in QUICK_GLUON, *sizes, block_k, *shape)
        for sizes in gluon_kernels.CONFIGS
        for block_k in (128, 64)
        for shape in SHAPES
    ],
)
def test_gluon(dim, block_q, block_k, pooled, padded):
    *helpers, launch = gluon_launches(BF16, dim, block_q, block_k, pooled=pooled, padded=padded)
    assert [x.name for x in helpers] == ["_count_kernel", "_schedule_kernel"] + ["_bias_kernel"] * pooled
    code = compile_launch(launch)
    check_gluon(code, dim, block_q, launch.arguments["BN"], between=pooled and not padded)
    assert code.spills == 0


def check_gluon(code, dim, block_q, keys, between=False):
    assert not code.serialized
    # Products of a step, in the loop and once before and after it, for each consumer; and between pooled and listed.
    assert code.count("HGMMA") == (keys + dim) // 16 * (3 if between else 2) * (block_q // 64)
    assert code.count("UTMALDG") > 0
    assert code.count("UTMASTG") == block_q // 64
    assert code.count("USETMAXREG") > 0
    # What a multiprocessor gives one program of two consumers, or each of two of one.
    assert code.shared_bytes <= (227 if block_q == 128 else 113) * 1024
    assert hand_overs(code.ptx) >= 4 * (block_q // 64)


# What hand_overs follows: one line of PTX, its predicate and its comment taken off.
LABEL, BRANCH = re.compile(r"(\$L\w+):"), re.compile(r"(@!?%p\d+\s+)?(bra|brx\.idx|ret|exit)\b.*?(\$L\w+)?;")
TABLE = re.compile(r"(\$L\w+):\s*\.branchtargets([^;]*);")


def hand_overs(ptx, during=0):
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
    queue, arrivals, early = [0], set(), set()
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
            if during and groups:
                early.add(at)
            assert (open_, 0 if during else groups, products, accesses) == (0, 0, 0, 0), f"line {at + 1}: {line}"
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
    assert len(early) == during, [lines[x] for x in early]
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
    with pytest.raises(AssertionError, match=r"mbarrier\.arrive"):
        hand_overs("\n".join(lines))


def test_hand_overs_while_products_run_are_counted_and_need_their_barrier():
    text = "\n".join([WRITE, PRODUCT, COMMIT, BARRIER, ARRIVE, WAIT, BARRIER, ARRIVE])
    assert hand_overs(text, during=1) == 2
    for wrong in (0, 2):
        with pytest.raises(AssertionError):
            hand_overs(text, during=wrong)
    for lines in ([PRODUCT, COMMIT, BARRIER, WRITE, ARRIVE], [PRODUCT, BARRIER, ARRIVE], [PRODUCT, COMMIT, ARRIVE]):
        with pytest.raises(AssertionError, match=r"mbarrier\.arrive"):
            hand_overs("\n".join(lines), during=1)


# By head size and whether in fixed point. Scalars, most of the warpgroup of queries and its 72 registers: bytes with
# Triton 3.6 and with 3.8.
BACKWARD_SPILLS = {(64, True): (16, 48), (64, False): (32, 40), (128, True): (180, 180), (128, False): (240, 180)}
QUICK_BACKWARD = {(128, False, False, True), (64, True, True, True), (128, False, False, False)}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("dim", "pooled", "padded", "fixed"),
    [
        unless((dim, *shape, fixed) in QUICK_BACKWARD, dim, *shape, fixed)
        for dim in gluon_backward.CONFIGS
        for shape in SHAPES
        for fixed in (True, False)
    ],
)
def test_gluon_backward(dim, pooled, padded, fixed):
    recorded = gluon_backward_launches(
        BF16, dim, heads_k=2, tokens=2056 if padded else 2048, pooled=pooled, padded=padded, fixed=fixed
    )
    assert [x.name for x in recorded] == (
        ["_extent_kernel"] * ((1 + pooled) * fixed)
        + ["_bounds_kernel"] * fixed
        + ["_statistics_kernel"]
        + ["_backward_kernel"] * (1 + pooled)
        + ["_order_kernel"]
    )
    for launch in recorded:
        code = compile_launch(launch)
        assert not code.serialized, launch
        if launch.name != "_backward_kernel":
            assert code.spills == 0, launch
            continue
        assert code.spills <= BACKWARD_SPILLS[dim, fixed][NEWER], launch
        tall, ahead = launch.arguments["q_desc"].block_shape[2], launch.arguments["AHEAD"]
        # Two warpgroups of keys: S (the first ahead of the loop, too) and dP over the head size, dV and dK over the
        # queries; then dQ over 128 keys, 64 columns at a time: in fixed point one loop, in any order one after another.
        pieces = 1 if fixed else dim // 64
        assert code.count("HGMMA") == 2 * ((2 + ahead) * dim // 16 + 2 * tall // 16) + pieces * 128 // 16
        assert code.count("USETMAXREG") > 0  # not ignored for want of registers
        assert ("red.relaxed.gpu.global.add.v4.f32" in code.ptx) == (not fixed)
        assert code.ptx.count("red.relaxed.gpu.global.add.s32") == fixed * 32
        assert code.shared_bytes <= 227 * 1024
        assert hand_overs(code.ptx, during=2) == 5


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
def test_hand_overs_of_a_pyramid(dim):
    launch = pyramid_launches(BF16, dim)[-1]
    assert launch.name == "_pyramid_kernel"
    assert hand_overs(compile_launch(launch).ptx) >= 8


@pytest.mark.compile
@pytest.mark.slow
def test_gluon_float16_and_padded():
    code = compile_launch(gluon_launches(FP16, 128, padded=True)[-1])
    check_gluon(code, 128, 128, 128)
    assert code.spills == 0


@pytest.mark.compile
def test_no_gradient_from_the_log_sum_exp():
    rows = [x for x in attention_launches(BF16, 128, from_lse=False) if x.name == "_rows_kernel"]
    rows += [x for x in gluon_backward_launches(BF16, 128, from_lse=False) if x.name == "_statistics_kernel"]
    assert [x.arguments["dlse_ptr"] for x in rows] == [None, None]
    for launch in rows:
        assert compile_launch(launch).spills == 0


@pytest.mark.compile
def test_gluon_helpers():
    for launch in gluon_launches(BF16, 64, pooled=True)[:-1]:
        assert compile_launch(launch).spills == 0
