"""A grammar of generated motions: an idle or dancing body with one or two events, whose frames and parts are known.

Every motion is kinematics of SMPL's bones, so that its features are real ones. A scene says what is to happen;
``perform`` makes the joints, ``caption`` the words, ``hone_motion_anything.music`` the track, ``heard`` which events
a motion shows, by rules on its joints alone. Ours: the paper's sets may not be redistributed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from hone_core.tensors import plain_tensors
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .features import extract
from .music import click_track, music_features, pooled
from .rotations import axis_angle_to_quat, multiply
from .skeletons import HUMANML3D, PARTS, SMPL_OFFSETS, forward_kinematics

__all__ = ["EVENTS", "FRAMES", "TOKEN_FRAMES", "WORDS", "Scenes", "caption", "draw_scenes", "event_cells", "heard"]
__all__ += ["motions", "perform", "right", "scene_ids", "scene_music", "text_ids"]

EVENTS = (
    *("waves the left hand", "waves the right hand", "kicks with the left leg", "kicks with the right leg"),
    *("squats", "jumps", "bows", "turns left", "turns right"),
)
"""What can happen, by number."""
_LEGS = (1, 2)
_PARTS_OF = ((4,), (5,), (1,), (2,), (0, *_LEGS), (0, *_LEGS), (3,), (0,), (0,))
"""Parts that an event moves, by number in ``skeletons.PARTS``."""
FRAMES = 80
"""Rows of features of a motion: four seconds."""
TOKEN_FRAMES = 4
"""Frames of a token."""
_LONGEST, _SHORTEST = 36, 24
WORDS = (
    *("<pad>", "a", "person", "someone", "then", "and", "to", "the", "music", "stands", "dances"),
    *("waves", "left", "right", "hand", "kicks", "with", "leg", "squats", "jumps", "bows", "turns"),
)
"""Every word of a caption; their place is their id."""
TEMPI = (80, 90, 100, 110, 120, 130)
"""Beats a minute of the music."""
PHASES = 8
"""Places in a beat at which music may begin."""
MOST_WORDS = 20
"""Of a caption."""


@dataclass(frozen=True)
class Scenes:
    """What happens in a batch of motions.

    Attributes:
        kind: ``[B, 2]`` events in their order; -1 for none.
        start: ``[B, 2]`` first frame of each.
        length: ``[B, 2]`` frames of each.
        size: ``[B, 2]`` how large it is done, from 0.85 to 1.15: a style that no caption tells.
        dance: ``[B]`` beats a minute; 0 for who stands.
        first_beat: ``[B]`` seconds of the first beat.
        idle: ``[B, 12]`` phases and speeds of the sway, in [0, 1].
        words: ``[B]`` which wording the caption has.
    """

    kind: Int[Tensor, "batch 2"]
    start: Int[Tensor, "batch 2"]
    length: Int[Tensor, "batch 2"]
    size: Float[Tensor, "batch 2"]
    dance: Float[Tensor, " batch"]
    first_beat: Float[Tensor, " batch"]
    idle: Float[Tensor, "batch 12"]
    words: Int[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.kind)


def draw_scenes(
    count: int, generator: torch.Generator, *, dance: float | bool = 0.0, device: torch.device | str = "cpu"
) -> Scenes:
    """Scenes at random.

    Args:
        count: How many.
        generator: On ``device``.
        dance: Share of scenes with music; True for all.
        device: Where.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    kind = (uniform(count, 2) * len(EVENTS)).long().clamp(max=len(EVENTS) - 1)
    # Two events differ, or there is one.
    second = (kind[:, 0] + 1 + (uniform(count) * (len(EVENTS) - 1)).long()) % len(EVENTS)
    kind[:, 1] = torch.where(uniform(count) < 0.4, torch.full_like(second, -1), second)
    length = (_SHORTEST + uniform(count, 2) * (_LONGEST - _SHORTEST + 1)).long().clamp(max=_LONGEST)
    alone = kind[:, 1] < 0
    slack = FRAMES - length[:, 0] - torch.where(alone, torch.zeros_like(length[:, 1]), length[:, 1])
    first = (uniform(count) * (slack + 1)).long().minimum(slack)
    gap = (uniform(count) * (slack - first + 1)).long().minimum(slack - first)
    start = torch.stack([first, first + length[:, 0] + gap], 1)
    tempo = 80 + 10 * (uniform(count) * len(TEMPI)).long().clamp(max=len(TEMPI) - 1).float()
    return Scenes(
        kind=kind,
        start=start,
        length=length,
        size=0.85 + 0.3 * uniform(count, 2),
        dance=torch.where(uniform(count) < float(dance), tempo, torch.zeros_like(tempo)),
        first_beat=(uniform(count) * PHASES).long().clamp(max=PHASES - 1) / PHASES * 60 / tempo,
        idle=uniform(count, 12),
        words=(uniform(count) * 2).long().clamp(max=1),
    )


def _angles(scenes: Scenes, frames: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotation vectors ``[B, frames, 24, 3]``, turn and lift ``[B, frames]`` and sideways step, all smooth in time."""
    batch, device = len(scenes), scenes.kind.device
    t = torch.arange(frames, device=device, dtype=torch.float32)
    angles = torch.zeros(batch, frames, 24, 3, device=device)
    lift = torch.zeros(batch, frames, device=device)
    turn, side = torch.zeros_like(lift), torch.zeros_like(lift)

    # Arms hang, and sway a little with the breath.
    idle = scenes.idle
    for column, joint, sign in ((0, 16, -1.0), (1, 17, 1.0)):
        wave = torch.sin(2 * math.pi * ((0.25 + 0.2 * idle[:, column, None]) * t / 20 + idle[:, column + 2, None]))
        angles[:, :, joint, 2] = sign * (1.25 + 0.06 * wave)
        angles[:, :, joint, 0] = 0.08 * wave
    wave = torch.sin(2 * math.pi * ((0.2 + 0.2 * idle[:, 4, None]) * t / 20 + idle[:, 5, None]))
    angles[:, :, 3, 2] = 0.03 * wave
    angles[:, :, 15, 0] = 0.05 * torch.sin(2 * math.pi * ((0.15 + 0.2 * idle[:, 6, None]) * t / 20 + idle[:, 7, None]))

    dancing = (scenes.dance > 0).float()[:, None]
    beats = (t / 20 - scenes.first_beat[:, None]) * scenes.dance[:, None] / 60  # whole numbers on the beat
    bounce = dancing * (0.5 + 0.5 * torch.cos(2 * math.pi * beats))  # 1 on the beat
    swing = dancing * torch.cos(math.pi * beats)  # the other way on every second
    for hip, knee, ankle in ((1, 4, 7), (2, 5, 8)):
        angles[:, :, hip, 0] -= 0.25 * bounce
        angles[:, :, knee, 0] += 0.5 * bounce
        angles[:, :, ankle, 0] -= 0.25 * bounce
    for shoulder, elbow, sign in ((16, 18, 1.0), (17, 19, -1.0)):
        angles[:, :, shoulder, 0] -= 0.45 * sign * swing
        angles[:, :, elbow, 1] -= dancing * sign * 0.9
    angles[:, :, 3, 2] += 0.12 * swing
    side = side + 0.05 * swing

    for which in (0, 1):
        kind, size = scenes.kind[:, which, None], scenes.size[:, which, None]
        phase = (t - scenes.start[:, which, None]) / scenes.length[:, which, None]
        inside = ((phase > 0) & (phase < 1)).float()
        phase = phase.clamp(0, 1)
        bump = inside * torch.sin(math.pi * phase).square()
        # Up in a quarter of the time, and down in the last.
        plateau = _smooth((phase / 0.25).clamp(0, 1)) * _smooth(((1 - phase) / 0.25).clamp(0, 1))
        for number, shoulder, elbow, sign in ((0, 16, 18, 1.0), (1, 17, 19, -1.0)):
            on = (kind == number).float()
            angles[:, :, shoulder, 2] += on * sign * plateau * (1.95 + 0.25 * (size - 1))
            angles[:, :, elbow, 2] += on * sign * plateau * size * (0.5 + 0.45 * torch.sin(6 * math.pi * phase))
        for number, hip, knee in ((2, 1, 4), (3, 2, 5)):
            on = (kind == number).float()
            angles[:, :, hip, 0] -= on * 1.25 * size * bump
            angles[:, :, knee, 0] += on * 0.9 * inside * torch.sin(2 * math.pi * phase).clamp(min=0) * size
        on = (kind == 4).float() * bump * 1.1 * size
        crouch = torch.exp(-((phase - 0.2) / 0.1).square()) + torch.exp(-((phase - 0.8) / 0.1).square())
        on = on + (kind == 5).float() * inside * 0.4 * size * crouch
        for hip, knee, ankle in ((1, 4, 7), (2, 5, 8)):
            angles[:, :, hip, 0] -= on
            angles[:, :, knee, 0] += 2 * on
            angles[:, :, ankle, 0] -= on
        flight = ((phase - 0.3) / 0.4).clamp(0, 1)
        lift = lift + (kind == 5).float() * 0.28 * size * 4 * flight * (1 - flight)
        on = (kind == 6).float() * bump * 0.5 * size
        for joint in (3, 6, 9):
            angles[:, :, joint, 0] += on
        way = (kind == 7).float() - (kind == 8).float()
        turn = turn + way * 1.6 * size * _smooth(phase)
    return angles, turn, lift, side


def _smooth(x: Tensor) -> Tensor:
    return x * x * (3 - 2 * x)


def perform(scenes: Scenes, frames: int = FRAMES + 1) -> Float[Tensor, "batch frames 22 3"]:
    """Joints of scenes, in metres at 20 frames a second, +y up; at rest the body faces +z.

    The lowest foot stands on the floor, save where one jumps.
    """
    angles, turn, lift, side = _angles(scenes, frames)
    rotations = axis_angle_to_quat(angles)
    heading = axis_angle_to_quat(torch.stack([torch.zeros_like(turn), turn, torch.zeros_like(turn)], -1))
    rotations[..., 0, :] = multiply(heading, rotations[..., 0, :])
    parents = (*HUMANML3D.parents, 20, 21)
    offsets = torch.tensor(SMPL_OFFSETS, device=angles.device)
    joints = forward_kinematics(rotations, torch.zeros_like(angles[..., 0, :]), offsets, parents)[..., :22, :]
    floor = joints[..., list(HUMANML3D.feet), 1].amin(-1)
    place = torch.stack([side, lift - floor, torch.zeros_like(lift)], -1)
    return joints + place[..., None, :]


def motions(scenes: Scenes) -> Float[Tensor, "batch rows 263"]:
    """Features of scenes."""
    return extract(perform(scenes)).float()


@lru_cache(maxsize=1)
def _tracks() -> Float[Tensor, "tracks tokens 35"]:
    """Pooled features of every track: tempo, phase, key."""
    seconds = FRAMES / HUMANML3D.fps
    found = []
    for tempo in TEMPI:
        for phase in range(PHASES):
            for timbre in (0, 1):
                track = click_track(tempo, phase / PHASES * 60 / tempo, seconds, timbre=timbre)
                found.append(pooled(music_features(track), TOKEN_FRAMES))
    return torch.stack(found)


def scene_music(scenes: Scenes) -> Float[Tensor, "batch tokens 35"]:
    """Pooled features of the music of dancing scenes: that of ``music.click_track`` in the key of the scene's wording.

    Raises:
        ValueError: A scene has no music.
    """
    if bool((scenes.dance == 0).any()):
        raise ValueError("a scene without music is among them: draw scenes with dance=True")
    tempo = ((scenes.dance - TEMPI[0]) / 10).round().long()
    phase = (scenes.first_beat * scenes.dance / 60 * PHASES).round().long() % PHASES
    with plain_tensors():
        tracks = _tracks()
    return tracks.to(scenes.kind.device)[(tempo * PHASES + phase) * 2 + scenes.words]


def event_cells(scenes: Scenes) -> Bool[Tensor, "batch tokens 6"]:
    """Cells of time and part that an event moves: the known key frames and parts."""
    tokens = FRAMES // TOKEN_FRAMES
    middle = torch.arange(tokens, device=scenes.kind.device) * TOKEN_FRAMES + TOKEN_FRAMES / 2
    parts = torch.zeros(len(EVENTS) + 1, len(PARTS), dtype=torch.bool, device=scenes.kind.device)
    for number, own in enumerate(_PARTS_OF):
        parts[number, list(own)] = True
    cells = torch.zeros(len(scenes), tokens, len(PARTS), dtype=torch.bool, device=scenes.kind.device)
    for which in (0, 1):
        start, length = scenes.start[:, which, None], scenes.length[:, which, None]
        inside = (middle >= start) & (middle < start + length)
        # The last row, of no part, is that of no event: -1.
        cells |= inside[..., None] & parts[scenes.kind[:, which]][:, None]
    return cells


def caption(scenes: Scenes, index: int) -> str:
    """The words of a scene."""
    who = ("a person", "someone")[int(scenes.words[index])]
    first, second = (int(kind) for kind in scenes.kind[index])
    words = f"{who} {EVENTS[first]}"
    if second >= 0:
        words += f" {('then', 'and then')[int(scenes.words[index])]} {EVENTS[second]}"
    return words + (" to the music" if float(scenes.dance[index]) else "")


def text_ids(texts: list[str] | tuple[str, ...]) -> Int[Tensor, "batch words"]:
    """Numbers of words in ``WORDS``, padded with 0.

    Raises:
        ValueError: A text is empty, too long, or has a word that the grammar does not know.
    """
    rows = []
    for text in texts:
        words = text.lower().replace(",", " ").replace(".", " ").split()
        if not words:
            raise ValueError("the text is empty: say what the person does, such as 'a person waves the left hand'")
        if unknown := [word for word in words if word not in WORDS]:
            raise ValueError(
                f"the tiny host knows {len(WORDS) - 1} words and not {', '.join(unknown)}; they are "
                f"{', '.join(WORDS[1:])}"
            )
        if len(words) > MOST_WORDS:
            raise ValueError(f"the tiny host reads {MOST_WORDS} words at most; got {len(words)}")
        rows.append([WORDS.index(word) for word in words] + [0] * (MOST_WORDS - len(words)))
    return torch.tensor(rows)


def scene_ids(scenes: Scenes) -> Int[Tensor, "batch words"]:
    """Words of scenes, made where they are: the same as ``text_ids`` of ``caption``."""
    device = scenes.kind.device
    phrases = [text_ids([text])[0] for text in EVENTS]
    table = torch.zeros(len(EVENTS) + 1, 6, dtype=torch.long)
    for number, phrase in enumerate(phrases):
        words = phrase[phrase > 0]
        table[number, : len(words)] = words
    table = table.to(device)
    word = {name: number for number, name in enumerate(WORDS)}
    other = scenes.words[:, None] == 1
    pad = torch.zeros(len(scenes), 1, dtype=torch.long, device=device)

    def put(name: str, where: Tensor) -> Tensor:
        return torch.where(where, word[name], pad)

    two = scenes.kind[:, 1:] >= 0
    dancing = scenes.dance[:, None] > 0
    columns = [
        put("a", ~other) + put("someone", other),
        put("person", ~other),
        table[scenes.kind[:, 0]],
        put("and", two & other),
        put("then", two),
        table[scenes.kind[:, 1]],
        *(put(name, dancing) for name in ("to", "the", "music")),
    ]
    found = torch.cat(columns, 1)
    # Gaps are closed: words first, in their order.
    order = (found == 0).int().argsort(dim=1, stable=True)
    found = found.gather(1, order)
    return torch.nn.functional.pad(found, (0, MOST_WORDS))[:, :MOST_WORDS]


def heard(joints: Float[Tensor, "batch frames 22 3"]) -> tuple[Bool[Tensor, "batch 9"], Float[Tensor, "batch 9"]]:
    """Which events a motion shows, and at which frame each is strongest; rules on joints, no network.

    Returns:
        Whether each of ``EVENTS`` is there, and the frame of its strongest moment.
    """
    y = joints[..., 1]
    floor = y[..., list(HUMANML3D.feet)].amin(-1)
    stand = y[:, :, 0].amax(1, keepdim=True).minimum(y[:, :1, 0] + 0.05)
    head = y[..., 15].maximum(y[:, :1, 15])
    left, right = y[..., 20] - head, y[..., 21] - head
    kick_left, kick_right = y[..., 7] - y[..., 8], y[..., 8] - y[..., 7]
    squat = stand - (y[..., 0] - (floor - floor.amin(1, keepdim=True)))
    jump = floor - floor.amin(1, keepdim=True)
    spine = joints[..., 12, :] - joints[..., 0, :]
    bow = spine[..., [0, 2]].norm(dim=-1) / spine.norm(dim=-1)
    across = joints[..., 1, :] - joints[..., 2, :] + joints[..., 16, :] - joints[..., 17, :]
    angle = torch.atan2(-across[..., 2], across[..., 0])
    step = angle.diff(dim=1)
    step = torch.atan2(step.sin(), step.cos())
    turned = torch.cat([torch.zeros_like(step[:, :1]), step.cumsum(1)], 1)
    # How far one turned within a second and a half, forwards and back.
    window = 30
    ahead = torch.cat([turned[:, window:], turned[:, -1:].expand(-1, min(window, turned.shape[1]))], 1)
    ahead = ahead[:, : turned.shape[1]] - turned
    signals = torch.stack([left, right, kick_left, kick_right, squat, jump, bow, ahead, -ahead], -1)
    least = signals.new_tensor([0.0, 0.0, 0.25, 0.25, 0.27, 0.12, 0.55, 0.8, 0.8])
    best, at = signals.max(1)
    # Turning is looked at from its start, the others at their height.
    at = at.float() + at.new_tensor([0] * 7 + [15] * 2)
    return best > least, at


def right(joints: Float[Tensor, "batch frames 22 3"], scenes: Scenes) -> Bool[Tensor, " batch"]:
    """Whether a motion shows exactly what its scene asks for, in the order that it asks for."""
    there, at = heard(joints)
    wanted = torch.zeros(len(scenes), len(EVENTS) + 1, dtype=torch.bool, device=there.device)
    wanted.scatter_(1, scenes.kind % (len(EVENTS) + 1), True)
    same = (there == wanted[:, :-1]).all(1)
    times = torch.cat([at, torch.full_like(at[:, :1], math.inf)], 1)
    order = times.gather(1, scenes.kind % (len(EVENTS) + 1))
    return same & (order[:, 0] < order[:, 1])
