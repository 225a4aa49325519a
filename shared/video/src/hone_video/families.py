"""The transformer classes that a method can be attached to, and how each of them runs self-attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from .attachment import Attachment, Forward, Method, Processor, Tables, fixed_size, reorder_patches
from .parallel import Ulysses

__all__ = ["FAMILIES", "CogVideoXAttachment", "HunyuanVideoAttachment", "WanAttachment"]


class _Dispatched(Processor):
    """Stands for a processor that goes through diffusers' attention dispatch."""

    # diffusers sets these two on the processors of a model; they belong to the one that does dense attention.
    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        reason = None if config is None else self.attachment.refuse_parallelism(config, self.method)
        if reason is not None:
            raise RuntimeError(reason)
        self.original._parallel_config = config


class WanProcessor(_Dispatched):
    """Self-attention of Wan: video tokens alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tables | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        tables = rotary_emb
        if not isinstance(tables, Tables) or self.own(tables):
            pair = tables.pair if isinstance(tables, Tables) else tables
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, pair)
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, S, H, D]
        share, own = Ulysses.of(self._parallel_config), q
        if share is not None:
            q, k, v = (share.gather(x) for x in (q, k, v))
        rope = self.rope(q, v, tables)
        if rope is None:
            assert tables.cos is not None
            assert tables.sin is not None
            q, k = (_rotate_pairs(x, tables.cos, tables.sin) for x in (q, k))
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), tables, attention_mask, rope)
        out = out.transpose(1, 2)
        if share is not None:
            out = share.scatter(out, own)
        out = out.flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of ``x [B, S, H, D]`` by tables ``[1, S, 1, D]`` that hold each angle twice."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


class WanAttachment(Attachment):
    """Wan: the latents' patches are put in order before the model embeds them, and the output's are put back.

    Under context parallelism every process has the whole latents; its tokens are a piece of that order.
    """

    base = WanTransformer3DModel
    processor = WanProcessor
    originals = (WanAttnProcessor,)
    parallel = True

    @staticmethod
    def self_attentions(model: Any) -> list[Any]:
        """See ``Attachment``."""
        return [block.attn1 for block in model.blocks]

    def place_hooks(self) -> None:
        """See ``Attachment``."""
        self.hooks.add("rope", lambda module: module.register_forward_hook(self.rotary))

    def start(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """See ``Attachment``."""
        hidden, timestep = _argument(args, kwargs, 0, "hidden_states"), _argument(args, kwargs, 1, "timestep")
        _check_latents(hidden, "batch, channels, frames, height, width")
        patch = model.config.patch_size
        f, h, w = (fixed_size(n) // size for n, size in zip(hidden.shape[2:], patch, strict=True))
        forward = self.begin(model, (f, h, w), 0, timestep)
        if forward is None or not forward.reorders:
            return None
        if timestep.ndim == 2:
            # Wan2.2 TI2V: the time of each token. All that is made of it is per token too, up to the output projection.
            args, kwargs = _replace(args, kwargs, 1, "timestep", forward.sort(timestep, 1))
        ordered = reorder_patches(hidden, forward.permutation(hidden.device), forward.grid, tuple(patch))
        return _replace(args, kwargs, 0, "hidden_states", ordered)

    def rotary(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> Tables | None:
        """Hook of the rotary embedding, ``[1, N, 1, D]`` each."""
        forward = self.state.current
        if forward is None:
            return None
        share = Ulysses.of(self.processors[0].original._parallel_config)
        if share is None:
            cos, sin = output
            return Tables.of(forward.sort(cos, 1), forward.sort(sin, 1), forward, self.method)
        # What diffusers' hook gave is a piece of them in the model's own order.
        cos, sin = (forward.sort(x, 1) for x in type(module).forward(module, *args))
        return Tables.of(cos, sin, forward, self.method, (share.share(cos, 1), share.share(sin, 1)))

    def restore(self, output: Tensor, forward: Forward) -> Tensor:
        """See ``Attachment``; ``[B, C, F, H, W]``."""
        return _restore(output, forward)


class CogVideoXProcessor(Processor):
    """Self-attention of CogVideoX: video and text in one sequence."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        tables = image_rotary_emb
        if not isinstance(tables, Tables) or self.own(tables):
            pair = tables.pair if isinstance(tables, Tables) else tables
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, pair)
        video, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        # The model's own order is text first; joining the two here anyway, the tail costs nothing.
        joint = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        if attn.fused_projections:
            q, k, v = attn.to_qkv(joint).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(joint), attn.to_k(joint), attn.to_v(joint)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        rope = self.rope(q, v, tables)
        if rope is None and tables.pair is not None:
            q, k = (_rotate_head(x, video, tables.pair) for x in (q, k))
        out = self.attend(q, k, v, tables, attention_mask, rope)
        out = out.transpose(1, 2).flatten(2, 3).type_as(joint)
        out = attn.to_out[1](attn.to_out[0](out))
        video_out, text_out = out.split([video, text], dim=1)
        return video_out, text_out


def _rotate_head(x: Tensor, video: int, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first ``video`` tokens of ``x [B, H, S, D]``, in place where ``x`` is ours to write."""
    x = x.contiguous()
    x[:, :, :video] = apply_rotary_emb(x[:, :, :video], tables)
    return x


class CogVideoXAttachment(Attachment):
    """CogVideoX: tokens are put in order behind the patch embedding, which adds positions in some of its models."""

    base = CogVideoXTransformer3DModel
    processor = CogVideoXProcessor
    originals = (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0)

    @staticmethod
    def self_attentions(model: Any) -> list[Any]:
        """See ``Attachment``."""
        return [block.attn1 for block in model.transformer_blocks]

    def place_hooks(self) -> None:
        """See ``Attachment``."""
        self.hooks.add("patch_embed", lambda module: module.register_forward_hook(self.embed))

    def start(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """See ``Attachment``; puts the rotary tables ``[N, D]`` in order."""
        hidden, text = _argument(args, kwargs, 0, "hidden_states"), _argument(args, kwargs, 1, "encoder_hidden_states")
        timestep, rotary = _argument(args, kwargs, 2, "timestep"), _argument(args, kwargs, 5, "image_rotary_emb", None)
        patches = (model.config.patch_size_t or 1, model.config.patch_size, model.config.patch_size)
        _check_latents(hidden, "batch, frames, channels, height, width")
        sizes = (hidden.shape[1], *hidden.shape[3:])
        f, h, w = (fixed_size(size) // patch for size, patch in zip(sizes, patches, strict=True))
        forward = self.begin(model, (f, h, w), fixed_size(text.shape[1]), timestep)
        if forward is None:
            return None
        tables = Tables(None, None, forward)
        if rotary is not None:
            cos, sin = rotary
            if cos.shape[0] != f * h * w:
                raise ValueError(
                    f"image_rotary_emb must have one row per video token, {f * h * w} for the grid {(f, h, w)}; got "
                    f"{cos.shape[0]}"
                )
            tables = Tables.of(forward.sort(cos, 0), forward.sort(sin, 0), forward, self.method)
        return _replace(args, kwargs, 5, "image_rotary_emb", tables)

    def embed(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Hook of the patch embedding ``[B, text + N, C]``: video tokens in order, text where it is."""
        forward = self.state.current
        if forward is None or not forward.reorders:
            return None
        order = forward.permutation(output.device)
        text = torch.arange(forward.text_tokens, device=order.device)
        return output.index_select(1, torch.cat([text, order + forward.text_tokens]))

    def restore(self, output: Tensor, forward: Forward) -> Tensor:
        """See ``Attachment``; ``[B, F, C, H, W]``."""
        return _restore(output.transpose(1, 2), forward).transpose(1, 2)


class HunyuanVideoProcessor(_Dispatched):
    """Self-attention of HunyuanVideo: video, then text, with projections of its own for text in the first blocks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        tables = image_rotary_emb
        if not isinstance(tables, Tables) or self.own(tables):
            pair = tables.pair if isinstance(tables, Tables) else tables
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, pair)
        video, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        if attn.add_q_proj is None:
            joint = torch.cat([hidden_states, encoder_hidden_states], dim=1)
            q, k, v = _heads(attn, joint, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        else:
            own = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            texts = _heads(attn, encoder_hidden_states, added, (attn.norm_added_q, attn.norm_added_k))
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(own, texts, strict=True))
        rope = self.rope(q, v, tables)
        if rope is None:
            assert tables.pair is not None
            q, k = (_rotate_first(x, video, tables.pair) for x in (q, k))
        # The mask hides padding of the text, which is not here: see HunyuanVideoAttachment.
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), tables, None, rope)
        video_out, text_out = out.transpose(1, 2).flatten(2, 3).type_as(q).split([video, text], dim=1)
        # The last blocks leave the projection to their own.
        if getattr(attn, "to_out", None) is not None:
            video_out = attn.to_out[1](attn.to_out[0](video_out))
        if getattr(attn, "to_add_out", None) is not None:
            text_out = attn.to_add_out(text_out)
        return video_out, text_out


def _heads(attn: Any, x: Tensor, projections: tuple[Any, ...], norms: tuple[Any, ...]) -> list[Tensor]:
    """q, k and v ``[B, S, H, D]`` after their norms."""
    parts = [projection(x).unflatten(2, (attn.heads, -1)) for projection in projections]
    return [part if norm is None else norm(part) for part, norm in zip(parts, (*norms, None), strict=True)]


def _rotate_first(x: Tensor, video: int, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first ``video`` tokens of ``x [B, S, H, D]``."""
    return torch.cat([apply_rotary_emb(x[:, :video], tables, sequence_dim=1), x[:, video:]], dim=1)


class HunyuanVideoAttachment(Attachment):
    """HunyuanVideo: tokens are put in order behind the patch embedding, and padding of the text is cut off.

    The model hides the keys of padding from all queries, so what is behind the prompt changes nothing but itself, which
    nobody reads. Cutting it off needs the length of the prompt on the host, read once per forward.
    """

    base = HunyuanVideoTransformer3DModel
    processor = HunyuanVideoProcessor
    originals = (HunyuanVideoAttnProcessor2_0,)

    @staticmethod
    def self_attentions(model: Any) -> list[Any]:
        """See ``Attachment``; blocks of two streams, then those of one."""
        return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]

    @classmethod
    def check(cls, model: Any, method: Method, supported: str) -> None:
        """See ``Attachment``."""
        super().check(model, method, supported)
        if model.config.image_condition_type == "token_replace" and method.order != "raster":
            raise ValueError(
                f"{method.name} orders tokens, but this {type(model).__name__} treats those of the first frame, by "
                "their place, in another way (image_condition_type='token_replace'); the text-to-video and "
                "'latent_concat' models are supported"
            )

    def place_hooks(self) -> None:
        """See ``Attachment``."""
        self.hooks.add("rope", lambda module: module.register_forward_hook(self.rotary))
        self.hooks.add("x_embedder", lambda module: module.register_forward_hook(self.embed))
        self.hooks.add("context_embedder", lambda module: module.register_forward_hook(self.cut))

    def start(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """See ``Attachment``."""
        hidden, timestep = _argument(args, kwargs, 0, "hidden_states"), _argument(args, kwargs, 1, "timestep")
        mask = _argument(args, kwargs, 3, "encoder_attention_mask")
        _check_latents(hidden, "batch, channels, frames, height, width")
        patches = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
        f, h, w = (fixed_size(n) // size for n, size in zip(hidden.shape[2:], patches, strict=True))
        self.begin(model, (f, h, w), _text_length(mask) if self.attached else 0, timestep)

    def rotary(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> Tables | None:
        """Hook of the rotary embedding, ``[N, D]`` each."""
        forward = self.state.current
        if forward is None:
            return None
        cos, sin = output
        return Tables.of(forward.sort(cos, 0), forward.sort(sin, 0), forward, self.method)

    def embed(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Hook of the patch embedding, ``[B, N, C]``."""
        forward = self.state.current
        return None if forward is None else forward.sort(output, 1)

    def cut(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Hook of the text's embedding, ``[B, text, C]``: its padding goes."""
        forward = self.state.current
        return None if forward is None else output[:, : forward.text_tokens]

    def restore(self, output: Tensor, forward: Forward) -> Tensor:
        """See ``Attachment``; ``[B, C, F, H, W]``."""
        return _restore(output, forward)


@torch.compiler.disable(reason="reading the length of the prompt; compile the blocks instead of the model")
def _text_length(mask: Tensor) -> int:
    """Tokens of the prompt, which all items of a batch share."""
    lengths = mask.sum(dim=1).int().tolist()
    if min(lengths) != max(lengths):
        raise ValueError(
            f"the prompts of a batch must have equally many tokens, since a layout of attention is for all of them; "
            f"encoder_attention_mask has {lengths}. Run prompts one by one"
        )
    return lengths[0]


FAMILIES: tuple[type[Attachment], ...] = (WanAttachment, CogVideoXAttachment, HunyuanVideoAttachment)
"""One attachment per transformer class."""


def _restore(video: Tensor, forward: Forward) -> Tensor:
    """Patches of ``[B, C, F, H, W]`` back in raster order."""
    f, h, w = (size // count for size, count in zip(video.shape[2:], forward.grid, strict=True))
    return reorder_patches(video, forward.permutation(video.device, inverse=True), forward.grid, (f, h, w))


_REQUIRED = object()


def _argument(args: tuple, kwargs: dict[str, Any], position: int, name: str, default: Any = _REQUIRED) -> Any:
    """An argument of the model's forward, however it was passed."""
    value = args[position] if position < len(args) else kwargs.get(name, default)
    if value is _REQUIRED or (value is None and default is _REQUIRED):
        got = "None" if value is None else "a call without it"
        raise TypeError(f"the transformer's forward needs {name} (argument {position + 1}); got {got}. Pass {name}=...")
    return value


def _check_latents(hidden: Tensor, axes: str) -> None:
    if hidden.dim() != 5:
        raise ValueError(
            f"hidden_states must be latents [{axes}]; got {list(hidden.shape)}. A single image has one frame"
        )


def _replace(args: tuple, kwargs: dict[str, Any], position: int, name: str, value: Any) -> tuple[tuple, dict[str, Any]]:
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}
