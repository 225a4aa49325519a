"""The paper: a small and a large model write one text, and the entropy of the next token says who writes it.

The small model writes. Where its next-token distribution is too uncertain its token is thrown away and the large model
writes that position; the large model stays until it is itself certain, and then hands back.

Source: arXiv 2507.17307, Eq. 1 and Algorithm 1 (entropy, v3 and later), and the maximum-probability gate of v1.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .config import LARGE, SMALL, StitchConfig

__all__ = [
    "Decision",
    "Gate",
    "Signals",
    "Step",
    "agreement",
    "choose",
    "entropy_nats",
    "read_logits",
    "stitch",
    "token_time",
    "uniform",
]


# Signals


class Signals(NamedTuple):
    """What the gate reads off one next-token distribution.

    Attributes:
        entropy: ``[batch]``, divided by ln V, in [0, 1].
        confidence: ``[batch]``, probability of the likeliest token.
        forced: ``[batch]``, only one token is allowed: the distribution says nothing of the model.
    """

    entropy: Float[Tensor, " batch"]
    confidence: Float[Tensor, " batch"]
    forced: Bool[Tensor, " batch"]


def entropy_nats(logits: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, " batch"]:
    """Entropy of softmax(logits) in nats; a logit of minus infinity is a token that cannot come.

    With m the largest logit, l = sum exp(x - m) and a = sum (x - m) exp(x - m), it is ln l - a / l: no logarithm of a
    probability is taken, which would be NaN wherever one underflows, and NaN > tau is False.
    """
    x = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    x = x - x.amax(-1, keepdim=True)
    e = x.exp()
    l = e.sum(-1)
    a = torch.where(e > 0, x, 0.0).mul(e).sum(-1)
    return l.log() - a / l


def read_logits(logits: Float[Tensor, "batch vocabulary"], size: int) -> Signals:
    """Signals of next-token logits.

    Args:
        logits: Hard masks (unshared ids, grammar) are applied, as minus infinity; temperature, top-k and top-p are not.
            Each row has a finite entry.
        size: V, the number of tokens that both models know.

    Source: arXiv 2507.17307, Eq. 1.
    """
    # Rounding may carry a uniform distribution past 1, and tau = 1 would not be the small model alone.
    entropy = (entropy_nats(logits) / math.log(size)).clamp(0.0, 1.0)
    x = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    confidence = (x.amax(-1) - x.logsumexp(-1)).exp()
    return Signals(entropy, confidence, logits.isfinite().sum(-1) == 1)


def agreement(
    small: Float[Tensor, "tokens vocabulary"], large: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, ""]:
    """Share of positions at which both models' likeliest tokens agree, given the large model's own prefix.

    Source: arXiv 2507.17307, motivation (token-level consistency).
    """
    return (small.argmax(-1) == large.argmax(-1)).float().mean()


# Draws that know their position

ROUTE_STREAM = 1
"""Stream of random routing; stream 0 draws tokens."""


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """Number in [0, 1) that is a function of its arguments: a discarded or batched step shifts no later draw.

    Args:
        seed: Of the request, at least 0.
        position: Of the emitted token.
        stream: 0 for tokens, 1 for random routing.

    Source: Philox4x32-10 (Salmon et al. 2011) with counter (position, stream, 0, 0) and key ``seed``, as
    ``triton.language.philox`` has it, so that a kernel can draw the same.
    """
    high, low = _philox((position & 0xFFFFFFFF, stream, 0, 0), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))[:2]
    return ((high >> 5) * 2**26 + (low >> 6)) / 2**53


def _philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def choose(logits: Float[Tensor, "batch vocabulary"], numbers: Sequence[float] | None) -> list[int]:
    """Pick a token per row: the likeliest, or the one at which the cumulative distribution passes the row's number.

    Args:
        logits: After all masks and warpers.
        numbers: ``[batch]``, in [0, 1), see ``uniform``; None is greedy.
    """
    if numbers is None:
        return logits.argmax(-1).tolist()
    mass = logits.double().softmax(-1).cumsum(-1)
    # Scaled by the sum as it was rounded, so that no number lies beyond the last token that can come.
    at = torch.tensor(numbers, dtype=torch.float64, device=logits.device) * mass[:, -1]
    # Logits that are no numbers have no such place; it is for the caller to see that the entropy is none either.
    return torch.searchsorted(mass, at[:, None], right=True)[:, 0].clamp(max=mass.shape[-1] - 1).tolist()


# The gate


class Decision(NamedTuple):
    """What becomes of one step.

    Attributes:
        emit: The token is kept; False: it is thrown away and the position is written anew.
        model: Who runs next, ``SMALL`` or ``LARGE``.
    """

    emit: bool
    model: int


@dataclass
class Gate:
    """Who writes a request's next position. One per request: it holds who is active and what was seen.

    Attributes:
        config: The policy and its thresholds.
        seed: Of the request; for random routing.
        active: The model that runs next.
        run: Tokens that the large model has written since it took over.
        position: Tokens emitted.
        due: The next small token is thrown away, as drawn (``discards``).
    """

    config: StitchConfig
    seed: int = 0
    active: int = SMALL
    run: int = 0
    position: int = 0
    seen: deque[float] = field(default_factory=deque)
    due: bool = False

    def __post_init__(self) -> None:
        self.seen = deque(maxlen=max(1, self.config.window - 1))
        self.active = {"large": LARGE, "random": self._drawn(first=True)}.get(self.config.policy, SMALL)
        if self.config.discards:
            self.due, self.active = self.active == LARGE, SMALL

    def doubts(self, signal: float, *, forced: bool = False) -> bool:
        """Whether the gate would throw the small model's token away; a router is asked only then."""
        gated = self.config.policy in ("stitch", "one-token", "router")
        return gated and self.active == SMALL and not forced and self.config.uncertain(self._value(signal))

    def _value(self, signal: float) -> float:
        # Emitted positions only: what the small model thought of a discarded one is gone with its token.
        return signal if self.config.window == 1 else math.fsum([*self.seen, signal]) / (len(self.seen) + 1)

    def step(self, signal: float, *, forced: bool = False, keep: bool = False) -> Decision:
        """Decide on the token that the active model has just produced.

        Both boundaries are those of Algorithm 1: a token of the small model is thrown away when H > tau, the large
        model hands back after a token with H <= tau, and that token is kept, as every token of the large model is.

        Args:
            signal: Entropy or confidence of its distribution, whichever the config's gate reads.
            forced: Only one token was allowed: it is kept, says nothing of confidence, and is not remembered.
            keep: The router keeps the small model's token, doubtful as it is (policy ``router``).

        Source: arXiv 2507.17307, Algorithm 1.
        """
        policy, active = self.config.policy, self.active
        value = self._value(signal)
        if self.due or (not keep and self.doubts(signal, forced=forced)):
            self.active, self.run, self.due = LARGE, 0, False
            return Decision(False, LARGE)
        self.position += 1
        if not forced:
            self.seen.append(signal)
        if policy == "random":
            self.active = self._drawn()
            if self.config.discards and active == SMALL:
                self.due, self.active = self.active == LARGE, SMALL
        elif policy in ("stitch", "one-token", "router") and active == LARGE:
            self.run += 1
            sure = policy == "one-token" or (not forced and self.config.certain(value))
            if sure and self.run >= self.config.min_large_run:
                self.active = SMALL
        return Decision(True, self.active)

    def delegate(self) -> Decision:
        """Hand a position to the large model that the small one has no allowed token for.

        Raises:
            ValueError: The policy has the small model alone.
        """
        if self.config.policy == "small":
            raise ValueError("the small model has no token that the constraints allow; it cannot write alone")
        self.active, self.run, self.due = LARGE, 0, False
        return Decision(False, LARGE)

    def _drawn(self, *, first: bool = False) -> int:
        """Two-state chain whose share of large tokens is ``share`` and whose runs of them have mean ``run_length``."""
        share = self.config.share
        if share is None:
            return SMALL
        leave = 1 / self.config.run_length if self.config.run_length is not None and share < 1 else 1 - share
        enter = leave * share / (1 - share) if share < 1 else 1.0
        chance = share if first else (1 - leave if self.active == LARGE else enter)
        return LARGE if uniform(self.seed, self.position, ROUTE_STREAM) < chance else SMALL


# Algorithm 1


class Step(NamedTuple):
    """One emitted token.

    Attributes:
        token: Its id.
        model: Who wrote it.
        entropy: Of the writer's distribution, divided by ln V.
        discarded: The small model was asked first and its token thrown away.
    """

    token: int
    model: int
    entropy: float
    discarded: bool


def stitch(
    models: Sequence[Callable[[list[int]], Float[Tensor, " vocabulary"]]],
    config: StitchConfig,
    *,
    size: int,
    budget: int,
    stop: Sequence[int] = (),
    seed: int | None = None,
    warp: Callable[[Tensor], Tensor] = lambda logits: logits,
    keep: Callable[[list[int], Signals], bool] = lambda tokens, signals: False,
) -> list[Step]:
    """R-Stitch without caches: the definition of right for every loop that has them.

    Args:
        models: Small and large: emitted tokens so far to next-token logits, hard masks applied.
        config: Policy and gate.
        size: V of Eq. 1.
        budget: Emitted tokens at most.
        stop: Ids that end the text, whoever writes them.
        seed: Seed of the draws; None is greedy. Random routing then has seed 0.
        warp: Temperature, top-k, top-p: applied before drawing, and before the entropy only if
            ``entropy_on="processed"``.
        keep: The router of R-Stitch+, asked in doubt with the text so far: whether the small model's token is kept.

    Source: arXiv 2507.17307, Algorithm 1. Differs: the paper's counter also advances when a token is thrown away, so
    that its budget is one of iterations.
    """
    gate = Gate(config, seed or 0)
    tokens: list[int] = []
    steps: list[Step] = []
    discarded = False
    while len(tokens) < budget:
        active = gate.active
        logits = models[active](tokens)
        warped = warp(logits)
        signals = read_logits((warped if config.entropy_on == "processed" else logits)[None], size)
        signal = float(getattr(signals, config.gate))
        (token,) = choose(warped[None], None if seed is None else [uniform(seed, len(tokens))])
        forced = bool(signals.forced)
        kept = gate.doubts(signal, forced=forced) and keep(tokens, signals)
        emit, _ = gate.step(signal, forced=forced, keep=kept)
        if not emit:
            discarded = True
            continue
        tokens.append(token)
        steps.append(Step(token, active, float(signals.entropy), discarded))
        discarded = False
        if token in stop:
            break
    return steps


def token_time(share: float, discards: float, *, small: float, large: float, overhead: float = 0.0) -> float:
    """Time per emitted token, (1 - u + s) t_S + u t_L + overhead, prompt prefills left out.

    Args:
        share: u, emitted tokens that the large model writes, in [0, 1].
        discards: s, small tokens thrown away per emitted token, in [0, u].
        small: t_S, time of a small step.
        large: t_L, time of a large one, in the same unit.
        overhead: Of routing, per token.
    """
    return (1 - share + discards) * small + share * large + overhead
