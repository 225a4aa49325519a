import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.prefix_attention import prefix_attention
from torch.nn import functional as F


def test_steps_of_hand_made_sizes():
    """Steps of 1, 2 and 1 tokens: each row is plain attention over what it may read."""
    q, k, v = (torch.randn(2, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    out = prefix_attention(q, k, v, torch.tensor([1, 3, 3, 4], dtype=torch.int32))
    assert_close(out[:, :, 0], v[:, :, 0])
    for row, end in ((1, 3), (2, 3), (3, 4)):
        wanted = F.scaled_dot_product_attention(q[:, :, row : row + 1], k[:, :, :end], v[:, :, :end])
        assert_close(out[:, :, row : row + 1], wanted)


def test_padding_of_a_text_is_read_by_itself_alone():
    q, k, v = (torch.randn(2, 1, 4, 3, dtype=torch.float64) for _ in range(3))
    ends, words = torch.tensor([1, 2, 4, 4], dtype=torch.int32), torch.tensor([[False, True], [True, True]])
    out = prefix_attention(q, k, v, ends, words=words)
    assert_close(out[:, :, 0], v[:, :, 0])
    wanted = F.scaled_dot_product_attention(q[:1, :, 1:], k[:1, :, 1:], v[:1, :, 1:])
    assert_close(out[:1, :, 1], v[:1, :, 1])
    assert_close(out[:1, :, 2:], wanted[:, :, 1:])
    assert_close(out[1:], prefix_attention(q[1:], k[1:], v[1:], ends))


def test_gradients():
    q = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 1, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ends = torch.tensor([1, 3, 3, 5, 5], dtype=torch.int32)
    words = torch.tensor([[False, True]])
    assert torch.autograd.gradcheck(lambda *x: prefix_attention(*x, ends, words=words), (q, k, v))


def test_bad_shapes_are_named():
    x, ends = torch.zeros(2, 2, 4, 3), torch.arange(1, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"ends int32 \[S\]; got 4, 3 and torch.int32 \[4\]"):
        prefix_attention(x, x[:, :, :3], x[:, :, :3], ends)
    with pytest.raises(ValueError, match=r"got 4, 4 and torch.int64"):
        prefix_attention(x, x, x, ends.long())
    with pytest.raises(ValueError, match=r"words must be bool \[2, T\], T at most 4; got torch.bool \[2, 5\]"):
        prefix_attention(x, x, x, ends, words=torch.ones(2, 5).bool())
    with pytest.raises(ValueError, match=r"words must be bool \[2, T\], T at most 4; got torch.int64 \[2, 2\]"):
        prefix_attention(x, x, x, ends, words=torch.ones(2, 2).long())
