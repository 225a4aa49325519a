"""A batch of prompts under knockouts and an exit: which pairs are blocked, which rows are left, in each forward on it.

Nothing here knows a model: what a forward needs travels with its prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from hone_lm.layouts import TokenLayout
from torch import Tensor

from .config import Knockout, KnockoutConfig
from .local_attention import RegularFrames, regular_frames
from .method import PairRule, Roles, causal_pairs, keep_frames, opposite_rule, pair_rule, random_pairs, span_rule

__all__ = ["Left", "Prompt", "Step", "by_layer"]

# Spans that generated tokens belong to, as queries and as keys.
_OPEN_SPANS = ("last", "suffix", "text")


class Step(NamedTuple):
    """One forward of the decoder."""

    start: int  # position of its first query
    queries: int
    prefill: bool


class Left(NamedTuple):
    """What stays after the exit."""

    rows: Tensor  # [B, T'] positions, fillers at the left
    real: Tensor  # [B, T'] False for fillers
    even: bool  # no fillers: every row keeps as many


def by_layer(config: KnockoutConfig) -> dict[int, tuple[Knockout, ...]]:
    """Knockouts of each layer that has any."""
    found: dict[int, tuple[Knockout, ...]] = {}
    for item in config.knockouts:
        for layer in item.layers:
            found[layer] = (*found.get(layer, ()), item)
    return found


@dataclass
class Prompt:
    """A batch of prompts as the masks need it, on the model's device, and the forward that runs on it."""

    config: KnockoutConfig
    layouts: list[TokenLayout]
    roles: Roles
    real: Tensor  # [B, S]
    tokens: int
    left: Left | None  # None without an exit
    regular: RegularFrames | None  # frames of one size that follow each other, no padding
    ids: Tensor | None  # [B, S] token ids, if the prompts came as such
    # The pairs of (knockout, row) that were drawn, and their seed.
    drawn: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict)
    _step: Step | None = None
    _made: dict[Any, Any] = field(default_factory=dict)  # for this forward

    @classmethod
    def of(
        cls, layouts: list[TokenLayout], config: KnockoutConfig, device: torch.device, ids: Tensor | None = None
    ) -> Prompt:
        """Take up a batch of prompts.

        Args:
            layouts: One per row of the batch, of equal padded length.
            config: Knockouts and exit.
            device: Of the decoder.
            ids: ``[batch, tokens]`` token ids, if there are any: a random control differs between prompts of one
                layout by them.

        Raises:
            ValueError: A knockout blocks no pair of a prompt, or leaves a token without any key.
        """
        frame = torch.stack([layout.frame for layout in layouts]).to(device)
        real = torch.stack([layout.real for layout in layouts]).to(device)
        left = None if config.exit is None else _rows_left(frame)
        made = cls(config, layouts, Roles.of(frame), real, frame.shape[1], left, regular_frames(layouts), ids)
        made._check_pairs()
        return made

    @property
    def step(self) -> Step:
        """The forward that runs.

        Raises:
            RuntimeError: None was begun.
        """
        if self._step is None:
            raise RuntimeError("the decoder ran without the model around it: call start(layouts) and begin(...) first")
        return self._step

    def begin(self, queries: int, start: int) -> None:
        """Begin a forward of the decoder with so many rows."""
        self._step, self._made = Step(start, queries, prefill=start == 0), {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What this forward makes once, for all layers."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    # Masks.

    def knocked(self, mask: Any, items: tuple[Knockout, ...], query: Tensor, keys: int) -> Any:
        """The base's mask without the blocked pairs."""
        step = self.step
        total = step.start + step.queries
        # A sliding cache holds the last keys only, a static one has room to spare.
        first_key = max(0, total - keys)
        rule = self.union(items, max(total, first_key + keys))
        batch = query.shape[0]
        if _is_block_mask(mask):
            return _flex_mask(mask, batch, step.queries, keys, lambda b, q, k: ~rule(b, q + step.start, k + first_key))
        b = torch.arange(batch, device=query.device)[:, None, None]
        q = torch.arange(step.queries, device=query.device)[None, :, None] + step.start
        k = torch.arange(keys, device=query.device)[None, None, :] + first_key
        blocked = rule(b, q, k)[:, None]
        if mask is None:
            # None is the base's word for causal, or for one query that reads everything.
            allowed = (k <= q)[:, None] & ~blocked
        elif mask.dtype == torch.bool:
            allowed = mask[..., :keys] & ~blocked
        else:
            return mask[..., :keys].masked_fill(blocked, torch.finfo(mask.dtype).min)
        return allowed

    def after_exit(self, mask: Any, query: Tensor, keys: int) -> Any:
        """The base's mask on the rows and columns that are left."""
        step, left = self.step, self.left
        assert left is not None, "there is an exit"
        total = step.start + step.queries
        kept, real = left.rows, left.real
        later = torch.arange(self.tokens, total, device=kept.device).expand(len(kept), -1)
        columns = torch.cat([kept, later], 1)
        valid = torch.cat([real, torch.ones_like(later, dtype=torch.bool)], 1)
        rows = kept if step.prefill else torch.arange(step.start, total, device=kept.device).expand(len(kept), -1)
        assert columns.shape[1] == keys, f"{columns.shape[1]} keys should be left; the cache holds {keys}"
        if mask is None and left.even:
            return None
        if _is_block_mask(mask):
            old = mask.mask_mod
            zero = torch.zeros((), dtype=torch.long, device=kept.device)

            def seen(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
                row = rows[b, q] - step.start
                return old(b, zero, row, columns[b, k]) & valid[b, k]

            return _flex_mask(None, len(kept), rows.shape[1], keys, seen, query.device)
        if mask is None:
            allowed = (columns[:, None, None, :] <= rows[:, None, :, None]) & valid[:, None, None, :]
        else:
            table = mask.expand(len(kept), -1, -1, -1)
            if step.prefill:
                table = table.gather(2, rows[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))
            index = columns[:, None, None, :].expand(-1, table.shape[1], table.shape[2], -1)
            table = table.gather(3, index)
            if table.dtype != torch.bool:
                return table.masked_fill(~valid[:, None, None, :], torch.finfo(table.dtype).min)
            allowed = table & valid[:, None, None, :]
        return allowed

    # Rules.

    def union(self, items: tuple[Knockout, ...], tokens: int) -> PairRule:
        """What any of some knockouts blocks."""
        rules = [self.rule(item, tokens) for item in items]

        def union(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            found = rules[0](b, q, k)
            for rule in rules[1:]:
                found = found | rule(b, q, k)
            return found

        return union

    def rule(self, item: Knockout, tokens: int) -> PairRule:
        """Blocked pairs of a knockout in a sequence of so many tokens, generated ones included."""
        roles = self.roles.pad(tokens)
        if item.kind == "span":
            rule = span_rule(self._span(item.source, tokens), self._span(item.target, tokens))
        else:
            rule = pair_rule(item.kind, roles, keep_self=item.keep_self)
        if item.frames is not None:
            rule = keep_frames(rule, roles.frame, item.frames)
        if item.control == "opposite":
            return opposite_rule(rule)
        if item.control == "random":
            return self._random(item, rule, tokens)
        return rule

    def _span(self, name: str, tokens: int) -> Tensor:
        rows = torch.stack([layout.mask(name) for layout in self.layouts])
        rows = torch.nn.functional.pad(rows, (0, tokens - rows.shape[1]), value=name in _OPEN_SPANS)
        return rows.to(self.real.device)

    def _random(self, item: Knockout, rule: PairRule, tokens: int) -> PairRule:
        """Drawn once per prompt and knockout, the same in all its layers; generated rows are drawn as they come.

        The draw is a matter of seed and prompt: neither its row in a batch nor padding changes it.
        """
        drawn = []
        for row, layout in enumerate(self.layouts):
            key = (self.config.knockouts.index(item), row)
            if key not in self.drawn:
                seed = _draw_seed(item.seed, layout, None if self.ids is None else self.ids[row])
                b = torch.full((1, 1), row, device=self.real.device)
                at = torch.arange(self.tokens, device=self.real.device)
                blocked = rule(b, at[:, None], at[None, :]) & causal_pairs(self.tokens, at.device)
                blocked &= self.real[row][:, None] & self.real[row][None, :]
                self.drawn[key] = random_pairs(blocked, seed=seed, real=self.real[row]), seed
            table, seed = self.drawn[key]
            while len(table) < tokens:
                table = _one_more_row(table, rule, row, self.real[row], seed)
            self.drawn[key] = table, seed
            drawn.append(table[:tokens, :tokens])
        pairs = torch.stack(drawn)

        def random(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return pairs[b, q, k]

        return random

    def _check_pairs(self) -> None:
        """Refuse a knockout that blocks nothing in some prompt, and a layer that leaves a token without any key."""
        layers = by_layer(self.config)
        if not layers:
            return
        at = torch.arange(self.tokens, device=self.real.device)
        for row, layout in enumerate(self.layouts):
            b = torch.full((1, 1), row, device=at.device)
            # Causal pairs of real tokens; [S, S] once per self.
            open_pairs = (at[None, :] <= at[:, None]) & self.real[row][:, None] & self.real[row][None, :]
            for item in self.config.knockouts if not self.config.allow_empty else ():
                if not bool((self.rule(item, self.tokens)(b, at[:, None], at[None, :]) & open_pairs).any()):
                    raise ValueError(
                        f"{item.label} blocks no pair of prompt {row} ({layout.num_frames} frames, spans "
                        f"{', '.join(layout.spans)}); its result would be the baseline's. Pass allow_empty=True to "
                        "run it anyway"
                    )
            for items in set(layers.values()):
                left = open_pairs & ~self.union(items, self.tokens)(b, at[:, None], at[None, :])
                empty = self.real[row] & ~left.any(1)
                if bool(empty.any()):
                    raise ValueError(
                        f"{' + '.join(item.label for item in items)} leaves position {int(empty.nonzero()[0])} of "
                        f"prompt {row} without any key; keep the diagonal (keep_self=True), or put text before the "
                        "video"
                    )


def _rows_left(frame: Tensor) -> Left:
    """Positions without a frame, right-aligned."""
    stay = frame < 0
    counts = stay.sum(1)
    most = int(counts.max())
    # A stable sort puts the positions that leave first and keeps the order of the others.
    order = stay.int().argsort(dim=1, stable=True)
    kept = order[:, frame.shape[1] - most :]
    real = stay.gather(1, kept)
    return Left(kept.where(real, 0), real, bool((counts == most).all()))


def _draw_seed(seed: int, layout: TokenLayout, ids: Tensor | None) -> int:
    """Seed of a random control for one prompt, from what its real positions are: frames and, if known, tokens."""
    digest = hashlib.sha256(str(seed).encode())
    for row in (layout.frame, ids):
        if row is not None:
            digest.update(row.cpu()[layout.real].long().numpy().tobytes())
    return int.from_bytes(digest.digest()[:6], "big")


def _one_more_row(table: Tensor, rule: PairRule, row: int, real: Tensor, seed: int) -> Tensor:
    """A drawn table with one generated token more, which blocks as many keys as its rule does."""
    size = len(table)
    larger = torch.nn.functional.pad(table, (0, 1, 0, 1))
    at = torch.arange(size, device=table.device)
    there = torch.nn.functional.pad(real, (0, size - len(real)), value=True)
    b = torch.full_like(at, row)
    count = int((rule(b, torch.full_like(at, size), at) & there).sum())
    places = there.nonzero().flatten()
    # Counted in real tokens, which padding does not change.
    generator = torch.Generator().manual_seed(seed + len(places))
    chosen = torch.randperm(len(places), generator=generator)[:count].to(places.device)
    larger[size, places[chosen]] = True
    return larger


def _is_block_mask(mask: Any) -> bool:
    return mask is not None and not isinstance(mask, Tensor)


def _flex_mask(
    mask: Any, batch: int, queries: int, keys: int, keep: PairRule, device: torch.device | None = None
) -> Any:
    """A block mask of what ``mask`` (if any) and ``keep`` both allow."""
    from torch.nn.attention.flex_attention import create_block_mask

    old = None if mask is None else mask.mask_mod

    def both(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = keep(b, q, k)
        return allowed if old is None else allowed & old(b, h, q, k)

    device = device or mask.kv_indices.device
    return create_block_mask(both, B=batch, H=None, Q_LEN=queries, KV_LEN=keys, device=device)
