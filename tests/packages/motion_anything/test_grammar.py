import pytest
import torch
from hone_core.testing import assert_close
from hone_motion_anything.data import fake_batch, generated, statistics
from hone_motion_anything.features import recover
from hone_motion_anything.grammar import (
    EVENTS,
    FRAMES,
    caption,
    draw_scenes,
    event_cells,
    heard,
    perform,
    right,
    scene_ids,
    scene_music,
    text_ids,
)
from hone_motion_anything.music import BEAT
from hone_motion_anything.skeletons import HUMANML3D, SMPL_OFFSETS


def scenes(count=64, dance=False, seed=0):
    return draw_scenes(count, torch.Generator().manual_seed(seed), dance=dance)


@pytest.mark.parametrize("dance", [False, True])
def test_what_a_scene_asks_for_is_what_its_motion_shows(dance):
    clips = generated(96, 0, dance=dance)
    assert clips.features.shape == (96, FRAMES, 263)
    joints = recover(clips.features)
    assert right(joints, clips.scenes).float().mean() > 0.98
    # Another scene's motion is not what was asked for.
    assert right(joints.flip(0), clips.scenes).float().mean() < 0.2


def test_bodies_are_smpls_and_stand_on_the_floor():
    asked = scenes()
    joints = perform(asked)
    offsets = torch.tensor(SMPL_OFFSETS)[:22]
    bones = joints[:, :, 1:] - joints[:, :, list(HUMANML3D.parents[1:])]
    assert_close(bones.norm(dim=-1), offsets[1:].norm(dim=-1).expand(64, 81, 21), atol=1e-5)
    low = joints[..., list(HUMANML3D.feet), 1].amin(-1)
    assert low.min() > -1e-5
    jumps = (asked.kind == EVENTS.index("jumps")).any(1)
    assert (low[jumps].amax(1) > 0.2).all()
    assert low[~jumps].max() < 1e-5


def test_cells_hold_the_frames_and_parts_of_the_events():
    asked = scenes(256)
    cells = event_cells(asked)
    features = generated(256, 0, dance=False).features
    assert cells.shape == (256, 20, 6)
    for index in range(256):
        first = int(asked.kind[index, 0])
        part = [(4,), (5,), (1,), (2,), (0, 1, 2), (0, 1, 2), (3,), (0,), (0,)][first]
        middle = int(asked.start[index, 0] + asked.length[index, 0] // 2) // 4
        assert cells[index, middle, list(part)].all()
        if asked.kind[index, 1] < 0:
            other = [p for p in range(6) if p not in part]
            assert not cells[index][:, other].any()
            assert abs(int(cells[index, :, part[0]].sum()) - int(asked.length[index, 0]) / 4) <= 1
    assert torch.isfinite(features).all()


def test_captions_and_their_ids():
    for dance in (False, True):
        asked = scenes(64, dance)
        texts = [caption(asked, index) for index in range(64)]
        assert torch.equal(text_ids(texts), scene_ids(asked))
        assert all(text.endswith("to the music") == dance for text in texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the text is empty"), ("a person flies", "not flies"), ("a " * 21, "reads 20 words at most; got 21")],
)
def test_bad_texts(text, message):
    with pytest.raises(ValueError, match=message):
        text_ids([text])


def test_music_of_scenes():
    asked = scenes(32, True)
    music = scene_music(asked)
    assert music.shape == (32, 20, 35)
    for index in range(32):
        beats = torch.arange(float(asked.first_beat[index]), 4.0, 60 / float(asked.dance[index]))
        count = int(music[index, :, BEAT].sum())
        assert abs(count - len(beats)) <= 3
    with pytest.raises(ValueError, match="without music"):
        scene_music(scenes(4))


def test_seeds_and_statistics():
    first, second = fake_batch(4, 3), fake_batch(4, 3)
    assert torch.equal(first.features, second.features)
    assert not torch.equal(first.features, fake_batch(4, 4).features)
    mean, std = statistics(first.features)
    assert_close(mean, first.features.flatten(0, 1).mean(0))
    assert len(set(std[4:67].tolist())) == 1
    assert_close(5 * std[3], first.features[..., 3].flatten().std(), rtol=1e-4)


def test_a_body_that_stands_shows_nothing():
    still = perform(scenes(1))[:, :1].expand(-1, 60, -1, -1)
    assert not heard(still)[0].any()
