"""Trajectory Distribution Matching as BLADE uses it: a few-step student learns from a many-step teacher and prompts.

The student ``theta`` rolls out its few steps from noise. At one of its states it estimates clean data; the estimate is
noised again, and two networks say where clean data should lie from there: the teacher ``phi``, guided, and a fake score
``psi``, which is trained along to know the student's own distribution. Where the two agree the student's samples are
distributed like the teacher's; elsewhere their difference is the direction in which the estimate has to move.

Everything here is a pure function of tensors, of networks as callables, and of a noise process, which is a
``TDMScheduler``: flow (Wan) or variance preserving with v-prediction (CogVideoX). Times are integers, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .config import TDMConfig
from .scheduler import TDMScheduler

__all__ = [
    "Draw",
    "Network",
    "diffuse",
    "draw_times",
    "estimate",
    "fake_loss",
    "fake_score_loss",
    "guide",
    "noised_again",
    "pseudo_huber",
    "rollout",
    "rollout_states",
    "student_loss",
    "student_score_loss",
]

Network = Callable[[Tensor, Tensor], Tensor]
"""Output for states ``[B, ...]`` at times int64 ``[B]``, in the process's parameterisation."""


@dataclass(frozen=True)
class Draw:
    """Times of one training step, int64 ``[B]`` each.

    Attributes:
        step: Which state of the rollout, from 0, the noisiest.
        start: Its time, at which the student estimates.
        middle: Least time of the step's interval: the estimate is taken there with the student's own noise.
        time: Where teacher and fake score are asked, reached from ``middle`` with fresh noise.
    """

    step: Tensor
    start: Tensor
    middle: Tensor
    time: Tensor

    def all(self) -> tuple[Tensor, ...]:
        """The four, in order."""
        return self.step, self.start, self.middle, self.time

    def to(self, device: torch.device) -> Draw:
        """The same times there."""
        return Draw(*(x.to(device) for x in self.all()))


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn where the generator is."""
    source = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=source, dtype=x.dtype).to(x.device)


def estimate(network: Network, process: TDMScheduler, state: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Clean estimate and noise estimate ``[B, ...]`` of a network."""
    output = network(state, time).to(state.dtype)
    return process.predict_x0(output, state, time), process.predict_noise(output, state, time)


def guide(conditional: Tensor, unconditional: Tensor, weight: float | Tensor) -> Tensor:
    """Classifier-free guidance: ``uncond + w (cond - uncond)``; 1 is none. Outputs and clean estimates alike."""
    return unconditional + weight * (conditional - unconditional)


@torch.no_grad()
def rollout_states(
    network: Network,
    process: TDMScheduler,
    noise: Tensor,
    times: Sequence[int],
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """States of the student's own sampling, which is ``TDMScheduler``'s; training needs no sample at their end.

    Args:
        network: The student; one call for each state but the last.
        process: Noise levels and ``eta``.
        noise: First states ``[B, ...]``, standard normal.
        times: Of the states, descending; see ``rollout_timesteps``.
        generator: Of the fresh noise between the states.

    Returns:
        ``[K, B, ...]``.

    Source: step 0 of an iteration of the release's training scripts, which makes the sample too and drops it.
    """
    states = [noise]
    for time, following in pairwise(times):
        clean, own = estimate(network, process, states[-1], _everywhere(time, noise))
        mixed = process.mix_noise(own, _randn_like(own, generator))
        states.append(process.add_noise(clean, mixed, following))
    return torch.stack(states)


@torch.no_grad()
def rollout(
    network: Network,
    process: TDMScheduler,
    noise: Tensor,
    times: Sequence[int],
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The student's own sampling: its states ``[K, B, ...]`` and the samples ``[B, ...]``.

    Args: As for ``rollout_states``.
    """
    states = rollout_states(network, process, noise, times, generator=generator)
    return states, estimate(network, process, states[-1], _everywhere(times[-1], noise))[0]


def _everywhere(time: int, states: Tensor) -> Tensor:
    """One time for each sample."""
    return torch.full((len(states),), time, device=states.device)


def draw_times(
    times: Sequence[int],
    batch: int,
    cfg: TDMConfig,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Draw:
    """A state of the rollout and a time for each sample, uniformly.

    The interval of a step holds the times above the rollout's next one, up to its own. ``intervals="separate"`` draws
    ``time`` from it; ``"overlapping"`` from its lower end up to ``cfg.last_time``. Both stay within ``first_time`` and
    ``last_time``.

    Args:
        times: Of the rollout, descending.
        batch: Samples.
        cfg: The intervals.
        generator: Of ``device``.
        device: Where.

    Source: the paper's "j in [t_i, t_i+1), non-overlapping"; the release draws from ``[t_m, 980)``, overlapping, with
        ``t_m = t_g - 124``.
    Differs: ``first_time`` is 20 in TDM's own demo and 0 in the release, where a flow's velocity target is 0 / 0.
    """
    starts = torch.tensor(times, device=device)
    middles = torch.tensor([*times[1:], -1], device=device) + 1
    step = torch.randint(len(times), (batch,), generator=generator, device=device)
    start, middle = starts[step], middles[step]
    high = start if cfg.intervals == "separate" else torch.full_like(start, cfg.last_time)
    high = high.clamp(cfg.first_time, cfg.last_time)
    low = torch.minimum(middle.clamp(min=cfg.first_time), high)
    share = torch.rand(batch, generator=generator, device=device, dtype=torch.float64)
    time = (low + (share * (high - low + 1)).long()).clamp(max=high)
    return Draw(step, start, middle, torch.maximum(time, middle))


def diffuse(process: TDMScheduler, state: Tensor, noise: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Carry states from time ``start`` to a later ``end``: what noising clean data up to ``end`` gives, in law.

    ``x_t = (alpha_t / alpha_m) x_m + sqrt(sigma_t^2 - (alpha_t sigma_m / alpha_m)^2) noise``.

    Args:
        process: Noise levels.
        state: ``x_m``, ``[B, ...]``.
        noise: Standard normal, like it.
        start: int64 ``[B]``, where ``alpha`` is not 0.
        end: int64 ``[B]``, not before ``start``.

    Differs: the release's Wan script keeps the root's argument at 1e-8 or more, so that ``end = start`` adds noise.
    """
    (alpha, sigma), (alpha_end, sigma_end) = process.levels(start, state), process.levels(end, state)
    ratio = alpha_end / alpha
    return ratio * state + (sigma_end.square() - (ratio * sigma).square()).clamp(min=0).sqrt() * noise


def noised_again(
    process: TDMScheduler,
    clean: Tensor,
    own: Tensor,
    draw: Draw,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The student's estimate at ``draw.time``, with no gradient: by its own noise to ``middle``, by fresh noise on.

    Args:
        process: Noise levels and ``eta``.
        clean: The student's clean estimate.
        own: Its noise estimate.
        draw: The times.
        generator: Of the fresh noise.
    """
    clean, own = clean.detach(), own.detach()
    mixed = process.mix_noise(own, _randn_like(own, generator))
    state = process.add_noise(clean, mixed, draw.middle)
    return diffuse(process, state, _randn_like(state, generator), draw.middle, draw.time)


def _per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def fake_loss(
    fake: Tensor,
    clean: Tensor,
    *,
    alpha: Tensor,
    sigma: Tensor,
    weight: str = "velocity",
    teacher: Tensor | None = None,
    regularisation: float = 0.0,
) -> Tensor:
    """How far the fake score's clean estimates are from the student's, ``[B]``.

    Args:
        fake: Clean estimate of the fake score.
        clean: The student's, which it is to find again.
        alpha: Of the time, shaped to multiply them.
        sigma: Likewise.
        weight: ``velocity``: ``1 / sigma^2``, which makes it the squared error of the velocity in both processes.
            ``uniform``: 1. ``min_snr``: the signal-to-noise ratio, at most 5.
        teacher: The teacher's unguided estimate, for ``regularisation``.
        regularisation: Weight of the squared distance to it (``lambda_reg``).

    Source: ``w = 1 / (1 - alpha_bar)`` on clean estimates (the release's CogVideoX script) and a mean squared error of
        velocities (its Wan script) are this one weight. ``min_snr`` is TDM's own demo.
    """
    weights = {"velocity": sigma.square().reciprocal(), "uniform": torch.ones_like(sigma)}
    weights["min_snr"] = (alpha / sigma).square().clamp(max=5)
    loss = _per_sample(weights[weight] * (fake - clean).square())
    if regularisation:
        assert teacher is not None
        loss = loss + regularisation * _per_sample(weights[weight] * (fake - teacher).square())
    return loss


def pseudo_huber(error: Tensor, constant: float) -> Tensor:
    """``sqrt(error^2 + c^2) - c``: squares well below ``c``, absolute values above."""
    return (error.square() + constant**2).sqrt() - constant


def student_loss(
    clean: Tensor, teacher: Tensor, fake: Tensor, *, huber: float = 1e-3, normalise: bool = True
) -> Tensor:
    """Loss ``[B]`` whose gradient moves the student's clean estimate along ``teacher - fake``.

    Args:
        clean: The student's clean estimate, with its gradient.
        teacher: Guided clean estimate of the teacher at the noised state; no gradient, like the next.
        fake: The fake score's.
        huber: Constant of the pseudo-Huber loss; small ones make it absolute values, whose gradient is a sign.
        normalise: Whether to divide by the sample's mean distance from the teacher's estimate, at most 5.

    Source: ``target = x0 + D_phi - D_psi`` and pseudo-Huber, after TDM. The division is in the release's CogVideoX
        script; its Wan script computes and drops it.
    """
    target = (clean + teacher - fake).detach()
    loss = _per_sample(pseudo_huber(clean - target, huber))
    if normalise:
        distance = _per_sample((clean - teacher).abs()).detach()
        loss = loss / distance.clamp(min=torch.finfo(distance.dtype).eps, max=5)
    return loss


def fake_score_loss(
    student: Network,
    fake: Network,
    teacher: Network | None,
    process: TDMScheduler,
    states: Tensor,
    draw: Draw,
    cfg: TDMConfig,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Loss ``[B]`` of the fake score on one batch; only ``fake`` gets a gradient.

    Args:
        student: Asked at the drawn states.
        fake: In training.
        teacher: Without guidance, if ``cfg.regularisation`` asks for it.
        process: Noise levels and ``eta``.
        states: Of the rollout, ``[K, B, ...]``.
        draw: Which of them, and the times.
        cfg: Weights.
        generator: Of the noise.
    """
    with torch.no_grad():
        clean, own = estimate(student, process, _pick(states, draw.step), draw.start)
        state = noised_again(process, clean, own, draw, generator=generator)
        anchor = None
        if cfg.regularisation:
            assert teacher is not None
            anchor = estimate(teacher, process, state, draw.time)[0]
    found = estimate(fake, process, state, draw.time)[0]
    alpha, sigma = process.levels(draw.time, state)
    return fake_loss(
        found, clean, alpha=alpha, sigma=sigma, weight=cfg.fake_weight, teacher=anchor,
        regularisation=cfg.regularisation,
    )  # fmt: skip


def student_score_loss(
    student: Network,
    fake: Network,
    teacher: Network,
    process: TDMScheduler,
    states: Tensor,
    draw: Draw,
    cfg: TDMConfig,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss ``[B]`` of the student on one batch, and the mean distance ``[B]`` of teacher and fake score.

    Arguments as for ``fake_score_loss``, but the teacher is the guided one. Only ``student`` gets a gradient, through
    its estimate alone: the rollout and the noised state are given. The student is asked first and the fake score last.
    """
    clean, own = estimate(student, process, _pick(states, draw.step), draw.start)
    with torch.no_grad():
        state = noised_again(process, clean, own, draw, generator=generator)
        real = estimate(teacher, process, state, draw.time)[0]
        found = estimate(fake, process, state, draw.time)[0]
    loss = student_loss(clean, real, found, huber=cfg.huber, normalise=cfg.normalise)
    return loss, _per_sample((real - found).abs())


def _pick(states: Tensor, step: Tensor) -> Tensor:
    """State ``step[b]`` of sample ``b``, ``[B, ...]``."""
    return states[step, torch.arange(len(step), device=step.device)]
