"""Masked and residual transformers of MoMask and MoGenTS, with the names of their checkpoints.

All take tokens ``[B, T, P]``, a ``Condition`` with CLIP's text vectors, and the time steps that are there, as
``MotionTransformer`` does: MoMask's grid has one column, MoGenTS's six. So generation, guidance, edits and the masking
of Motion Anything work on each.

Source: the released code of MoMask (Guo et al., CVPR 2024) and MoGenTS (Yuan et al., NeurIPS 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from hone_kernels.backends import Backend
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .conditions import check_tokens
from .decoding import Passes, draw
from .method import Condition

__all__ = ["LengthEstimator", "MaskTransformer", "MaskTransformer2D", "ResidualTransformer", "ResidualTransformer2D"]
__all__ += ["refine"]

CLIP_WIDTH = 512


class InputProcess(nn.Module):
    """Code vectors to the transformer's width."""

    def __init__(self, code_dim: int, width: int) -> None:
        super().__init__()
        self.poseEmbedding = nn.Linear(code_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., code_dim]`` to ``[..., width]``."""
        return self.poseEmbedding(x)


class PositionalEncoding(nn.Module):
    """Sines and cosines of a place; a parameter where MoGenTS trains them."""

    pe: Tensor

    def __init__(self, width: int, dropout: float, places: int = 5000, *, trained: bool = False) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        pe = _waves(places, width)[:, None]
        if trained:
            self.pe = nn.Parameter(pe)
        else:
            self.register_buffer("pe", pe)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, D]`` in and out."""
        return self.dropout(x + self.pe[: len(x)])


class PositionalEncoding2D(nn.Module):
    """The first half of the channels tells the column, the second the time step."""

    pe: Tensor

    def __init__(self, width: int, dropout: float, times: int = 200, columns: int = 50) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"a place in two dimensions needs a width that 4 divides; got {width}")
        self.dropout = nn.Dropout(dropout)
        across = _waves(columns, width // 2)[None].expand(times, -1, -1)
        along = _waves(times, width // 2)[:, None].expand(-1, columns, -1)
        self.register_buffer("pe", torch.cat([across, along], -1))

    def forward(self, x: Tensor) -> Tensor:
        """``[T, P, B, D]`` in and out."""
        return self.dropout(x + self.pe[: x.shape[0], : x.shape[1], None])


def _waves(places: int, width: int) -> Tensor:
    found = torch.zeros(places, width)
    at = torch.arange(places, dtype=torch.float)[:, None]
    rate = torch.exp(torch.arange(0, width, 2).float() * (-math.log(10000.0) / width))
    found[:, 0::2], found[:, 1::2] = torch.sin(at * rate), torch.cos(at * rate)
    return found


class OutputProcess_Bert(nn.Module):
    """A layer, GELU and a norm, then the scores."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.poseFinal = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to ``[..., out]``."""
        return self.poseFinal(self.LayerNorm(F.gelu(self.dense(x))))


def _encoder(width: int, heads: int, hidden: int, layers: int, dropout: float) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout, activation="gelu")
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def _brings_back(module: nn.Module) -> bool:
    """Whether accelerate's hook on a module loads all the weights inside it for a forward."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(one, "place_submodules", False) for one in getattr(hook, "hooks", (hook,)))


class _Published(nn.Module):
    """What all four share: sizes, the text's vector and what stands for none, the masking."""

    def __init__(self, codes: int, code_dim: int, width: int, hidden: int) -> None:
        super().__init__()
        self.codes, self.code_dim, self.width = codes, code_dim, width
        self.input_process = InputProcess(code_dim, width)
        self.cond_emb = nn.Linear(CLIP_WIDTH, width)
        self.output_process: OutputProcess_Bert
        self.masking: Any = None

    @property
    def mask_id(self) -> int:
        """Of a hidden token."""
        return self.codes

    @property
    def pad_id(self) -> int:
        """Of a token past the end."""
        return self.codes + 1

    def check(self, ids: Tensor, condition: Condition, valid: Tensor, parts: int | None = None) -> None:
        """See that the first level's tokens, condition and time steps fit; as for ``MotionTransformer``."""
        if ids.dim() != 3 or (parts is not None and ids.shape[2] != parts):
            raise ValueError(f"ids must be [batch, time, {parts or 'parts'}]; got {list(ids.shape)}")
        check_tokens(ids, valid)
        if condition.music is None:
            condition.check(len(ids), ids.device, CLIP_WIDTH)

    def check_attention(self, *, beside: bool = False) -> None:
        """Refuse what torch's attention would not see: it reads the weights of its ``out_proj`` without calling it.

        Args:
            beside: Attention is read by itself, without a forward of the layer around it.

        Raises:
            ValueError: ``out_proj`` was replaced, or its weights are offloaded and nothing brings them back.
        """
        for name, encoder in self.named_children():
            for number, layer in enumerate(encoder.layers if isinstance(encoder, nn.TransformerEncoder) else ()):
                attention: Any = layer.self_attn
                if type(attention) is not nn.MultiheadAttention:
                    continue  # peft's own looks after both
                where = f"{name}.layers.{number}.self_attn"
                if not isinstance(attention.out_proj, NonDynamicallyQuantizableLinear):
                    raise ValueError(
                        f"{where}.out_proj is a {type(attention.out_proj).__name__} now, which torch's attention does "
                        "not call, so that it would do nothing. Leave out_proj as it was; peft's LoRA takes self_attn"
                    )
                around = [attention] if beside else [self, encoder, layer, attention]
                if attention.out_proj.weight.is_meta and not any(map(_brings_back, around)):
                    raise ValueError(
                        f"the weights of {where}.out_proj are offloaded, and torch's attention reads them without the "
                        "call that would bring them back. Offload with preload_module_classes=['MultiheadAttention']"
                    )

    def said(self, condition: Condition) -> Tensor:
        """The text's row ``[1, B, D]``; none is a vector of zeros before the linear map.

        Raises:
            ValueError: There is no text, or music.
        """
        if condition.text is None or condition.music is not None:
            raise ValueError(f"{type(self).__name__} follows a text, and no music")
        text = condition.text
        if condition.no_text is not None:
            text = text * ~condition.no_text[:, None]
        # The norm's dtype is the model's, also where linear layers were quantised.
        return self.cond_emb(text.to(self.output_process.LayerNorm.weight.dtype))[None]


class MaskTransformer(_Published):
    """MoMask's, of tokens of whole frames (``t2m_transformer``); ``aux`` is MoGenTS's first stream.

    Args:
        codes: Ids of a token.
        code_dim: Numbers of a code.
        width: Channels.
        hidden: Of the feed-forward layers.
        layers: Of the encoder.
        heads: Of attention.
        dropout: Everywhere.
        aux: MoGenTS trains the table of places.
    """

    def __init__(
        self,
        codes: int = 512,
        code_dim: int = 512,
        width: int = 384,
        hidden: int = 1024,
        layers: int = 8,
        heads: int = 6,
        dropout: float = 0.2,
        *,
        aux: bool = False,
    ) -> None:
        super().__init__(codes, code_dim, width, hidden)
        self.position_enc = PositionalEncoding(width, dropout, trained=aux)
        self.seqTransEncoder = _encoder(width, heads, hidden, layers, dropout)
        self.output_process = OutputProcess_Bert(codes, width)
        self.token_emb = nn.Embedding(codes + 2, code_dim)

    def _sequence(self, ids: Tensor, condition: Condition) -> Tensor:
        # Places are added to the tokens alone, before the text's row.
        x = self.position_enc(self.input_process(self.token_emb(ids[..., 0])).transpose(0, 1))
        return torch.cat([self.said(condition), x])

    def forward(
        self, ids: Int[Tensor, "batch time 1"], condition: Condition, valid: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time 1 codes"]:
        """Logits of every token."""
        self.check(ids, condition, valid, 1)
        self.check_attention()
        hidden = _hidden(valid, 1)
        out = self.seqTransEncoder(self._sequence(ids, condition), src_key_padding_mask=hidden)[1:]
        return self.output_process(out).transpose(0, 1)[:, :, None]

    @torch.no_grad()
    def scores(
        self,
        ids: Int[Tensor, "batch time 1"],
        condition: Condition,
        valid: Bool[Tensor, "batch time"],
        rows: str = "condition",
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time 1"]]:
        """Attention of the first layer, as for ``MotionTransformer``; one column has no parts to tell apart."""
        self.check(ids, condition, valid, 1)
        self.check_attention(beside=True)
        x = self._sequence(ids, condition)
        hidden = _hidden(valid, 1)
        layer: Any = self.seqTransEncoder.layers[0]
        _, weights = layer.self_attn(x, x, x, key_padding_mask=hidden, need_weights=True)
        if rows == "all":
            weights = (weights * ~hidden[..., None]).mean(1, keepdim=True)
        return weights[:, 0, 1:], torch.zeros_like(ids, dtype=weights.dtype)


class MaskTransformer2D(_Published):
    """MoGenTS's, of tokens in time and column: over all, within a time step, and within a column.

    Kept from the release: within a time step the output replaces the input, and the last stack does not see the text.

    Args:
        codes: Ids of a token.
        code_dim: Numbers of a code.
        width: Channels.
        hidden: Of the feed-forward layers.
        layers: Of each of the three encoders.
        heads: Of attention.
        dropout: Everywhere.
    """

    def __init__(
        self,
        codes: int = 256,
        code_dim: int = 1024,
        width: int = 384,
        hidden: int = 1024,
        layers: int = 8,
        heads: int = 6,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(codes, code_dim, width, hidden)
        self.position2d_enc = PositionalEncoding2D(width, dropout)
        for name in ("seqTransEncoder", "seqTransEncoder2", "seqTransEncoder3"):
            self.add_module(name, _encoder(width, heads, hidden, layers, dropout))
        self.output_process = OutputProcess_Bert(codes, width)
        self.token_emb = nn.Embedding(codes + 2, code_dim)

    def _said(self, condition: Condition, parts: int) -> Tensor:
        """The text's row in every column ``[1, P, B, D]``."""
        return self.said(condition).expand(parts, -1, -1)[None]

    def _sequence(self, ids: Tensor, said: Tensor) -> Tensor:
        x = self.input_process(self.token_emb(ids)).permute(1, 2, 0, 3)
        return self.position2d_enc(torch.cat([said, x]))

    def forward(
        self, ids: Int[Tensor, "batch time parts"], condition: Condition, valid: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time parts codes"]:
        """Logits of every token."""
        self.check(ids, condition, valid)
        self.check_attention()
        batch, time, parts = ids.shape
        said = self._said(condition, parts)
        x = self._sequence(ids, said)
        hidden = _hidden(valid, 1)
        x = _over_all(self.seqTransEncoder, x, hidden)
        x = self.position2d_enc(x)
        steps = valid.T.reshape(-1)  # time steps of all rows that are there; the text's row is none
        inner = x[1:].permute(1, 0, 2, 3).reshape(parts, time * batch, -1)
        replaced = torch.where(steps[:, None], _stack(self, 2)(inner), inner)
        x = replaced.view(parts, time, batch, -1).transpose(0, 1)
        row = self.position2d_enc(torch.cat([said, x]))
        text_unseen = torch.cat([torch.ones_like(valid[:, :1]), ~valid], 1)
        x = x + _over_time(self.seqTransEncoder3, row, text_unseen)[1:]
        return self.output_process(x).permute(2, 0, 1, 3)

    @torch.no_grad()
    def scores(
        self,
        ids: Int[Tensor, "batch time parts"],
        condition: Condition,
        valid: Bool[Tensor, "batch time"],
        rows: str = "condition",
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time parts"]]:
        """Attention of the first layer over all tokens: of a time step its columns' sum, of a token its own.

        Columns are consecutive joints mixed by convolutions, and no parts of the body.
        """
        self.check(ids, condition, valid)
        self.check_attention(beside=True)
        batch, time, parts = ids.shape
        x = self._sequence(ids, self._said(condition, parts)).flatten(0, 1)
        hidden = _hidden(valid, 1).repeat_interleave(parts, 1)
        layer: Any = _stack(self, 1).layers[0]
        _, weights = layer.self_attn(x, x, x, key_padding_mask=hidden, need_weights=True)
        asked = weights[:, :parts] if rows == "condition" else weights * ~hidden[..., None]
        found = asked.mean(1)[:, parts:].view(batch, time, parts)
        return found.sum(-1), found


def _hidden(valid: Tensor, rows: int) -> Tensor:
    """What is no key ``[B, rows + T]``: time steps past the end, and none of the rows before them."""
    return F.pad(~valid, (rows, 0))


def _stack(model: nn.Module, number: int) -> Any:
    """The encoder of a number, from 1."""
    return getattr(model, "seqTransEncoder" + ("" if number == 1 else str(number)))


def _over_all(encoder: Any, x: Tensor, hidden: Tensor) -> Tensor:
    """``[T, P, B, D]`` as one sequence; hidden time steps ``[B, T]`` are no keys."""
    out = encoder(x.flatten(0, 1), src_key_padding_mask=hidden.repeat_interleave(x.shape[1], 1))
    return out.view(x.shape)


def _over_time(encoder: Any, x: Tensor, hidden: Tensor) -> Tensor:
    """``[T, P, B, D]``, each column a sequence of its own."""
    time, parts, batch, width = x.shape
    rows = x.permute(0, 2, 1, 3).reshape(time, batch * parts, width)
    out = encoder(rows, src_key_padding_mask=hidden.repeat_interleave(parts, 0))
    return out.view(time, batch, parts, width).transpose(1, 2)


class _Residual(_Published):
    """Tables of the levels: each level's codes, of which neighbours share all but the ends."""

    extra = 1
    """Ids beside the codes."""

    def __init__(self, codes: int, code_dim: int, width: int, hidden: int, levels: int) -> None:
        super().__init__(codes, code_dim, width, hidden)
        rows = codes + self.extra
        self.levels = levels
        self.quant_emb = nn.Linear(levels, width)
        self.output_process = OutputProcess_Bert(code_dim, width)
        self.embed_proj_shared_weight = nn.Parameter(0.02 * torch.randn(levels - 2, rows, code_dim))
        self.token_embed_weight_ = nn.Parameter(0.02 * torch.randn(1, rows, code_dim))
        self.output_proj_weight_ = nn.Parameter(0.02 * torch.randn(1, rows, code_dim))

    @property
    def pad_id(self) -> int:
        """Of a token past the end."""
        return self.codes + self.extra - 1

    def history(self, ids: Int[Tensor, "batch time parts levels"]) -> Float[Tensor, "batch time parts dim"]:
        """Sum of the embeddings of the levels that are known, the first ``ids.shape[-1]``."""
        table = torch.cat([self.token_embed_weight_, self.embed_proj_shared_weight])
        return torch.stack([F.embedding(ids[..., n], table[n]) for n in range(ids.shape[-1])]).sum(0)

    def project(self, x: Float[Tensor, "batch time parts dim"], level: int) -> Float[Tensor, "batch time parts rows"]:
        """Scores of the ids of a level, from 1."""
        table = torch.cat([self.embed_proj_shared_weight, self.output_proj_weight_])
        return x @ table[level - 1].T

    def level(self, level: int, batch: int) -> Tensor:
        """The level's row ``[1, B, D]``."""
        table = self.quant_emb
        if type(table) is nn.Linear:
            return (table.weight[:, level] + table.bias).expand(1, batch, -1)
        # What stands in its place, a LoRA or a quantised layer, is called so that it counts.
        chosen = torch.arange(self.levels, device=self.token_embed_weight_.device) == level
        return table(chosen.to(self.token_embed_weight_.dtype)).expand(1, batch, -1)


class ResidualTransformer(_Residual):
    """MoMask's, of the levels after the first (``res_transformer``); ``aux`` as in ``MaskTransformer``."""

    def __init__(
        self,
        codes: int = 512,
        code_dim: int = 512,
        width: int = 384,
        hidden: int = 1024,
        layers: int = 8,
        heads: int = 6,
        dropout: float = 0.2,
        levels: int = 6,
        *,
        aux: bool = False,
    ) -> None:
        super().__init__(codes, code_dim, width, hidden, levels)
        self.position_enc = PositionalEncoding(width, dropout, trained=aux)
        self.seqTransEncoder = _encoder(width, heads, hidden, layers, dropout)

    def forward(
        self, ids: Int[Tensor, "batch time 1 levels"], condition: Condition, valid: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time 1 rows"]:
        """Logits of the level that follows the known ones, padding's id included."""
        self.check_attention()
        level = ids.shape[-1]
        x = self.position_enc(self.input_process(self.history(ids)[:, :, 0]).transpose(0, 1))
        x = torch.cat([self.said(condition), self.level(level, len(ids)), x])
        hidden = _hidden(valid, 2)
        out = self.output_process(self.seqTransEncoder(x, src_key_padding_mask=hidden)[2:])
        return self.project(out.transpose(0, 1)[:, :, None], level)


class ResidualTransformer2D(_Residual):
    """MoGenTS's, of the levels after the first; here the text is seen in every stack, and outputs are added.

    Kept from the release: what comes from within a time step is added at other ones, by a reshape that takes columns
    for time. There it also mixes the rows of a batch; here each row is as it is alone.
    """

    extra = 2

    def __init__(
        self,
        codes: int = 256,
        code_dim: int = 1024,
        width: int = 384,
        hidden: int = 1024,
        layers: int = 8,
        heads: int = 6,
        dropout: float = 0.2,
        levels: int = 6,
    ) -> None:
        super().__init__(codes, code_dim, width, hidden, levels)
        self.position2d_enc = PositionalEncoding2D(width, dropout)
        for name in ("seqTransEncoder", "seqTransEncoder2", "seqTransEncoder3"):
            self.add_module(name, _encoder(width, heads, hidden, layers, dropout))

    def forward(
        self, ids: Int[Tensor, "batch time parts levels"], condition: Condition, valid: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time parts rows"]:
        """Logits of the level that follows the known ones, the further ids included."""
        self.check_attention()
        batch, time, parts, level = ids.shape
        head = torch.cat([self.said(condition), self.level(level, batch)])[:, None].expand(-1, parts, -1, -1)
        x = self.input_process(self.history(ids)).permute(1, 2, 0, 3)
        hidden = _hidden(valid, 2)
        x = _over_all(self.seqTransEncoder, self.position2d_enc(torch.cat([head, x])), hidden)[2:]
        steps = valid.T.reshape(-1)
        inner = self.position2d_enc(x).permute(1, 0, 2, 3).reshape(parts, time * batch, -1)
        added = torch.where(steps[:, None], _stack(self, 2)(inner), 0.0)
        # The release reads the memory of [P, T] as [T, P]: time steps and columns change places, in training too.
        mixed = added.view(parts, time, batch, -1).permute(2, 0, 1, 3).reshape(batch, time, parts, -1)
        x = x + mixed.permute(1, 2, 0, 3)
        row = self.position2d_enc(torch.cat([head, x]))
        x = x + _over_time(self.seqTransEncoder3, row, hidden)[2:]
        return self.project(self.output_process(x).permute(2, 0, 1, 3), level)


@torch.no_grad()
def refine(
    model: ResidualTransformer | ResidualTransformer2D,
    ids: Int[Tensor, "batch time parts"],
    condition: Condition,
    valid: Bool[Tensor, "batch time"],
    generator: torch.Generator,
    *,
    guidance: float = 5.0,
    temperature: float = 1.0,
    keep: float = 0.1,
    backend: Backend = "auto",
    last: list[Tensor] | None = None,
) -> Int[Tensor, "batch time parts levels"]:
    """All levels of the codes, one pass for each after the first; -1 where no time step is.

    Logits ``[settings, B, T, P, codes]`` of the last level are put into ``last``, for ``decoding.check_finite``.

    Differs: the release may draw padding's id, which then counts as no code; here only codes are drawn.
    """
    there = valid[..., None].expand_as(ids)
    found = torch.where(there, ids, model.pad_id)[..., None]
    gone = torch.arange(2, device=ids.device).repeat_interleave(len(ids)) == 0
    for _ in range(1, model.levels):
        if guidance == 1:
            logits, weights = model(found, condition, valid)[None], [1.0]
        else:
            both = condition.rows(torch.arange(len(ids), device=ids.device).repeat(2)).dropped(gone, gone)
            logits = model(found.repeat(2, 1, 1, 1), both, valid.repeat(2, 1)).unflatten(0, (2, len(ids)))
            weights = [1 - guidance, guidance]
        if last is not None:
            last[:] = [logits]
        drawn, _ = draw(Passes(logits[..., : model.codes], tuple(weights)), generator, keep, temperature, backend)
        found = torch.cat([found, torch.where(there, drawn, model.pad_id)[..., None]], -1)
    return torch.where(there[..., None], found, -1)


class LengthEstimator(nn.Module):
    """CLIP's text vector to the odds of a number of tokens: a class times four is a number of frames."""

    def __init__(self, width: int = CLIP_WIDTH, classes: int = 50) -> None:
        super().__init__()

        def layer(channels: int, out: int) -> list[nn.Module]:
            return [nn.Linear(channels, out), nn.LayerNorm(out), nn.LeakyReLU(0.2)]

        drop = nn.Dropout(0.2)
        self.output = nn.Sequential(
            *layer(width, 512), drop, *layer(512, 256), drop, *layer(256, 128), nn.Linear(128, classes)
        )

    def forward(self, text: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """Logits of the classes."""
        return self.output(text)

    @torch.no_grad()
    def draw(self, text: Float[Tensor, "batch width"], generator: torch.Generator) -> Int[Tensor, " batch"]:
        """Frames of each text, drawn from the odds; at least one token."""
        odds = self(text).float().softmax(-1)
        return 4 * torch.multinomial(odds, 1, generator=generator)[:, 0].clamp(min=1)
