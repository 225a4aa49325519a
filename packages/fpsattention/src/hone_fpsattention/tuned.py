"""What ``train`` exports: a LoRA or a whole transformer, and beside it the schedule that it was trained for."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hone_core.config import from_dict, to_dict
from hone_core.errors import CheckpointError, MissingExtraError
from hone_video.lora import LORA_FILE, read_lora_header, save_lora

from .schedule import Schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Tuned", "export_tuned", "load_tuned", "need_peft", "put_lora", "read_tuned"]

SCHEDULE_FILE = "schedule.json"
_SCHEDULE, _PART = "hone_fpsattention_schedule", "hone_fpsattention_part"


@dataclass(frozen=True)
class Tuned:
    """An exported training.

    Attributes:
        schedule: The attention it was trained for.
        part: Which transformer of the pipeline.
        lora: The LoRA file, or None where all weights are exported.
        transformer: Their folder, or None.
    """

    schedule: Schedule
    part: str
    lora: Path | None
    transformer: Path | None


def read_tuned(folder: str | Path) -> Tuned:
    """What ``train`` exported to a folder; weights are not read.

    Raises:
        CheckpointError: The folder holds no such thing.
    """
    folder = Path(folder)
    try:
        schedule = Schedule.load(folder / SCHEDULE_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not what hone-fpsattention train exports: {error}") from error
    file = folder / LORA_FILE
    if file.is_file():
        header = read_lora_header(file)
        stated = header.get(_SCHEDULE)
        if stated is None or from_dict(Schedule, json.loads(stated)) != schedule:
            raise CheckpointError(f"{file} was trained with another schedule than {SCHEDULE_FILE} beside it")
        return Tuned(schedule, header[_PART], file, None)
    for part in ("transformer", "transformer_2"):
        if (folder / part / "config.json").is_file():
            return Tuned(schedule, part, None, folder / part)
    raise CheckpointError(f"{folder} holds neither {LORA_FILE} nor a transformer")


def export_tuned(
    folder: Path, weights: dict[str, Tensor], model: Any, schedule: Schedule, *, part: str, dtype: torch.dtype
) -> Path:
    """Write what was trained, and the schedule beside it; returns the folder.

    Args:
        folder: To write.
        weights: Trained parameters by name: those of a LoRA, or all.
        model: The transformer that they are of.
        schedule: The attention that they are for.
        part: Which of the pipeline's transformers it is.
        dtype: Of exported weights; what diffusers keeps in float32 stays so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(".lora_A." in name for name in weights):
        header = {_SCHEDULE: json.dumps(to_dict(schedule)), _PART: part}
        save_lora(weights, folder / LORA_FILE, header=header)
    else:
        import torch

        kind: Any = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
        with torch.device("meta"):
            plain = kind.from_config(model.config)
        kept = set(plain._keep_in_fp32_modules or ())
        state = {
            name: value if kept.intersection(name.split(".")) else value.to(dtype) for name, value in weights.items()
        }
        buffers = {name: value.cpu() for name, value in model.named_buffers() if name in plain.state_dict()}
        plain.load_state_dict(state | buffers, assign=True)
        plain.save_pretrained(folder / part)
    schedule.save(folder / SCHEDULE_FILE)
    return folder


def load_tuned(tuned: Tuned, pipeline: str, *, dtype: torch.dtype) -> dict[str, Any]:
    """Ready parts for ``load_pipeline``: the trained transformer, where all of its weights were exported."""
    if tuned.transformer is None:
        return {}
    from hone_video.pipelines import load_transformer

    return {tuned.part: load_transformer(tuned.transformer, pipeline, dtype=dtype)}


def need_peft(purpose: str) -> None:
    """Refuse what a LoRA is for where peft is not installed, before anything long begins.

    Raises:
        MissingExtraError: It is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("train", "hone-fpsattention", purpose)


def put_lora(pipe: Any, tuned: Tuned) -> None:
    """Load the trained LoRA into the pipeline, where it is one.

    Raises:
        MissingExtraError: peft is not installed.
    """
    if tuned.lora is not None:
        need_peft("A LoRA")
        second = {"load_into_transformer_2": True} if tuned.part == "transformer_2" else {}
        pipe.load_lora_weights(tuned.lora.parent, weight_name=LORA_FILE, **second)
