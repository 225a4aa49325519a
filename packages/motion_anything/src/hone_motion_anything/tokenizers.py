"""Motion to tokens and back: MoMask's residual quantised autoencoder with its published names, and ours by parts."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .config import TokenizerConfig
from .features import part_columns
from .skeletons import PARTS

__all__ = ["RVQVAE", "Decoder", "Encoder", "PartTokenizer", "QuantizeEMAReset", "ResidualVQ"]


class ResConv1DBlock(nn.Module):
    """ReLU, dilated convolution, ReLU, pointwise convolution, added to the input."""

    def __init__(self, width: int, dilation: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T]`` in and out."""
        return x + self.dropout(self.conv2(self.conv1(x.relu()).relu()))


class Resnet1D(nn.Module):
    """Units of falling dilation, in encoder and decoder alike."""

    def __init__(self, width: int, depth: int, growth: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        self.model = nn.Sequential(*(ResConv1DBlock(width, growth**i, dropout) for i in reversed(range(depth))))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T]`` in and out."""
        return self.model(x)


class Encoder(nn.Module):
    """``[B, channels, T]`` to ``[B, out, T / 4]``, taken in the weights' dtype."""

    def __init__(self, channels: int, out: int, width: int, depth: int, dropout: float = 0.2) -> None:
        super().__init__()
        halves = [
            nn.Sequential(nn.Conv1d(width, width, 4, 2, 1), Resnet1D(width, depth, dropout=dropout)) for _ in range(2)
        ]
        self.model = nn.Sequential(
            nn.Conv1d(channels, width, 3, padding=1), nn.ReLU(), *halves, nn.Conv1d(width, out, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.model(x.to(next(self.parameters()).dtype))


class Decoder(nn.Module):
    """``[B, inner, T / 4]`` to ``[B, T, channels]``."""

    def __init__(self, channels: int, inner: int, width: int, depth: int, dropout: float = 0.2) -> None:
        super().__init__()
        doubles = [
            nn.Sequential(
                Resnet1D(width, depth, dropout=dropout),
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv1d(width, width, 3, padding=1),
            )
            for _ in range(2)
        ]
        self.model = nn.Sequential(
            nn.Conv1d(inner, width, 3, padding=1),
            nn.ReLU(),
            *doubles,
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.model(x).transpose(1, 2)


class QuantizeEMAReset(nn.Module):
    """A codebook of moving averages, of which rarely used vectors are replaced by inputs.

    Args:
        nb_code: Vectors.
        code_dim: Numbers of one.
        mu: Decay of the averages.
        averages: Keep sums and counts in the state, so that a training resumes exactly; the release keeps neither,
            and its files hold the codebook alone.

    Differs: which inputs replace rare vectors is drawn at random; the release takes the first of the batch.
    """

    codebook: Tensor
    code_sum: Tensor
    code_count: Tensor

    def __init__(self, nb_code: int, code_dim: int, mu: float = 0.99, *, averages: bool = False) -> None:
        super().__init__()
        self.nb_code, self.code_dim, self.mu = nb_code, code_dim, mu
        self.register_buffer("codebook", torch.zeros(nb_code, code_dim))
        self.register_buffer("code_sum", torch.zeros(nb_code, code_dim), persistent=averages)
        # A count of zero says that no batch was seen.
        self.register_buffer("code_count", torch.zeros(nb_code), persistent=averages)

    def nearest(self, x: Float[Tensor, "n dim"]) -> Int[Tensor, " n"]:
        """Ids by the squared distance."""
        return self.distance(x).argmin(-1)

    def distance(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n codes"]:
        """Squared distances to the codes."""
        return x.square().sum(-1, keepdim=True) - 2 * x @ self.codebook.T + self.codebook.square().sum(-1)

    def dequantize(self, ids: Int[Tensor, "*dims"]) -> Float[Tensor, "*dims dim"]:
        """Codes of ids; -1, which stands for a level that is left out, gives zeros."""
        return F.embedding(ids.clamp(min=0), self.codebook) * (ids >= 0)[..., None]

    def forward(
        self, x: Float[Tensor, "n dim"], *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes with the gradient of ``x``, ids, and the commitment loss; in training the codebook moves.

        Args:
            x: Vectors.
            temperature: Of Gumbel noise on the negative distances in training.
            generator: Of the draws.
        """
        if self.training and not bool(self.code_count.any()):
            self._begin(x.detach(), generator)
        distance = self.distance(x)
        if self.training and temperature > 0:
            u = torch.rand(distance.shape, generator=generator, device=x.device).clamp(1e-20, 1)
            ids = (-distance / temperature - (-u.log()).clamp(min=1e-20).log()).argmax(-1)
        else:
            ids = distance.argmin(-1)
        codes = self.dequantize(ids)
        if self.training:
            self._move(x.detach(), ids, generator)
        commit = F.mse_loss(x, codes.detach())
        return x + (codes - x).detach(), ids, commit

    def _inputs(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """As many inputs as there are codes."""
        order = torch.rand(max(len(x), self.nb_code), generator=generator, device=x.device).argsort()[: self.nb_code]
        found = x[order % len(x)]
        if len(x) < self.nb_code:
            noise = torch.randn(found.shape, generator=generator, device=x.device)
            found = found + noise * 0.01 / math.sqrt(self.code_dim)
        return found

    @torch.no_grad()
    def _begin(self, x: Tensor, generator: torch.Generator | None) -> None:
        self.codebook.copy_(self._inputs(x, generator))
        self.code_sum.copy_(self.codebook)
        self.code_count.fill_(1.0)

    @torch.no_grad()
    def _move(self, x: Tensor, ids: Tensor, generator: torch.Generator | None) -> None:
        one_hot = F.one_hot(ids, self.nb_code).to(x.dtype)
        self.code_sum.mul_(self.mu).add_(one_hot.T @ x, alpha=1 - self.mu)
        self.code_count.mul_(self.mu).add_(one_hot.sum(0), alpha=1 - self.mu)
        used = (self.code_count >= 1.0)[:, None]
        mean = self.code_sum / self.code_count.clamp(min=1e-12)[:, None]
        self.codebook.copy_(torch.where(used, mean, self._inputs(x, generator)))


class ResidualVQ(nn.Module):
    """Quantizers in a row, each of what the ones before left."""

    def __init__(self, num_quantizers: int, nb_code: int, code_dim: int, mu: float = 0.99, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(QuantizeEMAReset(nb_code, code_dim, mu, **options) for _ in range(num_quantizers))

    def quantize(self, x: Float[Tensor, "batch dim time"]) -> tuple[Int[Tensor, "batch time levels"], Tensor]:
        """Ids, and the code of each level ``[levels, B, D, T]``."""
        rest, ids, codes = x.transpose(1, 2), [], []
        for layer in self.layers:
            assert isinstance(layer, QuantizeEMAReset)
            found = layer.nearest(rest.reshape(-1, rest.shape[-1])).view(rest.shape[:-1])
            code = layer.dequantize(found)
            rest = rest - code
            ids.append(found)
            codes.append(code.transpose(1, 2))
        return torch.stack(ids, -1), torch.stack(codes)

    def get_codes_from_indices(self, ids: Int[Tensor, "batch time levels"]) -> Float[Tensor, "levels batch time dim"]:
        """Codes of ids; levels that are missing or -1 are zeros."""
        missing = len(self.layers) - ids.shape[-1]
        padded = F.pad(ids, (0, missing), value=-1)
        return torch.stack([layer.dequantize(padded[..., i]) for i, layer in enumerate(self.layers)])  # type: ignore[operator]

    def forward(
        self,
        x: Float[Tensor, "batch dim time"],
        *,
        temperature: float = 0.5,
        drop_after: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised ``x``, ids with -1 for levels left out, and the mean commitment loss.

        Args:
            x: Features.
            temperature: Of the draws of ids in training.
            drop_after: Last level that is used, in quantizer dropout; None: all.
            generator: Of the draws.
        """
        rest, total = x.transpose(1, 2), torch.zeros_like(x.transpose(1, 2))
        shape, ids, losses = rest.shape, [], []
        for level, layer in enumerate(self.layers):
            if drop_after is not None and level > drop_after:
                ids.append(torch.full(shape[:-1], -1, device=x.device))
                continue
            flat = rest.reshape(-1, shape[-1])
            codes, found, commit = layer(flat, temperature=temperature, generator=generator)
            codes = codes.view(shape)
            rest = rest - codes.detach()
            total = total + codes
            ids.append(found.view(shape[:-1]))
            losses.append(commit)
        return total.transpose(1, 2), torch.stack(ids, -1), torch.stack(losses).mean()


class RVQVAE(nn.Module):
    """MoMask's tokenizer, with the names of its checkpoints (``vq_model`` of ``net_best_fid.tar``).

    Args:
        input_width: 263, or 251 for KIT-ML.
        nb_code: Codes of a level.
        code_dim: Numbers of a code, also the encoder's output.
        width: Channels.
        depth: Residual units.
        num_quantizers: Levels.
    """

    def __init__(
        self,
        input_width: int = 263,
        nb_code: int = 512,
        code_dim: int = 512,
        width: int = 512,
        depth: int = 3,
        num_quantizers: int = 6,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(input_width, code_dim, width, depth)
        self.decoder = Decoder(input_width, code_dim, width, depth)
        self.quantizer = ResidualVQ(num_quantizers, nb_code, code_dim)

    def encode(self, x: Float[Tensor, "batch frames width"]) -> tuple[Int[Tensor, "batch time levels"], Tensor]:
        """Ids and codes of normalised features."""
        return self.quantizer.quantize(self.encoder(x.transpose(1, 2)))

    def forward_decoder(self, ids: Int[Tensor, "batch time levels"]) -> Float[Tensor, "batch frames width"]:
        """Normalised features of ids."""
        return self.decoder(self.quantizer.get_codes_from_indices(ids).sum(0).transpose(1, 2))

    def forward(
        self, x: Float[Tensor, "batch frames width"], **options: Any
    ) -> tuple[Float[Tensor, "batch frames width"], Tensor]:
        """Features after quantisation, and the commitment loss; options as for ``ResidualVQ``."""
        quantised, _, commit = self.quantizer(self.encoder(x.transpose(1, 2)), **options)
        return self.decoder(quantised), commit


class PartTokenizer(nn.Module):
    """Ours: an autoencoder for each part of the body, on the columns of the features that belong to it.

    A part's tokens hold that part and no other, and its decoder sees nothing else: when an edit keeps a part's
    tokens, its columns stay as they were, bit for bit.

    Args:
        cfg: Sizes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        self.columns = part_columns()
        sizes = (cfg.width, cfg.depth)
        self.encoders = nn.ModuleList(Encoder(len(own), cfg.code_dim, *sizes, dropout=0.0) for own in self.columns)
        self.decoders = nn.ModuleList(Decoder(len(own), cfg.code_dim, *sizes, dropout=0.0) for own in self.columns)
        self.quantizers = nn.ModuleList(
            QuantizeEMAReset(cfg.codes, cfg.code_dim, cfg.decay, averages=True) for _ in PARTS
        )
        self.register_buffer("mean", torch.zeros(263))
        self.register_buffer("std", torch.ones(263))
        order = [column for own in self.columns for column in own]
        self.register_buffer("place", torch.tensor(order).argsort(), persistent=False)

    def normalise(self, features: Tensor) -> Tensor:
        """Features less the mean, over the deviation."""
        return (features - self.mean) / self.std

    def _parts(self, x: Tensor) -> list[Tensor]:
        return [encoder(x[..., list(own)].mT) for encoder, own in zip(self.encoders, self.columns, strict=True)]

    def _joined(self, codes: list[Tensor]) -> Tensor:
        parts = [decoder(code) for decoder, code in zip(self.decoders, codes, strict=True)]
        return torch.cat(parts, -1)[..., self.place]  # type: ignore[index]

    def encode(self, features: Float[Tensor, "batch frames 263"]) -> Int[Tensor, "batch time 6"]:
        """Tokens of features.

        Raises:
            ValueError: The number of frames is not a multiple of 4.
        """
        if features.shape[1] % 4:
            raise ValueError(f"tokens need a multiple of 4 frames; got {features.shape[1]}. Crop the motion")
        ids = []
        for latent, quantizer in zip(self._parts(self.normalise(features)), self.quantizers, strict=True):
            flat = latent.transpose(1, 2)
            ids.append(quantizer.nearest(flat.reshape(-1, flat.shape[-1])).view(flat.shape[:-1]))  # type: ignore[operator]
        return torch.stack(ids, -1)

    def decode(self, ids: Int[Tensor, "batch time 6"]) -> Float[Tensor, "batch frames 263"]:
        """Features of tokens."""
        codes = [quantizer.dequantize(ids[..., i]).mT for i, quantizer in enumerate(self.quantizers)]  # type: ignore[operator]
        return self._joined(codes) * self.std + self.mean

    def loss(self, features: Float[Tensor, "batch frames 263"], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Of a step, and the mean absolute error of normalised features; terms as MoMask weighs them."""
        x = self.normalise(features)
        codes, commits = [], []
        for latent, quantizer in zip(self._parts(x), self.quantizers, strict=True):
            flat = latent.transpose(1, 2)
            code, _, commit = quantizer(flat.reshape(-1, flat.shape[-1]), generator=generator)
            codes.append(code.view(flat.shape).mT)
            commits.append(commit)
        out = self._joined(codes)
        error = F.smooth_l1_loss(out, x) + 0.5 * F.smooth_l1_loss(out[..., 4:67], x[..., 4:67])
        return error + 0.02 * torch.stack(commits).sum(), (out - x).abs().mean()
