"""How FPSAttention enters diffusers' video transformers: ``attach`` and its handle. The mechanics are ``hone_video``'s.

The regime of a forward is that of its noise level: of the timestep that the model is called with, the largest where
each token has one. Samples of a batch at different noise levels, as in training, have each their own. Both branches of
guidance see the same timestep, and so the same regime.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from hone_core.errors import UnsupportedHardwareError
from hone_core.handles import resolve
from hone_core.tensors import plain_tensors
from hone_kernels.attention import BlockLayout
from hone_kernels.attention_fp8 import SUPPORT
from hone_video.attachment import Method
from hone_video.grids import Grid
from hone_video.handle import VideoHandle, attach_method, transformers_of
from hone_video.host import NUM_TRAIN_TIMESTEPS
from torch import Tensor

from .config import PRESETS, FPSAttentionConfig, Regime
from .method import Plan, Rope, fps_attention
from .schedule import Schedule, regime_index
from .tiles import Tiling
from .windows import covers

__all__ = ["FPSAttentionHandle", "attach", "describe_model", "plan_for", "preset_for"]

log = logging.getLogger(__name__)


class _FPSAttention(Method):
    name = "FPSAttention"
    rotates = True

    def __init__(self, config: FPSAttentionConfig) -> None:
        self.config = config
        self.order, self.tile = "tile", config.tile
        self.counts_steps = len(config.regimes) > 1
        self.dense_layers = config.dense_layers

    def plan(self, step: int, timestep: float | None) -> int | None:
        """Number of the regime; None where it is the model's own attention, -1 where nothing says which."""
        if timestep is None and len(self.config.regimes) > 1:
            return -1
        number = 0 if timestep is None else regime_index(self.config, timestep / NUM_TRAIN_TIMESTEPS)
        return None if self.config.regimes[number].plain else number

    def plan_each(self, timesteps: Sequence[float]) -> int | tuple[int, ...] | None:
        """The regime of each sample; one number where they share it."""
        numbers = tuple(regime_index(self.config, timestep / NUM_TRAIN_TIMESTEPS) for timestep in timesteps)
        return self.plan(0, timesteps[0]) if len(set(numbers)) == 1 else numbers

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: int | tuple[int, ...],
        layer: int | Tensor,
        grid: Grid,
        text_tokens: int,
        rope: Rope | None = None,
    ) -> Tensor:
        if isinstance(plan, tuple):
            rows = [[i for i, number in enumerate(plan) if number == regime] for regime in sorted(set(plan))]
            parts = [
                self.attend(
                    q[at], k[at], v[at], plan=plan[at[0]], layer=layer, grid=grid, text_tokens=text_tokens, rope=rope
                )
                for at in rows
            ]
            order = sorted(range(len(plan)), key=[i for at in rows for i in at].__getitem__)
            return torch.cat(parts)[order]
        if plan < 0:
            raise RuntimeError(
                "FPSAttention goes by the noise level, and begin_step() was called without one; call "
                "handle.begin_step(i, sigma=sigma), or leave it out"
            )
        where = plan_for(self.config.regimes[plan], self.config, grid, text_tokens, q.device)
        # Nobody reads q afterwards.
        return fps_attention(q, k, v, plan=where, cfg=self.config, rope=rope, overwrite_q=not torch.is_grad_enabled())

    def measure(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: int | tuple[int, ...],
        layer: int | Tensor,
        grid: Grid,
        text_tokens: int,
        rope: Rope | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """``attend``, and ``[4]`` float64: density, and the relative L2 error of rounding, of the window and of both.

        Each error is that of the output against exact attention of the same queries, keys and values, over all of them.

        Raises:
            ValueError: Samples of the batch are in different regimes.
        """
        if isinstance(plan, tuple):
            raise ValueError("statistics need the samples of a forward in one regime; call the model on one timestep")
        regime = self.config.regimes[plan]
        exact = replace(regime, window=None, e4m3=False)

        def run(part: Regime) -> Tensor:
            where = plan_for(part, self.config, grid, text_tokens, q.device)
            return fps_attention(q, k, v, plan=where, cfg=self.config, rope=rope)

        own = run(exact).double()
        errors = []
        for part in (replace(regime, window=None), replace(regime, e4m3=False), regime):
            out = run(part)
            errors.append((out.double() - own).norm() / own.norm())
        share = plan_for(regime, self.config, grid, text_tokens, q.device).layout.density()
        return out, torch.stack([share.to(own), *errors])


def plan_for(regime: Regime, cfg: FPSAttentionConfig, grid: Grid, text_tokens: int, device: torch.device) -> Plan:
    """The plan of a regime at a grid, made once and kept for 64 of them. Shared: do not write into it."""
    if not torch.compiler.is_compiling():
        return _kept(regime, cfg.tile, cfg.block, cfg.border, grid, text_tokens, device)
    window, box = list(regime.window or ()), list(regime.scale_tile or ())
    options = (window, regime.scales, box, list(cfg.tile), cfg.block, cfg.border, list(grid), text_tokens)
    # Shapes and numbers that a graph is made for; only what is on the device comes from the op.
    longest = _longest(*options)
    slots, places, valid, groups, kv_num, kv_idx = _plan_op(*options, device)
    tokens, count, block = grid[0] * grid[1] * grid[2] + text_tokens, slots.shape[0], cfg.block
    padded = None if count == tokens and block == 128 else valid
    layout = BlockLayout(kv_num, kv_idx, count, count, block, block, padded, check=False)
    return Plan(regime, tokens, block, slots, places, valid, groups, longest, layout)


@lru_cache(maxsize=64)
def _kept(
    regime: Regime, tile: Grid, block: int, border: str, grid: Grid, text_tokens: int, device: torch.device
) -> Plan:
    if regime.window is not None and covers(grid, tile, regime.window, border):  # type: ignore[arg-type]
        log.warning(
            "window %s is larger than the grid of %s tokens in tiles of %s: it reads every tile. "
            "Make a larger video, or take a smaller window, or smaller tiles",
            *(regime.window, grid, tile),
        )
    with plain_tensors():
        cfg = FPSAttentionConfig(regimes=(regime,), tile=tile, block=block, border=border)  # type: ignore[arg-type]
        return Plan.of(regime, Tiling.of(grid, tile, block=block, text_tokens=text_tokens, device=device), cfg)


@torch.compiler.assume_constant_result
def _longest(
    window: list[int], scales: str, box: list[int], tile: list[int], block: int, border: str, grid: list[int],
    text_tokens: int,
) -> int | None:  # fmt: skip
    regime = Regime(window=tuple(window) or None, scales=scales, scale_tile=tuple(box) or None)  # type: ignore[arg-type]
    return _kept(regime, tuple(tile), block, border, tuple(grid), text_tokens, torch.device("cpu")).longest


def _tensors(
    window: list[int], scales: str, box: list[int], tile: list[int], block: int, border: str, grid: list[int],
    text_tokens: int, device: torch.device,
) -> tuple[Tensor, ...]:  # fmt: skip
    regime = Regime(window=tuple(window) or None, scales=scales, scale_tile=tuple(box) or None)  # type: ignore[arg-type]
    plan = _kept(regime, tuple(tile), block, border, tuple(grid), text_tokens, device)
    return plan.slots, plan.places, plan.valid, plan.groups, plan.layout.kv_num, plan.layout.kv_idx


@torch.library.custom_op("hone_fpsattention::plan", mutates_args=())
def _plan_op(
    window: list[int], scales: str, box: list[int], tile: list[int], block: int, border: str, grid: list[int],
    text_tokens: int, device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """For ``torch.compile``, which cannot trace how lists are made and may overwrite what an op returns."""
    tensors = _tensors(window, scales, box, tile, block, border, grid, text_tokens, device)
    slots, places, valid, groups, kv_num, kv_idx = (x.clone() for x in tensors)
    return slots, places, valid, groups, kv_num, kv_idx


@_plan_op.register_fake
def _(window, scales, box, tile, block, border, grid, text_tokens, device):
    tensors = _tensors(window, scales, box, tile, block, border, grid, text_tokens, torch.device("cpu"))
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=device) for x in tensors)


class FPSAttentionHandle(VideoHandle[FPSAttentionConfig]):
    """FPSAttention on a model, as ``attach`` returned it; also a context manager that detaches at the end."""

    def begin_step(self, step: int, *, sigma: float | Sequence[float] | Tensor | None = None) -> None:
        """Say which denoising step this thread's coming forwards belong to, and its noise level.

        Without this call the timestep of every forward is read back from the device, if there are several regimes.

        Args:
            step: From 0.
            sigma: Noise level in [0, 1], or those of a batch's samples (a tensor's are read back from its device); not
                needed where one regime holds everywhere.

        Raises:
            ValueError: ``step`` is negative, or ``sigma`` is missing or out of range.
        """
        if sigma is None and len(self.config.regimes) > 1:
            raise ValueError("sigma, the noise level in [0, 1], is needed: it chooses one of several regimes")
        if isinstance(sigma, Tensor):
            sigma = sigma.tolist()
        if isinstance(sigma, Sequence) and not sigma:
            raise ValueError("sigma must be a noise level in [0, 1] or those of a batch's samples; got none")
        super().begin_step(step)
        method = self._attachments[0].method
        if isinstance(sigma, Sequence):
            self._steps.plan = method.plan_each([level * NUM_TRAIN_TIMESTEPS for level in sigma])
        elif sigma is not None:
            self._steps.plan = method.plan(step, sigma * NUM_TRAIN_TIMESTEPS)


def attach(model_or_pipeline: Any, config: str | FPSAttentionConfig | Schedule) -> FPSAttentionHandle:
    """Give a video diffusion transformer FPSAttention, until ``detach()``.

    Regimes go by the noise level of each forward. A window that reads every tile of a forward's grid is warned of once;
    ``windows.covers`` says so before. What else there is to know says ``hone_video.handle.attach_method``.

    Args:
        model_or_pipeline: A ``WanTransformer3DModel``, ``CogVideoXTransformer3DModel`` (text-, image- or
            video-conditioned) or ``HunyuanVideoTransformer3DModel``, or a pipeline that holds one; of a Wan2.2 pipeline
            both transformers, or a sequence of them.
        config: Name in ``PRESETS``, of a pipeline with its scheduler's shift; settings; or a calibrated schedule. Both
            of these must have the scheduler's shift, and a schedule must be of this model and sampler.

    Returns:
        The handle. Keep it: it is how to detach.

    Raises:
        TypeError: The model's class is not supported.
        ValueError: The preset is unknown; the schedule is of something else; a method is attached already; one
            transformer was given twice; a self-attention has a processor that is not the class's own; ring or tensor
            parallelism is on; ``dense_layers`` names a layer that the model does not have.
        UnsupportedHardwareError: The model is on a GPU that cannot run it in E4M3. In every case the model is
            untouched.
    """
    models = transformers_of(model_or_pipeline)
    scheduler = getattr(model_or_pipeline, "scheduler", None)
    if isinstance(config, Schedule):
        schedule, config = config, config.config
        schedule.check(model=describe_model(models[0]), sampler=_sampler(scheduler, schedule), shift=config.shift)
    shift = None if scheduler is None else scheduler_shift(scheduler)
    if isinstance(config, str):
        config = preset_for(config, shift)
    config = resolve(config, PRESETS, FPSAttentionConfig)
    if shift is not None and len(config.regimes) > 1 and shift != config.shift:
        raise ValueError(
            f"the pipeline's scheduler has shift {shift:g}, but these settings map steps to noise levels by "
            f"{config.shift:g}; take dataclasses.replace(config, shift={shift:g}), or give the scheduler the other"
        )
    for model in models:
        check_hardware(config, model)
    return attach_method(model_or_pipeline, _FPSAttention(config), FPSAttentionHandle)


def preset_for(name: str, shift: float | None) -> FPSAttentionConfig:
    """A preset at a scheduler's timestep shift; None keeps the preset's, which is that of the published model.

    Its boundaries are fractions of the steps, whatever the shift.
    """
    config = resolve(name, PRESETS, FPSAttentionConfig)
    return config if shift is None else replace(config, shift=shift)


def _sampler(scheduler: Any, schedule: Schedule) -> str:
    return schedule.sampler if scheduler is None else type(scheduler).__name__


def scheduler_shift(scheduler: Any) -> float | None:
    """Timestep shift of a diffusers scheduler, 1 where it has none; None where it depends on the size."""
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        return None
    return float(config.get("flow_shift") or config.get("shift") or 1.0)


def describe_model(model_or_pipeline: Any) -> str:
    """Class and shape of a transformer, as ``Schedule.model`` words it."""
    model = getattr(model_or_pipeline, "transformer", model_or_pipeline)
    config = model.config
    return (
        f"{type(model).__name__}, {config.num_layers} layers, {config.num_attention_heads} heads of "
        f"{config.attention_head_dim}"
    )


def check_hardware(config: FPSAttentionConfig, transformer: Any) -> None:
    """Refuse a GPU or a head size that would run something else than E4M3 kernels without being asked to.

    Raises:
        UnsupportedHardwareError: No kernel takes this model there, and ``backend`` is ``"auto"``.
    """
    parameter = next(transformer.parameters())
    if parameter.device.type != "cuda" or config.backend != "auto" or not any(r.e4m3 for r in config.regimes):
        return
    capability = torch.cuda.get_device_capability(parameter.device)
    if capability < (8, 9):
        raise UnsupportedHardwareError(
            "E4M3 attention needs compute capability 8.9 (Ada, Hopper or newer)",
            found=f"{torch.cuda.get_device_name(parameter.device)}, {capability[0]}.{capability[1]}",
            use="backend='triton', which rounds in torch and multiplies in bfloat16: right values and no gain, or "
            "regimes with e4m3=False, for the window alone",
        )
    dim = transformer.config.attention_head_dim
    reason = SUPPORT["triton"].reason(parameter.device, torch.bfloat16, head_dim=dim, block=config.block)
    if reason is not None or any(r.scales == "token" for r in config.regimes if r.e4m3):
        raise UnsupportedHardwareError(
            "no E4M3 kernel takes this call",
            found=reason or "scales='token'",
            use="backend='reference', which emulates it slowly, or regimes with e4m3=False",
        )
