import pytest
import torch
from hone_knockout.config import QUESTIONS, ClipConfig
from hone_knockout.data import (
    COLORS,
    CORNERS,
    DIRECTIONS,
    SHAPES,
    draw_scenes,
    fake_batch,
    generated_items,
    questions,
    render,
)

CFG = ClipConfig()


def scenes(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_scenes(count, CFG, generator)
    return drawn, render(drawn, ClipConfig(noise=0.0), generator)


def test_labels_can_be_read_off_the_pixels():
    drawn, video = scenes()
    palette = torch.tensor(list(COLORS.values()))
    for index in range(len(drawn)):
        asked = questions(drawn, index)
        seen = {}
        for which in (0, 1):
            color = palette[drawn.color[index, which]]
            found = (video[index] == color[:, None, None]).all(1)
            frames = found.flatten(1).any(1).nonzero().flatten().tolist()
            seen[which] = frames[0]
            first, last = (found[f].nonzero().float().mean(0) for f in (frames[0], frames[-1]))
            way = last - first
            # The other shape may cover a part; the larger component still tells.
            axis = int(way.abs().argmax())
            name = [["up", "down"], ["left", "right"]][axis][int(way[axis] > 0)]
            assert name == list(DIRECTIONS)[drawn.direction[index, which]]
        order = next(entry for entry in asked if entry[0] == "order")
        assert order[2][order[3]] == list(COLORS)[drawn.color[index, min(seen, key=seen.get)]]
        white = (video[index, 0] == 255).all(0).nonzero().float().mean(0) > CFG.size / 2
        assert CORNERS[drawn.corner[index]] == f"{['top', 'bottom'][int(white[0])]}-{['left', 'right'][int(white[1])]}"


def test_shapes_differ():
    drawn, video = scenes(200)
    areas = {}
    for index in range(len(drawn)):
        color = torch.tensor(list(COLORS.values()))[drawn.color[index, 1]]
        last = (video[index, -1] == color[:, None, None]).all(0)
        areas.setdefault(SHAPES[drawn.shape[index, 1]], []).append(int(last.sum()))
    assert len({max(values) for values in areas.values()}) == 4


def test_attributes_are_uniform_and_inside():
    drawn = draw_scenes(4000, CFG, torch.Generator().manual_seed(0))
    for value, options in ((drawn.shape, 4), (drawn.direction, 4), (drawn.corner, 4), (drawn.color, 4)):
        counts = torch.bincount(value.flatten(), minlength=options).float()
        assert float((counts / counts.sum() - 1 / options).abs().max()) < 0.03
    row, column, seen = drawn.path(CFG)
    assert int(row.min()) >= 0
    assert int(row.max()) < CFG.grid
    assert int(column.max()) < CFG.grid
    assert (drawn.color[:, 0] != drawn.color[:, 1]).all()
    assert (drawn.appears[:, 0] != drawn.appears[:, 1]).all()
    assert seen[..., -1].all()
    firsts = [questions(drawn, i)[4][3] for i in range(500)]
    assert 0.4 < sum(firsts) / 500 < 0.6


def test_generated_items():
    items = generated_items(24, seed=1)
    assert [item.category for item in items[:4]] == list(QUESTIONS)
    assert len({item.id for item in items}) == 24
    again = generated_items(24, seed=1)
    assert torch.equal(items[5].clip.frames, again[5].clip.frames)
    assert len(fake_batch(3)) == 3
    with pytest.raises(ValueError, match="at least 4 frames"):
        ClipConfig(frames=2)
