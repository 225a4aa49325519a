import hashlib

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from hone_splat.mvsplat import MVSplat
from hone_splat.published import PUBLISHED, build_published, load_published, read_state

# Number of tensors, and the digest of their sorted names and shapes: published files have no others.
MANIFESTS = {
    "mvsplat": (471, "939fef153985be3b"),
    "depthsplat-head-small-256x256": (567, "0c03f6ec68b59e9c"),
    "depthsplat-head-base-256x256": (751, "61084cb35c267aff"),
    "depthsplat-head-large-256x256": (919, "963465b9f333d6eb"),
    "depthsplat-head-base-256x448": (751, "9849d9cc43a111a3"),
    "depthsplat-head-small-448x768": (567, "b7668fef1996c50b"),
    "depthsplat-head-base-448x768": (751, "9849d9cc43a111a3"),
    "depthsplat-oct-small-256x256": (711, "6f7d8d00e9b61a30"),
    "depthsplat-oct-base-256x448": (907, "d2e010927141a088"),
    "depthsplat-oct-pmloss-256x448": (907, "d2e010927141a088"),
    "depthsplat-oct-zpressor-256x448": (717, "e81b03929d8b0cba"),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_names_and_shapes_are_frozen(kind):
    with torch.device("meta"):
        state = build_published(kind).state_dict()
    listing = "\n".join(f"{name} {list(value.shape)}" for name, value in sorted(state.items()))
    assert (len(state), hashlib.sha256(listing.encode()).hexdigest()[:16]) == MANIFESTS[kind]


def test_a_checkpoint_of_the_other_generation_is_named(tmp_path):
    with torch.device("meta"):
        state = build_published("depthsplat-oct-small-256x256").state_dict()
    # Shapes alone, so that the file is small: each tensor is one stored number, spread.
    torch.save({name: torch.zeros(1).expand(value.shape) for name, value in state.items()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"missing.*It is a checkpoint of depthsplat-oct-small-256x256"):
        load_published(tmp_path / "a.pth", "depthsplat-head-small-256x256")


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return MVSplat().state_dict()


@pytest.mark.parametrize("form", ["lightning", "model", "plain", "safetensors"])
def test_every_form_loads_strictly_to_the_same_weights(state, form, tmp_path):
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.ckpt")
    prefixed = {f"encoder.{name}": value for name, value in state.items()}
    if form == "lightning":
        extra = {"losses.1.lpips.net.weight": torch.ones(2), "decoder.background_color": torch.zeros(3)}
        torch.save({"state_dict": prefixed | extra, "epoch": 3, "optimizer_states": [{"lr": 0.1}]}, path)
    elif form == "model":
        torch.save({"model": state}, path)
    elif form == "plain":
        torch.save(prefixed, path)
    else:
        save_safetensors(prefixed, path)
    host, compressor = load_published(path, "mvsplat")
    assert compressor is None
    assert all(torch.equal(value, state[name]) for name, value in host.state_dict().items())
    assert not host.training


def test_the_compressor_comes_apart(state, tmp_path):
    torch.save(state | {"backbone.zipmatch.self_attn_layers.0.0.norm.weight": torch.ones(128)}, tmp_path / "a.pth")
    _, compressor = load_published(tmp_path / "a.pth", "mvsplat")
    assert list(compressor) == ["self_attn_layers.0.0.norm.weight"]


def test_nothing_is_executed(state, tmp_path):
    class Bad:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"state_dict": state, "hyper": Bad()}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read as tensors alone"):
        read_state(tmp_path / "a.ckpt")
    assert not (tmp_path / "made").exists()


def test_what_does_not_fit_is_named(state, tmp_path):
    name = "depth_predictor.to_gaussians.2.weight"
    for change, message in (
        ({name: None}, f"missing: {name}"),
        ({"more": torch.ones(1)}, "too many: more"),
        ({name: torch.ones(3, 3)}, f"of another shape: {name}"),
    ):
        other = {key: value for key, value in (state | change).items() if value is not None}
        torch.save(other, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=message):
            load_published(tmp_path / "a.pth", "mvsplat")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="copied again"):
        read_state(tmp_path / "cut.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="cut short"):
        read_state(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_state(tmp_path / "absent.pth")
    torch.save({"state_dict": {f"encoder.{name}": torch.ones(1), "other": torch.ones(1)}}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"beside encoder.\* it holds other"):
        read_state(tmp_path / "b.pth")
    with pytest.raises(ValueError, match="no published host 'nerf'"):
        load_published(tmp_path / "a.pth", "nerf")
