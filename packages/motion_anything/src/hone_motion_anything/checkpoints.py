"""Published weights, read strictly: files of MoMask, MoGenTS and the T2M evaluator, each with a manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.errors import CheckpointError
from torch import Tensor, nn

from .evaluator import POS_TAGS, MotionEncoderBiGRUCo, MovementConvEncoder, TextEncoderBiGRUCo
from .mogents import MoGenTSTokenizer
from .published import LengthEstimator, MaskTransformer, MaskTransformer2D, ResidualTransformer, ResidualTransformer2D
from .tokenizers import RVQVAE

__all__ = ["MANIFESTS", "Manifest", "build", "load_published", "read_state"]


@dataclass(frozen=True)
class Manifest:
    """What a published file holds.

    Attributes:
        keys: Entry of the file that is the state; the first of these that is there.
        build: Makes the module.
        dropped: Prefixes of entries that are someone else's, such as CLIP's.
        licence: Of the weights, as their authors say.
        where: Which file it is.
    """

    keys: tuple[str, ...]
    build: Callable[[], nn.Module]
    where: str
    dropped: tuple[str, ...] = ()
    licence: str = "code MIT; trained on HumanML3D (AMASS), which forbids commercial use"


MANIFESTS: dict[str, Manifest] = {
    "momask-tokenizer": Manifest(
        ("vq_model", "net"), RVQVAE, "MoMask, rvq_nq6_dc512_nc512_noshare_qdp0.2/model/net_best_fid.tar"
    ),
    "momask-mask": Manifest(
        ("t2m_transformer",),
        MaskTransformer,
        "MoMask, t2m_nlayer8_nhead6_ld384_ff1024_cdp0.1_rvq6ns/model/latest.tar",
        ("clip_model.",),
    ),
    "momask-residual": Manifest(
        ("res_transformer",),
        ResidualTransformer,
        "MoMask, tres_nlayer8_ld384_ff1024_rvq6ns_cdp0.2_sw/model/net_best_fid.tar",
        ("clip_model.",),
    ),
    "momask-length": Manifest(("estimator",), LengthEstimator, "MoMask, length_estimator/model/finest.tar"),
    "mogents-tokenizer": Manifest(("vq_model", "net"), MoGenTSTokenizer, "MoGenTS, pretrain_vq/model/net_best_fid.tar"),
    "mogents-mask": Manifest(
        ("t2m_transformer_ts",),
        MaskTransformer2D,
        "MoGenTS, the columns' part of pretrain_mtrans/model/net_best_fid.tar",
        ("clip_model.",),
    ),
    "mogents-mask-aux": Manifest(
        ("t2m_transformer_aux",),
        lambda: MaskTransformer(aux=True),
        "MoGenTS, the frames' part of pretrain_mtrans/model/net_best_fid.tar",
        ("clip_model.",),
    ),
    "mogents-residual": Manifest(
        ("res_transformer_ts",),
        ResidualTransformer2D,
        "MoGenTS, the columns' part of pretrain_rtrans/model/net_best_fid.tar",
        ("clip_model.",),
    ),
    "mogents-residual-aux": Manifest(
        ("res_transformer_aux",),
        lambda: ResidualTransformer(aux=True),
        "MoGenTS, the frames' part of pretrain_rtrans/model/net_best_fid.tar",
        ("clip_model.",),
    ),
    "t2m-movement": Manifest(
        ("movement_encoder",), lambda: MovementConvEncoder(259, 512, 512), "T2M, text_mot_match/model/finest.tar"
    ),
    "t2m-motion": Manifest(
        ("motion_encoder",), lambda: MotionEncoderBiGRUCo(512, 1024, 512), "T2M, text_mot_match/model/finest.tar"
    ),
    "t2m-text": Manifest(
        ("text_encoder",), lambda: TextEncoderBiGRUCo(300, POS_TAGS, 512, 512), "T2M, text_mot_match/model/finest.tar"
    ),
}
"""Name to what its file holds. Names, shapes and entries are those of the released code; no file was at hand to try."""


def build(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """The module of a manifest with random weights; on ``meta`` it takes no memory.

    Raises:
        ValueError: There is no such manifest.
    """
    if name not in MANIFESTS:
        raise ValueError(f"no published model {name!r}; they are {', '.join(MANIFESTS)}")
    with torch.device(device):
        return MANIFESTS[name].build()


def read_state(path: str | Path) -> Mapping[str, Any]:
    """A file of tensors, ``.tar`` or ``.pt`` as torch writes them or ``.safetensors``; nothing in it is run.

    Raises:
        FileNotFoundError: There is none.
        CheckpointError: It cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise whatever the damage makes them meet
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {' '.join(str(error).split())[:200]}") from error


def load_published(name: str, path: str | Path) -> nn.Module:
    """A published model with its weights, every one of them and no other.

    Args:
        name: Of ``MANIFESTS``.
        path: The authors' file, or a ``.safetensors`` that ``convert`` wrote.

    Raises:
        ValueError: There is no such model.
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or holds other names or shapes.
    """
    model, manifest = build(name, "meta"), MANIFESTS[name]
    data = read_state(path)
    data = next((data[key] for key in manifest.keys if isinstance(data.get(key), Mapping)), data)
    state = {key: value for key, value in data.items() if isinstance(value, Tensor)}
    state = {key: value for key, value in state.items() if not key.startswith(manifest.dropped)}
    wanted = model.state_dict()
    problems = [f"{key} is missing" for key in wanted if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in wanted]
    problems += [
        f"{key} has shape {list(state[key].shape)} in place of {list(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    problems += [
        f"{key} is not finite" for key in wanted if key in state and not bool(torch.isfinite(state[key]).all())
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise CheckpointError(f"{path} is not {manifest.where}: {shown}")
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    for module in model.modules():
        # Buffers that no file holds; on meta they would have no values.
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(key, torch.zeros(buffer.shape), persistent=False)
    return model.eval().requires_grad_(False)
