"""What one update of a distillation computes, on any model: rollout, fake score's loss, student's loss.

Whoever trains decides on optimisers, precision and where random numbers come from.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from hone_video.host import NUM_TRAIN_TIMESTEPS
from torch import Tensor

from .config import TDMConfig
from .scheduler import TDMScheduler, rollout_timesteps
from .tdm import Network, draw_times, fake_score_loss, guide, rollout, student_score_loss
from .trio import Trio

__all__ = ["Objective", "Section"]

Section = Callable[[str], AbstractContextManager[object]]
"""What a section of an update runs in, by its name; for those who measure."""


class Objective:
    """The losses of a distillation.

    Args:
        trio: Student, fake score and teacher.
        process: Noise levels and ``eta``.
        tdm: The settings.
        section: Entered around the teacher's calls, as ``"teacher"``.
    """

    def __init__(
        self, trio: Trio, process: TDMScheduler, tdm: TDMConfig, *, section: Section = lambda name: nullcontext()
    ) -> None:
        self.trio, self.process, self.tdm, self.section = trio, process, tdm, section
        self.times = rollout_timesteps(tdm.student_steps)

    def teacher(self, text: Tensor, empty: Tensor) -> Network:
        """The guided teacher: one call on a doubled batch."""
        tdm = self.tdm
        if tdm.teacher_guidance == 1:
            return self._plain_teacher(text)
        both = self._plain_teacher(torch.cat([text, empty]))
        low, high = (bound * NUM_TRAIN_TIMESTEPS for bound in tdm.guidance_interval)

        def run(state: Tensor, time: Tensor) -> Tensor:
            conditional, unconditional = both(torch.cat([state, state]), torch.cat([time, time])).float().chunk(2)
            inside = ((time >= low) & (time <= high)).view(-1, *(1,) * (state.ndim - 1))
            weight = torch.where(inside, tdm.teacher_guidance, 1.0).to(conditional.dtype)
            return guide(conditional, unconditional, weight)

        return run

    def _plain_teacher(self, text: Tensor) -> Network:
        network = self.trio.network("teacher", text)

        def run(state: Tensor, time: Tensor) -> Tensor:
            with self.section("teacher"):
                return network(state, time)

        return run

    def rollout(self, text: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The student's states ``[K, B, ...]`` and samples ``[B, ...]`` from noise, without gradient."""
        return rollout(self.trio.network("student", text), self.process, noise, self.times, generator=generator)

    def fake_loss(self, text: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
        """Loss ``[B]`` of the fake score on states of a rollout; ``backward`` may follow at once."""
        student, fake = self.trio.network("student", text), self.trio.network("fake", text)
        drawn = draw_times(self.times, len(text), self.tdm, generator=generator, device=generator.device)
        return fake_score_loss(
            student, fake, self._plain_teacher(text), self.process, states, drawn.to(states.device), self.tdm,
            generator=generator,
        )  # fmt: skip

    def student_loss(
        self, text: Tensor, empty: Tensor, states: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Loss ``[B]`` of the student and distance ``[B]`` of teacher and fake score; ``backward`` may follow at once.

        Args:
            text: Of the batch.
            empty: Text of the unguided teacher.
            states: Of the rollout.
            generator: Of times and noise.
        """
        student, fake = self.trio.network("student", text), self.trio.network("fake", text)
        drawn = draw_times(self.times, len(text), self.tdm, generator=generator, device=generator.device)
        loss = student_score_loss(
            student, fake, self.teacher(text, empty), self.process, states, drawn.to(states.device), self.tdm,
            generator=generator,
        )  # fmt: skip
        # A checkpointed backward computes the student's blocks again; the fake score was asked last.
        self.trio.switch("student")
        return loss
