"""The bench on a CPU with the reference for a backend: what is measured and checked. Only the clock is replaced."""

import logging
import sys
import types
from functools import partial

import hone_kernels.attention.bench as bench_module
import hone_kernels.attention.flash as flash_module
import pytest
import torch
from hone_core.runs import Run
from hone_core.timing import Timing
from hone_kernels.attention import BlockLayout, block_sparse_attention
from hone_kernels.attention.bench import SHAPES, Shape, bench, providers, random_layout
from hone_kernels.attention.peers import DENSE_PEERS, LISTED_PEERS
from hone_kernels.rows import table

FP8 = torch.float8_e4m3fn
SMALL = Shape("small", 4, 300, 32, 2)


MODES = ("forward", "forward pooled", "backward", "prologue")


@pytest.fixture
def on_cpu(monkeypatch):
    """Calls run once; cuDNN takes 4 ms, everything else 2."""

    def clock(named, *, warmup, rounds, seed):
        for call in named.values():
            call()
        middle = {name: 4.0 if name.startswith("cudnn") else 2.0 for name in named}
        return {name: Timing(ms_p20=1.0, ms_p50=ms, ms_p80=5.0, n=rounds) for name, ms in middle.items()}

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench_module, "_DEVICE", "cpu")
    monkeypatch.setattr(bench_module, "measure_interleaved", clock)
    dense = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    monkeypatch.setattr(bench_module, "cudnn", dense)
    monkeypatch.setattr(logging.getLogger("hone_kernels"), "level", logging.INFO)
    return monkeypatch


def run(dtypes, shape=SMALL, backends=("reference",), modes=MODES, **fields):
    """Rows of a bench."""
    found = Run.start(package="hone-kernels", verb="bench")
    settings = dict(densities=[1.0, 0.4], rounds=3, **fields)
    bench(found, [shape], dtypes=dtypes, backends=backends, modes=modes, **settings)
    return found.rows


def ours(rows, metric):
    return [row for row in rows if row.variant.startswith("hone") and row.metric == metric]


def test_every_mode_and_how_it_is_counted(on_cpu, caplog):
    shape = Shape.parse("2x300x32")
    rows = run([torch.float32, FP8], shape, ["reference", "triton"])
    assert sum("no backend 'triton', since" in line for line in caplog.messages) == 2
    seen = {(r.labels["dtype"], r.split, r.variant) for r in rows}
    assert seen == {
        *[("float32", mode, "hone reference") for mode in ("forward", "forward pooled", "backward")],
        *[("float8_e4m3fn", mode, "hone reference") for mode in ("forward", "backward", "prologue")],
        ("float8_e4m3fn", "forward", "hone reference and prologue"),
        *[("float8_e4m3fn", mode, "cudnn dense") for mode in ("forward", "backward")],
        ("float8_e4m3fn", "prologue", "device copy"),
    }
    rates = [r for r in rows if r.metric == "rate"]
    (dense,) = (r for r in rates if (r.labels["dtype"], r.split, r.labels["density"]) == ("float32", "forward", 1.0))
    assert (dense.unit, dense.value) == ("TFLOP/s", pytest.approx(4 * 32 * 2 * 300**2 / 2.0 / 1e9))
    (prologue,) = (r for r in rates if r.split == "prologue" and r.variant == "hone reference")
    assert (prologue.unit, prologue.value) == ("GB/s", pytest.approx(9 * 2 * 300 * 32 / 2.0 / 1e6))
    times = [r for r in rows if r.metric == "time"]
    assert all((r.unit, r.n, r.spread) == ("ms", 3, 2.0) for r in times)
    assert len(table(rows).splitlines()) == len(times) + 1


def test_errors_and_speed_ups_are_of_the_rows_own_mode_and_density(on_cpu):
    rows = run([torch.bfloat16, torch.float32, FP8])
    errors = [r for r in rows if r.metric == "error"]
    # Dense ones are compared beside lists of all blocks.
    dense = [r for r in rows if r.variant == "cudnn dense" and (r.metric, r.labels["density"]) == ("error", 1.0)]
    assert {(r.labels["dtype"], r.split) for r in dense} == {
        (dtype, mode) for dtype in ("bfloat16", "float8_e4m3fn") for mode in ("forward", "backward")
    }
    assert [r for r in errors if r not in dense] == ours(rows, "error")
    errors = ours(rows, "error")
    assert len(errors) == len(ours(rows, "time"))
    assert all(0 < r.value < (0.15 if r.labels["dtype"] == "float8_e4m3fn" else 0.01) for r in errors)
    # One error for all would be one number: every row of ours has its own, but that the prologue before the forward
    # rounds as the forward's operands were rounded.
    own = [r for r in errors if not r.variant.endswith("and prologue")]
    assert len({r.value for r in own}) == len(own)
    (prologue,) = (r for r in errors if r.split == "prologue")
    assert 0.02 < prologue.value < 0.03  # E4M3 of Gaussian numbers
    lines = table(rows).splitlines()[1:]
    for line in lines:
        gain = line.split()[-3]
        if "float32" in line or "  prologue  " in line:  # cuDNN has no float32, and no prologue
            assert gain == "-"
        else:
            assert gain == ("1.00" if "cudnn dense" in line else "2.00")


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
    on_cpu.setattr(bench_module, "measure_interleaved", never)
    with pytest.raises(RuntimeError, match=f"hone reference, {mode} is wrong"):
        run([torch.bfloat16], modes=[mode])


def test_the_backward_in_any_order_is_a_row_of_its_own(on_cpu):
    asked = []
    on_cpu.setattr(bench_module, "block_sparse_attention", lambda *args, **options: asked.append(options))
    for block, backward in ((128, True), (128, False), (64, True)):
        found = providers(random_layout(2, 300, 1.0, block), torch.float32, ["gluon", "triton"], backward=backward)
        assert ("hone gluon in any order" in found) == (backward and block == 128)
        for name in set(found) - {"flex"}:
            found[name](None, None, None)
    loose = [x for x in asked if "deterministic" in x]
    assert loose == [{"pooled": None, "backend": "gluon", "deterministic": False}]
    assert len(asked) == 7


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
    assert len(ours(rows, "error")) == len(ours(rows, "time"))
    assert all(r.value for r in ours(rows, "error"))
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


def test_flash_attentions_are_peers_and_absent_ones_are_named(on_cpu, caplog):
    def flash(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    two, three = types.ModuleType("flash_attn"), types.ModuleType("flash_attn_interface")
    two.flash_attn_func = flash
    three.flash_attn_func = lambda q, k, v: (flash(q, k, v), None)
    on_cpu.setitem(sys.modules, "flash_attn", two)
    on_cpu.setitem(sys.modules, "flash_attn_interface", None)
    on_cpu.setitem(sys.modules, "fa3_fwd_interface", three)
    four = types.ModuleType("flash_attn.cute")
    four.flash_attn_func = three.flash_attn_func
    on_cpu.setitem(sys.modules, "flash_attn.cute", four)
    on_cpu.setitem(sys.modules, "sageattention", None)
    q, k, v = torch.randn(3, 1, 2, 300, 32, dtype=torch.bfloat16).unbind()
    found = providers(random_layout(2, 300, 1.0), torch.bfloat16, [])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    flashes = {f"flash-attn {n} dense" for n in (2, 3, 4)}
    for name in flashes:
        assert torch.equal(found[name](q, k, v), want)
    assert "sageattention dense" not in found
    rows = run([torch.bfloat16], Shape.parse("2x300x32"), modes=["forward"])
    assert flashes < {r.variant for r in rows}
    # The forward-only build of the third has no gradients, the full one has.
    backward = providers(random_layout(2, 300, 1.0), torch.bfloat16, [], backward=True)
    assert flashes - set(backward) == {"flash-attn 3 dense"}
    on_cpu.setitem(sys.modules, "flash_attn_interface", three)
    assert flashes < set(providers(random_layout(2, 300, 1.0), torch.bfloat16, [], backward=True))
    absent = [line for line in caplog.messages if "left out" in line]
    assert [line.split(" is left out")[0] for line in absent] == ["sageattention dense", *LISTED_PEERS]
    assert absent[0].startswith("sageattention dense is left out: ModuleNotFoundError: import of sageattention")
    assert {r.labels["dense"] for r in rows} <= flashes

    on_cpu.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # one without the function
    for name in ("flash_attn_interface", "fa3_fwd_interface", "flash_attn.cute"):
        on_cpu.setitem(sys.modules, name, None)
    caplog.clear()
    run([torch.bfloat16], Shape.parse("2x300x32"), modes=["forward"])
    assert [x.split(" is left out")[0] for x in caplog.messages if "left out" in x] == [*DENSE_PEERS, *LISTED_PEERS]


class Values(dict):
    """What cuDNN's op returns: a dictionary that gives its values in turn and by number, but no slice of them."""

    def __iter__(self):
        return iter(self.values())

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class Lists:
    """FlashAttention 4 and cuDNN's block-sparse op, as far as the bench calls them, by the reference."""

    def __init__(self, wrong=False):
        self.wrong = wrong
        interface, sparsity = types.ModuleType("flash_attn.cute.interface"), types.ModuleType("sparsity")
        interface.flash_attn_func, sparsity.BlockSparseTensorsTorch = self.flash, types.SimpleNamespace
        sparse = types.ModuleType("cudnn.block_sparse_attention")
        sparse.block_sparse_attention_forward, sparse.block_sparse_attention_backward = self.forward, self.backward
        cudnn = types.ModuleType("cudnn")
        cudnn.block_sparse_attention = sparse
        self.modules = {
            "flash_attn": types.ModuleType("flash_attn"),
            "flash_attn.cute": types.ModuleType("flash_attn.cute"),
            "flash_attn.cute.interface": interface,
            "flash_attn.cute.block_sparsity": sparsity,
            "cudnn": cudnn,
            "cudnn.block_sparse_attention": sparse,
        }

    def attend(self, q, k, v, num, idx):
        assert idx.shape == (*num.shape, -(-k.shape[1] // 128))
        layout = BlockLayout(num, idx, q.shape[1], k.shape[1], 128, 128)
        qkv = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = block_sparse_attention(*qkv, layout, return_lse=True, backend="reference")
        return out.transpose(1, 2) + self.wrong, lse

    def flash(self, q, k, v, *, softmax_scale, return_lse, block_sparse_tensors, block_sparse_tensors_bwd=None):
        assert (softmax_scale, return_lse) == (q.shape[3] ** -0.5, False)
        lists = block_sparse_tensors
        assert lists.block_size == (128, 128)
        assert not lists.mask_block_cnt.any()
        if block_sparse_tensors_bwd is not None:
            back = block_sparse_tensors_bwd
            columns = BlockLayout(back.full_block_cnt, back.full_block_idx, k.shape[1], q.shape[1], 128, 128).to_mask()
            rows = BlockLayout(lists.full_block_cnt, lists.full_block_idx, q.shape[1], k.shape[1], 128, 128).to_mask()
            assert torch.equal(columns.transpose(-1, -2), rows)
        return self.attend(q, k, v, lists.full_block_cnt, lists.full_block_idx)

    def forward(self, q, k, v, *, q2k_block_index, q2k_block_nums, sparse_block_size, layout):
        assert (sparse_block_size, layout) == (128, "bshd")
        out, lse = self.attend(q, k, v, q2k_block_nums, q2k_block_index)
        return Values(o_tensor=out, lse_tensor=lse)

    def backward(self, dout, q, k, v, out, lse, *, q2k_block_index, q2k_block_nums, sparse_block_size, layout):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            again, _ = self.attend(*leaves, q2k_block_nums, q2k_block_index)
            dq, dk, dv = torch.autograd.grad(again, leaves, dout)
            return Values(dq_tensor=dq, dk_tensor=dk, dv_tensor=dv)


@pytest.mark.parametrize("wrong", [False, True])
def test_peers_over_the_same_lists_run_forward_and_backward_and_their_values_count(on_cpu, caplog, wrong):
    for name, module in Lists(wrong).modules.items():
        on_cpu.setitem(sys.modules, name, module)
    on_cpu.setattr(flash_module, "_modules", flash_module._modules.__wrapped__)
    rows = run([torch.bfloat16], Shape("s", 2, 256, 32, 2), modes=["forward", "backward"], memory=["BHSD", "BSHD"])
    found = {(r.split, r.labels["memory"], r.variant) for r in rows if r.metric == "error"}
    found = {x for x in found if not x[2].endswith(" dense")}
    peers = {name for _, _, name in found} - {"hone reference"}
    if wrong:
        assert not {(mode, name) for mode, _, name in found if mode == "forward" and name in LISTED_PEERS}
        assert "flash-attn 4 is left out of s, forward: flash-attn 4, forward is wrong" in caplog.text
        return
    assert peers == set(LISTED_PEERS)
    assert len(found) == 2 * 2 * 3
    ragged = run([torch.bfloat16], Shape("s", 2, 300, 32, 2), modes=["forward"])
    assert {"flash-attn 4"} == {r.variant for r in ragged} & set(LISTED_PEERS)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_flash_attention_in_fp8_is_a_dense_peer_whose_values_count(on_cpu, caplog, factor):
    def flash(q, k, v, q_descale=None, k_descale=None, v_descale=None):
        if q_descale is not None:
            assert q.dtype == k.dtype == v.dtype == FP8
            assert q_descale.shape == (1, 2)
            scales = (q_descale, k_descale * factor, v_descale)
            q, k, v = (x.float() * s[:, None, :, None] for x, s in zip((q, k, v), scales, strict=True))
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    three = types.ModuleType("fa3_fwd_interface")
    three.flash_attn_func = flash
    on_cpu.setitem(sys.modules, "fa3_fwd_interface", three)
    on_cpu.setitem(sys.modules, "flash_attn_interface", None)
    rows = run([FP8], Shape.parse("2x300x32"), modes=["forward", "backward"])
    name = "flash-attn 3 fp8 dense"
    found = {(r.split, r.labels["density"]) for r in rows if (r.variant, r.metric) == (name, "time")}
    if factor == 1.0:
        assert found == {("forward", 1.0), ("forward", 0.4)}
        assert next(r for r in rows if (r.variant, r.metric) == (name, "error")).value > 0.01
        assert run([FP8], modes=["forward"])  # of other counts of heads it has no scales
    else:
        assert ("forward", 1.0) not in found
        assert f"{name} is left out of 2x300x32, forward: {name}, forward is wrong" in caplog.text


def test_host_time_of_a_call_is_a_row(on_cpu):
    on_cpu.setattr(bench_module, "measure_host", partial(bench_module.measure_host, calls=1))
    on_cpu.setattr(bench_module, "measure_interleaved", None)
    rows = run([torch.bfloat16, FP8], modes=["host"])
    assert {r.metric for r in rows} == {"host_us"}
    assert {r.labels["shape"] for r in rows} == {"2x256x128"}
    seen = {(r.labels["dtype"], r.split) for r in rows if r.variant == "hone reference"}
    modes = {("bfloat16", m) for m in ("forward", "forward pooled", "backward")}
    assert seen == modes | {("float8_e4m3fn", m) for m in ("forward", "backward", "prologue")}
    assert all(r.value > 0 and r.unit == "us" and r.better == "lower" for r in rows)
    assert "torch sdpa dense" in {r.variant for r in rows}


def test_shapes_by_name_and_by_size():
    assert Shape.parse("cogvideox-5b") is SHAPES["cogvideox-5b"]
    assert Shape.parse("12x4096x64") == Shape("12x4096x64", 12, 4096, 64, 12)
    for text in ("wan", "12x4096", "0x4096x64", "12x-1x64"):
        with pytest.raises(ValueError, match="HEADSxTOKENSxHEAD_SIZE"):
            Shape.parse(text)
