import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from hone_motion_anything import checkpoints
from hone_motion_anything.checkpoints import MANIFESTS, build, load_published
from hone_motion_anything.published import MaskTransformer
from hone_motion_anything.tokenizers import RVQVAE


@pytest.fixture
def small_manifests(monkeypatch):
    """The same names at sizes that a test can write."""
    sizes = {
        "momask-tokenizer": lambda: RVQVAE(263, 16, 8, 8, 1, 2),
        "momask-mask": lambda: MaskTransformer(20, 12, 24, 32, 1, 3),
    }
    for name, made in sizes.items():
        old = MANIFESTS[name]
        new = checkpoints.Manifest(old.keys, made, old.where, old.dropped, old.licence)
        monkeypatch.setitem(checkpoints.MANIFESTS, name, new)


def test_published_sizes():
    millions = {name: sum(p.numel() for p in build(name, "meta").parameters()) / 1e6 for name in MANIFESTS}
    wanted = {
        "momask-tokenizer": 19.44, "momask-mask": 12.05, "momask-residual": 13.36, "mogents-tokenizer": 113.82,
        "mogents-mask": 34.24, "mogents-residual": 35.86, "t2m-movement": 1.84, "t2m-motion": 15.75, "t2m-text": 4.10,
    }  # fmt: skip
    assert {name: round(millions[name], 2) for name in wanted} == wanted
    with pytest.raises(ValueError, match="no published model 'magic'"):
        build("magic")


def test_an_authors_file_loads_whole_and_without_clip(small_manifests, tmp_path):
    model = build("momask-mask")
    state = model.state_dict()
    torch.save({"t2m_transformer": state | {"clip_model.visual": torch.zeros(3)}, "ep": 5}, tmp_path / "latest.tar")
    loaded = load_published("momask-mask", tmp_path / "latest.tar")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters())
    save_safetensors(state, tmp_path / "mask.safetensors")
    again = load_published("momask-mask", tmp_path / "mask.safetensors")
    assert torch.equal(again.cond_emb.weight, state["cond_emb.weight"])


def test_the_entry_is_one_of_the_known_names(small_manifests, tmp_path):
    state = build("momask-tokenizer").state_dict()
    torch.save({"net": state, "ep": 5}, tmp_path / "net.tar")
    loaded = load_published("momask-tokenizer", tmp_path / "net.tar")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_a_loaded_tokenizer_runs(small_manifests, tmp_path):
    torch.save({"vq_model": build("momask-tokenizer").state_dict()}, tmp_path / "a.tar")
    loaded = load_published("momask-tokenizer", tmp_path / "a.tar")
    assert loaded.encode(torch.randn(1, 8, 263))[0].shape == (1, 2, 2)


def test_other_files_are_refused_by_name(small_manifests, tmp_path):
    state = build("momask-tokenizer").state_dict()
    bad = dict(state)
    bad["encoder.model.9.weight"] = bad.pop("encoder.model.0.weight")
    torch.save({"vq_model": bad}, tmp_path / "a.tar")
    with pytest.raises(
        CheckpointError, match=r"a\.tar is not MoMask.*encoder\.model\.0\.weight is missing; encoder\.model\.9"
    ):
        load_published("momask-tokenizer", tmp_path / "a.tar")
    torch.save({"vq_model": state | {"encoder.model.0.bias": torch.zeros(9)}}, tmp_path / "b.tar")
    with pytest.raises(CheckpointError, match=r"encoder\.model\.0\.bias has shape \[9\] in place of \[8\]"):
        load_published("momask-tokenizer", tmp_path / "b.tar")
    torch.save({"vq_model": state | {"encoder.model.0.bias": torch.full((8,), torch.nan)}}, tmp_path / "c.tar")
    with pytest.raises(CheckpointError, match=r"encoder\.model\.0\.bias is not finite"):
        load_published("momask-tokenizer", tmp_path / "c.tar")
    (tmp_path / "d.tar").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"d\.tar cannot be read"):
        load_published("momask-tokenizer", tmp_path / "d.tar")
    with pytest.raises(FileNotFoundError):
        load_published("momask-tokenizer", tmp_path / "e.tar")
