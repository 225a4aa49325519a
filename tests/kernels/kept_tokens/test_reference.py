import math

import pytest
import torch
from hone_kernels.kept_tokens import (
    add_change,
    draw_bits,
    gather_modulate,
    pack_tokens,
    spread_tokens,
    take_tokens,
    unpack_tokens,
)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_gather_modulate_is_the_norm_of_each_kept_token():
    x, scale, shift = randn(2, 5, 6), randn(2, 6), randn(2, 6)
    idx = torch.tensor([[0, 3], [1, 4]])
    kept, out = gather_modulate(x, idx, scale, shift, dtype=torch.float64, eps=1e-3)
    for row in range(2):
        for at, token in enumerate(idx[row].tolist()):
            values = x[row, token].tolist()
            assert kept[row, at].tolist() == values
            mean = sum(values) / 6
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 6 + 1e-3)
            want = [(v - mean) / spread * (1 + scale[row, c]) + shift[row, c] for c, v in enumerate(values)]
            torch.testing.assert_close(out[row, at], torch.stack(want))


def test_tokens_are_taken_and_put_back():
    q, k = randn(2, 3, 5, 2).requires_grad_(), randn(2, 1, 5, 2)
    keep = torch.tensor([[True, False, False, True, True], [False, True, False, False, True]])
    idx = torch.tensor([[0, 3, 4], [1, 4, 0]])
    taken, keys = take_tokens((q, k), idx)
    for row in range(2):
        for at, token in enumerate(idx[row].tolist()):
            assert taken[row, :, at].tolist() == q[row, :, token].tolist()
            assert keys[row, :, at].tolist() == k[row, :, token].tolist()
    back = spread_tokens(taken, keep)
    assert torch.equal(back, q * keep[:, None, :, None])
    back.sum().backward()
    assert torch.equal(q.grad, keep[:, None, :, None].expand_as(q).double())


def test_tokens_are_packed_and_put_back():
    q, k = randn(3, 3, 4, 2), randn(3, 1, 4, 2)
    keep = torch.tensor([[True, False, False, True], [False, False, True, False], [True, True, True, True]])
    idx = torch.tensor([[0, 3, 0, 0], [2, 0, 0, 0], [0, 1, 2, 3]], dtype=torch.int32)
    (queries, keys), ends, row = pack_tokens((q, k), idx, torch.tensor([2, 1, 4], dtype=torch.int32))
    assert ends.tolist() == [0, 2, 3, 7]
    assert queries.shape == (12, 3, 2)
    for at, (sample, token) in enumerate([(0, 0), (0, 3), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)]):
        assert row[sample, token] == at
        assert queries[at].tolist() == q[sample, :, token].tolist()
        assert keys[at].tolist() == k[sample, :, token].tolist()
    queries[7:] = torch.nan
    assert torch.equal(unpack_tokens(queries, keep, row), q * keep[:, None, :, None])


@pytest.mark.parametrize("relative", [False, True])
def test_add_change_by_hand(relative):
    x, update, before = randn(3, 4, 5), randn(3, 4, 5), randn(3, 4, 5)
    gamma = randn(3, 5)
    after, change = add_change(x, update, gamma, before, images=2, relative=relative)
    assert change.shape == (2, 4)
    for row in range(3):
        for token in range(4):
            want = [float(x[row, token, c] + gamma[row, c] * update[row, token, c]) for c in range(5)]
            torch.testing.assert_close(after[row, token].tolist(), want)
            if row < 2:
                old = before[row, token].tolist()
                square = sum((a - b) ** 2 for a, b in zip(want, old, strict=True)) / 5
                square = square / (sum(b * b for b in old) / 5) if relative else square
                assert float(change[row, token]) == pytest.approx(square)


def bit(logits, u, top_p):
    ones = 1 / (1 + math.exp(logits[0] - logits[1]))
    if top_p and min(ones, 1 - ones) <= 1 - top_p:
        return int(ones > 0.5)
    return int(u >= 1 - ones)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("top_p", [0.0, 0.7])
def test_draw_bits_position_by_position(guided, filled, top_p):
    logits, uniform = randn(4 if guided else 2, 3, 2, 2), torch.rand(2, 5 if filled else 3, 2)
    slot = torch.tensor([[0, 0, 1, 2, 1], [2, 1, 0, 0, 2]]) if filled else None
    got = draw_bits(logits, uniform, slot=slot, guidance=1.5, temperature=0.5, top_p=top_p)
    assert got.dtype == torch.int64
    for image in range(2):
        for position in range(uniform.shape[1]):
            token = position if slot is None else int(slot[image, position])
            for group in range(2):
                pair = [float(v) / 0.5 for v in logits[image, token, group]]
                if guided:
                    other = [float(v) / 0.5 for v in logits[image + 2, token, group]]
                    pair = [1.5 * a - 0.5 * b for a, b in zip(pair, other, strict=True)]
                want = bit(pair, float(uniform[image, position, group]), top_p)
                assert int(got[image, position, group]) == want


def test_draws_have_the_shares_of_the_logits():
    logits = torch.tensor([0.0, math.log(3)]).expand(1, 1, 1, 2)
    uniform = torch.rand(1, 100_000, 1)
    bits = draw_bits(logits, uniform, slot=torch.zeros(1, 100_000, dtype=torch.int64))
    assert float(bits.float().mean()) == pytest.approx(0.75, abs=0.01)


def call_gather(**change):
    call = {"x": torch.zeros(2, 3, 4), "idx": torch.zeros(2, 1, dtype=torch.int64)}
    call |= {"scale": torch.zeros(2, 4), "shift": torch.zeros(2, 4), "dtype": torch.float32}
    return gather_modulate(**call | change)


def call_add(**change):
    x = torch.zeros(2, 3, 4)
    return add_change(**{"x": x, "update": x, "gamma": torch.zeros(2, 4), "before": x} | change)


def call_draw(**change):
    return draw_bits(**{"logits": torch.zeros(2, 3, 4, 2), "uniform": torch.zeros(2, 3, 4)} | change)


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (call_gather, {"x": torch.zeros(2, 3)}, r"x must be \[R, L, C\] and not empty"),
        (call_gather, {"idx": torch.zeros(3, 1, dtype=torch.int64)}, r"idx must be int64 \[2, n\] on cpu"),
        (call_gather, {"idx": torch.zeros(2, 1)}, r"idx must be int64 \[2, n\] on cpu; got torch.float32"),
        (call_gather, {"shift": torch.zeros(2, 3)}, r"shift must be \[2, 4\]"),
        (call_gather, {"backend": "triton"}, "needs a CUDA device"),
        (call_add, {"update": torch.zeros(2, 3, 5)}, r"update must be \[2, 3, 4\]"),
        (
            call_add,
            {"before": torch.zeros(2, 3, 4).double()},
            r"before must be float32 \[2, 3, 4\] on cpu; got torch.float64",
        ),
        (call_add, {"images": 3}, "images must be a number of rows, 0 to 2; got 3"),
        (call_draw, {"logits": torch.zeros(2, 3, 4)}, r"expected logits \[B or 2 B, n, d, 2\]"),
        (call_draw, {"logits": torch.zeros(3, 3, 4, 2)}, "logits must have 2 or 4 rows"),
        (call_draw, {"uniform": torch.zeros(2, 5, 4)}, r"uniform must be \[2, 3, 4\]"),
        (call_draw, {"slot": torch.zeros(2, 3)}, r"slot must be int64 \[2, 3\] on cpu; got torch.float32"),
        (call_draw, {"slot": torch.zeros(2, 4, dtype=torch.int64)}, r"slot must be int64 \[2, 3\]"),
        (call_draw, {"temperature": 0.0}, "temperature must be positive"),
        (call_draw, {"top_p": 1.5}, r"top_p lie in \[0, 1\]"),
        (take_tokens, {"states": [], "idx": torch.zeros(1, 1).long()}, "one to three of"),
        (take_tokens, {"states": [torch.zeros(1, 2, 3)], "idx": torch.zeros(1, 1).long()}, r"got \[\[1, 2, 3\]\]"),
        (
            take_tokens,
            {"states": [torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)], "idx": torch.zeros(1, 1).long()},
            r"states\[1\] must be float32 \[1, n, 3, 4\]",
        ),
        (
            take_tokens,
            {"states": [torch.zeros(1, 2, 3, 4)], "idx": torch.zeros(2, 1).long()},
            r"idx must be int64 \[1, n\]",
        ),
        (
            pack_tokens,
            {"states": [torch.zeros(1, 2, 3, 4)], "idx": torch.zeros(1, 3).long(), "num": torch.ones(1).int()},
            r"idx must be int32 \[1, 3\]",
        ),
        (
            pack_tokens,
            {"states": [torch.zeros(1, 2, 3, 4)], "idx": torch.zeros(1, 3).int(), "num": torch.ones(2).int()},
            r"num must be int32 \[1\]",
        ),
        (
            unpack_tokens,
            {"x": torch.zeros(4, 2, 4), "keep": torch.ones(1, 3).bool(), "row": torch.ones(1, 3).int()},
            r"x must be \[3, n, n\]",
        ),
        (spread_tokens, {"x": torch.zeros(1, 3, 4), "keep": torch.ones(1, 3).bool()}, r"x must be \[n, n, n, n\]"),
        (spread_tokens, {"x": torch.zeros(1, 2, 3, 4), "keep": torch.ones(1, 3)}, r"keep must be bool \[1, n\]"),
    ],
)
def test_bad_arguments(call, change, message):
    with pytest.raises(ValueError, match=message):
        call(**change)
