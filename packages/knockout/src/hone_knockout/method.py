"""The paper: which query-key pairs a knockout blocks, and in which layers.

A decoder sees N frames of visual tokens and then text under a causal mask. A knockout sets the attention logits of a
set of pairs to minus infinity in some layers; how far accuracy falls says what those pairs were for.

Source: arXiv 2508.15360. LV-K is the language-to-video, VT-K the video temporal, VS-K the video spatial knockout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .config import Kind

__all__ = [
    "PairRule",
    "Roles",
    "blocked_pairs",
    "causal_pairs",
    "centred_window",
    "frame_owner",
    "global_after",
    "keep_frames",
    "opposite_rule",
    "pair_rule",
    "random_pairs",
    "span_rule",
    "windows",
]

PairRule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(batch, query, key) indices, any shapes that broadcast, to True where the pair is blocked.

Causality is not part of a rule: the mask that it is taken out of has it. The signature is that of FlexAttention's
``mask_mod`` without the head, so that one rule serves dense masks and block-sparse kernels.
"""


class Roles(NamedTuple):
    """What each position of a batch is to a knockout.

    Attributes:
        frame: ``[batch, tokens]``, the frame that a position shows, -1 for text.
        owner: ``[batch, tokens]``, like ``frame``, with text between frames given to the frame that follows.
    """

    frame: Int[Tensor, "batch tokens"]
    owner: Int[Tensor, "batch tokens"]

    @classmethod
    def of(cls, frame: Int[Tensor, "batch tokens"]) -> Roles:
        """Roles from the frames alone."""
        return cls(frame, frame_owner(frame))

    def pad(self, tokens: int) -> Roles:
        """Roles of a longer sequence, whose new positions are generated text."""
        more = tokens - self.frame.shape[1]
        return self if more <= 0 else Roles(*(torch.nn.functional.pad(x, (0, more), value=-1) for x in self))


def frame_owner(frame: Int[Tensor, "*batch tokens"]) -> Int[Tensor, "*batch tokens"]:
    """Frame of every position, where text between frames belongs to the frame that comes next; other text is -1.

    Timestamps and frame numbers stand before their frame, and what closes a frame (``</img>``) is counted with the
    next: it has read the frame it closes, and would carry that on.
    """
    flipped = frame.flip(-1)
    steps = torch.arange(frame.shape[-1], device=frame.device).expand_as(flipped)
    last = torch.where(flipped >= 0, steps, -1).cummax(-1).values
    following = flipped.gather(-1, last.clamp(min=0)).where(last >= 0, -1).flip(-1)
    started = (frame >= 0).int().cummax(-1).values.bool()
    return torch.where(started, following, -1)


def pair_rule(kind: Kind, roles: Roles, *, keep_self: bool = True) -> PairRule:
    """Blocked pairs of one knockout, as a function of indices.

    With V the visual positions, f their frames and T every other position, generated tokens included:

    - LV-K: q in T, k in V
    - VT-K: q and k in V, f(q) != f(k)
    - VS-K: q and k in V, f(q) == f(k)
    - VV:   q and k in V
    - strict VT-K: q and k in V or between frames, of different frames: text too, since an earlier separator has read
      the frame before it in the layers before a window

    Args:
        kind: The knockout; ``span`` has a rule of its own.
        roles: Of the positions.
        keep_self: Leave the diagonal open under VS and VV.

    Raises:
        ValueError: ``kind`` has no rule here.

    Source: arXiv 2508.15360, section 3. Differs: the diagonal of VS-K, of which nothing is said, is open by default.
    """
    frame, owner = roles

    def lv(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (frame[b, q] < 0) & (frame[b, k] >= 0)

    def vt(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        fq, fk = frame[b, q], frame[b, k]
        return (fq >= 0) & (fk >= 0) & (fq != fk)

    def vs(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        fq, fk = frame[b, q], frame[b, k]
        return (fq >= 0) & (fq == fk) & ((q != k) | (not keep_self))

    def vv(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (frame[b, q] >= 0) & (frame[b, k] >= 0) & ((q != k) | (not keep_self))

    def strict(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        oq, ok = owner[b, q], owner[b, k]
        return (oq >= 0) & (ok >= 0) & (oq != ok)

    rules: dict[str, PairRule] = {"LV": lv, "VT": vt, "VS": vs, "VV": vv, "VT-strict": strict}
    if kind not in rules:
        raise ValueError(f"kind must be one of {', '.join(rules)}; got {kind!r}")
    return rules[kind]


def span_rule(source: Bool[Tensor, "batch tokens"], target: Bool[Tensor, "batch tokens"]) -> PairRule:
    """Block every pair whose query is in ``target`` and whose key is in ``source``: information from source to target.

    Source: the targets of arXiv 2510.13251 (question to last, video to question) and 2411.18620.
    """

    def rule(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return target[b, q] & source[b, k]

    return rule


def keep_frames(rule: PairRule, frame: Int[Tensor, "batch tokens"], frames: tuple[int, ...]) -> PairRule:
    """Restrict a rule to keys that lie in some frames."""
    wanted = torch.isin(frame, torch.tensor(frames, device=frame.device))

    def restricted(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule(b, q, k) & wanted[b, k]

    return restricted


def opposite_rule(rule: PairRule) -> PairRule:
    """Block every pair but those of a rule and the diagonal, which leaves no row without a key."""

    def opposite(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~rule(b, q, k) & (q != k)

    return opposite


def causal_pairs(tokens: int, device: torch.device | str = "cpu") -> Bool[Tensor, "tokens tokens"]:
    """True where key <= query."""
    position = torch.arange(tokens, device=device)
    return position[None, :] <= position[:, None]


def blocked_pairs(
    kind: Kind, frame: Int[Tensor, " tokens"], *, keep_self: bool = True
) -> Bool[Tensor, "tokens tokens"]:
    """Blocked (query, key) pairs of a knockout as a matrix: True is blocked, causal pairs only.

    Args:
        kind: LV, VT, VS, VV or VT-strict.
        frame: One integer per position: -1 for text, else the frame that the position shows.
        keep_self: Leave the diagonal open under VS and VV.

    Raises:
        ValueError: ``kind`` is not one of these.

    Source: arXiv 2508.15360, section 3.
    """
    rule = pair_rule(kind, Roles.of(frame[None]), keep_self=keep_self)
    position = torch.arange(len(frame), device=frame.device)
    blocked = rule(torch.zeros_like(position[:1]), position[:, None], position[None, :])
    return blocked & causal_pairs(len(frame), frame.device)


def random_pairs(
    blocked: Bool[Tensor, "tokens tokens"], *, seed: int, among: Bool[Tensor, "tokens tokens"] | None = None
) -> Bool[Tensor, "tokens tokens"]:
    """As many pairs as ``blocked`` has, drawn without replacement among the model's own off the diagonal.

    Args:
        blocked: The knockout that this is the control of.
        seed: Of the draw.
        among: Pairs that the model has: its own mask, without padding; all causal ones if None.

    Raises:
        ValueError: There are not so many pairs, as when the diagonal was blocked too.
    """
    candidates = causal_pairs(len(blocked)) if among is None else among.cpu().clone()
    candidates.fill_diagonal_(False)
    places = candidates.flatten().nonzero().flatten()
    count = int(blocked.sum())
    if count > len(places):
        raise ValueError(f"a random control of {count} pairs needs as many that the model has; there are {len(places)}")
    chosen = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:count]]
    drawn = torch.zeros(blocked.numel(), dtype=torch.bool)
    drawn[chosen] = True
    return drawn.view_as(blocked).to(blocked.device)


# Layer sets. All are counted from 0; the paper's j is one more.


def global_after(after: int, num_layers: int) -> tuple[int, ...]:
    """Layers of the two-stage test (Global 1): KT(j) = LV if j > i else none, with i = ``after``.

    Text may read video in the first ``after`` layers: the layer ratio is ``after / num_layers``. Global 2 is
    ``after=0``.

    Raises:
        ValueError: ``after`` is not in 0 .. num_layers.
    """
    if not 0 <= after <= num_layers:
        raise ValueError(f"after must lie in 0 .. {num_layers}; got {after}")
    return tuple(range(after, num_layers))


def windows(num_layers: int, *, width: int = 4, stride: int = 1) -> list[tuple[int, ...]]:
    """Layer windows of the fine-grained test: KT(j) = X iff j in {x - 3, ..., x}, x >= 4.

    Args:
        num_layers: Of the decoder.
        width: Layers in a window; the paper has 4.
        stride: 1 slides (the text of the paper), ``width`` tiles (its figures, as a replication read them).

    Raises:
        ValueError: A window is wider than the decoder, or a number is not positive.
    """
    if not 1 <= width <= num_layers or stride < 1:
        raise ValueError(f"expected 1 <= width <= {num_layers} and stride >= 1; got {width} and {stride}")
    return [tuple(range(start, start + width)) for start in range(0, num_layers - width + 1, stride)]


def centred_window(layer: int, num_layers: int, *, width: int = 9) -> tuple[int, ...]:
    """The peers' window, [layer - width // 2, layer + ceil(width / 2)) cut to the decoder.

    Source: ``causal_intervention_tools.py`` of arXiv 2510.13251.
    """
    return tuple(range(max(0, layer - width // 2), min(num_layers, layer - (-width // 2))))
