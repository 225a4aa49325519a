import pytest
import torch
from hone_kernels.plane_sweep.bench import _check, _inputs, _ways, parse

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


@pytest.mark.interpret
def test_what_is_timed_is_alike_or_is_not_timed():
    features, *rest = _inputs(*parse("3x2x8x2x5x5"), 0, torch.device("cpu"))
    ways = _ways(rest)
    grad = torch.linspace(-1, 1, 3 * 5 * 10).view(3, 5, 2, 5)
    errors = _check(ways, features, grad)
    assert set(errors) == {
        (way, split) for way in ("triton", "torch, all at once") for split in ("forward", "forward and backward")
    }
    assert float(ways["triton"](features).abs().max()) > 0.3
    wrong = {"triton": lambda x: ways["triton"](x.detach()) + (x - x.detach()).sum()}
    with pytest.raises(RuntimeError, match="gradient by triton is wrong"):
        _check(ways | wrong, features, grad)


@pytest.mark.parametrize("text", ["6x6x128x32x56x128", "6x2x128x32x56", "6x2x0x32x56x128", "small"])
def test_a_shape_that_is_none_is_named(text):
    with pytest.raises(ValueError, match="VIEWSxOTHERSxCHANNELSxHEIGHTxWIDTHxCANDIDATES"):
        parse(text)
