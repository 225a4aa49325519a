"""Training of hosts on chunks: which views of a scene are given and asked for, the pictures' loss, and the loop.

What a step does depends on its number alone, so that a resumed run does what an uninterrupted one does. It runs in one
process, or in several that ``accelerate launch`` starts: each has the whole host and scenes of its own.

Source: the releases' ``boundedv2`` sampler, ``train.sh`` and losses.
Differs: DepthSplat's intermediate depths are not drawn in training; an error in a step ends the run, where the release
    passes over it; a span of frames holds as many as there are targets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from hone_core.processes import load_whole_weights
from hone_core.runs import Report, Run
from hone_core.training import SharedTraining
from torch import Tensor, nn

from .chunks import ChunkSet
from .hosts import HostOutput
from .metrics import Lpips
from .ranges import HOSTS, HostRange
from .rendering import render
from .training_config import FitConfig
from .views import Views

__all__ = ["WEIGHTS", "Drawn", "Term", "TrainedReport", "choose_views", "fit", "mirrored"]
__all__ += ["picture_loss", "scene_of"]

SKIP_AFTER = 300
"""Last step, from 0, that is never skipped."""
SKIPPED = 1e-8
"""What the loss of a skipped step is multiplied by."""
WEIGHTS = "host.safetensors"
"""Where a run's artifacts hold the trained weights, with the published names."""


@dataclass(frozen=True, kw_only=True)
class TrainedReport(Report):
    """What a training left.

    Attributes:
        weights: For ``published.load_published``, and ``--checkpoint`` of the verbs that draw.
    """

    weights: Path

    @classmethod
    def of(cls, run: Run) -> TrainedReport:
        """Return the report of a finished run."""
        return cls(path=run.path, rows=tuple(run.rows), weights=run.artifacts / WEIGHTS)

    def __str__(self) -> str:
        values = {row.metric: row.value for row in self.rows}
        return (
            f"weights  {self.weights}\n{'':8} {values['steps']:.0f} steps in {values['seconds']:.0f} s\n"
            f"results  {self.path / 'results.json'}"
        )


@dataclass(frozen=True)
class Drawn:
    """What a step looks at.

    Attributes:
        name: Of the scene, said otherwise where it is mirrored.
        frames: Numbers of the context views.
        context: Given, of one scene.
        targets: Asked for.
    """

    name: str
    frames: tuple[int, ...]
    context: Views
    targets: Views


Term = Callable[[HostOutput, Drawn], tuple[Tensor, dict[str, Tensor]]]
"""What a method adds to the pictures' loss: its weighted term, and values to log."""


def _seeded(*names: int | str) -> torch.Generator:
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def scene_of(chunks: ChunkSet, sample: int, seed: int) -> str:
    """Scene of a sample: each once in a pass, chunk after chunk, both in a new random order."""
    count = len(chunks.index)
    turn, place = divmod(sample, count)
    files = sorted(set(chunks.index.values()))
    keys = [files[i] for i in torch.randperm(len(files), generator=_seeded(seed, "chunks", turn)).tolist()]
    for file in keys:
        scenes = sorted(key for key, name in chunks.index.items() if name == file)
        if place < len(scenes):
            order = torch.randperm(len(scenes), generator=_seeded(seed, file, turn))
            return scenes[int(order[place])]
        place -= len(scenes)
    raise AssertionError


def choose_views(
    centres: Tensor, cfg: FitConfig, generator: torch.Generator
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Context and target views: the farthest cameras of a span of frames, and any drawn from the same span.

    A target may be a context view too.

    Args:
        centres: ``[V, 3]``, camera centres in the order of the frames.
        cfg: Of the training.
        generator: Of this draw.

    Raises:
        ValueError: The scene is shorter than what is drawn.
    """

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    frames, count = len(centres), between(*cfg.context)
    share = max(cfg.context[1] // count, 1)
    least = max(cfg.gap[0] // share, count - 1, cfg.targets - 1)
    if frames <= least:
        raise ValueError(f"a scene of {frames} frames is too short: {least + 1} are drawn from; lower gap or targets")
    gap = between(least, min(max(cfg.gap[1] // share, least), frames - 1))
    left = between(0, frames - 1 - gap)
    span = centres[left : left + gap + 1]
    # As ZPressor's anchors: the first is the farthest from the mean.
    nearest = torch.full((len(span),), torch.inf, dtype=span.dtype)
    current, chosen = int((span - span.mean(0)).square().sum(-1).argmax()), []
    for _ in range(count):
        chosen.append(current)
        nearest = torch.minimum(nearest, (span - span[current]).square().sum(-1))
        nearest[chosen] = -1
        current = int(nearest.argmax())
    asked = torch.randperm(gap + 1, generator=generator)[: cfg.targets]
    return tuple(sorted(left + i for i in chosen)), tuple(sorted((left + asked).tolist()))


def mirrored(views: Views) -> Views:
    """The scene in a mirror: pictures turned left to right, and what the cameras see of it."""
    mirror = torch.diag(views.near.new_tensor([-1.0, 1.0, 1.0, 1.0]))
    inner = views.intrinsics_norm.clone()
    inner[..., 0, 2] = 1 - inner[..., 0, 2]
    return Views(views.image_01.flip(-1), mirror @ views.cam_to_world @ mirror, inner, views.near, views.far)


def _draw(chunks: ChunkSet, cfg: FitConfig, limits: HostRange, sample: int) -> Drawn:
    key = scene_of(chunks, sample, cfg.seed)
    scene, visit = chunks.scene(key), sample // len(chunks.index)
    generator = _seeded(cfg.seed, "views", key, visit if cfg.draws is None else visit % cfg.draws)
    turn, shift = scene.cameras[:, 6:].unflatten(1, (3, 4)).double().split([3, 1], 2)
    try:
        given, asked = choose_views(-(turn.mT @ shift)[..., 0], cfg, generator)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    context, targets = (scene.views(frames, limits.size, limits.near, limits.far) for frames in (given, asked))
    name = key
    if float(torch.rand((), generator=generator)) < cfg.flip:
        context, targets, name = mirrored(context), mirrored(targets), f"{key} mirrored"
    return Drawn(name, given, context, targets)


def picture_loss(
    image_01: Tensor, true_01: Tensor, cfg: FitConfig, lpips: Lpips | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error without outliers, and LPIPS, of pictures ``[N, 3, H, W]``; with what to log of them."""
    error = (image_01 - true_01).square()
    kept = error if cfg.drop_error is None else error[error.detach() < cfg.drop_error]
    loss = kept.sum() / max(1, kept.numel())
    logged = {"mse": error.detach().mean()}
    if lpips is not None:
        logged["lpips"] = (far := lpips(image_01, true_01).mean()).detach()
        loss = loss + cfg.lpips * far
    return loss, logged


class _Processes:
    """How many train. Each takes a scene of its own for a step, so that other ones' steps would be others."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["count"] != self.count:
            raise CheckpointError(
                f"the training was begun by {state['count']} processes, of which each draws a scene for a step; got "
                f"{self.count}. Launch it as before, or choose another --out"
            )


def fit(cfg: FitConfig, host: nn.Module, run: Run, *, term: Term) -> TrainedReport:
    """Train the host, then write it; a stopped run goes on where it was.

    Args:
        cfg: Of the training; it stands in the checkpoint.
        host: A network that takes ``Views`` and gives a ``HostOutput``.
        run: The run, entered.
        term: What the method adds.

    Raises:
        CheckpointError: The folder's checkpoint is of another config or number of processes.
        RuntimeError: The loss is not finite.
        ValueError: A scene is too short, or its cameras or pictures are damaged; or accelerate was told to use another
            precision, or to accumulate gradients.
    """
    from accelerate import Accelerator  # type: ignore[import-untyped]

    device = resolve_device(run.device)
    load_whole_weights()
    accelerator = Accelerator(cpu=device.type != "cuda")
    asked = {"mixed precision": accelerator.mixed_precision, "accumulation": accelerator.gradient_accumulation_steps}
    if asked != {"mixed precision": "no", "accumulation": 1}:
        raise ValueError(
            f"hosts are trained in float32, with a step for each scene; accelerate was told {asked}. Leave both out"
        )
    device = device if accelerator.num_processes == 1 else accelerator.device
    chunks, limits = ChunkSet(cfg.chunks), HOSTS[cfg.model]
    if cfg.size is not None:
        limits = replace(limits, size=cfg.size)
    host.to(device).train()
    lpips = None if cfg.vgg is None or not cfg.lpips else Lpips.load(cfg.vgg).to(device)
    slow = [value for name, value in host.named_parameters() if "pretrained" in name]
    quick = [value for name, value in host.named_parameters() if "pretrained" not in name]
    groups = [(quick, cfg.lr), (slow, cfg.lr_pretrained)]
    optimizer = torch.optim.AdamW(
        [{"params": some, "lr": rate} for some, rate in groups if some], weight_decay=cfg.weight_decay
    )
    rates = [rate for some, rate in groups if some]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=cfg.steps + 10, pct_start=cfg.rise, cycle_momentum=False
    )
    # First, so that nothing is filled before it is refused.
    parts = {"processes": _Processes(accelerator.num_processes), "host": host}
    parts |= {"optimizer": optimizer, "schedule": schedule}
    training = SharedTraining(cfg, run.artifacts / "checkpoint.pt", parts, accelerator)
    training.resume()

    def loop() -> Iterator[dict[str, float] | None]:
        training.start()
        while training.step < cfg.steps:
            sample = training.step * accelerator.num_processes + accelerator.process_index
            drawn = _draw(chunks, cfg, limits, sample)
            logged = _advance(drawn, device)
            training.step += 1
            yield {name: float(value) for name, value in logged.items()} if training.due() else None

    def _advance(drawn: Drawn, device: torch.device) -> dict[str, Any]:
        drawn = Drawn(
            drawn.name, drawn.frames, *(v.map(lambda x: x.to(device)) for v in (drawn.context, drawn.targets))
        )
        output, targets = host(drawn.context), drawn.targets
        nearest = 0.2 * limits.near
        picture = render(output.gaussians, targets.cam_to_world, targets.intrinsics_norm, targets.size, near=nearest)
        pictures, logged = picture_loss(picture.image_01[0], targets.image_01[0], cfg, lpips)
        added, more = term(output, drawn)
        loss = pictures + added
        skipped = cfg.skip_loss is not None and training.step > SKIP_AFTER and float(pictures.detach()) > cfg.skip_loss
        if not math.isfinite(value := float(loss.detach())):
            raise RuntimeError(f"{drawn.name}: the loss is {value} at step {training.step}; lower the rate")
        optimizer.zero_grad(set_to_none=True)
        (loss * SKIPPED if skipped else loss).backward()
        if accelerator.num_processes > 1:
            for weight in host.parameters():
                own = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = accelerator.reduce(own, "mean")
        nn.utils.clip_grad_norm_(host.parameters(), cfg.clip)
        optimizer.step()
        schedule.step()
        return {"loss": loss.detach(), "skipped": float(skipped), **logged, **more}

    training.follow(loop(), run)
    if accelerator.is_main_process:
        save_safetensors({name: value.cpu() for name, value in host.state_dict().items()}, run.artifacts / WEIGHTS)
        run.row("steps", training.step, better="none")
        run.row("seconds", training.elapsed(), unit="s", better="lower")
    accelerator.wait_for_everyone()
    return TrainedReport.of(run)
