import math

import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.ragged_decode import decode_attention


def test_by_hand():
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([math.log(3), 0.0, 9.0], dtype=torch.float64).view(1, 1, 3, 1)
    v = torch.tensor([4.0, 8.0, torch.nan], dtype=torch.float64).view(1, 1, 3, 1)
    valid = torch.tensor([[True, True, False]])
    assert_close(decode_attention(q, k, v, valid), torch.full((1, 1, 1, 1), 5.0, dtype=torch.float64))
    assert_close(decode_attention(q, k, v, valid, scale=2.0).flatten(), torch.tensor([4.4], dtype=torch.float64))
    assert decode_attention(q, k, v, ~valid & False).item() == 0


def test_is_attention_to_each_samples_own_entries():
    q = torch.randn(3, 4, 1, 8, dtype=torch.float64)
    k, v = torch.randn(2, 3, 2, 11, 8, dtype=torch.float64)
    valid = torch.rand(3, 11) < 0.5
    valid[:, 0] = True
    got = decode_attention(q, k, v, valid)
    for b in range(3):
        own = valid[b]
        want = torch.nn.functional.scaled_dot_product_attention(
            q[b, None], k[b, None][:, :, own], v[b, None][:, :, own], enable_gqa=True
        )
        assert_close(got[b, None], want)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_opcheck():
    q, k = torch.randn(2, 2, 1, 16), torch.randn(2, 1, 5, 16)
    arguments = (q, k, k.clone(), torch.ones(2, 5, dtype=torch.bool), 0.25, "reference")
    torch.library.opcheck(torch.ops.hone_kernels.decode_attention.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 2, 16)}, r"q must hold one token of each sample"),
        ({"valid": torch.ones(2, 4).bool()}, r"valid must be bool \[2, 5\]"),
        ({"valid": torch.ones(2, 5)}, "got torch.float32"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"backend": "triton"}, "needs a CUDA device"),
    ],
)
def test_bad_arguments(change, message):
    k = torch.zeros(2, 2, 5, 16)
    call = {"q": torch.zeros(2, 4, 1, 16), "k": k, "v": k, "valid": torch.ones(2, 5).bool()} | change
    with pytest.raises(ValueError, match=message):
        decode_attention(call.pop("q"), call.pop("k"), call.pop("v"), call.pop("valid"), **call)
