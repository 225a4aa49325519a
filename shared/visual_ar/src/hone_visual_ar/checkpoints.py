"""Published weights, read strictly: every tensor's name and shape is compared before one is read.

The releases load with ``strict=False``, and a tokenizer whose unmatched parameters stay random: images come out, bad
ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hone_core.errors import CheckpointError
from torch import Tensor, nn

from .infinity import INFINITY_SIZES, Infinity
from .tokenizers import BSQVAE, VQVAE
from .var import VAR, VAR_SIZES

__all__ = ["MANIFESTS", "Manifest", "build", "compare_shapes", "digest_of", "key_shapes", "load_published"]
__all__ += ["manifest_of", "open_checkpoint"]


class Manifest(NamedTuple):
    """What a published file holds: tensors, parameters (buffers not counted), and a digest of all names and shapes."""

    tensors: int
    parameters: int
    digest: str


MANIFESTS: dict[str, Manifest] = {
    name: Manifest(tensors, parameters, digest)
    for name, tensors, parameters, digest in (
        ("infinity_layer12", 274, 125148800, "6594402d6eac7d0c6c2043938b982bdcd271fa12d0a1f2e1b50b98e28fceeee6"),
        ("infinity_layer16", 358, 361633792, "dfaa4ba925e630371db95dae6dae197263abfce3d24382b570371d18cd481e55"),
        ("infinity_layer24", 526, 940944832, "33ea4bb4e1b148d3e9ecf31e8c818ca724b286971b7d8ec108b8a286ded15acb"),
        ("infinity_layer32", 694, 2256694912, "1d8257e0ff5921fddce2997f7c361c8b302fedb7af4e7caac67cbb72dc4d64cc"),
        ("infinity_layer40", 862, 4716421888, "3d238aa277a1524e1c15a6f6ef95a5e2f3a2e7fdcd0b2df9f24e6605c356deba"),
        ("infinity_layer48", 1030, 8767198528, "90ea94926de905ae622c01454554a6ba31e075f239c3183b50ff485a088068ec"),
        ("infinity_2b", 694, 2204564032, "8d8840b702354f2acceaf2fff8c6a0fc57eb780e62cdd0e27d192cfa6d3f9aef"),
        ("infinity_8b", 862, 8375791824, "ccb7cfc173d5ed6bee7ca3f763e096bdf3e76da03e561b7bcc073e75b79a06af"),
        ("var_d16", 220, 310283520, "18a6457c7c3e8b11348974177e14d146b19755b007b9a98bc50b647ee7d6a06c"),
        ("var_d20", 272, 600917136, "79c59a4ac69b8035ffd8d133a61fdb71050de9df7cee606d01477d48253f836a"),
        ("var_d24", 324, 1033399360, "3e751541d8445056042778a092e30225cb1b4b7651e313e47fab5202b7116d7d"),
        ("var_d30", 402, 2010020356, "68f1668ce3d239d79e841df9db3032c02c37d9f983dff3b5bb0c02076fb21b89"),
        ("var_d36", 446, 2353893904, "a3c4edfba5418b36ecb560ee26f9e7cd53412e4375433a1bf2c82bc4bcb81da4"),
        ("bsq_d16", 270, 109970579, "062494c1bbd5f4e515a885804c7e0d0352c2089de76f7a38f8215bb43deea064"),
        ("bsq_d32", 270, 110118051, "72271b36b82abf37ef5dcc740685556c407d460f0c5c136b64d5aface3d5bf32"),
        ("bsq_d14_patchify", 226, 81624209, "a23c32bf3b030fb8a9491c63735935c121ff7e23cc8cde7a7c14a02c9856ef97"),
        ("vq_ch160v4096z32", 324, 108948355, "f6500b2eb253c217e4503ffc9b39bcf814be7244c690376f9168ad0175e937d1"),
    )
}
"""Read off the releases' own classes at their published sizes."""

TOKENIZER_SIZES: dict[str, dict[str, Any]] = {
    "bsq_d16": {"latent_dim": 16},
    "bsq_d32": {"latent_dim": 32},
    "bsq_d14_patchify": {"latent_dim": 14, "multipliers": (1, 2, 4, 4)},
    "vq_ch160v4096z32": {},
}


def build(name: str, device: torch.device | str = "meta") -> nn.Module:
    """A published model by its name in ``MANIFESTS``, without weights on the meta device.

    Raises:
        ValueError: There is none of this name.
    """
    sizes: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
        **{key: (Infinity, options) for key, options in INFINITY_SIZES.items()},
        **{key: (VAR, options) for key, options in VAR_SIZES.items()},
        **{key: (VQVAE if key[0] == "v" else BSQVAE, options) for key, options in TOKENIZER_SIZES.items()},
    }
    if name.startswith("hart"):
        raise ValueError(
            "HART cannot be built: its config.json could not be read, so width, heads, hidden width, what conditions "
            "the head's norm, and steps and width of the residual diffusion are unknown. Its schedule is "
            "schedules.HART_1024"
        )
    if name not in sizes:
        raise ValueError(f"no published model {name!r}; expected one of {', '.join(sizes)}")
    cls, options = sizes[name]
    with torch.device(device):
        return cls(**options)


def key_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model's published file holds."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return shapes | _derived(model)


def _derived(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Tensors of published files that the model makes itself."""
    if isinstance(model, VAR):
        return model.derived
    if isinstance(model, BSQVAE):
        return {f"{name}.lfq.mask": (model.latent_dim,) for name in ("quantizer", "quantize")}
    return {}


def manifest_of(model: nn.Module) -> Manifest:
    """The manifest that a model's file must have."""
    shapes = key_shapes(model)
    return Manifest(len(shapes), sum(parameter.numel() for parameter in model.parameters()), digest_of(shapes))


def digest_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Digest of names and shapes, whatever their order."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_published(model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Fill a model with published weights; names and shapes are compared before any is read.

    Args:
        model: Of the size of the file; it may lie on the meta device.
        path: A ``.pth`` or ``.safetensors`` file, or a folder of shards with an index.
        dtype: Of the weights; the model's own if None.

    Raises:
        CheckpointError: The file is missing, damaged, of another size, or holds other tensors.
    """
    path = Path(path)
    found = open_checkpoint(path, (("trainer", "gpt_fsdp"), ("vae",)))
    if isinstance(model, BSQVAE):
        found = {_nested_name(name): value for name, value in found.items()}
    expected = key_shapes(model)
    compare_shapes(path, model, expected, {name: tuple(value.shape) for name, value in found.items()})
    wanted = dtype or next(model.parameters()).dtype
    state = {
        name: found[name].read().to(wanted) if found[name].floating else found[name].read()
        for name in model.state_dict()
    }
    model.load_state_dict(state, assign=any(p.is_meta for p in model.parameters()))
    return model.eval()


class Entry(NamedTuple):
    """A tensor that is not read yet.

    Attributes:
        shape: Of it.
        floating: Whether it holds real numbers.
        source: The tensor, or what reads it.
    """

    shape: tuple[int, ...]
    floating: bool
    source: Any

    def read(self) -> Tensor:
        """The tensor."""
        return self.source() if callable(self.source) else self.source


def open_checkpoint(path: Path, inner: Iterable[tuple[str, ...]] = ()) -> dict[str, Entry]:
    """Tensors of a ``.pth``, ``.pt`` or ``.safetensors`` file or a folder of shards, none of them read.

    Args:
        path: File or folder.
        inner: Keys under which a pickle may hold its state dict, in place of being one.

    Raises:
        CheckpointError: It is missing, damaged, or holds no tensors by name.
    """
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}; expected a .pth or .safetensors file or a folder")
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.suffix == ".safetensors":
            return _open_safetensors([path])
        return _open_pickle(path, tuple(inner))
    except CheckpointError:
        raise
    except Exception as error:  # readers raise whatever the damage makes them meet
        raise CheckpointError(f"{path} cannot be read ({' '.join(str(error).split())}); copy it again") from error


def _open_folder(path: Path) -> dict[str, Entry]:
    index = sorted(path.glob("*.safetensors.index.json"))
    if index:
        names = set(json.loads(index[0].read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in names if not (path / name).is_file())
        if missing:
            raise CheckpointError(f"{path} lacks the shards {', '.join(missing)} that its index names; copy them too")
        return _open_safetensors([path / name for name in sorted(names)])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no .safetensors file; name the .pth file itself")
    return _open_safetensors(files)


def _open_safetensors(files: Iterable[Path]) -> dict[str, Entry]:
    from safetensors import safe_open

    found: dict[str, Entry] = {}
    for file in files:
        reader = safe_open(str(file), framework="pt")
        for name in reader.keys():  # noqa: SIM118 - no mapping
            part = reader.get_slice(name)
            floating = part.get_dtype().startswith(("F", "BF"))
            found[name] = Entry(tuple(part.get_shape()), floating, lambda r=reader, n=name: r.get_tensor(n))
    return found


def _open_pickle(path: Path, nested: tuple[tuple[str, ...], ...]) -> dict[str, Entry]:
    # Training checkpoints hold the options of their script too.
    with torch.serialization.safe_globals([argparse.Namespace]):
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for keys in nested:
        inner: Any = data
        for key in keys:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            data = inner
            break
    if not isinstance(data, Mapping) or not all(isinstance(value, Tensor) for value in data.values()):
        under = " or ".join(keys[0] for keys in nested)
        raise CheckpointError(f"{path} is no state dict; expected names and tensors, or them under {under}")
    return {name: Entry(tuple(value.shape), value.is_floating_point(), value) for name, value in data.items()}


def _nested_name(name: str) -> str:
    """Name of a tokenizer's tensor in the nested style: ``conv1.weight`` is ``conv1.conv.weight``."""
    parts = name.split(".")
    if parts[0] not in ("encoder", "decoder") or len(parts) < 3:
        return name
    layer, before = parts[-2], parts[-3]
    kind = "norm" if layer.startswith("norm") else "conv"
    plain = {"conv_in", "conv_out", "conv1", "conv2", "nin_shortcut", "norm1", "norm2", "norm_out"}
    if layer in plain or (layer == "conv" and before in ("downsample", "upsample")):
        return ".".join([*parts[:-1], kind, parts[-1]])
    return name


def compare_shapes(
    path: Path, model: nn.Module, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a file that does not hold exactly a model's tensors.

    Args:
        path: For the message.
        model: Likewise.
        expected: Name to shape.
        found: Name to shape.

    Raises:
        CheckpointError: Some are missing, too many or of another shape; the message names the first of each.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {list(found[name])} and not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if not (missing or extra or wrong):
        return
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("tensors missing", missing), ("tensors too many", extra), ("of another shape", wrong))
        if names
    ]
    raise CheckpointError(
        f"{path} is not the file of this {type(model).__name__}: {'; '.join(parts)}. Name the model's published "
        f"size, or the file that belongs to it"
    )
