from argparse import Namespace

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_nar.checkpoints import MANIFESTS, SIZES, build, key_shapes, load_published
from hone_nar.larp import LARPTokenizer
from hone_nar.models import tiny, tiny_tokenizer
from hone_visual_ar.checkpoints import Manifest, digest_of
from safetensors.torch import save_file


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_the_releases_names_and_shapes(name):
    model = build(name)
    shapes = key_shapes(model)
    found = Manifest(len(shapes), sum(p.numel() for p in model.parameters()), digest_of(shapes))
    assert found == MANIFESTS[name]


def test_larger_grids_have_the_same_tensors():
    assert key_shapes(build("nar_xl_t2i", grid=(32, 32))) == key_shapes(build("nar_xl_t2i"))
    with pytest.raises(ValueError, match="give no grid"):
        build("vq_ds16", grid=(32, 32))
    with pytest.raises(ValueError, match="no published model 'nar_s'"):
        build("nar_s")


def same(first, second):
    return all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("kind", ["nar", "llamagen", "video"])
def test_files_as_the_releases_write_them(kind, tmp_path):
    model = tiny(kind, seed=1)
    state = model.state_dict()
    inner = {"name": "x", "args": {}, "sd": state} if kind == "video" else state | {"freqs_cis": torch.zeros(3)}
    torch.save({"model": inner, "steps": 3, "args": Namespace(lr=1.0)}, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.pth")
    save_file(state, tmp_path / "c.safetensors")
    for name in ("a.pt", "b.pth", "c.safetensors"):
        assert same(model, load_published(tiny(kind), tmp_path / name))
    half = load_published(tiny(kind), tmp_path / "a.pt", dtype=torch.bfloat16)
    assert same(model.bfloat16(), half)


def test_larps_prior_is_dropped(tmp_path):
    options = {"frames": 4, "size": 16, "tokens": 6, "dim": 16, "depth": 1, "heads": 2, "codebook_size": 16}
    first, second = LARPTokenizer(**options), LARPTokenizer(**options)
    save_file(first.state_dict() | {"prior_model.head.weight": torch.zeros(3)}, tmp_path / "larp.safetensors")
    assert not same(first, second)
    assert same(first, load_published(second, tmp_path / "larp.safetensors"))


def test_the_tokenizers_usage_is_dropped(tmp_path):
    model = tiny_tokenizer(1)
    state = model.state_dict() | {"quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": state}, tmp_path / "vq.pt")
    assert same(model, load_published(tiny_tokenizer(), tmp_path / "vq.pt"))


def test_a_raster_file_is_no_nar_and_the_other_way_round(tmp_path):
    torch.save({"model": tiny("llamagen").state_dict()}, tmp_path / "raster.pt")
    torch.save({"model": tiny("nar").state_dict()}, tmp_path / "nar.pt")
    before = tiny("nar")
    model = tiny("nar")
    with pytest.raises(CheckpointError, match=r"raster LlamaGen and no NAR: .*medusa_output.weight .* stay random"):
        load_published(model, tmp_path / "raster.pt")
    assert same(before, model)
    with pytest.raises(CheckpointError, match="is of a NAR, whose right head alone draws badly"):
        load_published(tiny("llamagen"), tmp_path / "nar.pt")


def test_missing_and_wrong_tensors_are_named(tmp_path):
    state = dict(tiny("nar").state_dict())
    state["norm.weight"] = torch.zeros(3)
    del state["layers.1.ffn_norm.weight"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"missing \(layers.1.ffn_norm.weight\).*norm.weight is \[3\] and not"):
        load_published(tiny("nar"), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load_published(tiny("nar"), tmp_path / "none.pt")
    (tmp_path / "y.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_published(tiny("nar"), tmp_path / "y.pt")
