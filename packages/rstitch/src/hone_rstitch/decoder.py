"""Dense decoders of transformers (Qwen2, Qwen3, Llama) on paged caches, in a fixed number of small launches.

The weights are the model's own: the three projections of attention, and the two of the feed-forward layer, are laid
side by side in memory, and the model's parameters become views of them. Nothing here waits for the device, so that a
whole step, reading of the logits included, is one CUDA graph (``hone_rstitch.paged``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hone_kernels.decoding import add_rms_norm, linear_of_one, paged_attention, rotate_append, rotate_attend, silu_mul
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Decoder", "unsupported"]

CLASSES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")


def unsupported(model: Any) -> str | None:
    """Why a model cannot run here, or None."""
    name = type(model).__name__
    if name not in CLASSES:
        return f"{name} is none of {', '.join(CLASSES)}"
    config = model.config
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return f"this {name} has sliding windows"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    rotary = model.model.rotary_emb
    if rotary.rope_type not in ("default", "linear", "llama3", "yarn"):
        return f"its rotation ({rotary.rope_type}) changes with the length of the text"
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if 2 * rotary.inv_freq.numel() != dim:
        return "only a part of each head is rotated"
    for layer in model.model.layers:
        for part, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for name in names:
                kind = type(getattr(part, f"{name}_proj"))
                if kind is not nn.Linear:
                    return f"its {name}_proj is a {kind.__name__}, not a plain linear layer"
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return "it is spread over several devices"
    return None


@dataclass(frozen=True, eq=False)
class _Layer:
    before: Tensor
    qkv: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    after: Tensor
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    q_norm: Tensor | None
    k_norm: Tensor | None


class Decoder:
    """One model over pages that it owns.

    Args:
        model: A supported one, in evaluation mode.
        pages: In all, for every row together.
        page: Tokens that a page holds.
        positions: Of a row, at most.

    Raises:
        ValueError: The model is not supported.
    """

    def __init__(self, model: Any, *, pages: int, page: int, positions: int) -> None:
        reason = unsupported(model)
        if reason is not None:
            raise ValueError(f"paged caches are for dense decoders: {reason}")
        body, config = model.model, model.config
        weight = model.lm_head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.scale = self.dim**-0.5
        self.eps = config.rms_norm_eps
        self.embedding, self.norm, self.head = body.embed_tokens.weight, body.norm.weight, weight
        self.layers = [_layer(layer) for layer in body.layers]
        steps = torch.arange(positions, device=self.device)[None]
        cos, sin = body.rotary_emb(torch.zeros(1, dtype=self.dtype, device=self.device), steps)
        # Both halves of a rotation are the same.
        self.cos, self.sin = (x[0, :, : self.dim // 2].contiguous() for x in (cos, sin))
        shape = (len(self.layers), 2, pages, config.num_key_value_heads, page, self.dim)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._counts = torch.zeros(config.num_key_value_heads, dtype=torch.int32, device=self.device)

    @property
    def step_bytes(self) -> int:
        """Of weights that every call reads, the rows of its tokens in the embedding left out."""
        seen = [self.norm, self.head]
        for layer in self.layers:
            seen += [layer.before, layer.after, *layer.qkv, *layer.out, *layer.gate_up, *layer.down]
        return sum(x.numel() * x.element_size() for x in seen if x is not None)

    @property
    def token_bytes(self) -> int:
        """Of keys and values of one token."""
        layers, two, _, heads, _, dim = self.cache.shape
        return layers * two * heads * dim * self.cache.element_size()

    @torch.no_grad()
    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        rows: Tensor,
        table: Tensor,
        last: Tensor | None,
        *,
        fused: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Read tokens into the cache.

        Args:
            ids: int ``[tiles * tokens]``.
            positions: int32 ``[tiles, tokens]``, -1 where there is padding.
            rows: int32 ``[tiles]``, row of the table that each tile is of.
            table: int32 ``[rows, pages of a row]``.
            last: int ``[asked]``, tokens after which logits are wanted; None for none.
            fused: A single token takes five launches a layer.

        Returns:
            ``[asked, vocabulary]`` logits, and the normalised hidden states that they are of; without ``last`` nothing
            that is of use.
        """
        where = (positions, rows, table)
        if fused and len(ids) == 1 and last is not None:
            return self._one(ids, where)
        x = F.embedding(ids, self.embedding)
        total: Tensor | None = None
        for layer, cache in zip(self.layers, self.cache, strict=True):
            x, total = add_rms_norm(x, total, layer.before, self.eps)
            x = self._attend(layer, F.linear(x, *layer.qkv), where, cache)
            x, total = add_rms_norm(F.linear(x, *layer.out), total, layer.after, self.eps)
            x = F.linear(silu_mul(F.linear(x, *layer.gate_up)), *layer.down)
        if last is None:
            return x, x
        assert total is not None, "a decoder has a layer"
        x, _ = add_rms_norm(x[last], total[last], self.norm, self.eps)
        return F.linear(x, self.head), x

    def _one(self, ids: Tensor, where: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A single token: five launches a layer, each of which reads its first weights while the one before ends."""
        x = F.embedding(ids, self.embedding)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            qkv = linear_of_one(x, *layer.qkv, norm=layer.before, eps=self.eps)
            x = linear_of_one(self._attend(layer, qkv, where, cache, self._counts), *layer.out, residual=x)
            hidden = linear_of_one(x, *layer.gate_up, norm=layer.after, eps=self.eps, gated=True)
            x = linear_of_one(hidden, *layer.down, residual=x)
        x, _ = add_rms_norm(x, None, self.norm, self.eps)
        return linear_of_one(x, self.head), x

    def _attend(
        self,
        layer: _Layer,
        qkv: Tensor,
        where: tuple[Tensor, Tensor, Tensor],
        cache: Tensor,
        counts: Tensor | None = None,
    ) -> Tensor:
        keys, values = cache
        norms: dict[str, Any] = {"q_norm": layer.q_norm, "k_norm": layer.k_norm, "eps": self.eps}
        if counts is not None:
            out = rotate_attend(qkv, self.cos, self.sin, *where, keys, values, counts, scale=self.scale, **norms)
            return out.flatten(1)
        q = rotate_append(qkv, self.cos, self.sin, *where, keys, values, **norms)
        return paged_attention(q, keys, values, *where, scale=self.scale).flatten(1)


def _layer(layer: Any) -> _Layer:
    attention, feed = layer.self_attn, layer.mlp
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return _Layer(
        before=layer.input_layernorm.weight,
        qkv=_beside([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=(attention.o_proj.weight, attention.o_proj.bias),
        after=layer.post_attention_layernorm.weight,
        gate_up=_beside([feed.gate_proj, feed.up_proj]),
        down=(feed.down_proj.weight, feed.down_proj.bias),
        q_norm=None if norms[0] is None else norms[0].weight,
        k_norm=None if norms[1] is None else norms[1].weight,
    )


def _beside(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights of layers with one input as those of one layer; theirs become views of it."""
    weight = _joined([layer.weight for layer in layers])
    return weight, None if layers[0].bias is None else _joined([layer.bias for layer in layers])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    data = [part.data for part in parts]
    storages = {x.untyped_storage().data_ptr() for x in data}
    ends = [x.data_ptr() + x.numel() * x.element_size() for x in data]
    if len(storages) == 1 and all(x.data_ptr() == end for x, end in zip(data[1:], ends, strict=False)):
        # Another engine on this model has done so.
        return data[0].as_strided((sum(len(x) for x in data), *data[0].shape[1:]), data[0].stride())
    whole = torch.cat(data)
    for part, view in zip(parts, whole.split([len(x) for x in data]), strict=True):
        part.data = view
    return whole
