"""The tiny host: a small, trained ``WanTransformer3DModel`` that draws moving digits on a CPU.

It is diffusers' own class at a small size, in pixel space, so that a method attached to it runs the code that runs in
Wan2.1, with trained attention maps (random weights attend almost uniformly, and say nothing about a mask's quality).
A clip of 16 x 32 x 32 pixels is 16 x 8 x 8 = 1,024 tokens. Beside the transformer the checkpoint holds the embedding
of each prompt word and a small classifier that grades what was drawn.

Flow convention: ``x_sigma = (1 - sigma) * x_0 + sigma * noise``; the network predicts ``noise - x_0`` at timestep
``1000 * sigma``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hone_core import hosts
from torch import Tensor, nn

from .clips import label_words, random_labels
from .grader import ClipClassifier, grade
from .host_config import PACKAGE, PACKAGED, HostConfig, Solver
from .prompts import FIELDS, NUM_WORDS, parse_prompt

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

__all__ = [
    "NUM_TRAIN_TIMESTEPS",
    "Host",
    "build_transformer",
    "grade_samples",
    "load_host",
    "make_scheduler",
    "save_host",
    "to_clips",
    "to_latents",
]

NUM_TRAIN_TIMESTEPS = 1000
"""Timesteps over this are noise levels, in every model that is supported."""


def build_transformer(cfg: HostConfig, *, seed: int = 0) -> WanTransformer3DModel:
    """Build the untrained ``WanTransformer3DModel``.

    Linear layers start as in DiT: Xavier, no bias, output and cross-attention output at zero. The gates of a block
    start at 0.1 rather than at DiT's 0: the training run is short.

    Args:
        cfg: architecture.
        seed: of the weights; the global generator is left as it was.
    """
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanTransformer3DModel(
            patch_size=(1, cfg.patch, cfg.patch),
            num_attention_heads=cfg.heads,
            attention_head_dim=cfg.head_dim,
            in_channels=3,
            out_channels=3,
            text_dim=cfg.text_dim,
            freq_dim=cfg.freq_dim,
            ffn_dim=cfg.ffn_dim,
            num_layers=cfg.layers,
            cross_attn_norm=True,
            rope_max_seq_len=64,
        )
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(model.patch_embedding.weight.view(cfg.heads * cfg.head_dim, -1))
        nn.init.zeros_(model.patch_embedding.bias)
        embedder = model.condition_embedder
        for linear in (embedder.time_embedder.linear_1, embedder.time_embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(embedder.time_proj.weight)
        nn.init.zeros_(model.scale_shift_table)
        nn.init.zeros_(model.proj_out.weight)
        for block in model.blocks:
            nn.init.zeros_(block.attn2.to_out[0].weight)
            nn.init.zeros_(block.scale_shift_table)
            with torch.no_grad():
                block.scale_shift_table[:, [2, 5]] = 0.1  # rows: shift, scale, gate of attention; the same of the ffn
    return model


def to_latents(clips: Tensor) -> Tensor:
    """Map clips from [0, 1] to the model's [-1, 1]."""
    return clips * 2 - 1


def to_clips(latents: Tensor) -> Tensor:
    """Map the model's [-1, 1] to clips in [0, 1], clamped, float32."""
    return ((latents.float() + 1) / 2).clamp(0, 1)


def make_scheduler(solver: Solver, shift: float) -> Any:
    """Return the diffusers flow-matching scheduler of that name.

    Args:
        solver: ``euler`` or ``unipc`` (second order, multistep).
        shift: timestep shift.

    Raises:
        ValueError: on another solver.
    """
    if solver == "euler":
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=shift)
    if solver == "unipc":
        from diffusers import UniPCMultistepScheduler

        return UniPCMultistepScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
    raise ValueError(f"solver must be 'euler' or 'unipc'; got {solver!r}")


@dataclass
class Host:
    """A tiny host ready to sample.

    Attributes:
        config: architecture and sampler.
        transformer: the ``WanTransformer3DModel``; ``hone_blade.models.attach`` takes it.
        words: ``[V + 1, text_dim]`` embedding of each prompt word; the last row stands for "no prompt".
        classifier: grades clips.
        facts: how it was trained, and its grades; None for an untrained host.
    """

    config: HostConfig
    transformer: WanTransformer3DModel
    words: Tensor
    classifier: ClipClassifier
    facts: hosts.HostFacts | None = None

    @classmethod
    def untrained(cls, config: HostConfig | None = None, *, seed: int = 0) -> Host:
        """Return a host with random weights."""
        config = config or HostConfig()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            classifier = ClipClassifier(config.classifier_channels)
        words = torch.randn(NUM_WORDS + 1, config.text_dim, generator=torch.Generator().manual_seed(seed))
        return cls(config, build_transformer(config, seed=seed), words, classifier)

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return self.transformer.proj_out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the transformer's linear layers."""
        return self.transformer.proj_out.weight.dtype

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters of the transformer."""
        return sum(p.numel() for p in self.transformer.parameters())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Host:
        """Move everything to ``device`` in place, and the transformer's matrices to ``dtype``; return self.

        Norms, modulation tables, the rotary table and the time embedding stay in float32, as diffusers loads Wan.
        """
        self.transformer.to(device)
        self.classifier.to(device)
        if dtype is not None:
            keep = self.transformer._keep_in_fp32_modules
            for name, parameter in self.transformer.named_parameters():
                if not any(part in name.split(".") for part in keep):
                    parameter.data = parameter.data.to(dtype)
        self.words = self.words.to(device)
        return self

    def encode_labels(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Return the "text" tokens ``[B, 5, text_dim]`` of labels ``[B, 5]``.

        Args:
            labels: as in ``hone_video.prompts.FIELDS``.
            drop: ``[B]`` bool, rows to encode as "no prompt".
        """
        ids = label_words(labels.to(self.words.device))
        if drop is not None:
            ids = torch.where(drop[:, None], NUM_WORDS, ids)
        return self.words[ids]

    def encode_prompt(self, prompts: str | Sequence[str]) -> Tensor:
        """Return the "text" tokens ``[B, 5, text_dim]`` of prompts such as ``a red 7 moving left, slow``.

        Raises:
            ValueError: on a word that the host does not know, or a missing attribute.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.encode_labels(torch.tensor([parse_prompt(prompt) for prompt in prompts]))

    def encode_null(self, batch: int) -> Tensor:
        """Return the tokens of "no prompt", ``[batch, 5, text_dim]``, for guidance."""
        return self.words[-1].expand(batch, len(FIELDS), -1)

    def noise(self, count: int, seed: int) -> Tensor:
        """Draw starting noise ``[count, 3, F, H, W]`` on the CPU, so that devices agree, and move it.

        Clip ``i`` gets the same noise whatever ``count`` is.
        """
        cfg = self.config
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randn(3, cfg.frames, cfg.height, cfg.width, generator=generator) for _ in range(count)]
        return torch.stack(rows).to(self.device)

    def evaluations(
        self, *, steps: int | None = None, solver: Solver | None = None, guidance: float | None = None
    ) -> list[int]:
        """Return the network evaluations of a clip at each step: 2 where it is guided, else 1.

        Args:
            steps: as for :meth:`sample`, like the others.
            solver: the config's if omitted.
            guidance: the config's if omitted.
        """
        cfg = self.config
        scale = cfg.guidance if guidance is None else guidance
        scheduler = self._scheduler(cfg.steps if steps is None else steps, solver or cfg.solver)
        return [2 if self._guides(timestep, scale) else 1 for timestep in scheduler.timesteps]

    def _scheduler(self, steps: int, solver: Solver) -> Any:
        scheduler = make_scheduler(solver, self.config.shift)
        if solver == "euler":
            # explicit: the scheduler's own grid ends just above 0 and would spend its last step on nothing
            scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        else:
            scheduler.set_timesteps(steps)
        return scheduler

    def _guides(self, timestep: Tensor, scale: float) -> bool:
        low, high = self.config.guidance_interval
        return scale != 1.0 and low <= float(timestep) / NUM_TRAIN_TIMESTEPS <= high

    @torch.no_grad()
    def sample(
        self,
        text: Tensor,
        noise: Tensor,
        *,
        steps: int | None = None,
        solver: Solver | None = None,
        guidance: float | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Integrate the flow from noise to clips.

        Args:
            text: ``[B, 5, text_dim]`` from :meth:`encode_prompt`.
            noise: ``[B, 3, F, H, W]`` standard normal.
            steps: denoising steps; the config's if omitted.
            solver: the config's if omitted.
            guidance: the config's if omitted.
            on_step: called with (step, steps) before each step. A guided step is one call of the transformer on a
                doubled batch.

        Returns:
            Clips ``[B, 3, F, H, W]`` in [0, 1], float32.

        Raises:
            ValueError: if ``text`` and ``noise`` do not fit together or the config.
        """
        cfg = self.config
        steps = cfg.steps if steps is None else steps
        guidance = cfg.guidance if guidance is None else guidance
        expected = (len(text), 3, cfg.frames, cfg.height, cfg.width)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise must be {list(expected)} for {len(text)} prompts; got {list(noise.shape)}")
        scheduler = self._scheduler(steps, solver or cfg.solver)
        latents = noise.float()
        text = text.to(self.dtype)
        both = torch.cat([text, self.encode_null(len(text)).to(text)])
        for index, timestep in enumerate(scheduler.timesteps):
            if on_step is not None:
                on_step(index, steps)
            guided = self._guides(timestep, guidance)
            inputs, words = (torch.cat([latents, latents]), both) if guided else (latents, text)
            velocity = self.transformer(
                inputs.to(self.dtype), timestep.to(self.device).expand(len(inputs)), words, return_dict=False
            )[0].float()
            if guided:
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + guidance * (conditional - unconditional)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return to_clips(latents)


def save_host(host: Host, path: Path) -> Path:
    """Write transformer, word table and classifier, with the config in the sidecar; return the path.

    Args:
        host: what to save.
        path: the ``host.safetensors`` to write.
    """
    modules = {"transformer.": host.transformer, "classifier.": host.classifier}
    return hosts.save_host(path, host.config, modules, package=PACKAGE, others={"words": host.words}, facts=host.facts)


def load_host(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, path: Path | None = None
) -> Host:
    """Load the tiny host that ships with the package, or another one made by ``hone-blade train-host``.

    Args:
        device: where to put it.
        dtype: of the transformer's linear layers. float32 on a CPU.
        path: a ``host.safetensors``; the packaged one if omitted.

    Raises:
        CheckpointError: if the file is missing or is not a tiny host.
    """
    stored = hosts.open_host(HostConfig, PACKAGE, path or PACKAGED)
    host = Host.untrained(stored.config)
    rest = stored.load({"transformer.": host.transformer, "classifier.": host.classifier}, ("words",))
    host.words, host.facts = rest["words"], stored.facts
    host.transformer.eval().requires_grad_(False)
    host.classifier.eval().requires_grad_(False)
    return host.to(device, dtype)


@torch.no_grad()
def grade_samples(
    host: Host, *, clips: int, seed: int, solver: Solver, steps: int, guidance: float, chunk: int = 128
) -> tuple[dict[str, Tensor], Tensor]:
    """Sample clips for random prompts and grade them.

    Returns:
        The columns of :func:`hone_video.grader.grade`, and the first 16 clips.
    """
    labels = random_labels(clips, torch.Generator().manual_seed(seed))
    noise = host.noise(clips, seed)
    parts, shown = [], []
    for start in range(0, clips, chunk):
        rows = slice(start, start + chunk)
        made = host.sample(host.encode_labels(labels[rows]), noise[rows], steps=steps, solver=solver, guidance=guidance)
        parts.append(grade(host.classifier, made, labels[rows]))
        shown.append(made[:16])
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}, torch.cat(shown)[:16].cpu()
