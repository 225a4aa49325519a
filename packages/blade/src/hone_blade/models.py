"""How BLADE enters diffusers' video transformers: ``attach`` and its handle. The mechanics are ``hone_video``'s."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from hone_core.handles import resolve
from hone_video.attachment import Method
from hone_video.grids import Grid
from hone_video.handle import LayerStats, VideoHandle, attach_method
from torch import Tensor

from .config import PRESETS, BladeConfig
from .method import Stats, adaptive_sparse_attention

__all__ = ["BladeHandle", "attach"]


class _Blade(Method):
    name = "BLADE"

    def __init__(self, config: BladeConfig) -> None:
        self.config = config
        self.order, self.tile = config.order, config.tile
        self.counts_steps = config.dense_steps > 0
        self.dense_layers, self.min_tokens = config.dense_layers, config.min_tokens
        # Decided per layer, forward and step; further down, the comparisons would cost a compiled graph per layer.
        self.sparse = replace(config, dense_layers=(), dense_steps=0, min_tokens=0)

    def plan(self, step: int, timestep: float | None) -> BladeConfig | None:
        return None if step < self.config.dense_steps else self.sparse

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: BladeConfig,
        layer: int | Tensor,
        grid: Grid,
        text_tokens: int,
    ) -> Tensor:
        out = adaptive_sparse_attention(q, k, v, cfg=plan, layer=layer, grid=grid, text_tokens=text_tokens)
        return cast(Tensor, out)

    def measure(  # type: ignore[override]  # recall is the only option
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: BladeConfig,
        layer: int | Tensor,
        grid: Grid,
        text_tokens: int,
        recall: bool = False,
    ) -> tuple[Tensor, Stats]:
        both = adaptive_sparse_attention(
            q, k, v, cfg=plan, layer=layer, grid=grid, text_tokens=text_tokens, return_stats=True, recall=recall
        )
        return cast(tuple[Tensor, Stats], both)


class BladeHandle(VideoHandle[BladeConfig]):
    """BLADE on a model, as ``attach`` returned it; also a context manager that detaches at the end."""

    @contextmanager
    def record(  # type: ignore[override]  # likewise
        self, *, recall: bool = False
    ) -> Iterator[list[LayerStats]]:
        """Collect the ``Stats`` of every sparse self-attention call inside the block; see ``VideoHandle.record``.

        Args:
            recall: Also compute how much of dense attention's mass the kept keys hold. Costs a dense attention.
        """
        with super().record(recall=recall) as rows:
            yield rows


def attach(model_or_pipeline: Any, preset_or_config: str | BladeConfig) -> BladeHandle:
    """Give a video diffusion transformer BLADE's sparse self-attention, until ``detach()``.

    Steps count where ``dense_steps`` is above 0; what else there is to know says ``hone_video.handle.attach_method``.

    Args:
        model_or_pipeline: A ``WanTransformer3DModel``, ``CogVideoXTransformer3DModel`` (text-, image- or
            video-conditioned) or ``HunyuanVideoTransformer3DModel``, or a pipeline that holds one; of a Wan2.2 pipeline
            both transformers, or a sequence of them, whose steps are counted together.
        preset_or_config: Name in ``PRESETS``, or settings.

    Returns:
        The handle. Keep it: it is how to detach.

    Raises:
        TypeError: The model's class is not supported.
        ValueError: The preset is unknown; a method is attached already; a self-attention has a processor that is not
            the class's own; ring or tensor parallelism is on; ``dense_layers`` names a layer that the model does not
            have. In every case the model is untouched.
    """
    return attach_method(model_or_pipeline, _Blade(resolve(preset_or_config, PRESETS, BladeConfig)), BladeHandle)
