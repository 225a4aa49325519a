"""A batch of prompts under knockouts and an exit: which pairs are blocked, which rows are left, in each forward on it.

Nothing here knows a model. ``Prompt`` is bound to a cache, ``Pass`` to a forward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from hone_lm.layouts import TokenLayout
from torch import Tensor

from .config import Knockout, KnockoutConfig
from .local_attention import RegularFrames, regular_frames
from .method import PairRule, Roles, causal_pairs, keep_frames, opposite_rule, pair_rule, random_pairs, span_rule

__all__ = ["Base", "Left", "Pass", "Prompt", "by_layer"]

# Spans that generated tokens belong to, as queries and as keys.
_OPEN_SPANS = ("last", "suffix", "text")


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
    """A batch of prompts as the masks need it, on the model's device.

    Bound to the cache that its prefill fills: a forward that continues a cache continues its prompt, whatever ran in
    between. A copy of the cache goes on with the same one.
    """

    config: KnockoutConfig
    layouts: list[TokenLayout]
    roles: Roles
    real: Tensor  # [B, S]
    tokens: int
    left: Left | None  # None without an exit
    regular: RegularFrames | None  # frames of one size that follow each other, no padding
    ids: Tensor | None  # [B, S] token ids, if the prompts came as such
    # The pairs of (knockout, row, kind of mask) that were drawn, and their seed.
    drawn: dict[tuple[int, int, str], tuple[Tensor, int]] = field(default_factory=dict)
    _others: dict[tuple[int, ...], Prompt] = field(default_factory=dict)  # of rows of it
    _marks: Tensor | None = None  # see mark

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
            ValueError: A knockout blocks no pair of a prompt, or leaves a token without any key; or there is an exit
                and a prompt ends in the video.
        """
        made = cls._of(layouts, config, device, ids)
        made._check_end()
        made._check_pairs()
        return made

    @classmethod
    def _of(
        cls, layouts: list[TokenLayout], config: KnockoutConfig, device: torch.device, ids: Tensor | None
    ) -> Prompt:
        frame = torch.stack([layout.frame for layout in layouts]).to(device)
        real = torch.stack([layout.real for layout in layouts]).to(device)
        leaving = None
        if config.exit is not None:
            leaving = torch.stack([layout.mask(config.leave) for layout in layouts]).to(device)
        left = None if leaving is None else _rows_left(~leaving)
        return cls(config, layouts, Roles.of(frame), real, frame.shape[1], left, regular_frames(layouts), ids)

    def __deepcopy__(self, memo: dict[int, Any]) -> Prompt:
        return self

    def mark(self, cache: Any) -> None:
        """Remember, once, by what the rows of the cache that this prompt has filled are told apart."""
        if self._marks is None and not self._one_prompt:
            keys = _prompt_keys(cache, self.tokens)
            self._marks = None if keys is None else keys.clone()

    def follow(self, cache: Any, batch: int) -> Prompt:
        """The prompts of a cache's rows as they are now: repeated, chosen, or in another order than they were run in.

        Raises:
            ValueError: The rows of the cache cannot be told from each other.
        """
        rows = len(self.layouts)
        if self._one_prompt:
            return self if batch == rows else self._chosen((0,) * batch)
        keys = _prompt_keys(cache, self.tokens)
        if keys is None or self._marks is None or len(keys) != batch:
            if batch == rows and keys is None:
                return self
            raise ValueError(
                f"a cache of {rows} prompts came with a batch of {batch}: which row is which prompt cannot be told. "
                "Repeat the cache of one prompt, or run the prompts as one batch from the start"
            )
        same = (keys[:, None] == self._marks[None]).flatten(2).all(2)  # [batch, rows]
        if not bool(same.any(1).all()):
            raise ValueError(
                f"a row of the cache holds none of the {rows} prompts that it was filled with; run the prompts from "
                "the start"
            )
        index = tuple(same.int().argmax(1).tolist())
        # Rows of one prompt twice are alike.
        return self if batch == rows and bool(same.diagonal().all()) else self._chosen(index)

    def _chosen(self, index: tuple[int, ...]) -> Prompt:
        """The prompts of these rows."""
        made = self._others.get(index)
        if made is None:
            ids = None if self.ids is None else self.ids[list(index)]
            made = Prompt._of([self.layouts[row] for row in index], self.config, self.real.device, ids)
            if self.left is not None:
                # With the fillers of the batch that it was run in: the cache holds those.
                real = self.left.real[list(index)]
                made.left = Left(self.left.rows[list(index)], real, bool(real.all()))
            self._others[index] = made
        for row, source in enumerate(index):
            for (item, drawn_row, kind), drawn in self.drawn.items():
                known = made.drawn.get((item, row, kind))
                if drawn_row == source and (known is None or len(known[0]) < len(drawn[0])):
                    made.drawn[item, row, kind] = drawn
        return made

    @cached_property
    def _one_prompt(self) -> bool:
        """Whether all rows are the same prompt as far as masks go."""
        first = self.layouts[0]
        same = all(
            torch.equal(one.frame, first.frame)
            and torch.equal(one.real, first.real)
            and (one.spans, one.positions) == (first.spans, first.positions)
            for one in self.layouts[1:]
        )
        drawn = any(item.control == "random" for item in self.config.knockouts)
        return same and not (drawn and self.ids is not None and bool((self.ids != self.ids[:1]).any()))

    def kept_logits(self, keep: int | Tensor) -> int | Tensor:
        """``logits_to_keep`` of a whole prompt, as one of the rows that are left after the exit.

        Raises:
            ValueError: It asks for rows that leave, or for positions that come at different rows in a batch.
        """
        left = self.left
        assert left is not None, "there is an exit"
        gone = "logits_to_keep asks for rows of the video, which are gone after the exit; ask for text only"
        if isinstance(keep, int):
            late = torch.arange(self.tokens - keep, self.tokens, device=left.rows.device)
            if keep and not torch.equal(left.rows[:, -keep:], late.expand(len(left.rows), -1)):
                raise ValueError(gone)
            return keep
        wanted = keep.to(left.rows.device)
        wanted = wanted.nonzero().flatten() if wanted.dtype == torch.bool else wanted % self.tokens
        # Fillers, at position 0, come before every row that is there.
        at = torch.searchsorted(left.rows.contiguous(), wanted.expand(len(left.rows), -1).contiguous(), right=True) - 1
        if bool((left.rows.gather(1, at.clamp(min=0)) != wanted).any()) or bool((at < 0).any()):
            raise ValueError(gone)
        if bool((at != at[:1]).any()):
            raise ValueError(
                "logits_to_keep names positions that lie at different rows of each prompt after the exit; pass 0 and "
                "pick them by handle.rows"
            )
        return at[0].to(keep.device)

    # Rules.

    def union(self, items: tuple[Knockout, ...], tokens: int, base: Base | None = None) -> PairRule:
        """What any of some knockouts blocks."""
        rules = [self.rule(item, tokens, base) for item in items]

        def union(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            found = rules[0](b, q, k)
            for rule in rules[1:]:
                found = found | rule(b, q, k)
            return found

        return union

    def rule(self, item: Knockout, tokens: int, base: Base | None = None) -> PairRule:
        """Blocked pairs of a knockout in a sequence of so many tokens, generated ones included.

        Args:
            item: The knockout.
            tokens: So far.
            base: Pairs that the model has without it, of which a random control draws; causal ones if None.
        """
        rule = self._plain(item, tokens)
        if item.control == "opposite":
            return opposite_rule(rule)
        if item.control == "random":
            return self._random(item, rule, tokens, base)
        return rule

    def _plain(self, item: Knockout, tokens: int) -> PairRule:
        """What a knockout is about, before it is turned into a control."""
        roles = self.roles.pad(tokens)
        if item.kind == "span":
            rule = span_rule(self._span(item.source, tokens), self._span(item.target, tokens))
        else:
            rule = pair_rule(item.kind, roles, keep_self=item.keep_self)
        return rule if item.frames is None else keep_frames(rule, roles.frame, item.frames)

    def _span(self, name: str, tokens: int) -> Tensor:
        rows = torch.stack([layout.mask(name) for layout in self.layouts])
        rows = torch.nn.functional.pad(rows, (0, tokens - rows.shape[1]), value=name in _OPEN_SPANS)
        return rows.to(self.real.device)

    def _random(self, item: Knockout, rule: PairRule, tokens: int, base: Base | None) -> PairRule:
        """Drawn once per prompt, knockout and kind of mask; generated rows are drawn as they come.

        The draw is a matter of seed and prompt: neither its row in a batch nor padding changes it.
        """
        drawn = []
        for row, layout in enumerate(self.layouts):
            key = (self.config.knockouts.index(item), row, "" if base is None else base.name)
            if key not in self.drawn:
                seed = _draw_seed(item.seed, layout, None if self.ids is None else self.ids[row])
                b = torch.full((1, 1), row, device=self.real.device)
                at = torch.arange(self.tokens, device=self.real.device)
                whole = causal_pairs(self.tokens, at.device) if base is None else base.prompt(row, self.tokens)
                whole = whole & self.real[row][:, None] & self.real[row][None, :]
                blocked = rule(b, at[:, None], at[None, :]) & whole
                self.drawn[key] = random_pairs(blocked, seed=seed, among=whole), seed
            table, seed = self.drawn[key]
            while len(table) < tokens:
                there = None if base is None else base.query(row, len(table))
                table = _one_more_row(table, rule, row, self.real[row], seed, there)
            self.drawn[key] = table, seed
            drawn.append(table[:tokens, :tokens])
        pairs = torch.stack(drawn)

        def random(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return pairs[b, q, k]

        return random

    def _check_end(self) -> None:
        """Refuse a prompt whose last row, the one that answers, would leave at the exit."""
        if self.left is None:
            return
        for row, layout in enumerate(self.layouts):
            leaving = layout.mask(self.config.leave)
            if bool((leaving & (layout.frame < 0)).any()) or not bool(leaving.any()):
                raise ValueError(
                    f"leave={self.config.leave!r} must name visual tokens, and at least one; of prompt {row} it holds "
                    f"{int(leaving.sum())} positions, {int((leaving & (layout.frame < 0)).sum())} of them text"
                )
            last = int(layout.real.nonzero()[-1])
            if leaving[last]:
                raise ValueError(
                    f"prompt {row} ends in the video, at position {last}: its last row leaves at the exit, and nothing "
                    "is left to answer from. Put the question, or the template's answer tag, after the video"
                )

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
                rule = self._plain(item, self.tokens) if item.control == "random" else self.rule(item, self.tokens)
                if not bool((rule(b, at[:, None], at[None, :]) & open_pairs).any()):
                    raise ValueError(
                        f"{item.label} blocks no pair of prompt {row} ({layout.num_frames} frames, spans "
                        f"{', '.join(layout.spans)}); its result would be the baseline's. Pass allow_empty=True to "
                        "run it anyway"
                    )
            for items in set(layers.values()):
                # A random control, which never takes the diagonal, is looked at when it is drawn.
                items = tuple(item for item in items if item.control != "random")
                if not items:
                    continue
                left = open_pairs & ~self.union(items, self.tokens)(b, at[:, None], at[None, :])
                empty = self.real[row] & ~left.any(1)
                if bool(empty.any()):
                    raise ValueError(
                        f"{' + '.join(item.label for item in items)} leaves position {int(empty.nonzero()[0])} of "
                        f"prompt {row} without any key; keep the diagonal (keep_self=True), or put text before the "
                        "video"
                    )


class Base(NamedTuple):
    """Pairs that the model itself allows in a forward, whatever its mask is: causal, sliding, open in both directions.

    Attributes:
        name: of the kind of mask; layers of one kind share their draws.
        start: position of the first query.
        pairs: ``[batch, queries, tokens]``, False for keys that a cache has dropped.
    """

    name: str
    start: int
    pairs: Tensor

    def prompt(self, row: int, tokens: int) -> Tensor:
        """``[tokens, tokens]`` of a prompt that this forward holds whole."""
        assert self.start == 0, "a prompt's pairs are drawn in its prefill"
        return self.pairs[row, :tokens, :tokens]

    def query(self, row: int, position: int) -> Tensor:
        """Keys that one query may read."""
        return self.pairs[row, position - self.start]


@dataclass
class Pass:
    """One forward of the decoder over a batch of prompts.

    It travels with the forward, as an argument of the decoder that reaches every layer: other threads, other prompts,
    and layers that are run again for a backward pass each have their own.
    """

    prompt: Prompt
    start: int  # position of the first query
    queries: int
    seen: set[int] = field(default_factory=set)  # layers whose attention ran
    _made: dict[Any, Any] = field(default_factory=dict)

    @property
    def prefill(self) -> bool:
        """Whether it holds the prompt."""
        return self.start == 0

    def once(self, key: Any, of: Any, make: Callable[[], Any]) -> Any:
        """What this forward makes of something once, for all layers that get the same object."""
        key = (key, id(of))
        if key not in self._made:
            # Held, so that its id is not given to another.
            self._made[key] = make(), of
        return self._made[key][0]

    def rows(self) -> Tensor:
        """``[batch, rows]`` positions of the queries that are left after the exit, fillers at the left."""
        left, total = self.prompt.left, self.start + self.queries
        assert left is not None, "there is an exit"
        later = torch.arange(max(self.start, self.prompt.tokens), total, device=left.rows.device)
        later = later.expand(len(left.rows), -1)
        return torch.cat([left.rows, later], 1) if self.prefill else later

    def knocked(self, mask: Any, items: tuple[Knockout, ...], query: Tensor, keys: int, kind: str = "") -> Any:
        """The base's mask without the blocked pairs.

        Args:
            mask: Of the base.
            items: The layer's knockouts.
            query: The layer's.
            keys: That it has.
            kind: Of the layer, where a decoder has several.
        """
        total = self.start + self.queries
        # A sliding cache holds the last keys only, a static one has room to spare.
        first_key = max(0, total - keys)
        batch = query.shape[0]
        b = torch.arange(batch, device=query.device)[:, None, None]
        q = torch.arange(self.queries, device=query.device)[None, :, None] + self.start
        k = torch.arange(keys, device=query.device)[None, None, :] + first_key
        base = None
        if any(item.control == "random" for item in items):
            own = _allowed(mask, b, q, k, self.start, first_key)[:, :, : total - first_key]
            base = Base(kind, self.start, torch.nn.functional.pad(own, (first_key, 0)))
        most = max(total, first_key + keys) if base is None else total
        rule = self.prompt.union(items, most, base)
        if _is_block_mask(mask):

            def keep(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return ~rule(b, q + self.start, (k + first_key).clamp(max=most - 1))

            return _flex_mask(mask, batch, self.queries, keys, keep)
        # The base's mask closes the spare room of a static cache.
        blocked = rule(b, q, k.clamp(max=most - 1))[:, None]
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
        left = self.prompt.left
        assert left is not None, "there is an exit"
        total = self.start + self.queries
        kept, real, rows = left.rows, left.real, self.rows()
        later = torch.arange(self.prompt.tokens, total, device=kept.device).expand(len(kept), -1)
        columns = torch.cat([kept, later], 1)
        valid = torch.cat([real, torch.ones_like(later, dtype=torch.bool)], 1)
        assert columns.shape[1] == keys, f"{columns.shape[1]} keys should be left; the cache holds {keys}"
        if mask is None and left.even:
            return None
        if _is_block_mask(mask):
            old = mask.mask_mod
            zero = torch.zeros((), dtype=torch.long, device=kept.device)

            def seen(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
                row = rows[b, q] - self.start
                return old(b, zero, row, columns[b, k]) & valid[b, k]

            return _flex_mask(None, len(kept), rows.shape[1], keys, seen, query.device)
        if mask is None:
            allowed = (columns[:, None, None, :] <= rows[:, None, :, None]) & valid[:, None, None, :]
        else:
            table = mask.expand(len(kept), -1, -1, -1)
            if self.prefill:
                table = table.gather(2, rows[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))
            index = columns[:, None, None, :].expand(-1, table.shape[1], table.shape[2], -1)
            table = table.gather(3, index)
            if table.dtype != torch.bool:
                return table.masked_fill(~valid[:, None, None, :], torch.finfo(table.dtype).min)
            allowed = table & valid[:, None, None, :]
        return allowed


def _allowed(mask: Any, b: Tensor, q: Tensor, k: Tensor, start: int, first_key: int) -> Tensor:
    """``[batch, queries, keys]``: pairs that the base's mask allows, at positions ``q`` and ``k``."""
    shape = (len(b), q.shape[1], k.shape[2])
    if mask is None:
        return (k <= q).expand(shape)
    if _is_block_mask(mask):
        zero = torch.zeros((), dtype=torch.long, device=q.device)
        return mask.mask_mod(*torch.broadcast_tensors(b, zero, q - start, k - first_key)).expand(shape)
    table = mask[:, 0, :, : k.shape[2]]
    if mask.dtype != torch.bool:
        table = table > torch.finfo(mask.dtype).min / 2
    return table.expand(shape)


def _prompt_keys(cache: Any, tokens: int) -> Tensor | None:
    """``[batch, tokens, channels]``: a few channels of the keys of the first layer that holds every position.

    In a first layer they tell tokens and positions; whatever moves the rows of a cache moves them along. None where no
    layer holds them as such, as when all are sliding or quantised.
    """
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        whole = not getattr(layer, "is_sliding", False) and not hasattr(layer, "nbits")
        if whole and isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[2] >= tokens:
            return keys[:, 0, :tokens, :4]
    return None


def _rows_left(stay: Tensor) -> Left:
    """Positions that stay, right-aligned."""
    counts = stay.sum(1)
    most = int(counts.max())
    # A stable sort puts the positions that leave first and keeps the order of the others.
    order = stay.int().argsort(dim=1, stable=True)
    kept = order[:, stay.shape[1] - most :]
    real = stay.gather(1, kept)
    return Left(kept.where(real, 0), real, bool((counts == most).all()))


def _draw_seed(seed: int, layout: TokenLayout, ids: Tensor | None) -> int:
    """Seed of a random control for one prompt, from what its real positions are: frames and, if known, tokens."""
    digest = hashlib.sha256(str(seed).encode())
    for row in (layout.frame, ids):
        if row is not None:
            digest.update(row.cpu()[layout.real].long().numpy().tobytes())
    return int.from_bytes(digest.digest()[:6], "big")


def _one_more_row(table: Tensor, rule: PairRule, row: int, real: Tensor, seed: int, allowed: Tensor | None) -> Tensor:
    """A drawn table with one generated token more, which blocks as many keys as its rule does.

    ``allowed``: keys that the model lets it read, all real ones if None.
    """
    size = len(table)
    larger = torch.nn.functional.pad(table, (0, 1, 0, 1))
    at = torch.arange(size, device=table.device)
    there = torch.nn.functional.pad(real, (0, size - len(real)), value=True)
    # Counted in real tokens, which padding does not change.
    generator = torch.Generator().manual_seed(seed + int(there.sum()))
    if allowed is not None:
        there = there & allowed[:size]
    b = torch.full_like(at, row)
    count = int((rule(b, torch.full_like(at, size), at) & there).sum())
    places = there.nonzero().flatten()
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
