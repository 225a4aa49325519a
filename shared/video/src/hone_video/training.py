"""The loop of a training of a pipeline's transformer: accelerate around it, exact resume, atomic checkpoints.

    loop = Loop(cfg, run)
    loop.prepare(model, {"student": Group(lr=cfg.lr)})
    loop.resume()

    def update():
        total = 0.0
        for part in loop.parts():
            noise = part.randn(latents_shape, "noise").to(loop.device)
            total += loop.backward(loss_of(loop.model, part, noise), part)
        loop.apply("student")
        return {"loss": total}

    loop.follow(update)
    save_lora(loop.weights("student"), ...)          # every process calls weights()

What a step does depends on its number alone: the samples, their order and every random number come from (seed, number
of the sample), never from a generator that runs along. So a resumed run does what an uninterrupted one does, and
several processes do what one does, up to the order of sums.

Several groups of parameters (a student and a critic, adapters of one model) have an optimiser each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType  # type: ignore[import-untyped]
from hone_core.devices import resolve_device, use_device
from hone_core.errors import CheckpointError, MissingExtraError
from hone_core.io import atomic_write_json
from hone_core.processes import load_whole_weights
from hone_core.progress import progress_bar
from hone_core.runs import Run
from hone_core.tensors import not_finite
from torch import Tensor, nn

from .training_config import LoopConfig

__all__ = ["Group", "Loop", "Part", "data_index", "seeded"]

log = logging.getLogger(__name__)

_KINDS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)


def seeded(*names: int | str) -> torch.Generator:
    """A generator on the CPU whose numbers depend on these names and nothing else."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def data_index(sample: int, count: int, seed: int) -> int:
    """Which of ``count`` items the sample of a number is: every one once in each pass, in a new random order."""
    order = torch.randperm(count, generator=seeded(seed, "order", sample // count))
    return int(order[sample % count])


@dataclass(frozen=True)
class Part:
    """Samples of one forward.

    Attributes:
        samples: Their numbers, counted over the whole training and all processes.
        share: Of the process's part of the batch.
        last: Whether it is the step's last.
        seed: Of the training.
    """

    samples: tuple[int, ...]
    share: float
    last: bool
    seed: int

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One for each sample, on the CPU; another purpose has other numbers."""
        return [seeded(self.seed, purpose, sample) for sample in self.samples]

    def randn(self, shape: Collection[int], purpose: str) -> Tensor:
        """Standard normal ``[samples, *shape]`` on the CPU."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self.generators(purpose)])

    def items(self, count: int) -> list[int]:
        """Which of ``count`` items of data they are, see ``data_index``."""
        return [data_index(sample, count, self.seed) for sample in self.samples]


@dataclass
class Group:
    """Parameters with an optimiser of their own.

    Args:
        lr: Peak learning rate.
        select: Whether the parameter of a name belongs to it; by default all that need gradients.
        ema: Decay of the moving average; 0 for none.
        weight_decay: Of AdamW.
        betas: Of AdamW.
        eps: Of AdamW.
    """

    lr: float
    select: Callable[[str], bool] = lambda name: True
    ema: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    optimizer: Any = field(default=None, init=False)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict, init=False)
    averages: dict[str, Tensor] = field(default_factory=dict, init=False)
    updates: int = field(default=0, init=False)


class Loop:
    """A training over the processes that ``accelerate launch`` or ``torchrun`` started, or over one.

    Args:
        cfg: Settings.
        run: The run, entered. Checkpoints lie in its ``checkpoints``.
        bf16: Whether forwards run under autocast in bfloat16; None for where there is a GPU.

    Attributes:
        model: What ``prepare`` made of the model: call this one.
        groups: Name to parameters, with optimiser and averages.
        step: Updates done.
        device: Of this process.

    Raises:
        ValueError: The batch cannot be shared out over the processes, or they are launched in another way.
        MissingExtraError: TensorBoard is asked for and not installed.
    """

    def __init__(self, cfg: LoopConfig, run: Run, *, bf16: bool | None = None) -> None:
        self.cfg, self.run = cfg, run
        device = resolve_device(run.device)
        cuda = device.type == "cuda"
        use_device(device)
        load_whole_weights()
        self.accelerator = Accelerator(
            mixed_precision="bf16" if (cuda if bf16 is None else bf16) else "no", cpu=not cuda
        )
        self.device = device if self.accelerator.num_processes == 1 else self.accelerator.device
        count = self.accelerator.num_processes
        if cfg.batch % (count * cfg.micro_batch):
            raise ValueError(
                f"batch must be a multiple of processes times micro_batch, {count} x {cfg.micro_batch}; got {cfg.batch}"
            )
        kind = self.accelerator.distributed_type
        if kind not in _KINDS or (kind == DistributedType.FSDP and not self.accelerator.is_fsdp2):
            raise ValueError(
                f"training runs in one process, in several with a whole model each, or with FSDP2; got {kind.value}. "
                "Launch with --use_fsdp --fsdp_version 2, or without"
            )
        self.step = 0
        self._sum_late = False
        self.model: Any = None
        self.groups: dict[str, Group] = {}
        self.folder = run.path / "checkpoints"
        self._board = None
        if cfg.tensorboard and self.accelerator.is_main_process:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingExtraError("train", "hone-video", "TensorBoard") from error
            self._board = SummaryWriter

    def prepare(self, model: nn.Module, groups: Mapping[str, Group], *, wrap: bool = True) -> Any:
        """Wrap a model for training and make the optimisers; also sets ``model`` and ``groups``.

        A model that ``fully_shard`` has sharded already stays as it is.

        Args:
            model: In training mode where that matters, its parameters frozen or not.
            groups: Which parameters are trained how. A parameter has one group.
            wrap: Whether processes sum gradients in the backward pass. False for groups that take turns in one model,
                which ``DistributedDataParallel`` does not know; then ``apply`` sums them, and calls run under
                ``accelerator.autocast()``.

        Returns:
            What to call in place of the model.

        Raises:
            ValueError: A group is empty.
        """
        from torch.distributed.fsdp import FSDPModule

        self.groups = dict(groups)
        if self.cfg.gradient_checkpointing:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        optimizers = []
        for name, group in self.groups.items():
            chosen = [p for key, p in model.named_parameters() if p.requires_grad and group.select(key)]
            if not chosen:
                raise ValueError(f"group {name!r} holds no parameter that needs a gradient")
            optimizers.append(
                torch.optim.AdamW(chosen, group.lr, betas=group.betas, eps=group.eps, weight_decay=group.weight_decay)
            )
        self._sum_late = not wrap
        if isinstance(model, FSDPModule):
            self.model = model
        elif not wrap:
            self.model = model.to(self.device)
        else:
            if not self.accelerator.is_fsdp2:
                model.to(self.device)
            self.model, *optimizers = self.accelerator.prepare(model, *optimizers)
        trained = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        names = {id(parameter): name for name, parameter in trained.named_parameters()}
        for group, optimizer in zip(self.groups.values(), optimizers, strict=True):
            group.optimizer = getattr(optimizer, "optimizer", optimizer)
            group.parameters = {names[id(p)]: p for g in group.optimizer.param_groups for p in g["params"]}
            if group.ema:
                group.averages = {name: p.detach().clone() for name, p in group.parameters.items()}
        return self.model

    def parts(self) -> Iterator[Part]:
        """The forwards of this process in the coming step."""
        cfg, count = self.cfg, self.accelerator.num_processes
        mine, size = cfg.batch // count, cfg.micro_batch
        first = self.step * cfg.batch + self.accelerator.process_index * mine
        for at in range(0, mine, size):
            samples = tuple(range(first + at, first + at + size))
            yield Part(samples, size / mine, at + size == mine, cfg.seed)

    def backward(self, loss: Tensor, part: Part) -> float:
        """Accumulate the gradient of a part's mean loss, weighted by its share; returns the weighted loss.

        Gradients are summed over the processes with the last part.
        """
        weighted = loss * part.share
        wait = contextlib.nullcontext() if part.last else self.accelerator.no_sync(self.model)
        with wait:
            self.accelerator.backward(weighted)
        return float(weighted.detach())

    def apply(self, name: str) -> float:
        """Update a group's parameters and averages with what was accumulated; returns the norm of the gradient."""
        group = self.groups[name]
        parameters = list(group.parameters.values())
        if self._sum_late:
            # Sharded parameters are summed by the backward of their module. One that no part of the batch has called
            # has a gradient of zero, however many processes there are.
            for parameter in (p for p in parameters if _local(p) is p):
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(own, "mean")
        norm = self.accelerator.clip_grad_norm_(parameters, self.cfg.clip)
        for options in group.optimizer.param_groups:
            options["lr"] = group.lr * min(1.0, (group.updates + 1) / self.cfg.warmup_steps)
        group.optimizer.step()
        group.optimizer.zero_grad(set_to_none=True)
        group.updates += 1
        if group.averages:
            decay = min(group.ema, (1 + group.updates) / (10 + group.updates))
            with torch.no_grad():
                for key, average in group.averages.items():
                    _local(average).lerp_(_local(group.parameters[key].detach()), 1 - decay)
        return float(_whole(norm)) if isinstance(norm, Tensor) else float(norm or 0.0)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values averaged over the processes."""
        if self.accelerator.num_processes == 1:
            return dict(values)
        stacked = torch.tensor(list(values.values()), dtype=torch.float64).to(self.device, torch.float32)
        return dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def follow(self, update: Callable[[], Mapping[str, float]], *, show: Collection[str] = ("loss",)) -> None:
        """Run to the last step: progress, ``metrics.jsonl``, TensorBoard, checkpoints.

        Args:
            update: Does one step; returns values to log. That named ``loss`` must be finite.
            show: Values that stand beside the progress bar.

        Raises:
            RuntimeError: The loss is not finite; the last checkpoint is from before.
        """
        cfg, main = self.cfg, self.accelerator.is_main_process
        board = None
        if self._board is not None:
            board = self._board(self.run.path / "tensorboard", purge_step=self.step + 1)
        with progress_bar(cfg.steps, desc="training", quiet=self.run.quiet or not main) as bar:
            bar.update(self.step)
            while self.step < cfg.steps:
                values = self.mean(update())
                self.step += 1
                bar.update()
                if not math.isfinite(values.get("loss", 0.0)):
                    raise RuntimeError(
                        f"the loss became {values['loss']} at step {self.step}; lower the learning rate. The last "
                        "checkpoint is from before"
                    )
                if self.step % cfg.log_every == 0 or self.step == cfg.steps:
                    self.run.log(step=self.step, **values)
                    bar.show(**{name: f"{values[name]:.4g}" for name in show if name in values})
                    for name, value in values.items():
                        if board is not None:
                            board.add_scalar(name, value, self.step)
                if self.step % cfg.checkpoint_every == 0 or self.step == cfg.steps:
                    self.save()
        if board is not None:
            board.close()

    def save(self) -> None:
        """Write a checkpoint, whole or not at all, and drop the one before.

        Raises:
            OSError: It cannot be written; the one before is intact.
            RuntimeError: It would hold NaN or infinity; the one before is intact.
        """
        main, wait = self.accelerator.is_main_process, self.accelerator.wait_for_everyone
        # A loss that is finite may have gradients that are not. All processes stop, whoever holds the part.
        broken = not_finite(self._state())
        if self.mean({"broken": float(broken is not None)})["broken"]:
            raise RuntimeError(
                f"{broken or 'the part of another process'} holds NaN or infinity after step {self.step}, so that no "
                "checkpoint is written; lower the learning rate"
            )
        scratch, target = self.folder / "partial", self.folder / f"{self.step:08d}"
        if main:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        wait()
        with _checkpointing() as dcp:
            dcp.save(self._state(), checkpoint_id=scratch)
        if main:
            updates = {name: group.updates for name, group in self.groups.items()}
            atomic_write_json(scratch / "state.json", {"step": self.step, "updates": updates})
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
            for old in _checkpoints(self.folder):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
        wait()

    def resume(self) -> bool:
        """Go on from the last checkpoint, if there is one; True if there was. Call it after ``prepare``.

        Raises:
            CheckpointError: It cannot be read, or is of other parameters.
        """
        found = _checkpoints(self.folder)
        if not found:
            self.run.forget_after(0)
            return False
        again = "Pass another --out, or delete it to start again."
        try:
            facts = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
            with _checkpointing() as dcp:
                dcp.load(self._state(), checkpoint_id=found[-1])
            self.step = facts["step"]
            for name, group in self.groups.items():
                group.updates = facts["updates"][name]
        except Exception as error:  # torch raises whatever the damage makes it meet
            raise CheckpointError(
                f"{found[-1]} is no checkpoint of this training ({_cause(error)}). {again}"
            ) from error
        self.run.forget_after(self.step)
        log.info("resuming at step %d", self.step)
        return True

    def weights(self, name: str, *, averaged: bool = True) -> dict[str, Tensor]:
        """Whole parameters of a group by name, on the CPU of the first process; empty elsewhere. All call it.

        Args:
            name: Of the group.
            averaged: The moving averages, where the group has them.
        """
        group = self.groups[name]
        chosen: Mapping[str, Tensor] = group.averages if averaged and group.averages else group.parameters
        found = {}
        for key, value in chosen.items():
            whole = _whole(value.detach())
            if self.accelerator.is_main_process:
                found[key] = whole.cpu()
        return found

    def _state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint, those in use: reading one writes into them."""
        state: dict[str, dict[str, Tensor]] = {}
        for name, group in self.groups.items():
            state[f"{name}.parameters"] = {key: p.detach() for key, p in group.parameters.items()}
            if group.averages:
                state[f"{name}.averages"] = dict(group.averages)
            moments: dict[str, Tensor] = {}
            for key, p in group.parameters.items():
                own = group.optimizer.state[p]
                if not own:
                    # As AdamW begins.
                    own["step"] = torch.tensor(0.0, dtype=torch.float32)
                    own["exp_avg"], own["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                moments |= {f"{key}.{kind}": value for kind, value in own.items()}
            state[f"{name}.optimizer"] = moments
        return state


@contextlib.contextmanager
def _checkpointing() -> Iterator[Any]:
    """The checkpoint of ``torch.distributed``: it warns that one process is alone, and its error is no Exception."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield dcp
        except dcp.CheckpointException as error:
            raise OSError(f"a checkpoint could not be written or read: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """What an error says in its last line; torch's own begin with the tracebacks of all processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][-300:] if lines else type(error).__name__


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit() and (path / "state.json").is_file())


def _local(x: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return x.to_local() if isinstance(x, DTensor) else x


def _whole(x: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x
