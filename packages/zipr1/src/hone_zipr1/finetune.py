"""Train a model, or the tiny host, to answer with few tokens; see ``reinforce`` for the loop.

Runs in one process, or in several that ``accelerate launch`` starts: each samples its own questions, and gradients are
averaged. Every process holds the whole model, or with ``shard`` its part of the decoder's layers (FSDP2).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.processes import load_whole_weights
from hone_core.runs import Report, Run
from hone_core.training import SharedTraining
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import TrainConfig
from .models import attach
from .reinforce import Reinforcement, Task, whole

__all__ = ["TrainedReport", "train"]

log = logging.getLogger(__name__)

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class TrainedReport(Report):
    """What a training did to its own rollouts; ``eval`` measures the result.

    Attributes:
        model: the trained weights.
    """

    model: Path

    @classmethod
    def of(cls, run: Run) -> TrainedReport:
        """Return the report of a finished run."""
        return cls(path=run.path, rows=tuple(run.rows), model=run.artifacts / "model")

    def __str__(self) -> str:
        values = {(row.metric, row.split): row.value for row in self.rows}
        lines = [f"{'':<12}{'first tenth':>12}{'last tenth':>12}   of the steps that were logged"]
        for name in dict.fromkeys(row.metric for row in self.rows):
            lines.append(f"{name:<12}{values[name, 'first']:>12.4g}{values[name, 'last']:>12.4g}")
        return "\n".join([*lines, f"weights  {self.model}", f"results  {self.path / 'results.json'}"])


def train(cfg: TrainConfig, run: Run) -> TrainedReport:
    """Train, and write the weights; a stopped run goes on where it was.

    Raises:
        CheckpointError: The folder's checkpoint is of another config.
        RuntimeError: The loss is not finite.
    """
    from accelerate import Accelerator, DistributedType  # type: ignore[import-untyped]

    device = resolve_device(run.device)
    load_whole_weights()
    accelerator = Accelerator(cpu=device.type != "cuda")
    count, process = accelerator.num_processes, accelerator.process_index
    if accelerator.distributed_type == DistributedType.FSDP and not cfg.shard:
        log.warning("launched with FSDP, but every process holds the whole model: --shard shares its layers out")
    task = _task(cfg, device if count == 1 else accelerator.device, process, count)
    reduce = (lambda grad: accelerator.reduce(grad, "mean")) if count > 1 else None
    with attach(task.model, cfg.sparse) as handle:
        loop = Reinforcement(cfg.reinforce, task, handle, seed=cfg.seed, process=process, reduce=reduce)
        training = SharedTraining(cfg, run.artifacts / "checkpoint.pt", _resumable(loop, cfg), accelerator)
        training.resume()
        training.follow(loop.loop(training), run, show=("accuracy", "tau"))
    weights = _gathered(task.model, accelerator.is_main_process)
    if accelerator.is_main_process:
        _write(cfg, task, loop, weights, run.artifacts / "model")
        _write_rows(run)
    accelerator.wait_for_everyone()
    return TrainedReport.of(run)


class _Trained:
    """The weights that are trained, whole, of a model whose others stay."""

    def __init__(self, model: Any) -> None:
        self._weights = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """Name to weight; every process takes part."""
        return {name: whole(value.detach()) for name, value in self._weights.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over stored values."""
        with torch.no_grad():
            for name, value in self._weights.items():
                value.copy_(_like(state[name], value))


class _Moments:
    """An optimiser's state, whole."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """As the optimiser's; every process takes part."""
        state = self._optimizer.state_dict()
        moments = {at: {name: whole(x) for name, x in own.items()} for at, own in state["state"].items()}
        return state | {"state": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a stored state."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        moments = {
            at: {name: _like(x, parameters[at]) if x.shape == parameters[at].shape else x for name, x in own.items()}
            for at, own in state["state"].items()
        }
        self._optimizer.load_state_dict(state | {"state": moments})


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, shared out as a parameter is."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _shard(model: Any, device: torch.device, processes: int) -> None:
    """Share the decoder's layers out over the processes; embeddings, norm and tower stay whole in each."""
    from hone_lm.decoders import find_decoder
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder = find_decoder(model)
    inside = {id(p) for layer in decoder.layers for p in layer.parameters()}
    rest = {p for p in decoder.model.parameters() if id(p) not in inside}
    mesh = init_device_mesh(device.type, (processes,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder.model, mesh=mesh, ignored_params=rest)


def _gathered(model: Any, keep: bool) -> dict[str, Tensor]:
    """The model's state with whole tensors, on the CPU where they were shared out; empty unless it is to be kept."""
    found = {}
    for name, value in model.state_dict().items():
        one = whole(value).cpu() if isinstance(value, DTensor) else value
        if keep:
            found[name] = one
    return found


def _resumable(loop: Reinforcement, cfg: TrainConfig) -> dict[str, Any]:
    return {**loop.parts, "model": _Trained(loop.task.model), "optimizer": _Moments(loop.optimizer)}


def _task(cfg: TrainConfig, device: torch.device, process: int, processes: int) -> Task:
    if cfg.model is None or cfg.data is None:
        from .host import load_host
        from .rollouts import HostTask

        original, host = load_host(device), load_host(device)
        original.model.requires_grad_(False)
        return HostTask(host, original, seed=cfg.seed, process=process)
    from hone_lm.checkpoints import load_model
    from hone_lm.decoders import find_decoder

    from .questions import ModelTask, load_items

    whole = cfg.dtype == "auto" and not cfg.lora_rank
    dtype = torch.float32 if whole else resolve_dtype(cfg.dtype, device)
    model, processor = load_model(cfg.model, device=device, dtype=dtype)
    model.requires_grad_(False)
    frozen: Any = None
    if cfg.lora_rank:
        from peft import LoraConfig, inject_adapter_in_model

        decoder = find_decoder(model).model
        path = next(name for name, module in model.named_modules() if module is decoder)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(cfg.seed)
            modules = rf"{path.replace('.', '[.]')}[.].*[.]({'|'.join(ADAPTED)})"
            # Not by the model's add_adapter, for which each transformers wants a peft of its own.
            lora = LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules=modules)
            inject_adapter_in_model(lora, model)
        model.eval()
    else:
        frozen = load_model(cfg.model, device=device, dtype=dtype)[0].requires_grad_(False)
        find_decoder(model).model.requires_grad_(True)
    if cfg.shard and processes > 1:
        for one in (model, frozen):
            if one is not None:
                _shard(one, device, processes)
    return ModelTask(
        model,
        processor,
        load_items(cfg.data),
        original=frozen,
        frames=cfg.frames,
        max_new_tokens=cfg.max_new_tokens,
        seed=cfg.seed,
        process=process,
        processes=processes,
        sharded=cfg.shard and processes > 1,
    )


def _write(cfg: TrainConfig, task: Task, loop: Reinforcement, weights: dict[str, Tensor], folder: Path) -> None:
    from .rollouts import HostTask

    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(task, HostTask):
        from .host import save_host

        save_host(task.host, folder / "host.safetensors")
    else:
        if cfg.lora_rank:
            _write_adapter(task.model, weights, folder, str(cfg.model))
        else:
            task.model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        task.processor.save_pretrained(folder)  # type: ignore[attr-defined]
    if loop.budget is not None:
        loop.budget.save(folder / "budget.safetensors")


def _write_adapter(model: Any, state: dict[str, Tensor], folder: Path, base: str) -> None:
    """Write what peft reads: its config, with the model that they belong to, and the weights under its names."""
    from safetensors.torch import save_file

    weights = {
        f"base_model.model.{name.replace('.default.', '.')}": value.detach().cpu().contiguous()
        for name, value in state.items()
        if ".lora_" in name
    }
    model.peft_config["default"].base_model_name_or_path = base
    model.peft_config["default"].save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_rows(run: Run) -> None:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    few = max(1, len(lines) // 10)
    for split, part in (("first", lines[:few]), ("last", lines[-few:])):
        for name in ("accuracy", "tau", "kl", "p"):
            values = [line[name] for line in part if name in line]
            if values:
                better: Any = {"accuracy": "higher", "tau": "lower"}.get(name, "none")
                run.row(name, sum(values) / len(values), better=better, n=len(values), split=split)
