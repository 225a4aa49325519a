import json

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from hone_visual_ar import BSQVAE, MANIFESTS, VAR, Infinity, load_published
from hone_visual_ar.checkpoints import build, key_shapes, manifest_of, open_checkpoint


@pytest.mark.parity
@pytest.mark.parametrize("name", MANIFESTS)
def test_published_names_shapes_and_counts(name):
    assert manifest_of(build(name)) == MANIFESTS[name]


def test_the_counts_that_everybody_knows():
    assert MANIFESTS["infinity_2b"].parameters == 2_204_564_032
    assert MANIFESTS["infinity_8b"].parameters == 8_375_791_824


def tensors(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in key_shapes(model).items()}


def tiny():
    return Infinity(depth=2, width=64, num_heads=2, chunks=2, code_dim=4, text_channels=128, text_maxlen=4)


def check(model, state):
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_pickles_bare_and_inside_a_training_checkpoint(tmp_path):
    state = tensors(tiny())
    torch.save(state, tmp_path / "a.pth")
    torch.save({"trainer": {"gpt_fsdp": state, "step": 3}}, tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        check(load_published(tiny(), tmp_path / name), state)


def test_real_numbers_alone_are_cast(tmp_path):
    kinds = {"half": torch.bfloat16, "real": torch.float32, "whole": torch.int64, "yes": torch.bool}
    save_safetensors({name: torch.ones(1, dtype=kind) for name, kind in kinds.items()}, tmp_path / "a.safetensors")
    found = {name: entry.floating for name, entry in open_checkpoint(tmp_path / "a.safetensors").items()}
    assert found == {"half": True, "real": True, "whole": False, "yes": False}


def test_safetensors_alone_and_in_shards_onto_the_meta_device(tmp_path):
    state = tensors(tiny())
    save_safetensors(state, tmp_path / "model.safetensors")
    check(load_published(tiny(), tmp_path / "model.safetensors"), state)
    shards = tmp_path / "shards"
    shards.mkdir()
    names = list(state)
    weight_map = {}
    for at, part in enumerate((names[::2], names[1::2])):
        file = f"model-{at}.safetensors"
        save_safetensors({name: state[name] for name in part}, shards / file)
        weight_map |= dict.fromkeys(part, file)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with torch.device("meta"):
        model = tiny()
    model = load_published(model, shards, dtype=torch.float32)
    assert not any(p.is_meta for p in model.parameters())
    check(model, state)
    (shards / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shards model-1\.safetensors"):
        load_published(tiny(), shards)


def test_tokenizers_of_both_naming_styles(tmp_path):
    model = BSQVAE(latent_dim=4, channels=32, multipliers=(1, 2))
    state = tensors(model)
    torch.save({"vae": state}, tmp_path / "nested.pth")
    plain = {
        name.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias").replace(".norm.", "."): value
        for name, value in state.items()
    }
    assert len(plain) == len(state)
    assert "encoder.down.0.downsample.conv.weight" in plain
    assert "decoder.up.1.block.0.norm1.weight" in plain
    torch.save({"vae": plain}, tmp_path / "plain.pth")
    for name in ("nested.pth", "plain.pth"):
        check(load_published(BSQVAE(latent_dim=4, channels=32, multipliers=(1, 2)), tmp_path / name), state)


def test_var_files_hold_the_mask_which_is_checked_and_left(tmp_path):
    model = VAR(depth=1, head_dim=8, patch_nums=(1, 2), vocabulary=4, code_dim=2, num_classes=2)
    state = tensors(model)
    torch.save(state, tmp_path / "var.pth")
    check(load_published(model, tmp_path / "var.pth"), state)
    state["attn_bias_for_masking"] = torch.zeros(1, 1, 9, 9)
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match=r"attn_bias_for_masking is \[1, 1, 9, 9\] and not \[1, 1, 5, 5\]"):
        load_published(model, tmp_path / "var.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.bias"), r"1 tensors missing \(head.bias\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 tensors too many \(extra\)"),
        (lambda s: s.update({"head.bias": torch.zeros(3)}), r"head.bias is \[3\] and not \[8\]"),
    ],
)
def test_other_tensors_are_refused_before_any_is_read(change, message, tmp_path):
    state = tensors(tiny())
    change(state)
    torch.save(state, tmp_path / "a.pth")
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_published(model, tmp_path / "a.pth")
    check(model, before)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"not a pickle")
    (tmp_path / "b.safetensors").write_bytes(b"short")
    torch.save([1, 2], tmp_path / "c.pth")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "a.pth": "cannot be read", "b.safetensors": "cannot be read", "c.pth": "is no state dict",
        "empty": "holds no .safetensors", "none.pth": "there is no checkpoint",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            load_published(tiny(), tmp_path / name)
    with pytest.raises(ValueError, match="no published model 'infinity_3b'"):
        build("infinity_3b")


def test_what_cannot_be_built_says_why():
    with pytest.raises(ValueError, match=r"HART cannot be built: .* unknown"):
        build("hart_0.7b_1024")
    with pytest.raises(ValueError, match="no published model 'infinity_3b'; expected one of"):
        build("infinity_3b")
