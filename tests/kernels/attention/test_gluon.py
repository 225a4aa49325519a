"""The Gluon kernels: helpers interpreted on a CPU, the kernels on a Hopper GPU against reference and Triton."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hone_core.testing import assert_close, nan_poison, no_host_sync, requires_gpu
from hone_kernels.attention import SUPPORT, BlockLayout, PooledKV, api, block_sparse_attention
from hone_kernels.attention.api import _attention_op, gradients_by

gluon = pytest.importorskip("hone_kernels.attention.gluon_sm90", reason="Triton is for Linux only")
backward = pytest.importorskip("hone_kernels.attention.gluon_backward_sm90", reason="Triton is for Linux only")

SUPPORTED = SUPPORT["gluon"]

pytestmark = [
    # Triton's interpreter turns run-time loop bounds into Python integers in a way that NumPy 2.3 frowns on.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
    # opcheck of torch 2.11 itself.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]


@dataclass(frozen=True)
class Case:
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 300
    keys: int = 523
    dim: int = 128
    block_q: int = 128
    block_k: int = 128
    keep: float = 0.5
    shared_lists: bool = False
    padded: bool = False
    pooled: int = 0
    bias: bool = False
    transposed: bool = False  # [B, S, H, D] in memory, as diffusers lays its tensors out

    def __str__(self):
        return "-".join(f"{k}{v}" for k, v in vars(self).items() if v != getattr(Case, k)) or "plain"


# Every case runs at both head sizes.
CASES = [
    Case(),
    Case(queries=1, keys=1, keep=1.0),
    Case(queries=129, keys=127, keep=1.0),
    Case(queries=512, keys=512, keep=1.0),
    Case(queries=900, keys=1100, keep=0.1),
    Case(queries=260, keys=200, keep=0.0),
    Case(queries=260, keys=200, keep=0.0, pooled=5),
    Case(queries=260, keys=257, pooled=128, bias=True),
    Case(queries=300, keys=900, pooled=301, bias=True),
    Case(batch=2, heads=4, kv_heads=2, transposed=True),
    Case(batch=3, heads=4, kv_heads=1, shared_lists=True, keys=640),
    Case(batch=2, padded=True),
    Case(batch=2, heads=4, kv_heads=2, padded=True, pooled=70, bias=True, transposed=True, shared_lists=True),
]
SIZES = [(128, 128), (128, 64), (64, 128), (64, 64)]


def build(case, dtype=torch.bfloat16, device="cuda"):
    def make(heads, tokens):
        shape = (case.batch, tokens, heads, case.dim) if case.transposed else (case.batch, heads, tokens, case.dim)
        x = torch.randn(*shape, device=device, dtype=dtype)
        return (x.transpose(1, 2) if case.transposed else x).requires_grad_()

    rows, cols = -(-case.queries // case.block_q), -(-case.keys // case.block_k)
    lead = (1, 1) if case.shared_lists else (case.batch, case.heads)
    mask = torch.rand(*lead, rows, cols) < case.keep
    if case.keep < 1 and rows > 1:
        mask[..., 0, :] = False  # a row without a key
        mask[..., 1, :] = False
        mask[..., 1, -1] = True  # a row of one block, the ragged one
    valid = torch.randint(0, case.block_k + 1, (case.batch, cols), dtype=torch.int32) if case.padded else None
    if valid is not None:
        valid[torch.rand(case.batch, cols) < 0.5] = case.block_k  # a step of whole blocks has no mask
    layout = BlockLayout.from_mask(
        mask.to(device),
        case.queries,
        case.keys,
        block_q=case.block_q,
        block_k=case.block_k,
        k_valid=None if valid is None else valid.to(device),
    )
    leaves = [make(case.heads, case.queries), make(case.kv_heads, case.keys), make(case.kv_heads, case.keys)]
    pooled = None
    if case.pooled:
        leaves += [make(case.kv_heads, case.pooled), make(case.kv_heads, case.pooled)]
        if case.bias:
            leaves.append(torch.randn(case.kv_heads, case.pooled, device=device).requires_grad_())
        pooled = PooledKV(*leaves[3:])
    return leaves, layout, pooled


def run(leaves, layout, pooled, backend, **options):
    q, k, v, *rest = leaves
    pooled = None if pooled is None else PooledKV(*rest)
    return block_sparse_attention(q, k, v, layout, pooled=pooled, return_lse=True, backend=backend, **options)


def compare(case, dtype):
    leaves, layout, pooled = build(case, dtype)
    leaves = [x.detach() for x in leaves]
    with nan_poison():
        out, lse = run(leaves, layout, pooled, "gluon")
    exact, exact_lse = run([x.double() for x in leaves], layout, pooled, "reference")
    assert_close(out.double(), exact, dtype=dtype, what="out")
    assert_close(lse.double(), exact_lse, dtype=torch.float32, what="lse")
    other, other_lse = run(leaves, layout, pooled, "triton")
    assert_close(out, other, dtype=dtype, what="out beside Triton's")
    assert_close(lse, other_lse, dtype=torch.float32, what="lse beside Triton's")
    assert out.stride() == leaves[0].stride()


@pytest.mark.interpret
@pytest.mark.parametrize(("batch", "heads", "rows"), [(1, 1, 1), (1, 3, 50), (2, 4, 300)])
@pytest.mark.parametrize("shared", [False, True])
def test_schedule(batch, heads, rows, shared):
    """Every row once, with its count; much longer ones first; those of about one length in their order."""
    num = torch.randint(0, 200, (1, 1, rows) if shared else (batch, heads, rows), dtype=torch.int32)
    table = gluon.schedule(num, batch, heads)
    order, count = table[:-1, 0].long(), table[:-1, 1]
    assert torch.equal(order.sort().values, torch.arange(batch * heads * rows))
    assert torch.equal(count, num.expand(batch, heads, rows).flatten()[order])
    assert (count[1:] <= (count[:-1] + 1) * 1.2).all()
    assert table[-1, 0] == 0
    even = gluon.schedule(torch.full_like(num, 7), batch, heads)
    assert torch.equal(even[:-1, 0].long(), torch.arange(batch * heads * rows))


@pytest.mark.interpret
@pytest.mark.parametrize("keys", [64, 128])
def test_padded_bias(keys):
    pooled = torch.empty(2, 3, 300, 8)
    bias = torch.randn(3, 300).expand(2, 3, 300).clone()
    bias[:, 1, :256] = 2.0
    bias[1, 2, keys : 2 * keys] = -torch.inf
    got = gluon.pad_bias(bias, pooled, keys)
    assert got.shape[-1] - 1 - 300 < keys
    assert_close(got[..., :300], bias / torch.tensor(2.0).log())
    assert (got[..., 300:-1] == -torch.inf).all()
    # Of whole steps of one finite bias, that; the last step does not count.
    assert_close(got[:, 1, -1], torch.full((2,), 2 / math.log(2)))
    assert got[:, [0, 2], -1].isnan().all()
    zeros = gluon.pad_bias(None, pooled, keys)
    assert (zeros[..., :300] == 0).all()
    assert (zeros[..., 300:-1] == -torch.inf).all()
    assert (zeros[..., -1] == 0).all()
    # Neither one number in each step, nor a NaN among others, nor what a running maximum would lose the logits beside.
    steps = torch.arange(300).div(keys, rounding_mode="floor").float().expand(2, 3, 300)
    some = torch.zeros(2, 3, 300)
    some[..., 3] = torch.nan
    for other in (steps, some, *(torch.full((2, 3, 300), x) for x in (-1e9, -100.0, 100.0, torch.inf, -torch.inf))):
        assert gluon.pad_bias(other, pooled, keys)[..., -1].isnan().all()
    assert gluon.pad_bias(some[..., :keys].zero_(), pooled[:, :, :keys], keys)[..., -1].isnan().all()  # one step


class Columns:
    """Stands in for the kernel of columns on a CPU: sums in fixed point, in another order of columns each time."""

    def __init__(self, backward):
        self.arg_names = backward._backward_kernel.arg_names

    def __getitem__(self, grid):
        def launch(*args, **named):
            at = dict(zip(self.arg_names, args, strict=False)) | named
            q, k, v, dout, rows = (at[f"{x}_desc"].base for x in ("q", "k", "v", "do", "rows"))
            heads, dim, tiles, group = q.shape[1], q.shape[3], at["tiles"], at["GROUP"]
            sums = at["sums_ptr"].view(-1, 64 * dim)
            units = at["units_ptr"].view(-1, 64)
            factors = (at["factors_ptr"] & 0x7FFFFFFF).view(torch.float32).double()
            bias = torch.zeros(k.shape[:3]) if at["bias_ptr"] is None else at["bias_ptr"]
            # Where the matrix unit has row and column: thread, and register of it.
            row, column = torch.arange(64)[:, None], torch.arange(dim)
            thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
            register = column // 8 * 4 + row % 16 // 8 * 2 + column % 2
            word = register // 4 * 512 + thread // 32 * 128 + register % 4 * 32 + thread % 32
            for column in torch.randperm(grid[0] * grid[1] * grid[2]).tolist():
                block, kv, batch = column % grid[0], column // grid[0] % grid[1], column // grid[0] // grid[1]
                exist = k.shape[2] - block * 128
                if at["VALID"]:
                    exist = min(exist, int(at["valid_ptr"].expand(len(k), -1)[batch, block]))
                keys = slice(block * 128, block * 128 + min(exist, 128))
                scaled = k[batch, kv, keys].double() * factors[batch, kv]
                assert not (scaled.abs() >= 4).logical_and(scaled.isfinite()).any()
                for head in range(kv * group, kv * group + group):
                    listed = range(tiles)
                    if not at["DENSE"]:
                        each = at["BLOCK_Q"] // 64
                        blocks = at["idx_ptr"][batch, head, block, : at["num_ptr"][batch, head, block]].tolist()
                        listed = [b * each + i for b in blocks for i in range(each)]
                    for tile in listed:
                        place = (batch * heads + head) * tiles + tile
                        log2, delta = rows[place].double().view(2, 64, 1)
                        queries = [torch.zeros(64, dim, dtype=torch.float64) for _ in range(2)]
                        for all_, few in zip((q, dout), queries, strict=True):
                            part = all_[batch, head, tile * 64 : tile * 64 + 64]
                            few[: len(part)] = part
                        s = queries[0] @ k[batch, kv, keys].double().T * at["scale"]
                        p = torch.exp2(s + bias[batch, kv, keys].double() / math.log(2) - log2)
                        ds = p * (queries[1] @ v[batch, kv, keys].double().T - delta)
                        dq = (ds @ scaled).float() * units[place][:, None]
                        assert not (dq.abs() > backward.LIMIT / 1.125).any()
                        whole = dq.round().nan_to_num(0).to(torch.int32)
                        sums[place, word.flatten()] += whole.flatten()

        return launch


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("dim", "block_q"),
    [
        pytest.param(dim, block_q, marks=[pytest.mark.slow] * (dim != block_q))
        for dim in SUPPORTED.head_dims
        for block_q in (64, 128)
    ],
)
def test_sums_in_fixed_point(dim, block_q, monkeypatch):
    """Around a kernel of columns in plain torch: dq is exact to more digits than bfloat16 has, in whatever order."""
    monkeypatch.setattr(backward, "_backward_kernel", Columns(backward))
    q, dout = torch.randn(2, 2, 4, 170, dim)
    k, v = torch.randn(2, 2, 2, 300, dim)
    pooled_k, pooled_v = torch.randn(2, 2, 2, 9, dim)
    bias = torch.randn(2, 2, 9)
    k[:, :, 100] *= 8  # far from the others
    dout[:, :, 20] = 0
    dout[:, :, 21] *= 1e-20
    mask = torch.rand(2, 4, -(-170 // block_q), 3) < 0.7
    layout = BlockLayout.from_mask(mask, 170, 300, block_q=block_q)
    columns = layout.transpose()
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    far = PooledKV(pooled_k.double(), pooled_v.double(), bias.double())
    out, lse = block_sparse_attention(*leaves, layout, pooled=far, return_lse=True, backend="reference")
    dlse = torch.randn(lse.shape)
    dlse[:, :, 20:22] = 0
    want = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), leaves[0])[0]
    args = (dout, dlse, q, k, v, out.detach().float(), lse.detach().float(), *layout.lists()[:2], *columns.lists()[:2],
            None, pooled_k, pooled_v, bias, block_q, 128, dim**-0.5)  # fmt: skip
    first, second = (backward.attention_backward(*args)[0] for _ in range(2))
    assert torch.equal(first, second)
    off = (first - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-40)
    assert off.max() < 2**-11, off.max()  # bfloat16 rounds each to within 2**-9


@pytest.mark.interpret
@pytest.mark.parametrize("sizes", [(1, 1), (1e-24, 1), (1, 1e-24), (1e-12, 1e-12), (1e8, 1e8)], ids=str)
def test_no_sum_in_fixed_point_outgrows_its_word(sizes, monkeypatch):
    """Also where squares are too small for float32, and nothing else tells how large a sum may be."""
    seen = []

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **named: seen.append(args[7:9])

    monkeypatch.setattr(backward, "_backward_kernel", Nothing())
    dout, v = torch.randn(2, 4, 70, 64) * sizes[0], torch.randn(2, 2, 200, 64) * sizes[1]
    q, k = torch.randn_like(dout), torch.randn_like(v)
    layout = BlockLayout.dense(70, 200)
    lists = (*layout.lists()[:2], *layout.transpose().lists()[:2])
    zeros = torch.zeros(2, 4, 70)
    backward.attention_backward(dout, zeros, q, k, v, torch.zeros_like(q), zeros, *lists, *[None] * 4, 128, 128, 0.125)
    factors, units = seen[0]
    unit = units.view(2, 4, 128)[:, :, :70].double()
    scaled = (k.double() * factors.view(torch.float32).double()[:, :, None]).repeat_interleave(2, dim=1)
    largest = scaled.abs().amax((2, 3)) * v.double().norm(dim=-1).amax(2).repeat_interleave(2, dim=1)
    assert (dout.double().norm(dim=-1) * largest[..., None] * unit).max() < backward.LIMIT


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_no_number_has_no_place_in_fixed_point(monkeypatch):
    """Rows that read it have none either; the others are what they are."""
    monkeypatch.setattr(backward, "_backward_kernel", Columns(backward))
    for name, value in (("k", torch.nan), ("v", torch.nan), ("v", torch.inf), ("dout", torch.nan), ("dlse", torch.nan)):
        given = dict(zip(("q", "k", "v", "dout"), torch.randn(4, 1, 1, 200, 64), strict=True))
        given["dlse"] = torch.zeros(1, 1, 200)
        given[name][0, 0, 130] = value
        layout = BlockLayout.from_mask(torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.bool), 200, 200)
        q, k, v, dout, dlse = given.values()
        # Apart: in the reference zero weights of what is no number are none either.
        parts = [x.split(128, dim=2) for x in (q, k, v)]
        logits = [q @ k.mT * 0.125 for q, k in zip(*parts[:2], strict=True)]
        lse = torch.cat([x.logsumexp(-1) for x in logits], dim=2)
        out = torch.cat([x.softmax(-1) @ v for x, v in zip(logits, parts[2], strict=True)], dim=2)
        lists = (*layout.lists()[:2], *layout.transpose().lists()[:2])
        dq = backward.attention_backward(dout, dlse, q, k, v, out, lse, *lists, *[None] * 4, 128, 128, 0.125)[0]
        assert dq[0, 0, :128].isfinite().all()
        assert dq[0, 0, 130].isnan().all()
        assert dq[0, 0, 128:].isnan().any(-1).all() == (name in "kv")


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_keys_without_weight_that_are_not_finite_show_where_float32_shows_them(value, monkeypatch):
    """Zero times infinity: no number in that channel of each row whose list has the key, and nowhere else."""
    monkeypatch.setattr(backward, "_backward_kernel", Columns(backward))
    q, k, v, dout = torch.randn(4, 1, 1, 256, 64)
    k[0, 0, 130, 3] = value
    q[..., 3] = -math.copysign(1, value) * (q[..., 3].abs() + 0.1)  # its logit is -inf in each row
    mask = torch.tensor([[[[1, 0], [1, 1]]]], dtype=torch.bool)
    layout = BlockLayout.from_mask(mask, 256, 256)
    s = (q @ k.mT * 0.125).masked_fill(~mask.repeat_interleave(128, 2).repeat_interleave(128, 3), -torch.inf)
    p, lse = s.softmax(-1), s.logsumexp(-1)
    out = p @ v
    assert out.isfinite().all()
    lists = (*layout.lists()[:2], *layout.transpose().lists()[:2])
    args = (dout, torch.zeros_like(lse), q, k, v, out, lse, *lists, *[None] * 4, 128, 128, 0.125)
    dq = backward.attention_backward(*args)[0]
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
    want = torch.cat([ds[..., :128, :128] @ k[..., :128, :], ds[..., 128:, :] @ k], dim=2) * 0.125
    assert want.isnan().sum() == 128
    assert torch.equal(dq.isnan(), want.isnan())
    assert_close(dq.nan_to_num(), want.nan_to_num())


@pytest.mark.interpret
def test_unit_of_a_channel_does_not_follow_the_others(monkeypatch):
    """A channel of K 256 times as large costs no other channel a digit: all gradients are the same bits."""
    monkeypatch.setattr(backward, "_backward_kernel", Columns(backward))
    q, k, v, dout = torch.randn(4, 1, 1, 256, 64)
    lists = BlockLayout.dense(256, 256)
    lists = (*lists.lists()[:2], *lists.transpose().lists()[:2])
    got = []
    for factor in (1.0, 256.0):
        k[..., 7] *= factor
        q[..., 7] /= factor
        s = q @ k.mT * 0.125
        args = (dout, torch.zeros(1, 1, 256), q, k, v, s.softmax(-1) @ v, s.logsumexp(-1), *lists, *[None] * 4)
        got.append(backward.attention_backward(*args, 128, 128, 0.125)[0])
    got[1][..., 7] /= 256
    assert torch.equal(*got)


def test_only_what_may_differ_takes_the_kernel_that_adds_in_any_order(monkeypatch):
    """What calls tell the operator: any order never by default, and only of Gluon's with blocks of 128 keys."""
    seen = []

    def operator(*args):
        seen.append(args[-1])
        return args[0], args[0][..., 0].float()

    monkeypatch.setattr(api, "_attention_op", operator)
    monkeypatch.setattr(api, "eager", lambda *tensors: False)
    monkeypatch.setattr(api, "choose", lambda op, backend, *rest, **options: backend)
    for backend, block_k, dtype, deterministic, gradients in (
        ("gluon", 128, torch.bfloat16, True, "fixed point"),
        ("gluon", 128, torch.bfloat16, False, "any order"),
        ("gluon", 128, torch.float16, True, "triton"),
        ("gluon", 128, torch.float16, False, "any order"),
        ("gluon", 64, torch.bfloat16, False, "triton"),
        ("gluon", 64, torch.bfloat16, True, "triton"),
        ("triton", 128, torch.bfloat16, False, "triton"),
    ):
        q = torch.randn(1, 2, 128, 64, dtype=dtype)
        layout = BlockLayout.dense(128, 128, block_k=block_k)
        block_sparse_attention(q, q, q, layout, backend=backend, deterministic=deterministic)
        assert seen.pop() == gradients
    layout = BlockLayout.dense(128, 128)
    block_sparse_attention(q, q, q, layout, backend="gluon")
    assert seen.pop() == gradients_by("gluon", q.dtype, 128, deterministic=True)


def test_says_why_it_cannot():
    q = torch.randn(1, 2, 128, 64, dtype=torch.bfloat16)
    layout = BlockLayout.dense(128, 128)
    with pytest.raises(ValueError, match="'gluon' cannot run this call: it needs a CUDA device"):
        block_sparse_attention(q, q, q, layout, backend="gluon")
    with pytest.raises(ValueError, match=r"it takes torch\.bfloat16, torch\.float16; got torch\.float32"):
        block_sparse_attention(q.float(), q.float(), q.float(), layout, backend="gluon")
    with pytest.raises(ValueError, match=r"block_k in \(64, 128\); got 32"):
        block_sparse_attention(q, q, q, BlockLayout.dense(128, 128, block_k=32), backend="gluon")


# First of the GPU tests: a kernel that waits for an arrival that never comes ends the session here.
SMOKE = [
    Case(heads=1, kv_heads=1, queries=128, keys=128, keep=1.0),
    Case(heads=1, kv_heads=1, queries=128, keys=256, keep=1.0),
    Case(heads=12, kv_heads=12, queries=2500, keys=2500, keep=0.3),
    Case(queries=128, keys=128, keep=1.0, block_q=64, block_k=64),
    Case(heads=12, kv_heads=12, queries=2500, keys=2500, keep=0.3, block_q=64, block_k=64, pooled=100),
    Case(heads=12, kv_heads=12, queries=2500, keys=2500, keep=0.3, pooled=300),
    Case(heads=12, kv_heads=12, queries=2500, keys=2500, keep=0.3, pooled=300, bias=True, padded=True),
]


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
@pytest.mark.parametrize("case", SMOKE, ids=str)
def test_smoke(case, dim):
    """One block, then more, then more programs than rows and more rows than programs."""
    compare(replace(case, dim=dim), torch.bfloat16)


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("dtype", SUPPORTED.dtypes, ids=str)
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dim, dtype):
    compare(replace(case, dim=dim), dtype)


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
@pytest.mark.parametrize(("block_q", "block_k"), SIZES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pooled", [0, 150])
def test_block_sizes(dim, block_q, block_k, padded, pooled):
    for keys in (833, 700, 512):  # an odd and an even number of blocks of 64; a half of one of 128; whole blocks
        compare(
            Case(keys=keys, dim=dim, block_q=block_q, block_k=block_k, padded=padded, pooled=pooled, bias=True),
            torch.bfloat16,
        )


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("dim", "block_q"), list(gluon.CONFIGS))
def test_candidates_of_tuning(dim, block_q):
    """Configurations that ``hone-kernels tune`` times beside the shipped one."""
    from hone_kernels.attention.tune import CONFIGS

    case = Case(heads=12, kv_heads=12, queries=1500, keys=1500, keep=0.4, dim=dim, block_q=block_q)
    leaves, layout, _ = build(case)
    q, k, v = (x.detach() for x in leaves)
    want, want_lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="triton")
    shipped = gluon.CONFIGS[dim, block_q]
    for config in (*(gluon.Config(**x) for x in CONFIGS[dim, block_q]), replace(shipped, claim=False)):
        lists = (layout.kv_num, layout.kv_idx, None, None, None, None)
        out, lse = gluon.attention_forward(q, k, v, *lists, block_q, 128, dim**-0.5, config)
        assert_close(out, want, what=f"{config}")
        assert_close(lse, want_lse, what=f"{config}")


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
def test_views_the_copy_engine_cannot_address(dim):
    """Unaligned bases, odd strides and repeated axes are copied first."""
    layout = BlockLayout.dense(200, 200, device="cuda")
    wide = torch.randn(1, 2, 200, dim + 3, device="cuda", dtype=torch.bfloat16)
    shifted = torch.randn(2 * 200 * dim + 1, device="cuda", dtype=torch.bfloat16)[1:].view(1, 2, 200, dim)
    repeated = torch.randn(1, 1, 200, dim, device="cuda", dtype=torch.bfloat16).expand(1, 2, 200, dim)
    got = block_sparse_attention(wide[..., :dim], shifted, repeated, layout, backend="gluon")
    assert_close(got, block_sparse_attention(wide[..., :dim], shifted, repeated, layout, backend="reference"))


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("claim", [False, True])
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
def test_many_rows_of_many_lengths(dim, claim):
    """Many rows a program, with lists from empty to whole: the two ways to hand them out agree bit for bit."""
    tokens, heads = 5000, 16
    q, k, v = torch.randn(3, 1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)
    mask = torch.rand(1, heads, 40, 40, device="cuda") < torch.rand(1, heads, 40, 1, device="cuda") ** 2
    layout = BlockLayout.from_mask(mask, tokens, tokens)
    config = replace(gluon.config_for(dim, 128), claim=claim)
    lists = (layout.kv_num, layout.kv_idx)
    out, lse = gluon.attention_forward(q, k, v, *lists, None, None, None, None, 128, 128, dim**-0.5, config)
    want, want_lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="triton")
    assert_close(out, want)
    assert_close(lse, want_lse)
    other, other_lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="gluon")
    assert torch.equal(out, other)
    assert torch.equal(lse, other_lse)


def _one_differs(bias):
    bias[..., 200] += 1


def _each_step_has_its_own(bias):
    bias += torch.arange(bias.shape[-1], device=bias.device) // 64


def _far(bias):
    bias += 40


def _a_step_is_gone(bias):
    bias[:, :, 128:256] = -torch.inf


def _a_head_is_hidden(bias):
    bias[0, 0] = -1e9


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "twist",
    [None, lambda bias: None, _one_differs, _each_step_has_its_own, _far, _a_step_is_gone, _a_head_is_hidden],
)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
@pytest.mark.parametrize(
    ("dtype", "padded"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)], ids=str
)
def test_steps_of_pooled_keys_of_one_bias(dim, sizes, padded, dtype, twist):
    """As means of groups have it: one number, and another for a short last group; of each head, another."""
    block_q, block_k = sizes
    for keys, groups in ((523, 640), (512, 701)):
        case = Case(
            batch=2, heads=4, dim=dim, keys=keys, block_q=block_q, block_k=block_k, padded=padded, pooled=groups
        )
        leaves, layout, pooled = build(case, dtype)
        bias = None
        if twist is not None:
            bias = torch.tensor([[2.7, -1.5], [0.3, 4.0]], device="cuda")[..., None].repeat(1, 1, groups)
            bias[..., -1] = 1.2
            twist(bias)
        leaves = [x.detach() for x in leaves] + ([] if bias is None else [bias])
        out, lse = run(leaves, layout, pooled, "gluon")
        exact, exact_lse = run([x.double() for x in leaves], layout, pooled, "reference")
        # A row that has hidden keys alone: which of them counts is lost beside 1e9, by any kernel.
        seen = exact_lse > -1e6
        assert out.isfinite().all()
        assert_close(out.double()[seen], exact[seen], dtype=dtype)
        assert_close(lse.double()[seen], exact_lse[seen], dtype=torch.float32)


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("dtype", SUPPORTED.dtypes, ids=str)
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
@pytest.mark.parametrize("keys", [256, 250])
def test_nan_stays_nan(keys, dim, dtype):
    q = torch.randn(1, 1, 256, dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(1, 1, keys, dim, device="cuda", dtype=dtype) for _ in range(2))
    q[0, 0, 5, 3] = torch.nan
    k[0, 0, 140, 1] = torch.nan  # in the second block of keys
    for mask in ([[1, 1], [1, 0]], [[1, 0], [0, 1]], [[0, 1], [1, 0]]):
        layout = BlockLayout.from_mask(torch.tensor(mask, dtype=torch.bool, device="cuda")[None, None], 256, keys)
        out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="gluon")
        want_out, want_lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="reference")
        rows = want_lse.isnan()
        assert rows[0, 0, 5]
        assert not rows.all()
        assert torch.equal(lse.isnan(), rows)
        assert torch.equal(out.isnan().any(-1), rows)
        assert_close(out[~rows].double(), want_out[~rows].double(), dtype=dtype)
        assert_close(lse[~rows].double(), want_lse[~rows].double(), dtype=dtype)


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
def test_gradients(dim):
    leaves, layout, pooled = build(Case(heads=4, dim=dim, pooled=60, bias=True))

    def evaluate(leaves, backend):
        out, lse = run(leaves, layout, pooled, backend)
        scalar = (out.float() * dout).sum() + (lse.masked_fill(lse == -torch.inf, 0) * dlse).sum()
        return torch.autograd.grad(scalar, leaves)

    dout, dlse = torch.randn_like(leaves[0], dtype=torch.float32), torch.randn(leaves[0].shape[:3], device="cuda")
    exact = evaluate([x.detach().double().requires_grad_() for x in leaves], "reference")
    for got, want in zip(evaluate(leaves, "gluon"), exact, strict=True):
        # Sums over hundreds of half-precision products: the error follows the size of the whole.
        size = max(1.0, want.abs().max().item())
        assert_close(got.double() / size, want / size, dtype=torch.bfloat16)


def gradients(leaves, layout, pooled, dout, dlse, backend, **options):
    out, lse = run(leaves, layout, pooled, backend, **options)
    scalar = (out.float() * dout).sum() + (lse.masked_fill(lse == -torch.inf, 0) * dlse).sum()
    return torch.autograd.grad(scalar, leaves)


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("dtype", "deterministic"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)], ids=str
)
@pytest.mark.parametrize("block_q", [128, 64])
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_in_one_kernel(case, dim, block_q, dtype, deterministic):
    """Gluon's own backward; only q's gradient may differ between two runs, in its last bits, and only if it may."""
    leaves, layout, pooled = build(replace(case, dim=dim, block_q=block_q), dtype)
    given = layout, pooled, torch.randn_like(leaves[0], dtype=torch.float32), torch.randn(leaves[0].shape[:3]).cuda()
    exact = gradients([x.detach().double().requires_grad_() for x in leaves], *given, "reference")
    first, second = (gradients(leaves, *given, "gluon", deterministic=deterministic) for _ in range(2))
    for got, want in zip(first, exact, strict=True):
        size = max(1.0, want.abs().max().item())
        assert_close(got.double() / size, want / size, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))
    assert_close(first[0], second[0])
    if deterministic:
        assert torch.equal(first[0], second[0])


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
def test_runs_of_gradients_are_identical(dim):
    """More columns than multiprocessors, of many lengths, some adding to the same queries at once."""
    tokens, heads = 5000, 8
    leaves = [torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in "qkv"]
    mask = torch.rand(1, heads, 40, 40, device="cuda") < torch.rand(1, heads, 1, 40, device="cuda")
    layout = BlockLayout.from_mask(mask, tokens, tokens)
    given = layout, None, torch.randn_like(leaves[0]), torch.randn(1, heads, tokens, device="cuda")
    first = gradients(leaves, *given, "gluon")
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(leaves, *given, "gluon"), strict=True))


def some_tokens(what, tokens, factor):
    what[:, :, tokens] *= factor


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
@pytest.mark.parametrize(
    "twist",
    [
        lambda q, k, v, dout: some_tokens(k, 500, 30),
        lambda q, k, v, dout: (k[..., 3].add_(30), q[..., 3].mul_(0.05)),
        lambda q, k, v, dout: v.add_(20),
        lambda q, k, v, dout: (some_tokens(dout, slice(0, 700), 1e-6), some_tokens(dout, slice(700, 900), 0)),
    ],
    ids=["a key far out", "a channel far out", "values that share a mean", "small gradients"],
)
def test_sums_in_fixed_point_are_as_close_as_those_in_any_order(twist, dim):
    """But for 2**-30 of the bound from which their unit comes, also where that is far above what the sums are."""
    q, k, v, dout = torch.randn(4, 1, 2, 2000, dim, device="cuda").bfloat16()
    twist(q, k, v, dout)
    layout, dlse = BlockLayout.dense(2000, 2000, device="cuda"), torch.zeros(1, 2, 2000, device="cuda")
    leaves, wide = ([x.to(d).requires_grad_() for x in (q, k, v)] for d in (torch.bfloat16, torch.double))
    exact = gradients(wide, layout, None, dout, dlse, "reference")[0]
    out = block_sparse_attention(*wide, layout, backend="reference")

    def off(deterministic):
        got = gradients(leaves, layout, None, dout, dlse, "gluon", deterministic=deterministic)[0]
        return (got.double() - exact).norm(dim=-1)

    bound = dout.double().norm(dim=-1) * v.double().norm(dim=-1).max() + (dout * out).sum(-1).abs()
    bound *= k.double().abs().max() * dim**-0.5
    fixed, any_order = off(True), off(False)
    # An addition for each of 16 blocks, and half of what bfloat16 rounds away, by rows.
    assert (fixed <= 1.05 * any_order + 16 * 2**-30 * dim**0.5 * bound + 2**-10 * exact.norm(dim=-1)).all()
    assert fixed.norm() <= 1.05 * any_order.norm()


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("dim", SUPPORTED.head_dims)
def test_runs_are_identical(dim):
    leaves, layout, pooled = build(Case(heads=6, kv_heads=3, queries=3000, keys=3000, dim=dim, pooled=100, bias=True))
    first = run(leaves, layout, pooled, "gluon")
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, run(leaves, layout, pooled, "gluon"), strict=True))


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(120)
def test_no_wait_graph_and_compile():
    leaves, layout, pooled = build(Case(queries=512, keys=512, pooled=16, bias=True))
    q, k, v, *rest = (x.detach() for x in leaves)
    pooled = PooledKV(*rest)
    expected = block_sparse_attention(q, k, v, layout, pooled=pooled, backend="gluon")  # compiles the kernel
    assert torch.equal(block_sparse_attention(q, k, v, layout, pooled=pooled), expected)  # what auto takes here
    with no_host_sync():
        block_sparse_attention(q, k, v, layout, pooled=pooled, backend="gluon")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = block_sparse_attention(q, k, v, layout, pooled=pooled, backend="gluon")
    for _ in range(2):  # the second replay finds the counter where the first left it
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
    compiled = torch.compile(lambda q, k, v: block_sparse_attention(q, k, v, layout, pooled=pooled) * 2, fullgraph=True)
    assert torch.equal(compiled(q, k, v), expected * 2)


@requires_gpu(min_sm=SUPPORTED.min_sm)
@pytest.mark.timeout(60)
def test_registration():
    leaves, layout, _ = build(Case(pooled=8, bias=True))
    q, k, v, pooled_k, pooled_v, bias = leaves
    bias = bias.expand(pooled_k.shape[:3]).detach().requires_grad_()
    lists = (layout.kv_num, layout.kv_idx, None)
    torch.library.opcheck(_attention_op, (q, k, v, *lists, pooled_k, pooled_v, bias, 128, 128, 0.2, "gluon"))


@requires_gpu(min_sm=SUPPORTED.min_sm, min_gb=60)
@pytest.mark.timeout(120)
def test_offsets_beyond_32_bits():
    """The last head of a tensor of 3.1e9 elements: 75,600 tokens of 40 heads, eight of them in a batch, strided."""
    tokens, heads, dim = 75_600, 40, 128
    q = torch.empty(8, tokens, heads, dim, device="cuda", dtype=torch.bfloat16).normal_().transpose(1, 2)
    assert q.numel() > 2**31
    mask = torch.zeros(1, 1, 591, 591, dtype=torch.bool, device="cuda")
    mask[..., :, 588:] = True
    layout = BlockLayout.from_mask(mask, tokens, tokens, width=3)
    out = block_sparse_attention(q, q, q, layout, backend="gluon")
    keys = q[-1:, -1:, 588 * 128 :].float()
    want = torch.nn.functional.scaled_dot_product_attention(q[-1:, -1:, -500:].float(), keys, keys)
    assert_close(out[-1:, -1:, -500:], want, dtype=torch.bfloat16)
