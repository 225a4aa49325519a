import pytest
import torch
from hone_nar.data import LEVELS, TRAINED, digits, to_image


def test_digits_are_split_and_nothing_is_in_both():
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (TRAINED, 1797 - TRAINED)
    assert int(train.tokens.min()) == 0
    assert int(train.tokens.max()) == LEVELS - 1
    both = {tuple(row) for row in train.tokens.tolist()} & {tuple(row) for row in test.tokens.tolist()}
    assert not both
    assert torch.bincount(test.labels).min() > 15
    with pytest.raises(ValueError, match="split must be train or test"):
        digits("all")


def test_pictures_are_grey_levels():
    image = to_image(torch.arange(64)[None] % LEVELS)
    assert image.shape == (1, 1, 8, 8)
    assert float(image[0, 0, 0, 4]) == 4 / 16
