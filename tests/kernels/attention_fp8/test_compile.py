"""Every shipped FP8 configuration compiled for sm_90 without a GPU, and its machine code read.

What is marked slow is the rest of each grid.
"""

import pytest
import torch
from hone_kernels.attention import BlockLayout
from hone_kernels.attention_fp8 import SUPPORT
from hone_kernels.compile import compile_launch, record_launches

forward = pytest.importorskip("hone_kernels.attention_fp8.triton", reason="Triton is for Linux only")
prologue = pytest.importorskip("hone_kernels.attention_fp8.triton_quantize", reason="Triton is for Linux only")

DIMS = SUPPORT["triton"].head_dims


def unless(quick, *values):
    """Parameters of a test, slow unless they are among the quick ones."""
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


def forward_launch(monkeypatch, dim, tokens, padded, block=128, tiles=None, sm=90, placed=False):
    monkeypatch.setattr(forward, "_sm", lambda x: sm)
    blocks = -(-tokens // block)
    q8, v8 = (
        torch.empty(shape, dtype=torch.float8_e4m3fn)
        for shape in ((1, 2, tokens, dim), (1, 2, dim, -(-tokens // 128) * 128))
    )
    scale, v_scale = torch.empty(1, 2, blocks), torch.empty(1, 2, dim)
    layout = BlockLayout.dense(tokens, tokens, block_q=block, block_k=block)
    valid = torch.ones(1, blocks, dtype=torch.int32) if padded else None
    with record_launches(forward, "_forward_kernel") as recorded:
        forward.attention_fp8_forward(
            q8, q8, v8, scale, scale, v_scale, layout.kv_num, layout.kv_idx, valid, block, block, block, 0.1,
            torch.bfloat16, tiles,
            out=torch.empty(1, tokens, 2, dim, dtype=torch.bfloat16).transpose(1, 2) if placed else None,
            order=torch.empty(tokens, dtype=torch.int32) if placed else None,
        )  # fmt: skip
    return recorded[0]


QUICK = {(128, 128, 2048, False), (64, 128, 2056, False), (32, 128, 2056, True), (128, 64, 2056, True)}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("dim", "block", "tokens", "padded"),
    [
        unless((dim, block, *shape) in QUICK, dim, block, *shape)
        for dim in DIMS
        for block in SUPPORT["triton"].blocks
        for shape in ((2048, False), (2056, False), (2056, True))
    ],
)
def test_forward_uses_the_fp8_units(monkeypatch, dim, block, tokens, padded):
    code = compile_launch(forward_launch(monkeypatch, dim, tokens, padded, block))
    assert code.spills == 0
    assert not code.serialized
    loops = 2 if tokens % block and not padded else 1
    # One product with K, of 32 channels an instruction, and one with V, of 32 keys.
    assert code.count("QGMMA") == loops * (dim + block) // 32
    assert code.count("HGMMA") == 0
    assert code.count("UTMALDG") > 0
    # P stays in the thread that computed it: what is shuffled are two row maxima and two row sums, twice each.
    assert code.count("SHFL") == loops * 8


@pytest.mark.compile
@pytest.mark.parametrize("dim", [unless(False, 64), 128])
def test_forward_to_places(monkeypatch, dim):
    code = compile_launch(forward_launch(monkeypatch, dim, 2048, True, placed=True))
    assert code.spills == 0
    assert not code.serialized
    # Whole vectors, as many as without places.
    assert code.count(r"STG\.E\.128") == compile_launch(forward_launch(monkeypatch, dim, 2048, True)).count(
        r"STG\.E\.128"
    )


@pytest.mark.compile
def test_row_sums_are_added_in_float32(monkeypatch):
    """The product with V starts from zero in every tile: its 14 bits are not carried along the row."""
    code = compile_launch(forward_launch(monkeypatch, 128, 2048, False))
    products = [line for line in code.sass.splitlines() if "QGMMA" in line]
    assert len(products) == 8
    assert sum(", RZ" in line for line in products) == 2


@pytest.mark.compile
@pytest.mark.parametrize("dim", [unless(False, 64), 128])
def test_forward_before_hopper(monkeypatch, dim):
    code = compile_launch(forward_launch(monkeypatch, dim, 2056, False, sm=89), sm=89)
    assert code.spills == 0
    assert code.count("QMMA") > 0
    assert code.shared_bytes <= 99 * 1024


KERNELS = ("_sums_kernel", "_rows_kernel", "_values_kernel")


@pytest.mark.compile
@pytest.mark.parametrize(
    ("dim", "everything", "grouped"),
    [
        unless((dim, *kind) in ((64, True, True), (128, False, False)), dim, *kind)
        for dim in (64, 128)
        for kind in ((False, False), (True, False), (True, True))
    ],
)
def test_prologue_moves_whole_vectors(dim, everything, grouped):
    tokens = 2056
    q = torch.empty(1, tokens, 8, dim, dtype=torch.bfloat16).transpose(1, 2)
    table, order, valid = None, None, None
    if everything:
        table = torch.empty(tokens, dim // 2)
        order = torch.empty(tokens, dtype=torch.int32)
        valid = torch.ones(1, 17, dtype=torch.int32)
    groups = torch.arange(17) // 2 if grouped else None
    with record_launches(prologue, *KERNELS) as recorded:
        prologue.quantize_triton(q, q, q, table, table, order, valid, 128, groups, everything)
    assert {x.name for x in recorded} == set(KERNELS if everything else KERNELS[1:])
    for launch in recorded:
        code = compile_launch(launch)
        assert code.spills == 0, launch
        # Warps that share a multiprocessor and its 65,536 registers. Of V, few warps with many loads each are fastest.
        least = 12 if launch.name == "_values_kernel" else 16 if everything else 24
        assert 65536 // (32 * code.registers) >= least, launch
        if launch.name == "_values_kernel":
            assert code.count(r"LDSM\.16\.MT88\.4") > 0, launch
        if dim == 128:
            # Eight 16-byte loads bring a program's share of a tile of 128 tokens.
            assert code.count(r"LDG\.E(?:\.EF)?\.128") >= 8, launch
        if launch.name == "_rows_kernel" and launch.arguments["STEP"] != "amax":
            assert code.count(r"STG\.E\.(?:64|128)") > 0, launch


@pytest.mark.compile
@pytest.mark.parametrize(
    ("dim", "everything"), [unless((dim, x) == (128, True), dim, x) for dim in (64, 128) for x in (False, True)]
)
def test_groups_in_a_row_leave_room_for_other_programs(dim, everything):
    q = torch.empty(1, 2056, 20, dim, dtype=torch.bfloat16).transpose(1, 2)
    table = torch.empty(2056, dim // 2) if everything else None
    order, valid = torch.empty(2176, dtype=torch.int32), torch.ones(1, 17, dtype=torch.int32)
    with record_launches(prologue, *KERNELS) as recorded:
        prologue.quantize_triton(
            q, q, q, table, table, order, valid, 128, torch.arange(17) // 3, everything, longest=3, for_lse=False
        )
    (launch,) = (x for x in recorded if x.name == "_rows_kernel")
    assert launch.arguments["STEP"] == "run"
    code = compile_launch(launch)
    assert code.spills == 0
    assert 65536 // (32 * 8 * code.registers) >= (3 if everything else 4)
    assert code.count(r"STG\.E\.(?:64|128)") > 0


@pytest.mark.compile
@pytest.mark.parametrize(
    ("dtype", "heads", "tokens"),
    [
        unless(dtype == torch.float32 and tokens == 1, dtype, heads, tokens)
        for dtype in SUPPORT["triton"].dtypes
        for heads, tokens in ((1, 1), (2, 300))
    ],
    ids=str,
)
def test_prologue_compiles_for_every_dtype(dtype, heads, tokens):
    """Also where sizes are 1, which Triton makes constants of."""
    q = torch.empty(1, tokens, heads, 64, dtype=dtype).transpose(1, 2)
    table = torch.empty(tokens, 32)
    with record_launches(prologue, *KERNELS) as recorded:
        prologue.quantize_triton(q, q, q, table, table, None, None, 64, None, False)
        prologue.quantize_triton(q, q, q, None, None, None, None, 64, None, True)
    for launch in recorded:
        compile_launch(launch)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        unless((dim, dtype) in ((128, torch.bfloat16), (64, torch.float32)), dim, dtype)
        for dim in DIMS
        for dtype in SUPPORT["triton"].dtypes
    ],
    ids=str,
)
def test_dequantize_moves_whole_vectors(dim, dtype):
    q8, v8 = (torch.empty(shape, dtype=torch.float8_e4m3fn) for shape in ((1, 2, 2056, dim), (1, 2, dim, 2176)))
    scale, v_scale = torch.empty(1, 2, 17), torch.empty(1, 2, dim)
    with record_launches(prologue, "_dequantize_kernel") as recorded:
        prologue.dequantize_triton(q8, q8, v8, scale, scale, v_scale, 128, dtype)
    assert len(recorded) == 3
    for launch in recorded:
        code = compile_launch(launch)
        assert code.spills == 0, launch
        assert code.count(r"LDG\.E(?:\.EF)?\.(?:64|128)") > 0, launch
        assert code.count(r"STG\.E\.(?:64|128)") > 0, launch
