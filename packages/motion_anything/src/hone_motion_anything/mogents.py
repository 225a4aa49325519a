"""MoGenTS's tokenizer: a stream of whole frames, and one of time steps and six columns of joints, with published names.

Its columns are consecutive joint numbers, left and right mixed, blurred by convolutions: no parts of the body.

Source: the released code of MoGenTS (Yuan et al., NeurIPS 2024).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .features import Columns
from .tokenizers import Decoder, Encoder, ResidualVQ

__all__ = ["MoGenTSTokenizer", "from_joints", "to_joints"]

COLUMNS = 6
"""Of the grid."""
_CHANNELS = 12


class _Unit2D(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.conv2(self.conv1(x.relu()).relu()))


class _Resnet2D(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.model = nn.Sequential(*(_Unit2D(width, 3**i) for i in reversed(range(depth))))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Encoder2d(nn.Module):
    """``[B, 12, T, joints]`` to ``[B, out, T / 4, joints / 4]``, taken in the weights' dtype."""

    def __init__(self, out: int, width: int, depth: int) -> None:
        super().__init__()
        halves = [nn.Sequential(nn.Conv2d(width, width, 4, 2, 1), _Resnet2D(width, depth)) for _ in range(2)]
        self.model = nn.Sequential(
            nn.Conv2d(_CHANNELS, width, 3, padding=1), nn.ReLU(), *halves, nn.Conv2d(width, out, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.model(x.to(next(self.parameters()).dtype))


class Decoder2d(nn.Module):
    """``[B, inner, T / 4, 6]`` to ``[B, 12, T, 24]``."""

    def __init__(self, inner: int, width: int, depth: int) -> None:
        super().__init__()
        doubles = [
            nn.Sequential(
                _Resnet2D(width, depth),
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(2)
        ]
        self.model = nn.Sequential(
            nn.Conv2d(inner, width, 3, padding=1),
            nn.ReLU(),
            *doubles,
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, _CHANNELS, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.model(x)


def to_joints(features: Float[Tensor, "batch frames width"]) -> Float[Tensor, "batch frames joints 12"]:
    """Features by joint: place 3, rotation 6, velocity 3; of the root only the velocity, as in the release."""
    joints = (features.shape[-1] + 1) // 12
    columns = Columns(joints)
    found = features.new_zeros(*features.shape[:-1], joints, _CHANNELS)
    found[..., 1:, :3] = features[..., columns.places].unflatten(-1, (-1, 3))
    found[..., 1:, 3:9] = features[..., columns.turns].unflatten(-1, (-1, 6))
    found[..., 9:] = features[..., columns.speeds].unflatten(-1, (-1, 3))
    return found


def from_joints(x: Float[Tensor, "batch frames joints 12"]) -> Float[Tensor, "batch frames width"]:
    """The reverse; the root's first eight numbers are its own columns and the contacts."""
    parts = [
        x[..., 0, :4],
        x[..., 1:, :3].flatten(-2),
        x[..., 1:, 3:9].flatten(-2),
        x[..., 9:].flatten(-2),
        x[..., 0, 4:8],
    ]
    return torch.cat(parts, -1)


class MoGenTSTokenizer(nn.Module):
    """Both streams (the release calls it ``RVQVAE`` too).

    Args:
        joints: 22 for HumanML3D, 21 for KIT-ML.
        codes1d: Codes of the stream of frames.
        dim1d: Numbers of one.
        codes2d: Codes of the stream of columns.
        dim2d: Numbers of one.
        width: Channels.
        depth: Residual units.
        levels: Of each stream.
    """

    def __init__(
        self,
        joints: int = 22,
        codes1d: int = 512,
        dim1d: int = 512,
        codes2d: int = 256,
        dim2d: int = 1024,
        width: int = 512,
        depth: int = 3,
        levels: int = 6,
    ) -> None:
        super().__init__()
        features = 12 * joints - 1
        self.before, self.after = 1, 23 - joints
        self.encoder1d = Encoder(features, dim1d, width, depth)
        self.decoder1d = Decoder(features, dim1d, width, depth)
        self.quantizer1d = ResidualVQ(levels, codes1d, dim1d)
        self.encoder2d = Encoder2d(dim2d, width, depth)
        self.linear_merge = nn.Linear(dim2d * COLUMNS, dim2d * COLUMNS)
        self.decoder2d = Decoder2d(dim2d, width, depth)
        self.linear_out = nn.Linear(2 * features, features)
        self.quantizer2d = ResidualVQ(levels, codes2d, dim2d)

    def encode(
        self, x: Float[Tensor, "batch frames width"]
    ) -> tuple[Int[Tensor, "batch time levels"], Int[Tensor, "batch time 6 levels"]]:
        """Ids of both streams, of normalised features."""
        frames, _ = self.quantizer1d.quantize(self.encoder1d(x.mT))
        padded = nn.functional.pad(to_joints(x), (0, 0, self.before, self.after))
        latent = self.encoder2d(padded.permute(0, 3, 1, 2))  # [B, D, T, 6]
        rows = latent.permute(0, 3, 1, 2).flatten(0, 1)
        columns, _ = self.quantizer2d.quantize(rows)
        return frames, columns.unflatten(0, (-1, COLUMNS)).transpose(1, 2)

    def forward_decoder(
        self, frames: Int[Tensor, "batch time levels"], columns: Int[Tensor, "batch time 6 levels"]
    ) -> Float[Tensor, "batch frames width"]:
        """Normalised features of ids."""
        first = self.decoder1d(self.quantizer1d.get_codes_from_indices(frames).sum(0).mT)
        batch, time = columns.shape[:2]
        codes = self.quantizer2d.get_codes_from_indices(columns.flatten(2, 2).transpose(1, 2).flatten(0, 1)).sum(0)
        # Columns lie one after another in the vector that is merged.
        merged = self.linear_merge(codes.view(batch, COLUMNS, time, -1).transpose(1, 2).flatten(2))
        grid = merged.view(batch, time, COLUMNS, -1).permute(0, 3, 1, 2)
        joints = self.decoder2d(grid).permute(0, 2, 3, 1)
        second = from_joints(joints[:, :, self.before : joints.shape[2] - self.after])
        return self.linear_out(torch.cat([first, second], -1))
