"""What is kept of launches and layouts, by a stand-in for a kernel: a kept launch must equal Triton's own."""

import gc
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hone_core.testing import requires_gpu
from hone_kernels import launch as module
from hone_kernels.attention import BlockLayout, PooledKV, api, block_sparse_attention
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention, straight_through_attention
from hone_kernels.launch import Kept, Notes, Plans, eager, geometry, kept_beside, launch, number, plannable

pytest.importorskip("triton", reason="Triton is for Linux only")


@pytest.fixture(autouse=True)
def keep(monkeypatch):
    monkeypatch.setattr(module, "KEEP", True)


class Kernel:
    """Notes the arguments of each launch, and whether Triton's own way was taken."""

    arg_names = ("x", "out", "y", "n", "SIZE")
    device_caches = None
    pre_run_hooks = ()

    def __init__(self):
        self.seen = []
        self.compiled = SimpleNamespace(run=self.run, function="f", packed_metadata="m")

    def run(self, *args):
        self.seen.append(("kept", args[:3], args[3:9], args[9:]))

    def __getitem__(self, grid):
        def whole(x, out, y, n, SIZE, num_warps):
            self.seen.append(("triton", grid, None, (x, out, y, n, SIZE)))
            return self.compiled

        return whole


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if the kernels were compiled, and the tensors on a device with a stream."""
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "_launches", Kept())
    monkeypatch.setattr(module, "_maps", Kept())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)


def call(kernel, x, y, out):
    def build(x, y, out):
        return (3, 2), (x, out, y, x.shape[0]), dict(SIZE=4, num_warps=8)

    launch(kernel, geometry(x, y), (x, y, out), build)


def addresses(seen):
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in seen[3]]


def test_a_kept_launch_gives_each_argument_its_own_tensor(on_a_gpu):
    kernel = Kernel()
    one, two, three = (torch.zeros(16) for _ in range(3))
    call(kernel, one, one, one)  # the first call says nothing about which of them is which
    call(kernel, one, two, three)
    first, second = kernel.seen
    assert first[0] == "triton"
    assert second[:3] == ("kept", (3, 2, 1), (7, "f", "m", None, None, None))
    assert addresses(second) == [one.data_ptr(), three.data_ptr(), two.data_ptr(), 16, 4]


def test_another_geometry_is_another_launch(on_a_gpu):
    kernel = Kernel()
    for x in (torch.zeros(16), torch.zeros(32), torch.zeros(32)[::2], torch.zeros(16, dtype=torch.float16)):
        call(kernel, x, x, x)
    assert [seen[0] for seen in kernel.seen] == ["triton"] * 4
    call(kernel, *(torch.zeros(17)[1:] for _ in range(3)))  # a base that is not of whole 16 bytes is never kept
    call(kernel, *(torch.zeros(17)[1:] for _ in range(3)))
    assert [seen[0] for seen in kernel.seen] == ["triton"] * 6


def test_a_copy_made_on_the_way_is_not_kept(on_a_gpu):
    kernel, x = Kernel(), torch.zeros(16)

    def build(x):
        return (1,), (x, x.clone(), x, 1), dict(SIZE=4, num_warps=8)

    for _ in range(2):
        launch(kernel, geometry(x), (x,), build)
    assert [seen[0] for seen in kernel.seen] == ["triton"] * 2


def test_descriptors_get_the_new_base_and_keep_no_tensor(on_a_gpu):
    from triton.tools.tensor_descriptor import TensorDescriptor

    kernel = Kernel()

    def build(x, out):
        return (1,), (TensorDescriptor(x, [16, 16], [16, 1], [8, 16]), out, None, 1), dict(SIZE=4, num_warps=8)

    for _ in range(2):
        x, out = torch.zeros(16, 16), torch.zeros(16)
        launch(kernel, geometry(x), (x, out), build)
    mode, _, _, (found, *_) = kernel.seen[1]
    assert mode == "kept"
    assert type(found) is TensorDescriptor
    assert found.base is x
    assert (found.shape, found.strides, found.block_shape, found.padding) == ([16, 16], [16, 1], [8, 16], "zero")
    kernel.seen.clear()
    kept = [x for entry in module._launches.values() for x in (entry, *entry._arguments)]
    assert not any(isinstance(x, torch.Tensor) for x in kept)
    del found
    gc.collect()


def test_a_descriptor_is_encoded_once_for_each_base(on_a_gpu, monkeypatch):
    """What reaches the launcher below Triton's is what Triton's gives it."""
    import triton
    from triton.backends.nvidia import driver
    from triton.tools.tensor_descriptor import TensorDescriptor

    got, encoded = [], []

    def fill(address, *rest):
        encoded.append(address)
        return ("map", address, repr(rest))

    active = SimpleNamespace(utils=SimpleNamespace(fill_tma_descriptor=fill))
    monkeypatch.setattr(triton.runtime.driver, "_active", active, raising=False)
    signature = dict(enumerate(("tensordesc<fp32[8, 16]>", "*fp32", "*fp32", "i32", "constexpr")))
    meta = dict(swizzle=0, elem_size=4, elem_type=7, block_size=[8, 16], fp4_padded=False)

    class Run:
        launch = staticmethod(driver.wrap_handle_tensordesc(lambda *args: got.append(args), signature, [meta]))
        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid, launch_pdl = False, True

        def __call__(self, x, y, z, stream, function, *args):
            self.launch(x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, None, None, *args)

    if not triton.__version__.startswith("3.6."):
        assert module._below(Run()) == (None, None)
        return
    kernel = Kernel()
    kernel.compiled.run = Run()

    def build(x, out):
        return (3,), (TensorDescriptor(x, [16, 16], [16, 1], [8, 16]), out, None, 1), dict(SIZE=4, num_warps=8)

    tensors = [torch.zeros(16, 16) for _ in range(2)]
    for x in (*tensors, *tensors):
        out = torch.zeros(16)
        launch(kernel, geometry(x), (x, out), build)
        if not got:  # the first goes Triton's way
            assert len(kernel.seen) == 1
            kernel.seen.clear()
            got.append(None)
            continue
        descriptor = TensorDescriptor(x, [16, 16], [16, 1], [8, 16])
        seen = got[-1]
        kernel.compiled.run(3, 1, 1, 7, "f", "m", None, None, None, descriptor, out.data_ptr(), None, 1, 4)
        assert seen == got[-1]
    assert kernel.seen == []
    assert len(got) == 1 + 2 * 3
    assert len(encoded) == 2 + 3  # two bases, and three times Triton's way

    def other(x, out):
        return (3,), (TensorDescriptor(x, [8, 32], [32, 1], [8, 16]), out, None, 1), dict(SIZE=4, num_warps=8)

    # The same memory in another form is another descriptor, and so is it when it comes back.
    for x in (tensors[0].view(8, 32), tensors[0].view(8, 32), tensors[0]):
        launch(kernel, geometry(x), (x, torch.zeros(16)), other if x.shape[0] == 8 else build)
    assert [seen[13][2] for seen in got[-2:]] == [
        repr((0, 4, 7, [8, 16], n, [n[1], 1], 0)) for n in ([8, 32], [16, 16])
    ]
    assert [seen[13][1] for seen in got[-2:]] == [tensors[0].data_ptr()] * 2
    assert len(encoded) == 2 + 3 + 1
    assert len(module._maps) == 3


def test_what_lies_below_a_launcher_is_taken_only_where_it_is_known():
    run = SimpleNamespace(launch=len, global_scratch_size=0, profile_scratch_size=0)  # a function in C: no descriptors
    assert module._below(run) == (len, None)
    for other in (dict(global_scratch_size=1), dict(launch=lambda *args: None), dict(arg_annotations=[])):
        assert module._below(SimpleNamespace(**vars(run) | other)) == (None, None)
    assert module._below(lambda *args: None) == (None, None)


def test_threads_launch_side_by_side(on_a_gpu):
    kernel = Kernel()
    call(kernel, *(torch.zeros(16) for _ in range(3)))
    sets = [[torch.zeros(16) for _ in range(3)] for _ in range(8)]

    def often(tensors):
        for _ in range(200):
            call(kernel, *tensors)

    with ThreadPoolExecutor(len(sets)) as pool:
        list(pool.map(often, sets))
    want = Counter({(x.data_ptr(), out.data_ptr(), y.data_ptr()): 200 for x, y, out in sets})
    assert Counter(tuple(addresses(seen)[:3]) for seen in kernel.seen[1:]) == want


def test_a_profiler_sees_every_launch(on_a_gpu, monkeypatch):
    kernel, x = Kernel(), torch.zeros(16)
    call(kernel, x, x, x)
    monkeypatch.setattr(module._RUNTIME, "launch_enter_hook", SimpleNamespace(calls=[print]))
    call(kernel, x, x, x)
    assert [seen[0] for seen in kernel.seen] == ["triton"] * 2


def test_what_is_kept_is_bounded():
    kept = Kept(3)
    for i in range(5):
        kept.keep(i, i)
    assert list(kept) == [2, 3, 4]


def test_what_is_kept_beside_a_tensor_follows_it_and_goes_with_it():
    made = []

    def get(x, what="sum"):
        return kept_beside(x, what, lambda: made.append(what) or x.sum())

    x, held = torch.ones(3), len(module._beside)
    assert get(x) is get(x)
    x += 1
    assert get(x) == 6
    assert get(x, "other") is get(x, "other")
    assert made == ["sum", "sum", "other"]
    weight = torch.ones(3, requires_grad=True)  # who trains it may write where nobody counts
    assert get(weight) is not get(weight)
    with torch.inference_mode():
        y = torch.ones(3)
    assert get(y) is not get(y)
    assert len(module._beside) == held + 1
    del x
    gc.collect()
    assert len(module._beside) == held


def test_a_number_stands_for_one_key(monkeypatch):
    monkeypatch.setattr(module, "_numbers", Kept(2))
    one, two = number((1, "x")), number((2, "x"))
    assert one
    assert two
    assert one != two
    assert (number((1, "x")), number((2, "x"))) == (one, two)
    number((3, "x"))
    assert number((1, "x")) not in (one, two)  # forgotten, so that no other key may have had it since


def test_nothing_is_kept_where_that_is_refused(on_a_gpu, monkeypatch):
    monkeypatch.setattr(module, "KEEP", False)
    assert not eager(torch.zeros(2))
    kernel, x = Kernel(), torch.zeros(16)
    call(kernel, x, x, x)
    call(kernel, x, x, x)
    assert [seen[0] for seen in kernel.seen] == ["triton"] * 2


def test_only_plain_calls_are_eager():
    x = torch.zeros(2)
    assert eager(x, None, torch.nn.Parameter(x))
    assert not eager(x.as_subclass(type("Other", (torch.Tensor,), {})))
    with torch._subclasses.FakeTensorMode():
        assert not eager(x)
    assert torch.func.vmap(lambda y: y * eager(y))(x[None] + 1).sum() == 0
    with torch.autograd.forward_ad.dual_level():
        assert not eager(x)


def planned(plans, kernel, x, y, forget=False):
    """An op of one kernel: what it gives, and whether by a plan."""
    again = plans.find("op", (x, y)) if plannable() else None
    if again is not None:
        parts, addresses, stream = again
        return parts.op(addresses, stream)[0], True
    notes = Notes(x, y)
    out, scratch = notes.made(torch.empty_like(x)), torch.empty(8)
    if not forget:
        notes.made(scratch)

    def build(x, y, out, scratch):
        return (3, 2), (x, out, y, scratch), dict(SIZE=4, num_warps=8)

    launch(kernel, geometry(x, y), (x, y, out, scratch), build, notes)
    plans.add("op", (x, y), op=notes.replay(out))
    return out, False


def test_a_plan_does_what_the_first_call_did(on_a_gpu):
    plans, kernel = Plans(), Kernel()
    pairs = [(torch.zeros(2, 16).t().contiguous().t(), torch.zeros(16)) for _ in range(3)]
    outs = [planned(plans, kernel, *pair) for pair in pairs]
    assert [by_plan for _, by_plan in outs] == [False, True, True]
    first = kernel.seen[0]
    for (x, y), (out, _), seen in zip(pairs[1:], outs[1:], kernel.seen[1:], strict=True):
        assert seen[:3] == ("kept", (3, 2, 1), (7, "f", "m", None, None, None))
        assert addresses(seen)[:3] == [x.data_ptr(), out.data_ptr(), y.data_ptr()]
        assert addresses(seen)[3] not in {0, *addresses(seen)[:3]}  # scratch of its own
        assert (out.shape, out.stride(), out.dtype) == (x.shape, x.stride(), x.dtype)
        assert not out.requires_grad
    assert first[0] == "triton"
    assert addresses(first)[:3] == [pairs[0][0].data_ptr(), outs[0][0].data_ptr(), pairs[0][1].data_ptr()]
    kept = gc.get_referents(*plans._kept.values())
    assert not any(isinstance(x, torch.Tensor) for x in kept)


def test_what_a_plan_makes_on_the_way_lives_until_its_launches(monkeypatch):
    """Lists from inference mode keep no order of rows: where it had gone, the output would be given its memory."""
    alive = []

    def made(*args):
        x = torch.zeros(4)
        alive.append(weakref.ref(x))
        return x

    def forward(addresses, stream):
        assert addresses == [1, *[ref().data_ptr() for ref in alive]]
        return stream

    monkeypatch.setattr(api, "row_order", made)
    monkeypatch.setattr(api, "_padded", made)
    parts = SimpleNamespace(call=SimpleNamespace(backend="gluon", batch=1, heads=1), forward=forward)
    layout = SimpleNamespace(k_valid=None)
    assert api._replay((parts, [1], 7), layout, torch.zeros(1), torch.zeros(1)) == 7
    assert len(alive) == 2


def test_a_plan_is_for_its_kind_only(on_a_gpu, monkeypatch):
    plans, kernel = Plans(), Kernel()
    x, y = torch.zeros(16), torch.zeros(16)

    def by_plan(a, b):
        again = plans.find("op", (a, b)) if plannable() else None
        return again is not None

    planned(plans, kernel, x, y)
    assert by_plan(x, y)
    assert by_plan(torch.ones(16), torch.ones(16))
    others = {
        "shape": torch.zeros(32),
        "strides": torch.zeros(32)[::2],
        "dtype": torch.zeros(16, dtype=torch.float16),
        "device": torch.zeros(16, device="meta"),
        "base": torch.zeros(17)[1:],
        "gradient": torch.zeros(16, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.zeros(16)),
        "subclass": x.as_subclass(type("Other", (torch.Tensor,), {})),
        "conjugate": torch.zeros(16, dtype=torch.complex64).conj().imag,
        "no tensor": None,
        "the same twice": x,
    }
    for name, other in others.items():
        assert not by_plan(other, x), name
    with torch.inference_mode():
        assert not by_plan(x, y)
        assert not by_plan(torch.zeros(16), torch.zeros(16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not by_plan(x, y)
    with torch.autograd.forward_ad.dual_level():
        assert not by_plan(x, y)
    with torch._subclasses.FakeTensorMode():
        assert not by_plan(x, y)
    seen = []
    torch.func.vmap(lambda z: seen.extend([by_plan(z, y), by_plan(x, y)]) or z)(x[None])
    torch.func.grad(lambda z: seen.extend([by_plan(z, y), by_plan(x, y)]) or z.sum())(x)
    assert seen == [False] * 4
    traced = torch.compile(lambda z: z * by_plan(z, y), backend="eager", fullgraph=True)
    assert traced(x + 1).sum() == 0
    with monkeypatch.context() as patch:
        patch.setattr(module._RUNTIME, "launch_enter_hook", SimpleNamespace(calls=[print]))
        assert not by_plan(x, y)
    # Each of these has a plan of its own.
    for other in (others["shape"], others["gradient"]):
        planned(plans, kernel, other, x)
        assert by_plan(other.detach().clone().requires_grad_(other.requires_grad), y)
    assert by_plan(x, y)


def test_more_than_allocations_and_launches_is_no_plan(on_a_gpu):
    plans, kernel, x = Plans(), Kernel(), torch.zeros(16)
    planned(plans, kernel, x, torch.zeros(16), forget=True)  # a tensor that was made on the way
    planned(plans, kernel, x, x)  # of one tensor twice
    assert plans.find("op", (x, torch.zeros(16))) is None
    assert plans.find("op", (x, x)) is None


def test_zeros_of_a_plan_are_zeros_each_time(on_a_gpu):
    plans, x = Plans(), torch.zeros(4)
    notes = Notes(x)
    zeros = notes.made(torch.zeros(1 << 12), zeros=True)
    plans.add("op", (x,), op=notes.replay(zeros))
    for _ in range(3):
        parts, given, stream = plans.find("op", (torch.ones(4),))
        (got,) = parts.op(given, stream)
        assert (got == 0).all()
        got += 1


def test_plans_are_bounded_and_threads_share_them(on_a_gpu, monkeypatch):
    plans, kernel = Plans(kinds=2), Kernel()
    sizes = (16, 32, 48)

    def found():
        return [plans.find("op", (torch.zeros(n), torch.zeros(n))) is not None for n in sizes]

    for n in sizes:
        planned(plans, kernel, torch.zeros(n), torch.zeros(n))
    assert found() == [False, True, True]
    with monkeypatch.context() as patch:
        patch.setattr(module._RUNTIME, "launch_enter_hook", SimpleNamespace(calls=[print]))
        for _ in range(2):
            assert not planned(plans, kernel, torch.zeros(48), torch.zeros(48))[1]
    assert found() == [False, True, True]

    def often(n):
        return {planned(plans, kernel, torch.zeros(n), torch.zeros(n))[0].shape for _ in range(200)}

    with ThreadPoolExecutor(8) as pool:
        for n, shapes in zip([*sizes] * 4, pool.map(often, [*sizes] * 4), strict=True):
            assert shapes == {(n,)}


def layout():
    mask = torch.rand(1, 2, 4, 4) < 0.6
    return BlockLayout.from_mask(mask, 256, 256, block_q=64, block_k=64)


def test_what_is_kept_of_a_layout_follows_its_lists():
    lists = layout()
    made = []

    def make():
        made.append(lists.kv_num.sum())
        return made[-1]

    assert lists.kept("sum", make) is lists.kept("sum", make)
    assert lists.kept("other", make) is not made[0]
    lists.kv_num[0, 0, 0] = 1
    assert lists.kept("sum", make) is made[2]
    lists.kv_idx.clamp_(max=3)
    lists.kept("sum", make)
    assert len(made) == 4
    replace(lists, check=False).kept("sum", make)
    assert len(made) == 5
    with torch.inference_mode():
        lists = layout()
    for _ in range(2):  # no one counts the changes of these
        lists.kept("sum", make)
    assert len(made) == 7


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
def test_gradients_follow_lists_that_change():
    lists = layout()
    leaves = [torch.randn(1, 2, 256, 32, dtype=torch.float16, requires_grad=True) for _ in range(3)]

    def gradients(lists):
        out = block_sparse_attention(*leaves, lists, backend="triton")
        return torch.autograd.grad(out.float().square().sum(), leaves)

    gradients(lists)
    assert "columns" in lists.__dict__["_held"]
    lists.kv_num.fill_(1)
    again = gradients(lists)
    want = gradients(BlockLayout(lists.kv_num.clone(), lists.kv_idx.clone(), 256, 256, 64, 64))
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
def test_a_second_derivative_is_refused():
    q = torch.randn(1, 1, 64, 32, dtype=torch.float16, requires_grad=True)
    out = block_sparse_attention(q, q, q, BlockLayout.dense(64, 64, block_q=64, block_k=64), backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), q)


def calls(layout, backend, memory="BSHD", tokens=256):
    """What there is to call, by name, on inputs of its own."""
    shape = (1, tokens, 2, 128) if memory == "BSHD" else (1, 2, tokens, 128)
    q, k, v = torch.randn(3, *shape, device="cuda", dtype=torch.bfloat16).unbind()
    if memory == "BSHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    pooled = PooledKV(k[:, :, ::10].contiguous(), v[:, :, ::10].contiguous(), torch.tensor(2.0, device="cuda"))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    found = {
        "forward": lambda: block_sparse_attention(q, k, v, layout, backend=backend),
        "pooled": lambda: block_sparse_attention(q, k, v, layout, pooled=pooled, backend=backend),
    }
    for name, attend in (("backward", block_sparse_attention), ("fp8 backward", straight_through_attention)):
        out = attend(*leaves, layout, backend="triton" if name == "fp8 backward" else backend)
        found[name] = lambda out=out: torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    if backend == "triton":
        operands = quantize_qkv(q, k, v, backend=backend)
        found["fp8"] = lambda: quantized_attention(operands, layout, backend=backend)
        found["prologue"] = lambda: quantize_qkv(q, k, v, backend=backend).dequantize()
    return found


def same(a, b):
    a, b = ([x] if isinstance(x, torch.Tensor) else x for x in (a, b))
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@requires_gpu(min_sm=90)
@pytest.mark.parametrize("tokens", [256, 500])
@pytest.mark.parametrize("memory", ["BSHD", "BHSD"])
@pytest.mark.parametrize("backend", ["gluon", "triton"])
def test_a_kept_launch_gives_the_same_bits(backend, memory, tokens, monkeypatch):
    blocks = -(-tokens // 128)
    for density in (1.0, 0.5):
        mask = torch.rand(1, 2, blocks, blocks, device="cuda") <= density
        for call in calls(BlockLayout.from_mask(mask, tokens, tokens), backend, memory, tokens).values():
            call()
        # Other tensors and lists of the same sizes: by what is kept, then Triton's own way.
        mask = torch.rand(1, 2, blocks, blocks, device="cuda") <= density
        for name, call in calls(BlockLayout.from_mask(mask, tokens, tokens), backend, memory, tokens).items():
            got = [call(), call()]
            with monkeypatch.context() as patch:
                patch.setattr(module, "INTERPRETED", True)
                want = call()
            assert same(got[0], want), name
            assert same(got[1], want), name


@requires_gpu(min_sm=90)
def test_lists_that_change_under_a_graph_and_on_another_stream():
    mask = torch.rand(1, 2, 4, 4, device="cuda") < 0.6
    layout = BlockLayout.from_mask(mask, 512, 512)
    q, k, v = torch.randn(3, 1, 2, 512, 128, device="cuda", dtype=torch.bfloat16).unbind()

    def call(layout):
        return block_sparse_attention(q, k, v, layout, backend="gluon")

    first = call(layout)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # What a launch counts in is as it was when it ends.
    assert [held.view(-1)[-2].item() for (what, *_), (_, held) in layout._held.items() if what == "rows"] == [0]
    assert torch.equal(call(layout), first)
    with torch.cuda.graph(graph):
        captured = call(layout)
    other = BlockLayout.from_mask(torch.rand(1, 2, 4, 4, device="cuda") < 0.6, 512, 512)
    layout.kv_num.copy_(other.kv_num)
    layout.kv_idx.copy_(other.kv_idx)
    want = call(other)
    for _ in range(2):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, want)
    assert torch.equal(call(layout), want)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = [call(layout) for _ in range(3)]
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(x, want) for x in got)


BOUNDS = {"forward": 60, "pooled": 80, "fp8": 60, "prologue": 430, "backward": 300}
"""Microseconds of the host, where 40 are aimed at: by a plan an H200's took 30, 39, 19 and 201 (the prologue with what
gives its values back, 319 before there were plans); nothing kept, up to 270, 416 pooled, and 1,116 backward."""


@requires_gpu(min_sm=90)
@pytest.mark.parametrize("backend", ["gluon", "triton"])
def test_host_time_of_a_call(backend, record_property):
    """The least of many: another process may take the core in between."""
    found = {}
    for name, call in calls(BlockLayout.dense(256, 256, device="cuda"), backend).items():
        if name in BOUNDS:
            each = []
            for _ in range(30):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(10):
                    call()
                each.append((time.perf_counter() - start) / 10 * 1e6)
            found[name] = min(each)
    record_property("host_us", found)
    assert {name: us for name, us in found.items() if us > BOUNDS[name]} == {}
