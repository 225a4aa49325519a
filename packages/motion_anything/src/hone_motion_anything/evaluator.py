"""The T2M evaluator: motion and text to vectors that lie near each other where they belong together.

Names and shapes are those of ``text_mot_match/model/finest.tar``, whose three parts are ``movement_encoder``,
``motion_encoder`` and ``text_encoder``. Batches need not be sorted by length: results are in the order of the inputs.

Source: Guo et al., "Generating Diverse and Natural 3D Human Motions from Text" (CVPR 2022).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from .config import EvaluatorConfig

__all__ = ["Evaluator", "MotionEncoderBiGRUCo", "MovementConvEncoder", "TextEncoderBiGRUCo", "TextReader"]

POS_TAGS = 15
"""Parts of speech in the published word vectors."""


class MovementConvEncoder(nn.Module):
    """Features without contacts ``[B, T, 259]`` to a vector for each four frames ``[B, T / 4, out]``."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv1d(input_size, hidden_size, 4, 2, 1),
            nn.Dropout(0.2),
            nn.LeakyReLU(0.2),
            nn.Conv1d(hidden_size, output_size, 4, 2, 1),
            nn.Dropout(0.2),
            nn.LeakyReLU(0.2),
        )
        self.out_net = nn.Linear(output_size, output_size)

    def forward(self, x: Float[Tensor, "batch frames width"]) -> Float[Tensor, "batch time out"]:
        """See the class."""
        return self.out_net(self.main(x.mT).mT)


class _BiGRUCo(nn.Module):
    """A bidirectional GRU from a learned first state, whose two last states are mapped to a vector."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.input_emb = nn.Linear(input_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True, bidirectional=True)
        self.output_net = nn.Sequential(
            nn.Linear(hidden_size * 2, hidden_size),
            nn.LayerNorm(hidden_size),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden_size, output_size),
        )
        self.hidden = nn.Parameter(torch.randn(2, 1, hidden_size))

    def last(self, x: Tensor, lengths: Tensor) -> Tensor:
        """``[B, T, input]`` and ``[B]`` to ``[B, out]``."""
        packed = pack_padded_sequence(self.input_emb(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, state = self.gru(packed, self.hidden.repeat(1, len(x), 1))
        return self.output_net(torch.cat([state[0], state[1]], -1))


class MotionEncoderBiGRUCo(_BiGRUCo):
    """Movements ``[B, T / 4, in]`` and lengths to a vector ``[B, out]``."""

    def forward(
        self, x: Float[Tensor, "batch time width"], lengths: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch out"]:
        """See the class."""
        return self.last(x, lengths)


class TextEncoderBiGRUCo(_BiGRUCo):
    """Word vectors, parts of speech and lengths to a vector ``[B, out]``."""

    def __init__(self, word_size: int, pos_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__(word_size, hidden_size, output_size)
        self.pos_emb = nn.Linear(pos_size, word_size)

    def forward(
        self,
        words: Float[Tensor, "batch words width"],
        tags: Float[Tensor, "batch words 15"],
        lengths: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch out"]:
        """See the class."""
        return self.last(words + self.pos_emb(tags), lengths)


class TextReader(nn.Module):
    """Word ids of the grammar to a vector: a learned table, then the evaluator's text encoder without tags."""

    def __init__(self, words: int, cfg: EvaluatorConfig, out: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, cfg.word)
        self.encoder = TextEncoderBiGRUCo(cfg.word, POS_TAGS, cfg.text, out)

    def forward(self, ids: Int[Tensor, "batch words"]) -> Float[Tensor, "batch out"]:
        """Ids are padded with 0."""
        tags = self.table.weight.new_zeros(*ids.shape, POS_TAGS)
        return self.encoder(self.table(ids), tags, (ids > 0).sum(1))


class Evaluator(nn.Module):
    """The published evaluator's architecture, for the grammar's words.

    Args:
        words: Of the table.
        cfg: Sizes.
    """

    def __init__(self, words: int, cfg: EvaluatorConfig) -> None:
        super().__init__()
        self.movement_encoder = MovementConvEncoder(259, cfg.movement, cfg.movement)
        self.motion_encoder = MotionEncoderBiGRUCo(cfg.movement, cfg.motion, cfg.out)
        self.text_encoder = TextReader(words, cfg, cfg.out)

    def motion(self, x: Float[Tensor, "batch frames 263"], lengths: Tensor | None = None) -> Float[Tensor, "batch out"]:
        """Vectors of normalised features; lengths are frames."""
        if lengths is None:
            lengths = torch.full((len(x),), x.shape[1])
        return self.motion_encoder(self.movement_encoder(x[..., :-4]), lengths // 4)

    def text(self, ids: Int[Tensor, "batch words"]) -> Float[Tensor, "batch out"]:
        """Vectors of captions."""
        return self.text_encoder(ids)
