"""Published weights, read strictly: every tensor's name and shape is compared before one is read.

The releases load with ``strict=False``. One of their links leads to LlamaGen's raster weights in place of NAR's, which
then load without a word and leave the below head random; here that is an error of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hone_core.errors import CheckpointError
from hone_visual_ar.checkpoints import Manifest, compare_shapes, open_checkpoint
from torch import nn

from .flashar import FlashARForImageGeneration
from .larp import LARPTokenizer
from .tokenizer import LlamaGenVQModel
from .transformer import LlamaGenForImageGeneration, NARForImageGeneration, NARForVideoGeneration

__all__ = ["MANIFESTS", "SIZES", "build", "extra_names", "key_shapes", "load_published"]

MANIFESTS: dict[str, Manifest] = {
    name: Manifest(tensors, parameters, digest)
    for name, tensors, parameters, digest in (
        ("nar_b", 97, 130551552, "02ee38c95f0266475f52f5defb210a581335f4d14f265a33b6211280bbeb4f54"),
        ("nar_m", 139, 295453696, "6ea1ccc3a6543543f1629229c0917b5722646b8140db11a59cf2c6d7fabd0687"),
        ("nar_l", 181, 372536320, "eb782c890d6c1993d4be71e2bfe2b30b7b3d3455b186fb195724e259b6c1e722"),
        ("nar_xl", 265, 815991040, "11dc803cbd214c159de17ab7d3d0714244fdb3045c64f0668d2222d5ab8a576b"),
        ("nar_xxl", 349, 1464454656, "6b2f5c788603a83ef1391e05f3973f2c10245d630aff09a7a218c4f40ce2b780"),
        ("nar_xl_t2i", 267, 818969600, "52741578abbbb7f1b751fa2af4b20f54d2bc9319c924f8f1220e8dd531e46723"),
        ("nar_video_l", 191, 368736256, "97057158af5185f1ea80b58c0833e65ac39c2fe80b96c234f65576491fed57c1"),
        ("nar_video_lp", 233, 693588480, "7e04a4ae10006963d08528d010a36c2b10185b69c37131fc6065e8b6230981bd"),
        ("llamagen_b", 88, 110888448, "9128673c58f3710e7e9635faffce695b5b5576e46a0bda95414eb5c611ae4170"),
        ("llamagen_l", 172, 342910976, "a3344acdfc151439bf08abc5027a83938b49fe373a412142c6923636ee3dce1a"),
        ("llamagen_xl", 256, 774699520, "84436375fc1f2d8dedd1ef065db108dd383c519c4f0c288757e157d23b96ecd8"),
        ("llamagen_xxl", 340, 1410972672, "b409385ae31706aab9865851c98704c8a10868962debed1be5b31c9ed1101c1c"),
        ("llamagen_3b", 172, 3096659200, "d50ec5365a9cd1b430e8bec0872c048ef0aaac11fbf21627161331eb06fdd6ad"),
        ("llamagen_xl_t2i", 258, 777678080, "d7e608d2a7cb881bb8c26e9bfc6448aabf6d8d53fd538c72a5fa7f744ca7b721"),
        ("flashar_b", 100, 131600161, "da0f5f9bc96474cb4975d8b9f7023cb9b9f20c4ebcb9964c9a278313828baa7d"),
        ("flashar_l", 184, 373584929, "d9d24f192c8e516a09d6447494bc4864ba89228df4ee6675bbe50da3cb7fdbe7"),
        ("flashar_xl", 268, 817039649, "0ad11d7616ecad1195fa7144f7a3918c7f6ce8dffbc00a0e09bdd6777defb6e4"),
        ("flashar_xxl", 352, 1465503265, "df2b05e061a8544ba0c87e452b71d90866b9b89268c93de8aea5ac7c8b9e0502"),
        ("flashar_xl_t2i", 270, 820018209, "32e5d9b699befc9bc0245b5496f3b8af3f48dc7b3fcf374d31f3d54f2e86db6e"),
        ("larp_l_long", 280, 172179984, "edb9497d51cb146300652ac00315a679a56ab390ab29d28f1feac35674dd7072"),
        ("vq_ds16", 343, 71883403, "44b74cd41ffdd8c9e9e8e5e2fc69eb30e14e75b5154f968ee48e60f80136c367"),
        ("vq_ds8", 299, 70109835, "a17c2017faac6e7c6c1db0bb7ef68206f1060fd067a6211dc1082a66ebf3167d"),
    )
}
"""Read off the releases' own classes at their published sizes, without what is dropped on loading; FlashAR's by the
names in its code."""

_WIDTHS: dict[str, dict[str, int]] = {
    "b": {"n_layer": 12, "n_head": 12, "dim": 768},
    "m": {"n_layer": 18, "n_head": 16, "dim": 1024},
    "l": {"n_layer": 24, "n_head": 16, "dim": 1024},
    "xl": {"n_layer": 36, "n_head": 20, "dim": 1280},
    "xxl": {"n_layer": 48, "n_head": 24, "dim": 1536},
    "3b": {"n_layer": 24, "n_head": 32, "dim": 3200},
}
_TEXT: dict[str, Any] = {**_WIDTHS["xl"], "num_classes": None}

SIZES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    **{f"nar_{name}": (NARForImageGeneration, _WIDTHS[name]) for name in ("b", "m", "l", "xl", "xxl")},
    "nar_xl_t2i": (NARForImageGeneration, _TEXT),
    "nar_video_l": (NARForVideoGeneration, _WIDTHS["l"]),
    "nar_video_lp": (NARForVideoGeneration, {"n_layer": 30, "n_head": 20, "dim": 1280}),
    **{f"llamagen_{name}": (LlamaGenForImageGeneration, _WIDTHS[name]) for name in ("b", "l", "xl", "xxl", "3b")},
    "llamagen_xl_t2i": (LlamaGenForImageGeneration, _TEXT),
    **{f"flashar_{name}": (FlashARForImageGeneration, _WIDTHS[name]) for name in ("b", "l", "xl", "xxl")},
    "flashar_xl_t2i": (FlashARForImageGeneration, _TEXT),
    "larp_l_long": (LARPTokenizer, {}),
    "vq_ds16": (LlamaGenVQModel, {}),
    "vq_ds8": (LlamaGenVQModel, {"multipliers": (1, 2, 2, 4)}),
}
"""Class and options of each published model; grids are 16 x 16, and 4 x 16 x 16 of clips, unless ``build`` is told."""

_INNER = (("model", "sd"), ("model",), ("module",), ("state_dict",))
_DROPPED = ("freqs_cis", "quantize.codebook_used", "prior_model.")
"""Tables that are made anew, usage, and a model that LARP trains beside its tokenizer."""


def build(name: str, *, grid: Sequence[int] | None = None, device: torch.device | str = "meta") -> Any:
    """A published model by its name in ``SIZES``, without weights on the meta device.

    Args:
        name: Of it.
        grid: Rows and columns of tokens, such as (24, 24) of 384 px and (32, 32) of 512 px: files do not say.
        device: Where.

    Raises:
        ValueError: There is none of this name, or a tokenizer is given a grid.
    """
    if name not in SIZES:
        raise ValueError(f"no published model {name!r}; expected one of {', '.join(SIZES)}")
    cls, options = SIZES[name]
    if grid is not None:
        if cls in (LlamaGenVQModel, LARPTokenizer):
            raise ValueError(f"{name} is a tokenizer, whose grid follows from its input; give no grid")
        options = {**options, "grid": tuple(grid)}
    with torch.device(device):
        return cls(**options)


def key_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model's file."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def extra_names(model: nn.Module) -> list[str]:
    """Tensors of a NAR that a raster LlamaGen of its size does not have: the below head, its norm and its block."""
    assert isinstance(model, NARForImageGeneration)
    begins = ("medusa_", f"layers.{model.n_layer}.")
    return [name for name in model.state_dict() if name.startswith(begins)]


def load_published(model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Fill a model with published weights; names and shapes are compared before any is read.

    Args:
        model: Of the size of the file; it may lie on the meta device.
        path: A ``.pt``, ``.pth`` or ``.safetensors`` file, or a folder of shards with an index.
        dtype: Of the weights; the model's own if None.

    Raises:
        CheckpointError: The file is missing, damaged, of another size, or holds other tensors.
    """
    path = Path(path)
    found = {name: entry for name, entry in open_checkpoint(path, _INNER).items() if not name.startswith(_DROPPED)}
    expected = key_shapes(model)
    _check_kind(path, model, expected, found)
    compare_shapes(path, model, expected, {name: entry.shape for name, entry in found.items()})
    wanted = dtype or next(model.parameters()).dtype
    state = {name: found[name].read().to(wanted) if found[name].floating else found[name].read() for name in expected}
    model.load_state_dict(state, assign=any(p.is_meta for p in model.parameters()))
    return model.eval()


def _check_kind(path: Path, model: nn.Module, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Say what is wrong where a raster file is read as NAR's or the other way round."""
    if isinstance(model, NARForImageGeneration):
        extra = extra_names(model)
        missing = [name for name in expected if name not in found]
        if missing and set(missing) <= set(extra) and "medusa_output.weight" in missing:
            raise CheckpointError(
                f"{path} is of a raster LlamaGen and no NAR: {', '.join(missing[-2:])} and {len(missing) - 2} more "
                "tensors of the below head are missing, and it would stay random. Load it with "
                "LlamaGenForImageGeneration, or train a NAR from it with warm_start"
            )
    elif isinstance(model, LlamaGenForImageGeneration) and "medusa_output.weight" in found:
        raise CheckpointError(
            f"{path} is of a NAR, whose right head alone draws badly; load it with NARForImageGeneration"
        )
