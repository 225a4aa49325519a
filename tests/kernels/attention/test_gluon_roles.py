"""The roles of the Gluon forwards, over lists and over a pyramid, played by threads on a CPU.

What runs is the kernels' own Python: producer and consumers of some programs that claim rows from one table, with
barriers that count arrivals and bytes, copies that land late and in any order, and turns that go round at random. Seen
are a role that waits for ever, an arrival or a byte too many, a read past the end of an array, a buffer that is written
while a product reads it, one that is read before its copy has landed (it holds NaN until then), and wrong values.
"""

import functools
import inspect
import math
import operator
import random
import sys
import threading
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest

lists = pytest.importorskip("hone_kernels.attention.gluon_sm90", reason="Triton is for Linux only")
pyramid = pytest.importorskip("hone_kernels.pyramid_attention.gluon_sm90", reason="Triton is for Linux only")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

D = 8
SCALE = np.float32(D**-0.5 / math.log(2))


def raw(x):
    return x.of if isinstance(x, Value) else x


def single(x):
    return x.astype(np.float32) if getattr(x, "dtype", None) == np.float64 else x


class Value:
    """A scalar or a tensor of a role; whole numbers are divided as the GPU does, towards zero."""

    type = SimpleNamespace(layout=None)

    def __init__(self, of):
        self.of = np.asarray(of)

    @property
    def shape(self):
        return list(self.of.shape)

    def to(self, dtype):
        return Value(self.of.astype(np.float32)) if dtype is Language.float32 else self

    def reshape(self, shape):
        return Value(self.of.reshape(shape))

    def __getitem__(self, at):
        return Value(self.of[at])

    def __bool__(self):
        return bool(self.of)

    def __index__(self):
        return int(self.of)


def towards_zero(a, b):
    return np.trunc(np.asarray(a) / np.asarray(b)).astype(np.int64)


def operators():
    made = {"floordiv": towards_zero, "mod": np.fmod}
    made |= {name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "lshift", "rshift", "xor")}
    made |= {"and": operator.and_, "or": operator.or_}
    for name, of in made.items():

        def forth(self, other, of=of):
            return NotImplemented if isinstance(other, Pointer) else Value(single(of(self.of, raw(other))))

        def back(self, other, of=of):
            return Value(single(of(raw(other), self.of)))

        setattr(Value, f"__{name}__", forth)
        setattr(Value, f"__r{name}__", back)
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        of = getattr(operator, name)
        setattr(Value, f"__{name}__", lambda a, b, of=of: Value(of(a.of, raw(b))))


class Pointer:
    def __init__(self, base, at=0):
        self.base, self.at = base.reshape(-1), at

    def __add__(self, more):
        return Pointer(self.base, self.at + raw(more))

    __radd__ = __add__

    def to(self, dtype):
        return self

    def load(self, mask=True, other=0):
        at, mask = np.broadcast_arrays(self.at, raw(mask))
        past = mask & ((at < 0) | (at >= self.base.size))
        assert not past.any(), f"reads {at[past]} of {self.base.size}"
        return Value(np.where(mask, self.base[np.where(mask, at, 0)], np.asarray(other, self.base.dtype)))


class Barrier:
    def __init__(self, arrivals, name):
        self.arrivals = self.missing = arrivals
        self.phase = self.bytes = 0
        self.name = name

    def count(self, arrivals=0, more_bytes=0):
        self.missing -= arrivals
        self.bytes += more_bytes
        assert self.missing >= 0, f"an arrival too many at {self.name}"
        if self.missing == self.bytes == 0:
            self.missing, self.phase = self.arrivals, self.phase ^ 1


class Several(list):
    def index(self, at):
        return self[int(raw(at))]


class Buffer:
    """``[1, 1, rows, D]`` of shared memory."""

    def __init__(self, rows):
        self.of, self.shape = np.full((rows, D), np.nan, np.float32), [1, 1, rows, D]

    def slice(self, start, rows, dim):
        assert start + rows <= len(self.of)
        assert dim == 2
        return SimpleNamespace(of=self.of[start : start + rows])

    def reshape(self, shape):
        return self

    def permute(self, order):
        return self

    def load(self, layout):
        return Value(self.of.copy())

    def store(self, value):
        self.of[:] = raw(value)


class Buffers(Several):
    dtype = SimpleNamespace(primitive_bitwidth=16)

    def __init__(self, count, rows):
        super().__init__(Buffer(rows) for _ in range(count))
        self.shape = [count, *self[0].shape]


class Word:
    def store(self, value):
        self.of = raw(value)

    def load(self, layout):
        return Value(self.of)


class Description:
    dtype = None

    def __init__(self, base, rows):
        self.base, self.block_shape = base, [1, 1, rows, D]


class Language:
    """Of Gluon's language what the roles use. Layouts do not matter here."""

    float32, int32, int64 = object(), object(), object()
    static_range = range
    num_warps = staticmethod(lambda: 4)
    BlockedLayout = NVMMADistributedLayout = SliceLayout = DotOperandLayout = staticmethod(lambda *given: None)
    convert_layout = staticmethod(lambda x, layout: x)
    where = staticmethod(lambda test, a, b: Value(single(np.where(raw(test), raw(a), raw(b)))))
    maximum = staticmethod(lambda a, b: Value(np.fmax(raw(a), raw(b))))
    minimum = staticmethod(lambda a, b: Value(np.fmin(raw(a), raw(b))))
    max = staticmethod(lambda x, dim: Value(np.fmax.reduce(raw(x), dim)))
    sum = staticmethod(lambda x, dim: Value(raw(x).sum(dim)))
    exp2 = staticmethod(lambda x: Value(np.exp2(raw(x))))
    log2 = staticmethod(lambda x: Value(np.log2(raw(x))))
    arange = staticmethod(lambda start, end, layout: Value(np.arange(start, end)))
    zeros = staticmethod(lambda shape, dtype, layout: Value(np.zeros(shape, np.float32)))
    load = staticmethod(lambda pointer, mask=True, other=0: pointer.load(mask, other))

    @staticmethod
    def full(shape, value, dtype, layout):
        return Value(np.full(shape, raw(value), np.float32 if dtype is Language.float32 else np.int64))

    @staticmethod
    def store(pointer, value, mask=True):
        at, value, mask = np.broadcast_arrays(pointer.at, raw(value), raw(mask))
        pointer.base[at[mask]] = value[mask]


operators()


class Product:
    """Read twice: where it starts, and where it is awaited."""

    type = Value.type

    def __init__(self, make):
        self.make, self.first = make, make()

    def wait(self):
        last = self.make()
        assert np.array_equal(last, self.first, equal_nan=True), "a buffer is written under a product"
        return Value(last)


class Machine:
    """Threads of which one runs at a time, until it waits for something, and copies that are on their way."""

    def __init__(self, seed, programs, lost=None, hasty=None):
        self.random, self.programs, self.lost, self.hasty = random.Random(seed), programs, lost, hasty
        self.roles, self.copies, self.barriers, self.error = [], [], [], None
        self.done = threading.Semaphore(0)

    def role(self, program, turns, play):
        role = SimpleNamespace(
            program=program, turns=turns, turn=threading.Semaphore(0), ready=lambda: True, ended=False
        )

        def body():
            role.turn.acquire()
            try:
                if self.error is None:
                    play()
            except BaseException as error:  # also what ends a thread that waits when another failed
                self.error = self.error or error
            role.ended = True
            self.done.release()

        self.roles.append(role)
        threading.Thread(target=body, daemon=True).start()

    def block(self, ready, what):
        role = self.now
        role.ready, role.what = ready, what
        self.done.release()
        role.turn.acquire()
        if self.error is not None:
            sys.exit()

    def run(self):
        copies_first = self.random.choice([0.1, 0.5, 0.95])
        while not all(role.ended for role in self.roles):
            ready = [role for role in self.roles if not role.ended and role.ready()]
            if self.copies and (not ready or self.random.random() < copies_first):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            if not ready:
                waits = [(role.program, role.what) for role in self.roles if not role.ended]
                self.error = RuntimeError(f"these wait for ever: {waits}")
            else:
                self.now = self.random.choice(ready)
                self.now.turn.release()
                self.done.acquire()
            if self.error is not None:
                for role in self.roles:
                    role.turn.release()
                raise self.error
        assert not self.copies
        for barrier in self.barriers:
            assert (barrier.missing, barrier.bytes) == (barrier.arrivals, 0), f"{barrier.name} is left halfway"

    def some_barriers(self, name, count, arrivals):
        made = Several(Barrier(arrivals, f"{name}[{i}]") for i in range(count))
        self.barriers += made
        return made

    # What the roles call.

    def wait(self, barrier, phase):
        if self.hasty is None or not barrier.name.startswith(self.hasty):
            self.block(lambda: barrier.phase != int(raw(phase)), f"{barrier.name}, phase {int(raw(phase))}")

    def arrive(self, barrier, count=1):
        if self.lost is None or not barrier.name.startswith(self.lost):
            barrier.count(count)

    def expect(self, barrier, size):
        barrier.count(1, size)

    def bring(self, source, place, barrier, to):
        batch, head, first, _ = (int(raw(x)) for x in place)
        rows = source.block_shape[2]
        assert len(to.of) == rows
        assert first >= 0
        part = source.base[batch, head, first : first + rows]
        to.of[:] = np.nan

        def land():
            to.of[:] = 0
            to.of[: len(part)] = part
            barrier.count(0, -2 * rows * D)

        self.copies.append(land)

    def take(self, target, place, buffer):
        batch, head, first, _ = (int(raw(x)) for x in place)
        part = target.base[batch, head, first : first + 64]
        part[:] = buffer.of[: len(part)]

    def multiply(self, a, b, acc, use_acc=True, is_async=False):
        def make():
            if use_acc:
                return raw(acc) + raw(a) @ b.of
            return a.of @ b.of.T

        return Product(make)

    def awaited(self, pending, deps):
        found = tuple(x.wait() if isinstance(x, Product) else x for x in deps)
        return found if len(found) > 1 else found[0]

    def assembly(self, code, constraints, given, dtype, is_pure, pack):
        assert not is_pure
        if code == lists._CLAIM.value:
            counter, total = given
            found = counter.load().of
            counter.base[counter.at] = 0 if found >= int(raw(total)) - 1 else found + 1
            return Value(found)
        if code == pyramid._LOAD.value:
            return (given[0] + np.minimum(np.arange(32), raw(given[1]))).load()
        if code == pyramid._OF_LANE.value:
            return Value(np.broadcast_to(raw(given[0]), 32)[given[1]])
        return self.turn(*code.split(",")[0].split())

    def turn(self, what, number):
        here, gone = self.now.turns.setdefault(number, ([], []))
        before = len(gone)
        here.append(what)
        if len(here) == 2:
            assert "bar.sync" in here, "a turn is given twice"
            here.clear()
            gone.append(1)
        if what == "bar.sync":
            self.block(lambda: len(gone) > before, f"turn {number}")

    def names(self, module, made):
        """The module's functions as Python runs them, with this machine behind their names."""
        if module.__name__ in made:
            return made[module.__name__]
        found = made[module.__name__] = {}
        language = SimpleNamespace(**{n: getattr(Language, n) for n in dir(Language) if not n.startswith("__")})
        language.program_id = lambda axis: Value(self.now.program)
        language.num_programs = lambda axis: Value(self.programs)
        language.inline_asm_elementwise = self.assembly
        copies = dict(async_copy_global_to_shared=self.bring, async_copy_shared_to_global=self.take)
        played = dict(
            gl=language, mbarrier=self, warpgroup_mma=self.multiply, warpgroup_mma_wait=self.awaited,
            tma=SimpleNamespace(**copies, store_wait=lambda pending: None), fence_async_shared=lambda: None,
        )  # fmt: skip
        for name, it in vars(module).items():
            if name in played:
                found[name] = played[name]
            elif type(it).__name__ == "constexpr":
                found[name] = it.value
            elif inspect.isfunction(getattr(it, "fn", None)):
                home = self.names(sys.modules[it.fn.__module__], made)
                found[name] = FunctionType(it.fn.__code__, home, name, it.fn.__defaults__)
        return found

    def launch(self, module, produce, consume, shared, consumers, stages, keys, k_arrivals):
        """Programs of a producer and its consumers. ``shared`` makes the words of a program."""
        names = self.names(module, {})
        for program in range(self.programs):
            turns = {}
            memory = (
                Buffers(consumers, 64), Buffers(stages, keys), Buffers(stages, keys), *shared(),
                self.some_barriers("q_full", consumers, 2), self.some_barriers("q_empty", consumers, 1),
                self.some_barriers("k_full", stages, k_arrivals), self.some_barriers("k_empty", stages, consumers),
                self.some_barriers("v_full", stages, 1), self.some_barriers("v_empty", stages, consumers),
            )  # fmt: skip
            self.role(program, turns, functools.partial(produce, names["_producer"], memory))
            for group in range(consumers):
                self.role(program, turns, functools.partial(consume, names["_consumer"], memory, Buffer(64), group))
        self.run()


def words(count):
    return Several(Word() for _ in range(count))


def attend(q, keys, values, bias):
    """Output and log-sum-exp in double precision."""
    logits = q.astype(float) @ keys.astype(float).T * D**-0.5 + bias
    top = logits.max(1, initial=-np.inf)
    p = np.exp(logits - np.where(np.isinf(top), 0, top)[:, None])
    total = p.sum(1)
    some = total > 0
    return (p @ values) / np.where(some, total, 1)[:, None], np.where(some, top + np.log(total), -np.inf)


def check(out, lse, want_out, want_lse):
    np.testing.assert_allclose(out, want_out, atol=1e-4)
    np.testing.assert_allclose(lse, want_lse, atol=3e-4, rtol=1e-6)


def schedule(draw, steps):
    """Rows in any order, and the counter from which they are claimed."""
    table = np.zeros((steps.size + 1, 2), np.int64)
    table[:-1, 0] = draw.permutation(steps.size)
    table[:-1, 1] = steps.reshape(-1)[table[:-1, 0]]
    return table


def shapes(draw):
    batch, kv_heads, group = (int(x) for x in draw.integers(1, 3, 3))
    return batch, kv_heads, group, kv_heads * group


def tensors(draw, batch, heads, tokens):
    return draw.standard_normal((batch, heads, tokens, D)).astype(np.float32)


def pooled_bias(draw, kind, shape, keys):
    bias = np.zeros(shape, np.float32) + draw.standard_normal((*shape[:2], 1)).astype(np.float32)
    if kind == "another in the last":
        bias[..., -1] += 1
    elif kind == "all differ":
        bias = draw.standard_normal(shape).astype(np.float32)
    elif kind == "one a step":
        bias += np.arange(shape[2]) // keys
    elif kind == "at the limit":
        bias[:] = draw.choice([-1, 1]) * 63.9 * math.log(2)
    elif kind == "past the limit":
        bias[:] = draw.choice([-1, 1]) * 64.1 * math.log(2)
    elif kind == "a step is hidden":
        bias[..., keys : 2 * keys] = -np.inf
    elif kind == "the last step is hidden":
        bias[..., (shape[2] - 1) // keys * keys :] = -np.inf
    elif kind == "all is hidden":
        bias[:] = -np.inf
    return bias


KINDS = ("alike", "another in the last", "all differ", "one a step", "at the limit", "past the limit",
         "a step is hidden", "the last step is hidden", "all is hidden")  # fmt: skip


def padded(bias, keys):
    """As ``pad_bias``, which has a test of its own."""
    steps = -(-bias.shape[2] // keys)
    found = np.full((*bias.shape[:2], steps * keys + 1), -np.inf, np.float32)
    found[..., : bias.shape[2]] = bias / np.float32(math.log(2))
    whole = found[..., : (steps - 1) * keys]
    found[..., -1] = np.nan
    if steps > 1:
        alike = (whole == whole[..., :1]).all(-1) & (np.abs(whole[..., 0]) < lists.LARGEST_SHIFT.value)
        found[..., -1] = np.where(alike, whole[..., 0], np.nan)
    return found


def play_lists(seed, **faults):
    draw = np.random.default_rng(seed)
    batch, kv_heads, group, heads = shapes(draw)
    block_q, block_k, keys = (int(draw.choice([64, 128])) for _ in range(3))
    consumers, stages, claim = block_q // 64, int(draw.integers(2, 5)), bool(draw.random() < 0.7)
    turns, q_registers = bool(draw.integers(2)) and consumers == 2, bool(draw.integers(2))
    tokens_q, tokens_k = int(draw.integers(1, 5 * block_q)), int(draw.integers(1, 900))
    rows, columns = -(-tokens_q // block_q), -(-tokens_k // block_k)
    mask = draw.random((batch, heads, rows, columns)) < draw.random((batch, heads, rows, 1)) * draw.choice([0.3, 1.2])
    num = mask.sum(-1)
    idx = np.argsort(~mask, -1, kind="stable")
    q, k, v = tensors(draw, batch, heads, tokens_q), *(tensors(draw, batch, kv_heads, tokens_k) for _ in range(2))
    valid = None
    if draw.integers(2):
        valid = np.where(draw.random((batch, columns)) < 0.6, block_k, draw.integers(0, block_k + 1, (batch, columns)))
    groups = int(draw.choice([0, 0, 1, 63, 64, 65, 128, 129, 250, 300, 384]))
    pooled = [tensors(draw, batch, kv_heads, groups) for _ in range(2)]
    bias = pooled_bias(draw, draw.choice(KINDS), (batch, kv_heads, groups), keys) if groups else None

    table = schedule(draw, num)
    total, tall = len(table) - 1, min(keys, block_k)
    machine = Machine(seed, min(int(draw.integers(1, 4)), total), **faults)
    out, lse = np.full(q.shape, np.nan, np.float32), np.full(q.shape[:3], np.nan, np.float32)
    sizes = Value(-(-groups // keys)), Value(heads), Value(rows)
    config = block_k, stages, consumers, group, valid is not None, groups > 0, q_registers, turns, claim
    described = Description(q, 64), *(Description(x, tall) for x in (k, v, *pooled))
    valid_at = None if valid is None else Pointer(valid)
    bias_at = None if bias is None else Pointer(padded(bias, keys))
    strides = [Value(x) for x in (heads * rows * columns, rows * columns, columns, columns)]

    def produce(role, memory):
        lengths = Value(tokens_k), Value(total)
        role(*described, Pointer(table), Pointer(idx), valid_at, *strides, *lengths, sizes, memory, config)

    def consume(role, memory, buffer, group):
        given = Description(out, 64), Pointer(lse), bias_at, buffer, Value(tokens_q), SCALE
        role(*given, sizes, memory, config, group)

    def shared():
        return words(3 * consumers), words(2 * stages)

    machine.launch(lists, produce, consume, shared, consumers, stages, keys, 1 if valid is None else 2)
    assert not claim or table[-1, 0] == 0  # for the next launch
    for b, h in np.ndindex(batch, heads):
        seen = mask[b, h].repeat(block_q, 0)[:tokens_q].repeat(block_k, 1)[:, :tokens_k]
        if valid is not None:
            seen = seen & (np.arange(tokens_k) % block_k < valid[b].repeat(block_k)[:tokens_k])
        of = b, h // group
        added = np.where(seen, 0, -np.inf)
        if groups:
            added = np.concatenate([np.broadcast_to(bias[of], (tokens_q, groups)), added], 1)
        both = [np.concatenate([few[of], x[of]]) for few, x in zip(pooled, (k, v), strict=True)]
        check(out[b, h], lse[b, h], *attend(q[b, h], *both, added))


def play_pyramid(seed, **faults):
    draw = np.random.default_rng(seed)
    batch, kv_heads, group, heads = shapes(draw)
    stages, claim = int(draw.integers(2, 5)), bool(draw.random() < 0.7)
    turns, q_registers = (bool(x) for x in draw.integers(0, 2, 2))
    tokens_q, tokens_k = int(draw.integers(1, 512)), int(draw.integers(1, draw.choice([200, 900, 5000])))
    rows, columns, whole = -(-tokens_q // 128), -(-tokens_k // 128), tokens_k // 128
    share = draw.dirichlet([0.5] * 5, (batch, heads, rows))
    pick = (draw.random((batch, heads, rows, columns, 1)) > share.cumsum(-1)[..., None, :]).sum(-1).clip(0, 4)
    factors = np.array([0, 1, 2, 4, 8])[pick]
    kind = draw.random((batch, heads, rows))
    factors[(kind < 0.15) | (kind > 0.85)] = 0  # rows without a key, and of one entry
    factors[kind > 0.85, 0] = draw.choice([1, 2, 4, 8])
    if tokens_k % 128:
        factors[..., -1] = np.minimum(factors[..., -1], 1)
    listed = [factors == factor for factor in (1, 2, 4, 8)]
    num = np.stack([x.sum(-1) for x in listed], -1)
    steps = sum(-(-num[..., level] // 2**level) for level in range(4))
    idx = np.full((batch, heads, rows, columns), 10**8)  # what no entry holds may be anything
    for at in np.ndindex(batch, heads, rows):
        entries = np.concatenate([np.flatnonzero(x[at]) for x in listed])
        idx[at][: len(entries)] = entries
    q, k, v = tensors(draw, batch, heads, tokens_q), *(tensors(draw, batch, kv_heads, tokens_k) for _ in range(2))

    def levels(x):
        return [x[:, :, : whole * 128].reshape(batch, kv_heads, -1, factor, D).mean(3) for factor in (2, 4, 8)]

    table = schedule(draw, steps)
    total = len(table) - 1
    machine = Machine(seed, min(int(draw.integers(1, 4)), total), **faults)
    out, lse = np.full(q.shape, np.nan, np.float32), np.full(q.shape[:3], np.nan, np.float32)
    sizes, config = (Value(heads), Value(rows)), (stages, group, q_registers, turns, claim)
    described = []
    for x in (k, v):
        means = np.concatenate(levels(x), 2)
        described.append((Description(x, 128), *(Description(means, 128 >> level) for level in (1, 2, 3))))

    def produce(role, memory):
        lengths = Value(columns), Value(tokens_k), Value(total)
        pointers = [Pointer(x) for x in (table, num, idx)]
        role(Description(q, 64), *described, *pointers, *lengths, sizes, memory, config)

    def consume(role, memory, buffer, group):
        role(Description(out, 64), Pointer(lse), buffer, Value(tokens_q), SCALE, sizes, memory, config, group)

    machine.launch(pyramid, produce, consume, lambda: (words(10),), 2, stages, 128, 1)
    assert not claim or table[-1, 0] == 0
    every = [[x, *levels(x)] for x in (k, v)]
    for b, h in np.ndindex(batch, heads):
        added = []
        for level, wanted in enumerate(listed):
            seen = wanted[b, h].repeat(128, 0)[:tokens_q].repeat(128 >> level, 1)
            seen = seen[:, : every[0][level].shape[2]]
            added.append(np.where(seen, level * math.log(2), -np.inf))
        both = [np.concatenate([x[b, h // group] for x in each]) for each in every]
        check(out[b, h], lse[b, h], *attend(q[b, h], *both, np.concatenate(added, 1)))


PLAYS = {"lists": play_lists, "pyramid": play_pyramid}


def several(play, seeds, **faults):
    for seed in seeds:
        try:
            PLAYS[play](seed, **faults)
        except Exception as error:
            error.add_note(f"{play}, seed {seed}")
            raise


@pytest.mark.parametrize(
    "seeds", [range(25), pytest.param(range(25, 150), marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("play", PLAYS)
def test_every_row_is_right_and_nothing_waits_for_ever(play, seeds):
    several(play, seeds)


@pytest.mark.parametrize(
    "fault", ["lost k_empty", "lost v_empty", "lost q_empty", "hasty k_full", "hasty v_full", "hasty v_empty"]
)
@pytest.mark.parametrize("play", PLAYS)
def test_what_goes_wrong_is_seen(play, fault):
    """An arrival that is lost, a wait that is left out."""
    what, barrier = fault.split()
    message = "wait for ever" if what == "lost" else "Not equal|written under a product|an arrival too many"
    with pytest.raises((RuntimeError, AssertionError), match=message):
        several(play, range(20), **{what: barrier})
