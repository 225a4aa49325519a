import math

import pytest
import torch
from hone_core.testing import TOLERANCES, assert_close, gradcheck, nan_poison, no_host_sync, requires_gpu


def test_assert_close_passes_within_and_fails_beyond_the_table():
    for dtype, row in TOLERANCES.items():
        one = torch.ones(3, dtype=torch.float64)
        assert_close(one + 0.9 * (row.atol + row.rtol), one, dtype=dtype)
        with pytest.raises(AssertionError, match="3 of 3 elements"):
            assert_close(one + 1.1 * (row.atol + row.rtol), one, dtype=dtype)


def test_assert_close_takes_the_coarser_dtype():
    assert_close(torch.tensor(1.01, dtype=torch.bfloat16), torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor(1.01), torch.tensor(1.0, dtype=torch.float64))


def test_message_names_the_worst_element():
    actual, expected = torch.zeros(2, 3), torch.zeros(2, 3)
    actual[0, 1], actual[1, 2] = 0.5, -2.0
    expected[0, 0] = actual[0, 0] = 4.0
    with pytest.raises(AssertionError) as caught:
        assert_close(actual, expected, what="out")
    message = str(caught.value)
    assert message.startswith("out: 2 of 6 elements differ")
    assert "worst at (1, 2): got -2, expected 0" in message
    assert "largest error 2," in message
    # sqrt(0.5^2 + 2^2) / 4
    assert f"relative RMS {math.sqrt(4.25) / 4:.3g}" in message


def test_not_finite_values():
    inf = torch.tensor([math.inf, -math.inf])
    assert_close(inf, inf.clone())
    for actual, expected in [(inf, -inf), (inf, torch.zeros(2)), (torch.zeros(2), inf)]:
        with pytest.raises(AssertionError, match="2 not finite"):
            assert_close(actual, expected)
    nan = torch.tensor([math.nan])
    with pytest.raises(AssertionError, match="1 not finite"):
        assert_close(nan, nan)


def test_shapes_scalars_integers():
    with pytest.raises(AssertionError, match=r"expected shape \(3, 1\); got \(3,\)"):
        assert_close(torch.ones(3), torch.ones(3, 1))
    assert_close(1.0, 1.0)
    assert_close([[1, 2]], torch.tensor([[1, 2]]))
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_close(torch.tensor([100, 2]), torch.tensor([101, 2]))
    with pytest.raises(ValueError, match="dtype must be one of"):
        assert_close(1.0, 1.0, dtype=torch.int32)


def test_nan_poison_fills_fresh_memory_and_stops():
    with nan_poison():
        base = torch.ones(2, dtype=torch.float16)
        for fresh in (
            torch.empty(4),
            torch.empty_like(base),
            base.new_empty(3),
            torch.empty_strided((2, 2), (1, 2)),
            torch.empty(2, dtype=torch.bfloat16, requires_grad=True),
        ):
            assert torch.isnan(fresh).all()
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
        assert (torch.zeros(3) == 0).all()
        assert torch.equal(base, torch.ones(2, dtype=torch.float16))
    torch.full((64,), 7.0)
    assert not torch.isnan(torch.empty_like(torch.zeros(2)).zero_()).any()


def test_gradcheck_finds_a_wrong_sign():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return -2 * grad

    gradcheck(lambda x, n: (x**n).sum(), torch.tensor([1.0, 2.0]), 3)
    with pytest.raises(AssertionError, match="Jacobian mismatch"):
        gradcheck(Wrong.apply, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="at least one floating tensor"):
        gradcheck(lambda n: n, 3)


def test_requires_gpu_is_the_gpu_mark():
    mark = requires_gpu(min_sm=90, min_gb=80).mark
    assert (mark.name, mark.kwargs) == ("gpu", {"min_sm": 90, "min_gb": 80})


@requires_gpu()
def test_no_host_sync_finds_a_wait_and_restores_the_mode():
    x = torch.ones(3, device="cuda")
    with no_host_sync():
        x + 1
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.sum().item()
    assert x.sum().item() == 3
