"""The bench on a CPU with the reference for a backend: what is measured and checked. Only the clock is replaced."""

import sys
import types
from functools import partial

import hone_kernels.attention.bench as bench_module
import pytest
import torch
from hone_kernels import cli
from hone_kernels.attention import BlockLayout, block_sparse_attention
from hone_kernels.attention.bench import MODES, SHAPES, Shape, bench, providers, random_layout
from hone_kernels.timing import Times

FP8 = torch.float8_e4m3fn
SMALL = Shape("small", 4, 300, 32, 2)


@pytest.fixture
def on_cpu(monkeypatch):
    """Calls run once; cuDNN takes 4 ms, everything else 2."""

    def clock(named, *, rounds, seed):
        for call in named.values():
            call()
        return {name: Times(1.0, 4.0 if name.startswith("cudnn") else 2.0, 5.0, rounds) for name in named}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench_module, "_DEVICE", "cpu")
    monkeypatch.setattr(bench_module, "interleaved", clock)
    dense = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    monkeypatch.setattr(bench_module, "cudnn", dense)
    return monkeypatch


def run(dtypes, shape=SMALL, backends=("reference",), **fields):
    settings = dict(densities=[1.0, 0.4], rounds=3, say=lambda text: None)
    return bench([shape], dtypes=dtypes, backends=list(backends), **{**settings, **fields})


def test_every_mode_and_how_it_is_counted(on_cpu):
    lines = []
    shape = Shape.parse("2x300x32")
    rows = run([torch.float32, FP8], shape, ["reference", "triton"], say=lines.append)
    assert sum("no backend 'triton', since" in line for line in lines) == 2
    seen = {(r["dtype"], r["mode"], r["provider"]) for r in rows}
    assert seen == {
        *[("float32", mode, "hone reference") for mode in ("forward", "forward pooled", "backward")],
        *[("float8_e4m3fn", mode, "hone reference") for mode in ("forward", "backward", "prologue")],
        ("float8_e4m3fn", "forward", "hone reference and prologue"),
        *[("float8_e4m3fn", mode, "cudnn dense") for mode in ("forward", "backward")],
        ("float8_e4m3fn", "prologue", "device copy"),
    }
    (dense,) = (r for r in rows if (r["dtype"], r["mode"], r["density"]) == ("float32", "forward", 1.0))
    assert dense["tflops"] == pytest.approx(4 * 32 * 2 * 300**2 / 2.0 / 1e9)
    (prologue,) = (r for r in rows if r["mode"] == "prologue" and r["provider"] == "hone reference")
    assert prologue["gbps"] == pytest.approx(9 * 2 * 300 * 32 / 2.0 / 1e6)
    assert len(cli.table(rows).splitlines()) == len(rows) + 1


def test_errors_are_those_of_the_rows_own_mode_and_density(on_cpu):
    rows = run([torch.bfloat16, FP8])
    ours = [r for r in rows if r["provider"].startswith("hone")]
    assert all(r["error"] is None for r in rows if r not in ours)
    assert all(0 < r["error"] < (0.01 if r["dtype"] == "bfloat16" else 0.15) for r in ours)
    # One error for all would be one number: every row of ours has its own, but that the prologue before the forward
    # rounds as the forward's operands were rounded.
    distinct = {r["error"] for r in ours if not r["provider"].endswith("and prologue")}
    assert len(distinct) == sum(not r["provider"].endswith("and prologue") for r in ours)
    (prologue,) = (r for r in ours if r["mode"] == "prologue")
    assert 0.02 < prologue["error"] < 0.03  # E4M3 of Gaussian numbers


def test_speed_up_is_over_cudnn_of_the_same_run(on_cpu):
    rows = run([torch.bfloat16, torch.float32, FP8])
    for r in rows:
        if r["dtype"] == "float32" or r["mode"] == "prologue":  # cuDNN has no float32, and no prologue
            assert r["speedup_over_dense"] is None
        else:
            assert r["speedup_over_dense"] == (1.0 if r["provider"] == "cudnn dense" else 2.0)


def spoiled(x, which):
    """x, wrong where ``which`` says."""
    x = x.clone()
    x[which] += 1
    return x


@pytest.mark.parametrize("mode", ["forward", "forward pooled", "backward"])
def test_a_wrong_value_of_any_mode_ends_the_run_before_it_is_timed(on_cpu, mode):
    def never(*args, **kwargs):
        raise AssertionError("timed")

    def wrong(q, k, v, layout, *, pooled=None, backend):
        if q.dtype == torch.bfloat16:  # a call of ours; the reference computes in float32
            if mode == "backward" and q.requires_grad:
                v = v * 1.0
                v.register_hook(lambda grad: spoiled(grad, (0, 0, -1)))
            elif mode == "forward pooled" and pooled is not None:
                pooled = type(pooled)(pooled.k, pooled.v, pooled.bias + 1)
            elif mode == "forward":
                return spoiled(block_sparse_attention(q, k, v, layout, backend=backend), (0, 1, -1))
        return block_sparse_attention(q, k, v, layout, pooled=pooled, backend=backend)

    on_cpu.setattr(bench_module, "block_sparse_attention", wrong)
    on_cpu.setattr(bench_module, "interleaved", never)
    with pytest.raises(RuntimeError, match=f"hone reference, {mode} is wrong"):
        run([torch.bfloat16], modes=[mode])


@pytest.mark.parametrize("mode", ["forward", "backward", "prologue"])
def test_wrong_fp8_values_end_the_run(on_cpu, mode):
    good = {name: getattr(bench_module, name) for name in ("quantize_qkv", "straight_through_attention")}
    whole = SMALL.heads

    def quantize(q, k, v, *, backend):
        return good["quantize_qkv"](spoiled(q, (0, 0)) if q.shape[1] == whole else q, k, v, backend=backend)

    def train(q, k, v, layout, *, backend):
        return good["straight_through_attention"](q, k * 1.1, v, layout, backend=backend)

    on_cpu.setattr(bench_module, "quantize_qkv", quantize)
    on_cpu.setattr(bench_module, "straight_through_attention", train)
    with pytest.raises(RuntimeError, match=f"hone reference.*, {mode} is wrong"):
        run([FP8], modes=[mode])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_a_long_sequence_is_compared_at_some_queries(on_cpu, dtype):
    on_cpu.setattr(bench_module, "_PAIRS_CHECKED", 3 * 2 * 32 * 300)
    on_cpu.setattr(bench_module, "_PAIRS_AT_ONCE", 2 * 2 * 32 * 300)
    modes = [mode for mode in MODES if mode != "prologue"]
    rows = run([dtype], block=32, modes=modes)
    assert all(r["error"] for r in rows if r["provider"].startswith("hone"))
    layout = random_layout(4, 300, 0.4, 32)
    chunks = list(bench_module._chunks(layout, 2))
    queries = torch.cat([at for at, _ in chunks]).tolist()
    assert queries == [*range(32), *range(4 * 32, 5 * 32), *range(9 * 32, 300)]
    assert [len(at) for at, _ in chunks] == [64, 12]
    some = BlockLayout(layout.kv_num[:, :2], layout.kv_idx[:, :2], 300, 300, 32, 32).to_mask()[:, :, [0, 4, 9]]
    assert torch.equal(torch.cat([lists.to_mask() for _, lists in chunks], dim=2), some)


def test_nan_is_an_error():
    good = torch.ones(3)
    bad = torch.tensor([1.0, torch.nan, 1.0])
    for got in ([good, bad], [bad, good]):
        with pytest.raises(RuntimeError, match="relative error nan"):
            bench_module._checked("x", got, [good, good], 1e-2, good)


def test_nothing_to_time_is_said(on_cpu):
    with pytest.raises(RuntimeError, match="nothing was timed"):
        run([torch.float32], backends=["gluon"])


def test_both_flash_attentions_are_peers_and_absent_ones_are_named(on_cpu):
    def flash(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    two, three = types.ModuleType("flash_attn"), types.ModuleType("flash_attn_interface")
    two.flash_attn_func = flash
    three.flash_attn_func = lambda q, k, v: (flash(q, k, v), None)
    on_cpu.setitem(sys.modules, "flash_attn", two)
    on_cpu.setitem(sys.modules, "flash_attn_interface", three)
    on_cpu.setitem(sys.modules, "sageattention", None)
    q, k, v = torch.randn(3, 1, 2, 300, 32, dtype=torch.bfloat16).unbind()
    found = providers(random_layout(2, 300, 1.0), torch.bfloat16, [])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for name in ("flash-attn 2 dense", "flash-attn 3 dense"):
        assert torch.equal(found[name](q, k, v), want)
    assert "sageattention dense" not in found
    lines = []
    rows = run([torch.bfloat16], Shape.parse("2x300x32"), modes=["forward"], say=lines.append)
    assert {"flash-attn 2 dense", "flash-attn 3 dense"} < {r["provider"] for r in rows}
    (line,) = (line for line in lines if "left out" in line)
    assert line.startswith("sageattention dense is left out: ModuleNotFoundError: import of sageattention")

    on_cpu.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # one without the function
    on_cpu.setitem(sys.modules, "flash_attn_interface", None)
    lines.clear()
    run([torch.bfloat16], Shape.parse("2x300x32"), modes=["forward"], say=lines.append)
    assert [line.split(" is left out")[0] for line in lines if "left out" in line] == list(bench_module._PEERS)


def test_shapes_by_name_and_by_size():
    assert Shape.parse("cogvideox-5b") is SHAPES["cogvideox-5b"]
    assert Shape.parse("12x4096x64") == Shape("12x4096x64", 12, 4096, 64, 12)
    for text in ("wan", "12x4096", "0x4096x64", "12x-1x64"):
        with pytest.raises(ValueError, match="HEADSxTOKENSxHEAD_SIZE"):
            Shape.parse(text)
