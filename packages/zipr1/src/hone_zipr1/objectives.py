"""What trains a model to live on fewer tokens: the paper's group-relative objective, term by term."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from hone_core.errors import CheckpointError
from hone_core.tensors import not_finite
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

__all__ = ["BudgetPolicy", "GrpoLoss", "advantages", "grpo_loss", "rewards"]


def rewards(
    correct: Bool[Tensor, "groups rollouts"],
    ratio: Float[Tensor, "groups rollouts"],
    *,
    performance: float = 1.0,
    efficiency: float = 1.0,
    gated: bool = True,
) -> Float[Tensor, "groups rollouts"]:
    """R = r_per + C r_eff: 1 for a correct answer, and 1 - tau where the group has a correct one.

    Args:
        correct: Whether each rollout's answer is right.
        ratio: tau of each rollout.
        performance: Weight of the first term.
        efficiency: Weight of the second.
        gated: Whether C is 1 only in groups with a correct rollout; otherwise always.
    """
    gate = correct.any(-1, keepdim=True) if gated else torch.ones_like(correct[:, :1])
    return performance * correct.to(ratio) + efficiency * gate.to(ratio) * (1 - ratio)


def advantages(reward: Float[Tensor, "groups rollouts"], *, floor: float = 0.05) -> Float[Tensor, "groups rollouts"]:
    """A = (r - mean) / std within a group.

    Args:
        reward: Of each rollout.
        floor: Least standard deviation: in a group that is all right, the spread of tau alone, or rounding, would
            otherwise be blown up to +-1. The paper names none.
    """
    centred = reward - reward.mean(-1, keepdim=True)
    return centred / reward.std(-1, keepdim=True).clamp(min=floor)


class GrpoLoss(NamedTuple):
    """The objective's negative, and what to watch.

    Attributes:
        loss: scalar.
        kl: mean k3 estimate of KL(policy || reference) per token.
        ratio_error: largest ``|rho - 1|``: 0 on the first update after a rollout, or the policies differ.
    """

    loss: Tensor
    kl: Tensor
    ratio_error: Tensor


def grpo_loss(
    logp: Float[Tensor, "rows tokens"],
    old: Float[Tensor, "rows tokens"],
    reference: Float[Tensor, "rows tokens"],
    advantage: Float[Tensor, " rows"],
    mask: Bool[Tensor, "rows tokens"],
    *,
    epsilon: float,
    beta: float,
) -> GrpoLoss:
    """-J: clipped importance ratios times advantages, less beta KL to the reference; means per answer, then over rows.

    Args:
        logp: Log-probabilities of the answer's tokens under the sparse policy, with gradient.
        old: The same when the answer was sampled.
        reference: The same under the frozen original model with dense attention.
        advantage: Of each answer.
        mask: Which positions are tokens of the answer.
        epsilon: Clip range of the ratios.
        beta: Weight of the KL, estimated as exp(d) - d - 1 with d = reference - logp.
    """
    rho = (logp - old).exp()
    gain = torch.minimum(rho * advantage[:, None], rho.clamp(1 - epsilon, 1 + epsilon) * advantage[:, None])
    distance = reference - logp
    kl = distance.exp() - distance - 1
    lengths = mask.sum(-1).clamp(min=1)
    per_row = ((beta * kl - gain) * mask).sum(-1) / lengths
    with torch.no_grad():
        error = ((rho - 1).abs() * mask).max()
        mean_kl = (kl * mask).sum() / mask.sum()
    return GrpoLoss(per_row.mean(), mean_kl, error)


class BudgetPolicy(nn.Module):
    """Which threshold a prompt gets: a distribution over a few, by what the prompt is like.

    As an action with a log-probability of its own, the threshold gets the gradient of tau that the paper's objective
    lacks: there, tau does not depend on what is sampled.

    Args:
        ps: The choices.
        dim: Features of a prompt.

    Source: ours (not in the paper).
    """

    thresholds: Tensor

    def __init__(self, ps: Sequence[float], dim: int) -> None:
        super().__init__()
        self.register_buffer("thresholds", torch.tensor(ps))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.out = nn.Linear(dim, len(ps))
        # Every threshold is as likely at first.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch choices"]:
        """Log-probabilities of the choices."""
        return self.out(self.norm(features.float())).log_softmax(-1)

    @torch.no_grad()
    def draw(
        self, features: Float[Tensor, "batch dim"], generator: torch.Generator
    ) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Indices of drawn thresholds, and their log-probabilities.

        Args:
            features: Of the prompts.
            generator: On the CPU.
        """
        logps = self(features)
        choice = torch.multinomial(logps.exp().cpu(), 1, generator=generator).to(logps.device)
        return choice[:, 0], logps.gather(1, choice)[:, 0]

    @torch.no_grad()
    def best(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """The likeliest threshold of each prompt, which is the one to deploy."""
        return self.thresholds[self(features).argmax(-1)]

    def save(self, path: str | Path) -> None:
        """Write what ``load`` reads, as safetensors."""
        from safetensors.torch import save_file

        save_file({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a policy that ``train`` wrote, ``budget.safetensors``, onto the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: It is none of these.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no {path}; expected the budget.safetensors of a training")
        try:
            state = load_file(path)
            policy = cls(state["thresholds"].tolist(), state["out.weight"].shape[1])
            policy.load_state_dict(state)
        except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} holds no learned budget ({error}); expected the budget.safetensors that "
                "train --objective budget-policy wrote"
            ) from error
        if broken := not_finite(state):
            raise CheckpointError(
                f"{broken} of {path} holds NaN or infinity; expected a budget of a training that went well"
            )
        return policy
