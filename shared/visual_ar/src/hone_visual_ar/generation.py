"""Drawing images scale by scale, with a policy that says what of a scale runs.

Nothing of a run is kept on a model: a ``Generation`` holds the cache, the latent and the draws, and a policy's own
state lives with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import AttentionContext, ScaleKVCache
from .rope import Rope
from .sampling import Sampling, draw, uniforms
from .schedules import ScaleSchedule
from .tokenizers import ScaleTokenizer
from .transformer import Condition, NextScaleTransformer, Observe

__all__ = ["Generation", "Policy", "ScaleRecord", "generate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleRecord:
    """What ran of a scale.

    Attributes:
        scale: Number.
        tokens: Of the scale, per image.
        kept: That ran, per image.
        rows: Of the batch, per image: 2 under guidance.
        keys: Positions that each of them read, its own scale included.
    """

    scale: int
    tokens: int
    kept: int
    rows: int
    keys: int


class Policy:
    """What of each scale runs; this one runs everything. Its settings may be shared, its state may not."""

    def begin(self, run: Generation) -> Any:
        """State of one generation, handed to ``scale``.

        Raises:
            ValueError: The settings do not fit the model or the schedule.
        """
        return None

    def capacity(self, schedule: ScaleSchedule) -> int:
        """Positions that the cache has to hold: those of every scale but the last, which nothing reads again."""
        return schedule.start(len(schedule) - 1)

    def scale(self, run: Generation, scale: int, state: Any) -> Tensor | None:
        """Codes ``[B, L, d]`` that a scale adds to the latent; None adds nothing and ends the image."""
        hidden = run.run(run.embed(scale), scale)
        return run.codes(run.logits(hidden, scale), scale)


@dataclass(kw_only=True)
class Generation:
    """One batch of images on the way.

    Attributes:
        model: The transformer.
        tokenizer: That its codes belong to.
        condition: Of the prompts or classes.
        schedule: Scales.
        sampling: How tokens are drawn.
        cache: Keys and values of the scales so far.
        uniform: ``[B, total, groups]`` draws.
        latent: ``[B, d, H, W]`` summed so far, float32.
        rope: Table of the schedule.
        seeds: Of each image.
        state: The policy's own.
        records: What ran.
        indices: ``[B, L, groups]`` of each scale that was sampled at all positions.
        unguided: ``[R, n, groups, choices]`` logits of the last scale that ran, while an image is drawn.
    """

    model: NextScaleTransformer
    tokenizer: ScaleTokenizer
    condition: Condition
    schedule: ScaleSchedule
    sampling: Sampling
    cache: ScaleKVCache
    uniform: Tensor
    latent: Tensor
    rope: Rope | None
    seeds: tuple[int, ...]
    state: Any = None
    records: list[ScaleRecord] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    unguided: Tensor | None = None

    @classmethod
    def start(
        cls,
        model: NextScaleTransformer,
        tokenizer: ScaleTokenizer,
        condition: Condition,
        schedule: ScaleSchedule,
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        capacity: int | None = None,
    ) -> Generation:
        """Check what goes together, and make the empty state.

        ``capacity`` is what a policy asks for; None: all scales but the last.

        Raises:
            ValueError: Schedule, tokenizer, seeds or guidance do not fit.
        """
        model.check_schedule(schedule)
        per_token = tokenizer.latent_dim * model.patch**2
        if model.token_dim != per_token or model.choices != tokenizer.choices:
            raise ValueError(
                f"model and tokenizer do not belong together: tokens of {model.token_dim} channels and {model.choices} "
                f"choices, codes of {per_token} and {tokenizer.choices}"
            )
        if len(seeds) != condition.images:
            raise ValueError(f"expected a seed for each of {condition.images} images; got {len(seeds)}")
        sampling.at(0, len(schedule))
        device = condition.vector.device
        height, width = (model.patch * side for side in schedule.last)
        return cls(
            model=model,
            tokenizer=tokenizer,
            condition=condition,
            schedule=schedule,
            sampling=sampling,
            cache=model.new_cache(condition, schedule, capacity=capacity),
            uniform=uniforms(seeds, schedule.total, model.groups, device),
            latent=torch.zeros(condition.images, tokenizer.latent_dim, height, width, device=device),
            rope=model.rope(schedule),
            seeds=tuple(seeds),
        )

    def is_last(self, scale: int) -> bool:
        """Whether nothing comes after a scale."""
        return scale == len(self.schedule) - 1

    def embed(self, scale: int) -> Tensor:
        """Tokens ``[R, L, C]`` that a scale starts from, conditional rows first."""
        if scale == 0:
            return self.model.begin(self.condition, self.schedule)
        x = self.model.embed(self.read(scale), scale, self.schedule)
        return torch.cat([x, x]) if self.condition.guided else x

    def read(self, scale: int) -> Tensor:
        """The latent's tokens ``[B, L, d]`` at a scale."""
        height, width = (self.model.patch * side for side in self.schedule.grids[scale])
        latent = self.tokenizer.shrink(self.latent, (height, width))
        if self.model.patch > 1:
            latent = F.pixel_unshuffle(latent, self.model.patch)
        return latent.flatten(2).transpose(1, 2)

    def run(
        self,
        x: Tensor,
        scale: int,
        *,
        positions: Tensor | None = None,
        spread: Tensor | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Blocks on tokens of a scale; their keys and values join the cache unless the scale is the last.

        Args:
            x: ``[R, n, C]``; with fewer rows than the cache, only its first are read and written.
            scale: Number.
            positions: ``[R, n]`` raster index of each token; None: all of them in order.
            spread: See ``AttentionContext``.
            observe: See ``Observe``.
        """
        context = self.context(scale, positions=positions, spread=spread)
        rows, kept = x.shape[:2]
        condition = self.condition if rows == self.condition.rows else self.condition.conditional()
        before = self.cache.lengths[-1]
        hidden = self.model.run_blocks(x, condition, context, observe=observe)
        self.ran(scale, kept, rows, keys=before + (kept if spread is None else self.schedule.tokens(scale)))
        return hidden

    def context(self, scale: int, *, positions: Tensor | None = None, spread: Tensor | None = None) -> AttentionContext:
        """What attention is given of a scale; the arguments are those of ``run``."""
        begin, count = self.schedule.start(scale), self.schedule.tokens(scale)
        rope = rope_k = None
        if self.rope is not None:
            rope_k = self.rope.rows(slice(begin, begin + count))
            rope = rope_k if positions is None else self.rope.rows(begin + positions)
        return AttentionContext(
            rope=rope, cache=self.cache, write=not self.is_last(scale), spread=spread, rope_k=rope_k
        )

    def ran(self, scale: int, kept: int, rows: int, *, keys: int) -> None:
        """Write down what ran of a scale; ``keys`` are those that its last block read."""
        record = ScaleRecord(
            scale=scale,
            tokens=self.schedule.tokens(scale),
            kept=kept,
            rows=rows // self.condition.images,
            keys=keys,
        )
        self.records.append(record)

    def logits(self, hidden: Tensor, scale: int) -> Tensor:
        """Guided and tempered logits ``[B, n, groups, choices]``; hidden rows without a partner are not guided."""
        strength, temperature = self.sampling.at(scale, len(self.schedule))
        logits = self.raw_logits(hidden) / temperature
        images = self.condition.images
        if logits.shape[0] == images:
            return logits
        share = scale / max(1, len(self.schedule) - 1)
        return self.model.guide(logits[:images], logits[images:], strength, share)

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """The model's logits ``[R, n, groups, choices]`` of the blocks' output, by which ``check_finite`` judges."""
        self.unguided = self.model.logits(hidden, self.condition)
        return self.unguided

    def check_finite(self) -> None:
        """Refuse an image of values that are not finite: draws of those are codes like any other.

        What is not finite at one scale is so at all after it, which read its keys and values.

        Raises:
            RuntimeError: The last scale's logits are not.
        """
        logits, self.unguided = self.unguided, None
        if logits is not None and not bool(logits.isfinite().all()):
            raise RuntimeError(
                f"the model's values are not finite, with blocks in {self.model.body_dtype}; take bfloat16 or float32, "
                "or look at its weights and at what the text encoder gave"
            )

    def sample(self, logits: Tensor, scale: int, *, positions: Tensor | None = None) -> Tensor:
        """Indices ``[B, n, groups]``; a position has its draw whatever else runs.

        Args:
            logits: ``[B, n, groups, choices]``.
            scale: Number.
            positions: ``[B, n]`` raster index of each; None: all of them in order.
        """
        begin = self.schedule.start(scale)
        uniform = self.uniform[:, begin : begin + self.schedule.tokens(scale)]
        if positions is not None:
            uniform = uniform.gather(1, positions[..., None].expand(-1, -1, uniform.shape[-1]))
        return draw(logits, uniform, self.sampling)

    def embed_indices(self, indices: Tensor) -> Tensor:
        """Codes ``[B, n, d]`` of indices ``[B, n, groups]``."""
        return self.tokenizer.embed(indices)

    def codes(self, logits: Tensor, scale: int) -> Tensor:
        """Codes ``[B, L, d]`` drawn at every position of a scale."""
        indices = self.sample(logits, scale)
        self.indices.append(indices)
        return self.embed_indices(indices)

    def add(self, codes: Tensor, scale: int) -> None:
        """Add a scale's codes ``[B, L, d]`` to the latent."""
        grid = codes.transpose(1, 2).unflatten(2, self.schedule.grids[scale])
        if self.model.patch > 1:
            grid = F.pixel_shuffle(grid, self.model.patch)
        size = (self.latent.shape[-2], self.latent.shape[-1])
        self.latent = self.latent + self.tokenizer.spread(grid, size, scale=scale, scales=len(self.schedule))

    def step(self, scale: int, policy: Policy) -> bool:
        """One scale; False if the policy ends the image here."""
        codes = policy.scale(self, scale, self.state)
        if codes is None:
            return False
        self.add(codes, scale)
        return True

    def image(self) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1] of the latent as it stands."""
        return self.tokenizer.decode(self.latent).float()


@torch.no_grad()
def generate(
    model: NextScaleTransformer,
    tokenizer: ScaleTokenizer,
    condition: Condition,
    schedule: ScaleSchedule,
    *,
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    policy: Policy | None = None,
) -> Generation:
    """Draw images; ``.image()`` decodes them.

    Args:
        model: The transformer.
        tokenizer: That its codes belong to.
        condition: Of the prompts or classes.
        schedule: Scales.
        seeds: Of each image.
        sampling: How tokens are drawn.
        policy: What runs of a scale; None: what is attached to the model, or everything.

    Raises:
        ValueError: These do not go together.
        RuntimeError: The model's values are not finite.
    """
    used = policy or model.policy or Policy()
    run = Generation.start(
        model,
        tokenizer,
        condition,
        schedule,
        seeds=seeds,
        sampling=sampling or Sampling(),
        capacity=used.capacity(schedule),
    )
    run.state = used.begin(run)
    for scale in range(len(schedule)):
        if not run.step(scale, used):
            break
    run.check_finite()
    return run
