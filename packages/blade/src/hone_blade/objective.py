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
from .tdm import Draw, Network, draw_times, fake_score_loss, guide, rollout, rollout_states, student_score_loss
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

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> Draw:
        """Times of a batch, drawn where the generator is, for ``device``."""
        return draw_times(self.times, count, self.tdm, generator=generator, device=generator.device).to(device)

    def states(self, text: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        """The student's states ``[K, B, ...]`` from noise, without gradient."""
        return rollout_states(self.trio.network("student", text), self.process, noise, self.times, generator=generator)

    def samples(self, text: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        """The student's samples ``[B, ...]`` from noise, without gradient."""
        return rollout(self.trio.network("student", text), self.process, noise, self.times, generator=generator)[1]

    def fake_loss(self, text: Tensor, states: Tensor, drawn: Draw, generator: torch.Generator) -> Tensor:
        """Loss ``[B]`` of the fake score on states of a rollout; ``backward`` may follow at once."""
        student, fake = self.trio.network("student", text), self.trio.network("fake", text)
        return fake_score_loss(
            student, fake, self._plain_teacher(text), self.process, states, drawn, self.tdm, generator=generator
        )

    def student_loss(
        self, text: Tensor, empty: Tensor, states: Tensor, drawn: Draw, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Loss ``[B]`` of the student and distance ``[B]`` of teacher and fake score; ``backward`` may follow at once.

        Args:
            text: Of the batch.
            empty: Text of the unguided teacher.
            states: Of the rollout.
            drawn: Which of them, and the times.
            generator: Of the noise.
        """
        student, fake = self.trio.network("student", text), self.trio.network("fake", text)
        loss = student_score_loss(
            student, fake, self.teacher(text, empty), self.process, states, drawn, self.tdm, generator=generator
        )
        # A checkpointed backward computes the student's blocks again; the fake score was asked last.
        self.trio.switch("student")
        return loss
