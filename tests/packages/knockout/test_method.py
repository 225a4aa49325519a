"""Blocked pairs against loops that say the definition out loud."""

import pytest
import torch
from hone_knockout.method import (
    Roles,
    blocked_pairs,
    causal_pairs,
    centred_window,
    frame_owner,
    global_after,
    keep_frames,
    opposite_rule,
    pair_rule,
    random_pairs,
    span_rule,
    windows,
)
from hone_lm.layouts import find_layouts
from hone_lm.tiny import FAMILIES, tiny, tiny_inputs

T = -1
FRAMES = {
    "block": [T, T, 0, 0, 0, 1, 1, 1, 2, 2, 2, T, T],
    "with text between": [T, 0, 0, T, T, 1, 1, T, 2, 2, T],
    "no prefix, no suffix": [0, 0, 1, 1],
    "unequal": [T, 0, 0, 0, 1, T, 2, 2, T],
}


def by_loop(kind, frame, keep_self=True):
    """Section 3 of the paper, one pair at a time."""
    size = len(frame)
    first = next(i for i, f in enumerate(frame) if f >= 0)
    last = max(i for i, f in enumerate(frame) if f >= 0)

    def owner(i):
        if not first <= i <= last:
            return None
        return next(f for f in frame[i:] if f >= 0)

    blocked = torch.zeros(size, size, dtype=torch.bool)
    for q in range(size):
        for k in range(q + 1):
            video_q, video_k = frame[q] >= 0, frame[k] >= 0
            if q == k and keep_self and kind in ("VS", "VV"):
                continue
            blocked[q, k] = {
                "LV": not video_q and video_k,
                "VT": video_q and video_k and frame[q] != frame[k],
                "VS": video_q and video_k and frame[q] == frame[k],
                "VV": video_q and video_k,
                "VT-strict": owner(q) is not None and owner(k) is not None and owner(q) != owner(k),
            }[kind]
    return blocked


@pytest.mark.parametrize("kind", ["LV", "VT", "VS", "VV", "VT-strict"])
@pytest.mark.parametrize("keep_self", [True, False])
@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_pairs_are_those_of_the_definition(kind, keep_self, frame):
    got = blocked_pairs(kind, torch.tensor(frame), keep_self=keep_self)
    assert torch.equal(got, by_loop(kind, frame, keep_self))


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_of_every_class(family):
    model, processor = tiny(family, layers=1)
    (layout,) = find_layouts(model, tiny_inputs(family, processor))
    for kind in ("LV", "VT", "VS", "VV", "VT-strict"):
        got = blocked_pairs(kind, layout.frame)
        assert got.any()
        assert torch.equal(got, by_loop(kind, layout.frame.tolist()))


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_temporal_and_spatial_make_all_of_visual_attention(frame):
    frame = torch.tensor(frame)
    vt, vs, vv = (blocked_pairs(kind, frame) for kind in ("VT", "VS", "VV"))
    assert torch.equal(vt | vs, vv)
    assert not (vt & vs).any()


def test_no_kind_blocks_text_to_text_or_video_to_text_or_the_future():
    frame = torch.tensor(FRAMES["block"])
    text = frame < 0
    for kind in ("LV", "VT", "VS", "VV"):
        blocked = blocked_pairs(kind, frame)
        assert not blocked[:, text].any()
        assert not (blocked & ~causal_pairs(len(frame))).any()


def test_one_frame_one_token_and_no_suffix_block_nothing():
    assert not blocked_pairs("VT", torch.tensor([T, 0, 0, T])).any()
    assert not blocked_pairs("VS", torch.tensor([T, 0, 1, 2, T])).any()
    assert not blocked_pairs("LV", torch.tensor([T, T, 0, 0])).any()


def test_shares_of_causal_pairs():
    # 32 frames of 196 tokens and 60 text tokens: 95.0 % between frames, 3.1 % within, 1.9 % text to video.
    frame = torch.cat([torch.arange(32).repeat_interleave(196), torch.full((60,), T)])
    total = len(frame) * (len(frame) + 1) / 2
    shares = {
        "VT": float(blocked_pairs("VT", frame).sum()) / total,
        "VS": float(blocked_pairs("VS", frame, keep_self=False).sum()) / total,
        "LV": float(blocked_pairs("LV", frame).sum()) / total,
    }
    assert {kind: round(100 * share, 1) for kind, share in shares.items()} == {"VT": 95.0, "VS": 3.1, "LV": 1.9}


@pytest.mark.parametrize("frames", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("offset", [0, 3, 7])
def test_peer_definition_of_frame_ranges(frames, tokens, offset):
    # arXiv 2510.13251 blocks, for frame i, the queries of i against the keys of every earlier frame.
    size = offset + frames * tokens + 2
    expected = torch.zeros(size, size, dtype=torch.bool)
    for i in range(1, frames):
        expected[offset + i * tokens : offset + (i + 1) * tokens, offset : offset + i * tokens] = True
    frame = torch.full((size,), T)
    frame[offset : offset + frames * tokens] = torch.arange(frames).repeat_interleave(tokens)
    assert torch.equal(blocked_pairs("VT", frame), expected)


def test_owner_of_text_between_frames_is_the_next_frame():
    frame = torch.tensor([[T, 0, T, T, 1, 1, T, 2, T], [T, T, T, T, 0, 0, 0, 0, 0]])
    assert frame_owner(frame).tolist() == [[T, 0, 1, 1, 1, 1, 2, 2, T], [T, T, T, T, 0, 0, 0, 0, 0]]
    assert frame_owner(torch.tensor([T, T])).tolist() == [T, T]


def test_strict_closes_the_side_channel():
    # Reachability: which frames can a position of frame 2 have heard of, over any number of layers?
    frame = torch.tensor([T, 0, T, T, 1, T, T, 2, T])
    for kind, heard in (("VT", {0, 1, 2}), ("VT-strict", {2})):
        allowed = (causal_pairs(9) & ~blocked_pairs(kind, frame)).float()
        reach = torch.linalg.matrix_power(allowed, 9)[7] > 0
        assert set(frame[reach & (frame >= 0)].tolist()) == heard


def test_strict_closes_it_in_a_window_of_layers_too():
    """A separator has read the frame before it by then, so the next one may not read it."""
    frame = torch.tensor([T, 0, 0, T, 1, 1, T, 2, 2])
    assert blocked_pairs("VT-strict", frame)[6, 3]
    allowed = (causal_pairs(9) & ~blocked_pairs("VT-strict", frame)).float()
    reach = torch.linalg.matrix_power(allowed, 4)[8].nonzero().flatten().tolist()
    assert reach == [0, 6, 7, 8]


def indices(size):
    position = torch.arange(size)
    return torch.zeros(1, 1, dtype=torch.long), position[:, None], position[None, :]


def test_frames_restrict_the_keys():
    frame = torch.tensor([FRAMES["block"]])
    rule = keep_frames(pair_rule("LV", Roles.of(frame)), frame, (0, 2))
    blocked = rule(*indices(13))
    assert blocked[11].nonzero().flatten().tolist() == [2, 3, 4, 8, 9, 10]


def test_opposite_keeps_only_these_pairs_and_the_diagonal():
    frame = torch.tensor(FRAMES["block"])
    rule = pair_rule("LV", Roles.of(frame[None]))
    left = causal_pairs(13) & ~opposite_rule(rule)(*indices(13))
    assert torch.equal(left, blocked_pairs("LV", frame) | torch.eye(13, dtype=torch.bool))


def test_spans():
    source, target = torch.zeros(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool)
    source[0, 1:3], target[0, 5] = True, True
    assert span_rule(source, target)(*indices(6)).nonzero().tolist() == [[5, 1], [5, 2]]


def test_random_control_has_as_many_pairs_and_keeps_the_diagonal():
    frame = torch.tensor(FRAMES["block"])
    blocked = blocked_pairs("VT", frame)
    drawn = random_pairs(blocked, seed=0)
    assert drawn.sum() == blocked.sum()
    assert not (drawn & ~causal_pairs(13)).any()
    assert not drawn.diagonal().any()
    assert torch.equal(drawn, random_pairs(blocked, seed=0))
    assert not torch.equal(drawn, random_pairs(blocked, seed=1))
    real = torch.arange(13) > 2
    among = causal_pairs(len(frame)) & real[:, None] & real[None, :]
    padded = random_pairs(blocked_pairs("LV", frame), seed=0, among=among)
    assert not padded[:, :3].any()
    assert not padded[:3].any()
    with pytest.raises(ValueError, match="needs as many that the model has"):
        random_pairs(causal_pairs(4), seed=0)


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind must be one of LV, VT"):
        blocked_pairs("TV", torch.tensor([0, T]))


def test_layer_sets():
    assert global_after(18, 28) == tuple(range(18, 28))
    assert global_after(28, 28) == ()
    assert [w[0] for w in windows(12, stride=4)] == [0, 4, 8]
    sliding = windows(12)
    # The paper's x runs from 4 to L, counted from 1: L - 3 windows.
    assert len(sliding) == 9
    assert sliding[0] == (0, 1, 2, 3)
    assert sliding[-1] == (8, 9, 10, 11)
    with pytest.raises(ValueError, match=r"0 \.\. 28"):
        global_after(29, 28)
    with pytest.raises(ValueError, match="width"):
        windows(3, width=4)


@pytest.mark.parametrize("width", [1, 4, 9])
@pytest.mark.parametrize("num_layers", [5, 28])
def test_peer_windows(width, num_layers):
    for layer in range(num_layers):
        expected = range(max(0, layer - width // 2), min(num_layers, layer - (-width // 2)))
        assert centred_window(layer, num_layers, width=width) == tuple(expected)
