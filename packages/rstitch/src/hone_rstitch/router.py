"""R-Stitch+: a small network decides, where the small model is in doubt, whether the large one takes over.

Source: arXiv 2507.17307, R-Stitch+. The head's layers and width were not published; these are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .config import LARGE, SMALL
from .method import uniform

__all__ = ["EXTRA", "Routed", "Router", "Routing", "load_router", "route_features", "save_router"]

EXTRA = 4
"""Features beside the hidden state."""
SAMPLE_STREAM = 2
"""Stream of ``uniform`` that routes are sampled from."""


def route_features(
    hidden: Float[Tensor, "batch width"], logits: Float[Tensor, "batch vocabulary"], entropy: Tensor, lengths: Tensor
) -> Float[Tensor, "batch features"]:
    """State of the router: the small model's last hidden state, the length of the text, and how unsure it is.

    Args:
        hidden: After the last norm, of the last position.
        logits: Masked, of the same position.
        entropy: ``[batch]``, over ln V.
        lengths: ``[batch]``, tokens of prompt and text.
    """
    top = logits.float().softmax(-1).topk(2, -1).values
    extra = torch.stack([lengths.float().log1p() / 12, entropy.float()], -1)
    return torch.cat([hidden.float(), extra.to(hidden.device), top.to(hidden.device)], -1)


class Router(nn.Module):
    """Two logits, of the small and of the large model, for a gated position.

    An untrained router hands most positions to the large model, which is what R-Stitch does.

    Args:
        hidden: Channels of the small model.
        width: Of the inner layer.
    """

    def __init__(self, hidden: int, width: int = 128) -> None:
        super().__init__()
        self.hidden, self.width = hidden, width
        self.norm = nn.LayerNorm(hidden + EXTRA)
        self.inner = nn.Linear(hidden + EXTRA, width)
        self.out = nn.Linear(width, 2)
        nn.init.zeros_(self.out.weight)
        with torch.no_grad():
            self.out.bias.copy_(torch.tensor([0.0, math.log(4.0)]))

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch 2"]:
        """Logits."""
        return self.out(nn.functional.silu(self.inner(self.norm(features))))


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """One decision, as training needs it.

    Attributes:
        row: Of the batch.
        position: Of the text.
        features: ``[features]``.
        action: ``SMALL`` or ``LARGE``.
        logprob: Of the action, in nats.
    """

    row: int
    position: int
    features: Tensor
    action: int
    logprob: float


@dataclass(eq=False)
class Routing:
    """A router at work.

    Attributes:
        router: Who decides.
        sample: Draw the decision, as training does; else the likelier one is taken.
        records: Every decision, where sampled.
    """

    router: Router
    sample: bool = False
    records: list[Routed] = field(default_factory=list)

    @torch.no_grad()
    def decide(self, features: Tensor, rows: list[int], seeds: list[int], positions: list[int]) -> list[int]:
        """``SMALL`` (its token is kept all the same) or ``LARGE``, for each row in doubt."""
        logprobs = self.router(features).log_softmax(-1)
        if not self.sample:
            return logprobs.argmax(-1).tolist()
        chances = logprobs[:, LARGE].exp().tolist()
        found = []
        for at, (row, seed, position) in enumerate(zip(rows, seeds, positions, strict=True)):
            action = LARGE if uniform(seed, position, SAMPLE_STREAM) < chances[at] else SMALL
            found.append(action)
            self.records.append(Routed(row, position, features[at].cpu(), action, float(logprobs[at, action])))
        return found


def save_router(path: Path, router: Router) -> None:
    """Write weights and sizes."""
    from safetensors.torch import save_file

    save_file(router.state_dict(), path, {"hidden": str(router.hidden), "width": str(router.width)})


def load_router(path: Path, *, hidden: int | None = None) -> Router:
    """Read a router.

    Args:
        path: Written by ``save_router``.
        hidden: Channels of the small model that it is for; not compared if None.

    Raises:
        ValueError: It is no router, or for another small model.
        FileNotFoundError: There is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            sizes = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        router = Router(int(sizes["hidden"]), int(sizes["width"]))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no router; make one with hone-rstitch train-router") from error
    if hidden is not None and router.hidden != hidden:
        raise ValueError(f"{path} is for a small model of {router.hidden} channels; this one has {hidden}")
    router.load_state_dict(state)
    return router.eval()
