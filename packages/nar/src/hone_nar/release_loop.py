"""How the release draws, re-created eagerly on our weights: the baseline that ours is timed against.

Caches and masks are made anew in each call, tokens lie in raster order, each step sends its indices from the CPU, reads
the whole padded cache under a mask with the plain attention kernel, runs both heads on every row, and draws token by
token with ``torch.multinomial``.

Source: ``NAR-images/autoregressive/models/generate.py`` and ``gpt.py`` of the release, written anew.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hone_visual_ar.rope import Rope, rotate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .method import guide, mask_of, mix
from .transformer import NARForVideoGeneration, rope_table, slot_ids

__all__ = ["ReleaseLoop"]


class ReleaseLoop:
    """Draws classes or texts as the release does.

    Args:
        model: NAR of images or clips, or LlamaGen.
        guidance: Strength; 1 is none.
    """

    def __init__(self, model: Any, guidance: float) -> None:
        self.model, self.guidance = model, guidance
        self.device = model.tok_embeddings.weight.device
        self.start = model.cls_token_num
        # Position in slots of each one in raster order, behind the condition.
        at = self.start + slot_ids(model.order, self.device).argsort()
        self.places = torch.cat([torch.arange(self.start, device=self.device), at])
        self.rope: Rope | None = None
        if not isinstance(model, NARForVideoGeneration):
            table = rope_table(model.order, self.start, model.head_dim, model.config.rope_base, self.device)
            self.rope = Rope(table.cos[self.places], table.sin[self.places])
        self.plan = model.plan(None, self.device)

    @torch.no_grad()
    def __call__(
        self, labels: Tensor | None = None, *, forced: Tensor | None = None, **text: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Codes ``[B, tokens]`` in raster order.

        Args:
            labels: ``[B]``, for a model of classes.
            forced: ``[B, tokens]`` codes to go on with in place of what is drawn, for comparisons.
            text: ``text`` and ``words`` as of the model's ``condition``, for a model of texts.

        Returns:
            The codes; and with ``forced``, the guided logits ``[B, tokens, vocabulary]``.
        """
        model, start, device = self.model, self.start, self.device
        condition = model.condition(labels, guided=self.guidance != 1, **text)
        images, rows = condition.images, len(condition.embedding)
        count = start + model.tokens
        capacity = -(-count // 8) * 8
        weight = model.tok_embeddings.weight
        shape = (rows, model.layers[0].attention.heads_k, capacity, model.head_dim)
        caches = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in model.layers]
        mask = torch.zeros(rows, capacity, capacity, dtype=torch.bool, device=device)
        seen = mask_of(model.order, start, device, condition.words)
        mask[:, :count, :count] = seen[..., self.places, :][..., self.places]
        tokens = torch.zeros(images, model.tokens, dtype=torch.long, device=device)
        kept: list[Tensor] | None = [] if forced is not None else None
        x = condition.embedding.to(weight.dtype)
        position = torch.arange(start, device=device)
        for step, ids in enumerate(model.order.steps):
            heads = self._forward(x, position, mask, caches)
            logits = self._mix(heads, step)
            if self.guidance != 1:
                logits = guide(logits[:images], logits[images:], self.guidance)
            if kept is not None:
                kept.append(logits)
            drawn = _draw(logits)
            place = torch.tensor(ids)
            position = (start + place).to(device)
            place = place.to(device)
            tokens[:, place] = drawn
            current = drawn if forced is None else forced[:, place]
            x = model.tok_embeddings(torch.cat([current, current]) if self.guidance != 1 else current)
        if kept is None:
            return tokens, None
        return tokens, torch.cat(kept, 1)[:, slot_ids(model.order, device).argsort()]

    def _forward(self, x: Tensor, position: Tensor, mask: Tensor, caches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        model = self.model
        rope = None
        if self.rope is not None:
            rope = Rope(self.rope.cos[position], self.rope.sin[position])
        else:
            x = x + model.abs_pe[:, position].to(x.dtype)
        seen = mask[:, None, position]
        logits, head = [], 0
        for number, block in enumerate(model.layers):
            attention = block.attention
            qkv = attention.wqkv(block.attention_norm(x)).unflatten(-1, (-1, attention.dim)).transpose(1, 2)
            q, k, v = qkv.split([attention.heads, attention.heads_k, attention.heads_k], dim=1)
            keys, values = caches[number]
            if rope is not None:
                q, k = rotate(q, rope).to(x.dtype), rotate(k, rope).to(x.dtype)
            keys[:, :, position] = k
            values[:, :, position] = v
            with sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
            x = x + attention.wo(out.transpose(1, 2).flatten(2))
            x = x + block.feed_forward(block.ffn_norm(x))
            if number >= model.n_layer - 1:
                logits.append(model.head(head, x))
                head += 1
        return logits

    def _mix(self, heads: list[Tensor], step: int) -> Tensor:
        """First from the right head, last from the below head, the others from both; of clips, from those there are."""
        if len(heads) == 1:
            return heads[0][:, -1:]
        if len(heads) == 3:
            starts = self.model.order.starts
            before = self.start + starts[step - 1] if step else 0
            slots = slice(starts[step], starts[step + 1])
            source = (self.plan.source[slots] - before).clamp(min=0)
            each = [logits[:, source[:, head]] for head, logits in enumerate(heads)]
            return mix(each, self.plan.weight[slots])
        right, below = heads
        if step == 0:
            return (right[:, -1:] + below[:, -1:]) / 2
        rows, columns = self.model.grid
        middle = (below[:, :-1] + right[:, 1:]) / 2
        parts = [middle]
        if step < columns:
            parts.insert(0, right[:, :1])
        if step < rows:
            parts.append(below[:, -1:])
        return torch.cat(parts, 1)


def _draw(logits: Tensor) -> Tensor:
    drawn = [torch.multinomial(logits[:, at].softmax(-1), 1) for at in range(logits.shape[1])]
    return torch.cat(drawn, 1)
