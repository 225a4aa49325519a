import math

import pytest
import torch
from hone_video.clips import Glyphs, fake_batch, label_words, load_glyphs, random_labels, render, segment_glyphs
from hone_video.prompts import COLORS, DIRECTIONS, FIELDS, NUM_WORDS, SPEEDS, VOCABULARY, ClipConfig

SMALL = ClipConfig(frames=4, height=16, width=16, glyph_px=8)


def labels(**words):
    """A row of labels from words."""
    default = {"digit": "0", "color": "white", "direction": "right", "speed": "fast", "background": "plain"}
    return torch.tensor([[VOCABULARY[field].index({**default, **words}[field]) for field in FIELDS]])


def blob():
    """A smooth round glyph, whose center of mass suffers no aliasing."""
    at = (torch.arange(32) + 0.5) / 32 - 0.5
    image = torch.exp(-(at[:, None].square() + at.square()) / (2 * 0.15**2))
    return Glyphs(image.expand(10, 32, 32), torch.arange(10))


def solid():
    """A glyph that fills its box, so that its pixels can be counted."""
    return Glyphs(torch.ones(10, 32, 32), torch.arange(10))


def test_word_ids_are_distinct_over_fields():
    corners = torch.tensor([[0] * 5, [len(VOCABULARY[field]) - 1 for field in FIELDS]])
    assert label_words(corners).tolist() == [[0, 10, 17, 25, 28], [9, 16, 24, 27, 29]]
    assert NUM_WORDS == 30


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_a_digit_moves_as_labelled(direction, speed):
    row = labels(direction=direction, speed=speed)
    batch = render(blob(), row, SMALL, torch.Generator().manual_seed(3))
    assert batch.clips.shape == (1, 3, 4, 16, 16)
    # the white blob weighs by how far it exceeds the background: its center of mass is the labelled center
    weight = batch.clips[0].amin(0) - batch.clips[0].amin()
    pixels = torch.arange(16) + 0.5
    mass = weight.sum((1, 2))
    center = torch.stack([(weight.sum(1) * pixels).sum(1) / mass, (weight.sum(2) * pixels).sum(1) / mass], 1)
    x, y = DIRECTIONS[direction]
    step = torch.tensor([x * SPEEDS[speed], y * SPEEDS[speed]])
    expected = batch.centers[0, :1] + torch.arange(4)[:, None] * step
    torch.testing.assert_close(batch.centers[0], expected)
    torch.testing.assert_close(center, expected, atol=0.03, rtol=0)
    assert (batch.centers >= 4 - 1e-4).all()
    assert (batch.centers <= 12 + 1e-4).all()


@pytest.mark.parametrize(("name", "rgb"), COLORS.items())
def test_a_digit_has_its_color(name, rgb):
    batch = render(solid(), labels(color=name), SMALL, torch.Generator().manual_seed(0))
    x, y = (int(value) for value in batch.centers[0, 0])
    assert batch.clips[0, :, 0, y, x].tolist() == pytest.approx(list(rgb))
    assert max(rgb) >= 0.9


def test_backgrounds_stand_still_and_stay_dim():
    empty = Glyphs(torch.zeros(10, 32, 32), torch.arange(10))
    plain = render(empty, labels(background="plain"), SMALL, torch.Generator().manual_seed(0)).clips
    textured = render(empty, labels(background="textured"), SMALL, torch.Generator().manual_seed(0)).clips
    for clips in (plain, textured):
        assert clips.max() <= 0.4
        assert torch.equal(clips[:, :, 0], clips[:, :, -1])
    assert plain.flatten(3).std(-1).max() < 1e-6
    assert textured.flatten(3).std(-1).min() > 0.01


def test_a_seed_decides_everything():
    first, again, other = fake_batch(SMALL, 5), fake_batch(SMALL, 5), fake_batch(SMALL, 6)
    assert torch.equal(first.clips, again.clips)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.clips, other.clips)


def test_each_label_draws_its_own_glyph():
    # glyph of digit d covers (d + 1) / 10 everywhere
    images = ((torch.arange(10) + 1) / 10).view(10, 1, 1).expand(10, 32, 32)
    glyphs = Glyphs(images, torch.arange(10))
    for digit in range(10):
        batch = render(glyphs, labels(digit=str(digit)), SMALL, torch.Generator().manual_seed(digit))
        x, y = (int(value) for value in batch.centers[0, 0])
        corner = batch.clips[0, 0, 0].flatten().min()
        assert batch.clips[0, 0, 0, y, x].item() == pytest.approx(corner * (1 - (digit + 1) / 10) + (digit + 1) / 10)


def test_segment_digits_differ():
    images = segment_glyphs().images
    distance = torch.cdist(images.flatten(1), images.flatten(1)) + 100 * torch.eye(10)
    assert distance.min() > 3


def test_handwritten_digits_are_split():
    pytest.importorskip("sklearn")
    train, held_out = load_glyphs("train"), load_glyphs("held_out")
    assert len(train.digits) == 1438
    assert len(held_out.digits) == 359
    assert set(held_out.digits.tolist()) == set(range(10))
    distance = torch.cdist(held_out.images.flatten(1), train.images.flatten(1))
    assert distance.min() > 0.1
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        load_glyphs("test")


def test_labels_are_uniform():
    drawn = random_labels(4000, torch.Generator().manual_seed(0))
    for column, field in enumerate(FIELDS):
        counts = torch.bincount(drawn[:, column]).float() / 4000
        size = len(VOCABULARY[field])
        assert len(counts) == size
        # five standard deviations of a binomial share
        assert (counts - 1 / size).abs().max() < 5 * math.sqrt((1 / size) * (1 - 1 / size) / 4000)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="room beside the digit"):
        ClipConfig(frames=32)
    with pytest.raises(ValueError, match=r"labels must be \[B, 5\]"):
        render(segment_glyphs(), torch.zeros(2, 4, dtype=torch.long), SMALL)
