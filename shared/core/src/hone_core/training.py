"""Training runs: a budget of minutes or steps, a checkpoint from which a stopped one goes on exactly, a report."""

import json
import logging
import math
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from hone_core.config import check_least, to_dict
from hone_core.environment import environment
from hone_core.errors import CheckpointError
from hone_core.hosts import HostFacts, read_facts, write_facts
from hone_core.io import save_state
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run, drop_lines_after
from hone_core.tensors import not_finite

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import AdamW, Muon

__all__ = ["Budgeted", "Log", "LogFile", "SharedTraining", "TrainReport", "Training", "average_into", "check_budget"]
__all__ += ["finish_host", "matrix_optimizers", "rate_at", "stage_at"]

log = logging.getLogger(__name__)

HOST = "host.safetensors"
"""Where a run's artifacts hold the host that it trained."""


class Budgeted(Protocol):
    """Fields that every training config has."""

    @property
    def seed(self) -> int:
        """Of weights and data."""

    @property
    def minutes(self) -> float:
        """Wall-clock budget of the training itself, where ``steps`` is None."""

    @property
    def steps(self) -> int | None:
        """Optimiser steps in place of a time."""

    @property
    def log_every(self) -> int:
        """Steps between two logged ones."""

    @property
    def checkpoint_seconds(self) -> float:
        """Least time between two checkpoints."""


class Log(Protocol):
    """What ``Training.follow`` writes to; a ``Run`` is one."""

    quiet: bool

    def log(self, *, step: int, **scalars: float) -> None:
        """Keep the values of a step."""

    def forget_after(self, step: int) -> None:
        """Drop what was kept of later steps."""


class LogFile:
    """A ``Log`` that is no run: one training of several, in a file of JSON lines.

    Args:
        path: The file; lines are added to it.
    """

    quiet = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, *, step: int, **scalars: float) -> None:
        """Keep the values of a step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop what was kept of later steps."""
        drop_lines_after(self.path, step)


def check_budget(config: Budgeted, *positive: str) -> None:
    """Refuse a budget without a step, and what no training runs with; for the ``__post_init__`` of its config.

    Args:
        config: Of the training; of ``minutes`` and ``steps``, the one that holds is looked at.
        positive: Other fields of it that must be above 0, such as ``batch`` and ``lr``.

    Raises:
        ValueError: A value is out of its range.
    """
    if config.steps is None and not config.minutes > 0:
        raise ValueError(f"minutes must be positive when steps is not given; got {config.minutes}")
    check_least(config, 1, "steps", "log_every")
    check_least(config, 0, "checkpoint_seconds")
    for name in positive:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive; got {getattr(config, name)}")


class Training:
    """Where a training run stands, over all the parts that interruptions cut it into.

    The loop that changes the weights is the package's own: a generator that calls ``start``, goes on while ``spent`` is
    below 1, counts ``step`` up with each update and yields after it what is to be logged, or None. ``follow`` runs it.

    Args:
        config: Of the run. A checkpoint of any other is refused.
        path: File of the resumable state.
        parts: Name to everything that an exact continuation needs: modules, optimisers, generators, and whatever else
            has ``state_dict`` and ``load_state_dict``.

    Attributes:
        step: Updates done.
    """

    def __init__(self, config: Budgeted, path: Path, parts: Mapping[str, Any]) -> None:
        self.config, self.path, self.parts = config, path, dict(parts)
        self.step = 0
        self._before = 0.0  # seconds of earlier parts
        self._started: float | None = None
        self._saved = 0.0

    def start(self) -> None:
        """Start the clock; what came before, such as building the model, is not in the budget."""
        self._started = self._saved = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        self._before, self._started = self.elapsed(), None

    def elapsed(self) -> float:
        """Seconds of training so far, over all parts."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def spent(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        if self.config.steps is not None:
            return min(1.0, self.step / self.config.steps)
        return min(1.0, self.elapsed() / (60 * self.config.minutes))

    def due(self) -> bool:
        """Whether this step is one to log."""
        return self.step % self.config.log_every == 0

    def follow(
        self, loop: Iterable[Mapping[str, float] | None], run: Log, *, show: Collection[str] = ("loss",)
    ) -> None:
        """Run the loop to its end: progress, ``metrics.jsonl``, checkpoints now and then and at the end.

        What the log holds of steps after the checkpoint that a resumed training began at is dropped first.

        Args:
            loop: See the class. Values named ``loss`` must be finite.
            run: The run, entered.
            show: Values that stand beside the progress bar.

        Raises:
            RuntimeError: The loss of a logged step, or what a checkpoint is to hold, is not finite; no checkpoint is
                written after it.
        """
        run.forget_after(self.step)
        with progress_bar(self.config.steps, desc="training", quiet=run.quiet) as bar:
            bar.update(self.step)
            for values in loop:
                bar.update()
                if values is not None:
                    run.log(step=self.step, **values)
                    bar.show(**{name: f"{values[name]:.4g}" for name in show if name in values})
                    if not math.isfinite(values.get("loss", 0.0)):
                        raise RuntimeError(
                            f"the loss became {values['loss']} at step {self.step}; lower the learning rate"
                        )
                if time.perf_counter() - self._saved > self.config.checkpoint_seconds:
                    self.save()
        self.save()
        self.stop()

    def save(self) -> None:
        """Write the state, whole or not at all.

        Raises:
            OSError: It cannot be written; the checkpoint before is intact.
            RuntimeError: It holds NaN or infinity, of a step that was not logged too; the checkpoint before is intact.
        """
        parts = {name: _state_of(part) for name, part in self.parts.items()}
        broken = not_finite(parts)
        if broken is not None:
            raise RuntimeError(
                f"{broken} holds NaN or infinity after step {self.step}, so that no checkpoint is written: the "
                "training diverged since the last one; lower the learning rate"
            )
        state = {"config": to_dict(self.config), "step": self.step, "seconds": self.elapsed(), "parts": parts}
        save_state(state, self.path)
        self._saved = time.perf_counter()

    def resume(self) -> bool:
        """Read the state, if there is any, into the parts; True if there was.

        Raises:
            CheckpointError: It is of another config, or cannot be read.
        """
        import torch

        if not self.path.is_file():
            return False
        again = "Pass another --out, or delete it to start again."
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            before, parts = state["config"], state["parts"]
        except Exception as error:  # torch raises whatever the damage makes it meet
            raise CheckpointError(f"{self.path} is no checkpoint of a training run ({error}). {again}") from error
        # Tuples come back from a file as lists.
        now = json.loads(json.dumps(to_dict(self.config)))
        if before != now:
            changed = sorted(key for key in {**before, **now} if before.get(key) != now.get(key))
            raise CheckpointError(
                f"{self.path} was made with another configuration: it differs in {', '.join(changed)}. {again}"
            )
        if parts.keys() != self.parts.keys():
            raise CheckpointError(
                f"{self.path} holds {', '.join(parts)}; expected {', '.join(self.parts)}. It is of another version. "
                f"{again}"
            )
        for name, part in self.parts.items():
            _restore(part, parts[name])
        self.step, self._before = state["step"], state["seconds"]
        log.info("resuming at step %d after %.0f s of training", self.step, self._before)
        return True


class SharedTraining(Training):
    """A training of the processes of ``accelerate``, which stop at the same step; the first writes the checkpoint.

    Args:
        config: See ``Training``.
        path: See ``Training``.
        parts: See ``Training``; where a part's ``state_dict`` gathers over the processes, all of them call it.
        accelerator: Of ``accelerate``.
    """

    def __init__(self, config: Budgeted, path: Path, parts: Mapping[str, Any], accelerator: Any) -> None:
        super().__init__(config, path, parts)
        self._accelerator = accelerator
        self._written = 0.0

    def start(self) -> None:
        """Start the clock."""
        super().start()
        self._written = self._saved

    def spent(self) -> float:
        """Share of the budget that is spent, the mean of the processes'."""
        import torch

        share = super().spent()
        if self._accelerator.num_processes == 1:
            return share
        main = self._accelerator.is_main_process
        due = main and time.perf_counter() - self._written > self.config.checkpoint_seconds
        clocks = torch.tensor([share, float(due)], device=self._accelerator.device)
        share, save = self._accelerator.reduce(clocks, "mean").tolist()
        # Gathering the weights may take all processes: the first one's clock says after which step.
        self._saved = -math.inf if save else math.inf
        return share

    def save(self) -> None:
        """Write the state, in the first process."""
        if self._accelerator.is_main_process:
            super().save()
        else:
            for part in self.parts.values():
                part.state_dict()
        self._written = self._saved = time.perf_counter()


def matrix_optimizers(
    model: "nn.Module",
    layers: str,
    *,
    lr: float,
    adamw_lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    fused: bool | None = None,
) -> "tuple[Muon, AdamW]":
    """Muon for the matrices of a model's layers, and AdamW without decay for every other parameter.

    Args:
        model: Whose parameters are trained.
        layers: What the names of the layers' parameters have and no others do, as ``.layers.``.
        lr: Of Muon, scaled so that updates are of AdamW's size.
        adamw_lr: Of AdamW.
        weight_decay: Of Muon.
        betas: Of AdamW.
        fused: As AdamW takes it.
    """
    import torch

    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if layers in name and parameter.ndim == 2 else others).append(parameter)
    return (
        torch.optim.Muon(matrices, lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, adamw_lr, betas=betas, weight_decay=0.0, fused=fused),
    )


def rate_at(done: float, *, rise: float = 0.03, first: float = 0.01, least: float = 0.02) -> float:
    """Factor of the peak learning rate at a share of a training: a straight rise, under half a cosine down.

    Args:
        done: Share that is over, in [0, 1].
        rise: Share in which a rise from 0 would reach the peak.
        first: Factor at the start.
        least: Factor at the end.
    """
    return min(1.0, done / rise + first) * (least + (1 - least) * (1 + math.cos(math.pi * done)) / 2)


def stage_at(shares: Mapping[str, float], last: str, spent: float) -> tuple[str, float]:
    """Which stage of a training a share of its budget lies in, and how far that stage is, in [0, 1].

    Args:
        shares: Stage to its share of the budget, in order; all but the last.
        last: The stage that has the rest.
        spent: Share of the budget.
    """
    begin = 0.0
    for name, share in shares.items():
        if spent < begin + share:
            return name, (spent - begin) / share
        begin += share
    return last, (spent - begin) / (1 - begin)


def average_into(average: "nn.Module", model: "nn.Module", decay: float) -> None:
    """Let a moving average of weights follow the model by an update."""
    import torch

    follows, weights = ([part.detach() for part in module.parameters()] for module in (average, model))
    torch._foreach_lerp_(follows, weights, weight=1 - decay)


def _state_of(part: Any) -> Any:
    import torch

    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _restore(part: Any, state: Any) -> None:
    import torch

    if isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class TrainReport(Report):
    """What a run that trained a tiny host made.

    Attributes:
        checkpoint: The exported ``host.safetensors``.
        steps: Optimiser steps done.
        seconds: Training time, over all resumed parts.
        result: Grades of the stored weights.
        passed: Whether every gate was reached.
    """

    checkpoint: Path
    steps: int
    seconds: float
    result: dict[str, float]
    passed: bool

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return the report of a run whose host is written.

        Raises:
            CheckpointError: There is no host, or its sidecar lacks the facts.
        """
        checkpoint = run.artifacts / HOST
        facts = read_facts(checkpoint, run.package)
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            checkpoint=checkpoint,
            steps=facts.steps,
            seconds=facts.seconds,
            result=facts.result,
            passed=facts.passed,
        )

    def __str__(self) -> str:
        grades = ", ".join(f"{name} {value:.4g}" for name, value in self.result.items())
        verdict = "every gate is passed" if self.passed else "a gate is missed: train longer before using this host"
        return (
            f"host     {self.checkpoint}\n{'':8} {self.steps} steps in {self.seconds:.1f} s\n"
            f"result   {grades}; {verdict}\nresults  {self.path / 'results.json'}"
        )


def finish_host(
    run: Run,
    training: Training,
    result: Mapping[str, float],
    *,
    gates: Mapping[str, float],
    details: Mapping[str, Any],
) -> TrainReport:
    """Write the facts of the host that was exported to ``run.artifacts / "host.safetensors"`` and graded.

    Args:
        run: The run, entered.
        training: Done.
        result: Grades of the weights as stored: read the file back before grading.
        gates: Least grades, of names in ``result``.
        details: What else the sidecar is to hold, in JSON types.
    """
    passed = all(result[name] >= gate for name, gate in gates.items())
    if not passed:
        log.warning("the gates %s were missed: %s. Train longer before using this host.", dict(gates), dict(result))
    facts = HostFacts(
        command=run.command,
        seed=training.config.seed,
        steps=training.step,
        seconds=round(training.elapsed(), 1),
        result={name: round(value, 4) for name, value in result.items()},
        gates=dict(gates),
        passed=passed,
        train_config=to_dict(training.config),
        environment=environment(),
        details=dict(details),
    )
    write_facts(run.artifacts / HOST, facts, package=run.package)
    return TrainReport.of(run)
