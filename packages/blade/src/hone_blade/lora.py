"""LoRA weights in the layout that BLADE publishes: checked key by key before anything is loaded.

One rank for all, no stored alpha (alpha equals the rank, so the update is exactly ``B @ A``), on the four projections
of every attention: of both attentions in Wan, of the one in CogVideoX. Only safetensors files are read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline, ModelMixin, WanTransformer3DModel
from diffusers.utils.torch_utils import is_compiled_module
from hone_core.config import to_dict
from hone_core.errors import CheckpointError
from hone_core.io import atomic_write_json, save_safetensors
from hone_video.architectures import full_size
from hone_video.lora import PROJECTIONS
from torch import Tensor, nn

from .config import BladeConfig, Rollout
from .lora_files import (
    CONFIG_KEY,
    PART_KEY,
    ROLLOUT_KEY,
    STATED,
    Transformer,
    check_part,
    few,
    find_lora,
    read_config,
    read_header,
    read_rollout,
)

__all__ = ["LoraReport", "check_lora", "expected_keys", "load_blade_lora", "lora_header", "lora_targets"]
__all__ += ["save_blade_lora", "save_student"]

log = logging.getLogger(__name__)

_PREFIX = "transformer"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_LAYOUTS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    WanTransformer3DModel: ("blocks", ("attn1", "attn2")),
    CogVideoXTransformer3DModel: ("transformer_blocks", ("attn1",)),
}
_LICENCE_KEY = "license"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraReport:
    """What ``load_blade_lora`` loaded.

    Attributes:
        file: The file.
        adapter_name: Name of the adapter on the model.
        rank: Rank of every update.
        num_tensors: Tensors in the file.
        num_values: Numbers in them.
        dtype: Of the file, for example ``bfloat16``.
        config: The attention settings that the file says it was trained with, or None. The published files do not say;
            they need the preset of their model.
        rollout: The sampling that the file says it was trained for, or None.
        licence: One line to show to whoever loads it.
    """

    file: str
    adapter_name: str
    rank: int
    num_tensors: int
    num_values: int
    dtype: str
    config: BladeConfig | None
    rollout: Rollout | None
    licence: str


def expected_keys(model: nn.Module | str, rank: int = 64) -> dict[str, tuple[int, int]]:
    """Names and shapes of the layout for one model.

    Args:
        model: A transformer, or the name of one in ``hone_video.architectures.FULL_SIZE``.
        rank: Of the LoRA; 64 is published.

    Returns:
        ``transformer.<block>.<attention>.<projection>.lora_A.weight`` to ``(rank, in)`` and ``lora_B.weight`` to
        ``(out, rank)``: 480 tensors for Wan2.1-1.3B, 336 for CogVideoX-5B.

    Raises:
        TypeError: The model's class has no such layout.
        ValueError: The name is unknown, or ``rank`` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}")
    model = full_size(model) if isinstance(model, str) else model
    keys: dict[str, tuple[int, int]] = {}
    for name, linear in _projections(model).items():
        keys[f"{_PREFIX}.{name}.lora_A.weight"] = (rank, linear.in_features)
        keys[f"{_PREFIX}.{name}.lora_B.weight"] = (linear.out_features, rank)
    return keys


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the projections that the layout adapts, for a ``peft.LoraConfig``.

    Raises:
        TypeError: The model's class has no such layout.
    """
    return list(_projections(model))


def load_blade_lora(
    pipeline_or_model: Any,
    path: str | Path,
    *,
    transformer: Transformer | None = None,
    adapter_name: str = "blade",
    local_files_only: bool = False,
) -> LoraReport:
    """Load LoRA weights of the published layout into a Wan or CogVideoX transformer.

    Every name and shape is compared with the model's, and every value has to be finite, before the model is touched.
    The order with ``attach`` does not matter. ``model.delete_adapters(adapter_name)`` takes the weights off again.

    Args:
        pipeline_or_model: The transformer, or a pipeline.
        path: A safetensors file, a folder that holds ``pytorch_lora_weights.safetensors``, or a hub address
            ``owner/repository[/folder][/file.safetensors]``, for example ``GYP666/BLADE/BLADE_wanx_weight``.
        transformer: Which one of a pipeline; to be said of a Wan2.2 pipeline, which has two.
        adapter_name: Name for the adapter.
        local_files_only: Do not ask the hub, only its local cache.

    Raises:
        TypeError: The model's class has no such layout.
        CheckpointError: The file is not there, is not safetensors, has unknown, missing or misshapen tensors or
            values that are not finite, or says that it is for the other transformer of a pipeline of two.
        ValueError: The pipeline has two transformers and none is named, or ``adapter_name`` is taken.
    """
    pipeline = pipeline_or_model if isinstance(pipeline_or_model, DiffusionPipeline) else None
    model = _transformer(pipeline_or_model if transformer is None else getattr(pipeline_or_model, transformer))
    _layout(model)
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(
            f"the model already has an adapter named {adapter_name!r}; choose another adapter_name, or call "
            f"model.delete_adapters({adapter_name!r}) first"
        )
    file = find_lora(path, local_files_only=local_files_only)
    shapes, dtypes, metadata = read_header(file)
    if transformer is not None and getattr(pipeline_or_model, "transformer_2", None) is not None:
        check_part(file, transformer)
    rank = _check(file, shapes, model)
    if not all(name in ("F32", "F16", "BF16", "F64") for name in dtypes):
        raise CheckpointError(f"{file}: expected floating-point tensors; got {', '.join(sorted(dtypes))}")
    config, rollout = read_config(file, metadata), read_rollout(file, metadata)

    from safetensors.torch import load_file

    tensors = load_file(file)
    broken = sorted(name for name, values in tensors.items() if not values.isfinite().all())
    if broken:
        raise CheckpointError(
            f"{file}: {len(broken)} tensors hold values that are not finite, such as {few(broken)}. Its training "
            "diverged, or the file was damaged; take another checkpoint"
        )
    model.load_lora_adapter(tensors, prefix=_PREFIX, adapter_name=adapter_name, _pipeline=pipeline)
    report = LoraReport(
        file=str(file),
        adapter_name=adapter_name,
        rank=rank,
        num_tensors=len(shapes),
        num_values=sum(a * b for a, b in shapes.values()),
        dtype=", ".join(_DTYPES.get(name, name) for name in sorted(dtypes)),
        config=config,
        rollout=rollout,
        licence=_licence(path, metadata),
    )
    log.info("loaded %d LoRA tensors of rank %d from %s. %s", report.num_tensors, rank, file, report.licence)
    return report


def save_blade_lora(
    pipeline_or_model: Any,
    path: str | Path,
    *,
    adapter_name: str = "blade",
    config: BladeConfig | None = None,
    rollout: Rollout | None = None,
    licence: str | None = None,
) -> Path:
    """Save an adapter in the published layout, which ``load_blade_lora`` and diffusers' ``load_lora_weights`` read.

    Args:
        pipeline_or_model: What the adapter is on.
        path: The file, ending in ``.safetensors``.
        adapter_name: Name of the adapter.
        config: Attention settings that it was trained with, kept in the file's header.
        rollout: Sampling that it was trained for, likewise.
        licence: One line, kept in the header.

    Raises:
        ValueError: There is no such adapter, its alpha is not its rank, it does not cover exactly the layout's
            projections, or ``path`` has another ending.
    """
    from peft import get_peft_model_state_dict

    path, model = Path(path), _transformer(pipeline_or_model)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors; got {path}")
    adapters = getattr(model, "peft_config", {})
    if adapter_name not in adapters:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {', '.join(adapters) or 'none'}")
    settings = adapters[adapter_name]
    if settings.lora_alpha != settings.r or settings.alpha_pattern or settings.rank_pattern:
        raise ValueError(
            f"the layout stores no alpha, so lora_alpha must equal the rank of every layer; got rank {settings.r}, "
            f"alpha {settings.lora_alpha}, patterns {settings.rank_pattern} and {settings.alpha_pattern}"
        )
    tensors = {
        f"{_PREFIX}.{name}": value
        for name, value in get_peft_model_state_dict(model, adapter_name=adapter_name).items()
    }
    expected = expected_keys(model, settings.r)
    if {name: tuple(value.shape) for name, value in tensors.items()} != expected:
        missing, more = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise ValueError(
            f"the adapter must cover {', '.join(PROJECTIONS)} of every attention and nothing else; "
            f"missing {few(missing)}; beyond {few(more)}"
        )
    metadata = {"format": "pt"} | lora_header(config, rollout)
    if licence is not None:
        metadata[_LICENCE_KEY] = licence
    return save_safetensors(tensors, path, metadata=metadata)


def save_student(model: Any, weights: Mapping[str, Tensor], folder: Path, header: Mapping[str, str]) -> Path:
    """Write a transformer that was trained whole, as ``from_pretrained`` reads it, and beside it what it is for.

    Args:
        model: Of its class, for config and dtypes.
        weights: All its parameters.
        folder: To write.
        header: See ``lora_header``.
    """
    kind: Any = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
    with torch.device("meta"):
        plain = kind.from_config(model.config)
    own = model.state_dict()  # of a sharded model in parts: buffers are whole, and of the rest only the dtype counts
    whole = {name: weights.get(name, value).to(value.dtype).cpu() for name, value in own.items()}
    plain.load_state_dict(whole, assign=True)
    plain.save_pretrained(folder)
    atomic_write_json(folder / STATED, dict(header))
    return folder


def lora_header(config: BladeConfig | None, rollout: Rollout | None, part: Transformer | None = None) -> dict[str, str]:
    """What a file's header says of how its weights were trained, and for which transformer of two."""
    stated = {CONFIG_KEY: config, ROLLOUT_KEY: rollout}
    header = {key: json.dumps(to_dict(value)) for key, value in stated.items() if value is not None}
    return header if part is None else header | {PART_KEY: part}


def check_lora(file: str | Path, model: nn.Module) -> None:
    """Refuse weights that are not of the layout of a transformer, which may be on the meta device; none are read.

    Raises:
        TypeError: The model's class has no such layout.
        CheckpointError: They are not.
    """
    _check(Path(file), read_header(Path(file))[0], model)


def _transformer(pipeline_or_model: Any) -> ModelMixin:
    model = pipeline_or_model
    if isinstance(model, DiffusionPipeline):
        if getattr(model, "transformer_2", None) is not None:
            raise ValueError(
                f"this {type(model).__name__} has two transformers; pass pipe.transformer or pipe.transformer_2"
            )
        model = getattr(model, "transformer", None)
    return model._orig_mod if is_compiled_module(model) else model


def _layout(model: Any) -> tuple[str, tuple[str, ...]]:
    for kind, layout in _LAYOUTS.items():
        if isinstance(model, kind):
            return layout
    raise TypeError(
        f"BLADE's LoRA layout exists for {', '.join(kind.__name__ for kind in _LAYOUTS)}; got {type(model).__name__}"
    )


def _projections(model: nn.Module) -> dict[str, Any]:
    """Name to linear layer, the layer below any adapter that it already has."""
    blocks, attentions = _layout(model)
    found = {}
    for index, block in enumerate(getattr(model, blocks)):
        for attention in attentions:
            for projection in PROJECTIONS:
                linear = block.get_submodule(f"{attention}.{projection}")
                found[f"{blocks}.{index}.{attention}.{projection}"] = getattr(linear, "base_layer", linear)
    return found


def _check(file: Path, shapes: dict[str, tuple[int, ...]], model: nn.Module) -> int:
    """The rank, if the file has exactly the layout of the model."""
    name = type(model).__name__
    first = next((shape for key, shape in shapes.items() if key.endswith(".lora_A.weight") and len(shape) == 2), None)
    if first is None:
        raise CheckpointError(f"{file}: no LoRA tensors; expected {_PREFIX}.*.lora_A.weight, got {few(sorted(shapes))}")
    rank = first[0]
    expected = expected_keys(model, rank)
    unknown, missing = sorted(shapes.keys() - expected.keys()), sorted(expected.keys() - shapes.keys())
    if unknown or missing:
        problems = [f"{len(unknown)} unknown tensors, such as {few(unknown)}"] if unknown else []
        problems += [f"{len(missing)} missing, such as {few(missing)}"] if missing else []
        raise CheckpointError(
            f"{file} does not fit this {name}: {'; '.join(problems)}. Expected {len(expected)} tensors, A and B for "
            f"{', '.join(PROJECTIONS)} of every attention; got {len(shapes)}. Is it for another model?"
        )
    wrong = [f"{key} {shapes[key]} instead of {shape}" for key, shape in expected.items() if shapes[key] != shape]
    if wrong:
        raise CheckpointError(
            f"{file} does not fit this {name} at rank {rank}: {len(wrong)} tensors of another shape, such as "
            f"{few(wrong)}. Is it for another model size?"
        )
    return rank


def _licence(path: str | Path, metadata: dict[str, str]) -> str:
    if _LICENCE_KEY in metadata:
        return f"Licence of these weights, as the file says: {metadata[_LICENCE_KEY]}"
    # An address on the hub, or a file in the hub's local cache.
    if str(path).startswith("GYP666/") or "models--GYP666--" in str(path):
        return (
            "Licence of the published BLADE weights (GYP666/BLADE): unknown to this package; read the repository's "
            "model card before you use or share them. The base model's licence applies as well."
        )
    return "Licence of these weights: unknown, the file does not say; the base model's licence applies as well."
