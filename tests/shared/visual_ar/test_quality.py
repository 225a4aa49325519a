import pytest
import torch
from hone_visual_ar.quality import frechet


def test_two_sets_along_one_axis_by_hand():
    # Means 0 and 3, variances 2 and 8 (over N - 1) along the first axis, none along the second.
    first = torch.tensor([[-1.0, 5.0], [1.0, 5.0]])
    second = torch.tensor([[1.0, 5.0], [5.0, 5.0]])
    assert frechet(first, second) == pytest.approx(9 + (2**0.5 - 8**0.5) ** 2)
    assert frechet(first, first) == pytest.approx(0)
    with pytest.raises(ValueError, match="two images of each set; got 1 and 2"):
        frechet(first[:1], second)


def test_covariances_are_over_n_where_asked():
    first, second = torch.tensor([[0.0, 5.0], [2.0, 5.0]]), torch.tensor([[0.0, 5.0], [4.0, 5.0]])
    # Means 1 and 2, and deviations 1 and 2, or root 2 of each.
    assert frechet(first, second, ddof=0) == pytest.approx(1 + 1)
    assert frechet(first, second) == pytest.approx(1 + 2)
