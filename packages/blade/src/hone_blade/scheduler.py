"""The sampler that BLADE's distillation trains for, as a diffusers scheduler.

Trajectory Distribution Matching (TDM) trains the few-step student on the states of one particular rollout. A student
that is sampled with another solver or on another grid meets noise levels it never saw, so the rollout itself is shipped
as the sampler, and the training code uses the same arithmetic.

Words used below: ``t`` is an integer training time in ``[0, num_train_timesteps)``; a state is ``x_t = alpha_t x0 +
sigma_t e`` with ``e`` standard normal; ``t = -1`` stands for clean data (``alpha = 1, sigma = 0``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from diffusers import CogVideoXDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

__all__ = ["TDMScheduler", "TDMSchedulerOutput", "rollout_timesteps"]

Timesteps = int | Tensor


def rollout_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Times visited by a rollout of ``num_inference_steps`` network calls, descending.

    ``T_i = round(T (K - i) / K) - 1``: for 8 of 1000 steps 999, 874, ..., 124, equally spaced by 125.

    Args:
        num_inference_steps: ``K``, between 1 and ``num_train_timesteps``.
        num_train_timesteps: ``T``.

    Raises:
        ValueError: ``K`` is out of range.

    Source: TDM rollout as BLADE's training scripts run it, ``T_0 = 999, T_{i+1} = T_i - 125``.
    Differs: Those scripts only know K = 8. For a K that does not divide T the times are rounded, half to even, which is
        diffusers' "trailing" spacing.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must be between 1 and num_train_timesteps={num_train_timesteps}; "
            f"got {num_inference_steps}"
        )
    steps, total = num_inference_steps, num_train_timesteps
    return [round(total * (steps - i) / steps) - 1 for i in range(steps)]


@dataclass
class TDMSchedulerOutput(BaseOutput):
    """What ``TDMScheduler.step`` returns.

    Args:
        prev_sample: State at the next (smaller) time of the grid; after the last step the clean sample.
        pred_original_sample: The network's clean estimate ``x0`` at this step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class TDMScheduler(SchedulerMixin, ConfigMixin):
    """Rollout of Trajectory Distribution Matching: predict ``x0``, refresh part of the noise, go to the next time.

    One step from ``t`` to ``s = next(t)``, with the network's output read as ``x0`` and ``e``:

        e' = eta e + sqrt(1 - eta^2) randn,    x_s = alpha_s x0 + sigma_s e',    and x0 itself after the last step.

    ``TDMScheduler.from_config(pipe.scheduler.config)`` builds the right one for a Wan or a CogVideoX pipeline: the
    parameterisation follows from ``prediction_type``, the noise levels of CogVideoX from its betas.

    **Flow time (Wan).** The network is conditioned on ``t = 1000 sigma``, where ``sigma`` is the noise level of its
    input *after* any timestep shift: a shift changes which levels a solver visits, not what the number ``t`` means to
    the network. So a grid value ``t`` is the level ``sigma = t / num_train_timesteps`` and ``alpha = 1 - sigma``, and
    no ``flow_shift`` enters here. Two consequences: the first state is pure noise although ``sigma_999 = 0.999`` leaves
    room for 0.001 x0 (as in training), and the last network call, at t = 124, jumps from sigma 0.124 to clean data.

    **Where noise comes from.** ``CogVideoXPipeline`` hands its ``generator`` to ``step``; ``WanPipeline`` does not. Set
    ``scheduler.generator`` to make Wan repeatable; with neither, torch's global generator is used.

    Args:
        num_train_timesteps: Training times ``T``.
        prediction_type: ``flow_prediction`` (Wan: the network gives ``e - x0``) or ``v_prediction`` (CogVideoX,
            variance preserving: ``alpha e - sigma x0``).
        eta: Share of the predicted noise that is kept in each step, in [0, 1]; 1 is the deterministic rollout.
        beta_start: First beta of the variance-preserving process; this and the next five are unused under flow.
        beta_end: Last beta.
        beta_schedule: ``scaled_linear`` or ``linear``, as in ``CogVideoXDPMScheduler``.
        trained_betas: Explicit betas, instead of a schedule.
        rescale_betas_zero_snr: Rescale so that the last level is pure noise.
        snr_shift_scale: Shift of the signal-to-noise ratio, 1 for CogVideoX-5B, 3 for CogVideoX-2B.

    Raises:
        ValueError: ``prediction_type`` is another one, or ``eta`` is outside [0, 1].

    Source: BLADE (arXiv 2508.10774) training scripts, step 0 of an iteration; TDM (arXiv 2503.06674).
    Differs: The Wan script looks ``sigma`` up by exact match of ``t`` in a table of 1000 shifted levels rounded to
        integers. 268 of the 980 usable times are not in that table, t = 374 and t = 124 of the rollout among them, and
        each miss silently takes the table's last, nearly zero level. Here ``sigma`` is computed. The published
        inference script runs UniPC with flow shift 3, on other times than the training rollout; this class does not.
        Defaults of the betas are those of CogVideoX-5B, not those of the diffusers class.
    """

    _compatibles = [  # noqa: RUF012 - diffusers reads a plain class attribute
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        prediction_type: Literal["flow_prediction", "v_prediction"] = "flow_prediction",
        eta: float = 0.9,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        beta_schedule: Literal["linear", "scaled_linear"] = "scaled_linear",
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = True,
        snr_shift_scale: float = 1.0,
    ) -> None:
        if prediction_type not in ("flow_prediction", "v_prediction"):
            raise ValueError(
                "prediction_type must be 'flow_prediction' (Wan) or 'v_prediction' (CogVideoX); "
                f"got {prediction_type!r}. Pass TDMScheduler.from_config(config, prediction_type=...)."
            )
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be between 0 and 1; got {eta}")
        self.alphas_cumprod: Tensor | None = None
        if prediction_type == "v_prediction":
            # One definition of the noise levels for this sampler and for the solvers that it can be exchanged with.
            self.alphas_cumprod = CogVideoXDPMScheduler(
                num_train_timesteps=num_train_timesteps,
                beta_start=beta_start,
                beta_end=beta_end,
                beta_schedule=beta_schedule,
                trained_betas=trained_betas,
                rescale_betas_zero_snr=rescale_betas_zero_snr,
                snr_shift_scale=snr_shift_scale,
            ).alphas_cumprod.double()
        self.init_noise_sigma = 1.0
        self.generator: torch.Generator | list[torch.Generator] | None = None
        self.num_inference_steps: int | None = None
        self._times = list(range(num_train_timesteps - 1, -1, -1))
        self.timesteps = torch.tensor(self._times)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """Position in ``timesteps`` of the coming step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position at which the first step starts, if a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at ``timesteps[begin_index]`` (video-to-video), without searching for the first time."""
        self._begin_index = begin_index

    @property
    def sigmas(self) -> Tensor:
        """Noise level ``sigma`` of each state of the grid and of the clean end, float32 on the CPU, ``[steps + 1]``."""
        return self._levels(torch.tensor([*self._times, -1]))[1].float()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the grid.

        Args:
            num_inference_steps: Network calls; the grid is ``rollout_timesteps``. 8 is what BLADE trains.
            device: Where ``timesteps`` lives.
            timesteps: An own grid of descending times instead.

        Raises:
            ValueError: Both or neither are given, or the times do not descend within ``[0, num_train_timesteps)``.
        """
        total = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(f"pass either num_inference_steps or timesteps; got {num_inference_steps} and {timesteps}")
        if timesteps is not None:
            times = [int(t) for t in timesteps]
        else:
            assert num_inference_steps is not None
            times = rollout_timesteps(num_inference_steps, total)
        descending = all(a > b for a, b in pairwise(times))
        if not times or not descending or not 0 <= times[-1] <= times[0] < total:
            raise ValueError(f"timesteps must descend strictly within 0 .. {total - 1}; got {times}")
        self._times = times
        self.timesteps = torch.tensor(times, dtype=torch.int64, device=device)
        self.num_inference_steps = len(times)
        self._step_index = self._begin_index = None

    def scale_model_input(self, sample: Tensor, timestep: Timesteps | None = None) -> Tensor:
        """Return the sample as it is: the network takes ``x_t`` unscaled."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Timesteps,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> TDMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go from ``x_t`` to the next state of the grid.

        There is deliberately no ``eta`` argument: ``CogVideoXPipeline`` passes its own DDIM ``eta``, 0 by default, to
        every scheduler that accepts one.

        Args:
            model_output: What the network gave for ``sample`` at ``timestep``, same shape.
            timestep: The time; it has to be the coming one of the grid.
            sample: State ``x_t``, any shape.
            generator: Source of the fresh noise; None uses ``scheduler.generator``, then the global one.
            return_dict: Return a ``TDMSchedulerOutput`` rather than a tuple ``(prev_sample, x0)``.

        Raises:
            RuntimeError: ``set_timesteps`` was not called, or the rollout has already ended.
            ValueError: ``timestep`` is not the coming one. (Not checked where it would make the host wait for the GPU.)
        """
        if self.num_inference_steps is None:
            raise RuntimeError("call set_timesteps(num_inference_steps) before step()")
        if self._step_index is None:
            self._step_index = self._begin_index if self._begin_index is not None else self._find(timestep)
        index = self._step_index
        if index >= len(self._times):
            raise RuntimeError(
                f"the rollout of {len(self._times)} steps has ended; call set_timesteps() to start again"
            )
        time = self._times[index]
        on_host = isinstance(timestep, int) or (isinstance(timestep, Tensor) and timestep.device.type == "cpu")
        if on_host and int(timestep) != time:
            raise ValueError(f"step {index} of this rollout is at timestep {time}; got {int(timestep)}")
        # Bfloat16 keeps 8 bits: x - sigma v loses the small sigmas.
        x0 = self.predict_x0(model_output.float(), sample.float(), time)
        if index + 1 == len(self._times):
            following = x0
        else:
            noise = self.predict_noise(model_output.float(), sample.float(), time)
            generator = generator if generator is not None else self.generator
            fresh = randn_tensor(noise.shape, generator=generator, device=noise.device, dtype=noise.dtype)
            following = self.add_noise(x0, self.mix_noise(noise, fresh), self._times[index + 1])
        self._step_index += 1
        following, x0 = following.to(sample.dtype), x0.to(sample.dtype)
        return TDMSchedulerOutput(prev_sample=following, pred_original_sample=x0) if return_dict else (following, x0)

    def predict_x0(self, model_output: Tensor, sample: Tensor, timesteps: Timesteps) -> Tensor:
        """Clean estimate: ``x - sigma v`` (flow) or ``alpha x - sigma v`` (v-prediction).

        Args:
            model_output: Network output ``v``, ``[batch, ...]``.
            sample: State ``x_t``, ``[batch, ...]``.
            timesteps: One time, or one per batch element.
        """
        alpha, sigma = self.levels(timesteps, sample)
        if self.alphas_cumprod is None:
            return sample - sigma * model_output
        return alpha * sample - sigma * model_output

    def predict_noise(self, model_output: Tensor, sample: Tensor, timesteps: Timesteps) -> Tensor:
        """Noise estimate: ``x + (1 - sigma) v`` (flow) or ``sigma x + alpha v`` (v-prediction).

        Equal to ``(x - alpha x0) / sigma`` without the division, so also good at ``sigma = 0``.
        """
        alpha, sigma = self.levels(timesteps, sample)
        if self.alphas_cumprod is None:
            return sample + alpha * model_output
        return sigma * sample + alpha * model_output

    def mix_noise(self, noise: Tensor, fresh: Tensor) -> Tensor:
        """``eta noise + sqrt(1 - eta^2) fresh``: standard normal again if both are and are independent."""
        eta = self.config.eta
        return eta * noise + (1.0 - eta * eta) ** 0.5 * fresh

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        """``alpha_t x0 + sigma_t noise``; time -1 gives ``x0``.

        Args:
            original_samples: Clean data ``x0``, ``[batch, ...]``.
            noise: Standard normal, same shape.
            timesteps: One time, or one per batch element.
        """
        alpha, sigma = self.levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        """What the network should give for clean data ``sample`` and ``noise``: the training target."""
        if self.alphas_cumprod is None:
            return noise - sample
        alpha, sigma = self.levels(timesteps, sample)
        return alpha * noise - sigma * sample

    def levels(self, timesteps: Timesteps, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha_t, sigma_t)`` in the dtype and on the device of ``like``, shaped to multiply it.

        Args:
            timesteps: One time in ``[-1, num_train_timesteps)``, or one per batch element, ``[batch]``.
            like: ``[batch, ...]``.
        """
        times = torch.as_tensor(timesteps)
        alpha, sigma = self._levels(times)
        if times.ndim == 0 and times.device.type == "cpu":
            # A scalar on the host multiplies a tensor on any device; moving it would make the host wait.
            return alpha.to(like.dtype), sigma.to(like.dtype)
        shape = (-1, *(1,) * (like.ndim - 1)) if times.ndim else ()
        alpha, sigma = (value.to(device=like.device, dtype=like.dtype).reshape(shape) for value in (alpha, sigma))
        return alpha, sigma

    def _levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma)`` in float64, on the device of ``times``."""
        if self.alphas_cumprod is None:
            sigma = torch.where(times < 0, 0.0, times.double() / self.config.num_train_timesteps)
            return 1.0 - sigma, sigma
        table = self.alphas_cumprod.to(times.device)
        signal = torch.where(times < 0, 1.0, table[times.clamp(min=0)])
        return signal.sqrt(), (1.0 - signal).sqrt()

    def _find(self, timestep: Timesteps) -> int:
        """Position of a time in the grid; reads it back from the device once per rollout."""
        if int(timestep) not in self._times:
            raise ValueError(f"timestep {int(timestep)} is not in this rollout, whose timesteps are {self._times}")
        return self._times.index(int(timestep))
