import huggingface_hub
import pytest
import torch
from hone_blade.config import BladeConfig
from hone_blade.lora import expected_keys, load_blade_lora, save_blade_lora
from hone_blade.models import attach
from hone_core.errors import CheckpointError
from hone_video.architectures import FULL_SIZE, full_size, tiny
from hone_video.lora import LORA_FILE
from peft import LoraConfig
from safetensors.torch import load_file, save_file

KINDS = pytest.mark.parametrize("kind", ["wan", "cogvideox"])


def lora_tensors(model, rank=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) / 4).to(dtype)
        for name, shape in expected_keys(model, rank).items()
    }


def lora_file(folder, model, **options):
    file = folder / LORA_FILE
    save_file(lora_tensors(model, **options), file)
    return file


def arguments(kind):
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 8, 32, generator=generator)
    shape = (1, 4, 2, 8, 8) if kind == "wan" else (1, 2, 4, 8, 8)
    more = {}
    if kind == "cogvideox":
        angles = torch.rand(32, 16, generator=generator).repeat_interleave(2, dim=1)
        more["image_rotary_emb"] = (angles.cos(), angles.sin())
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "timestep": torch.tensor([400]),
        "encoder_hidden_states": text,
        **more,
    }


def run(model, kind):
    with torch.no_grad():
        return model(**arguments(kind), return_dict=False)[0]


@pytest.mark.parametrize(
    ("name", "tensors", "values", "some"),
    [
        # The published Wan file is 94.4 MB of bfloat16: 47,185,920 values.
        (
            "wan2.1-1.3b",
            480,
            47_185_920,
            {
                "transformer.blocks.0.attn1.to_q.lora_A.weight": (64, 1536),
                "transformer.blocks.29.attn2.to_out.0.lora_B.weight": (1536, 64),
                "transformer.blocks.17.attn2.to_k.lora_A.weight": (64, 1536),
            },
        ),
        (
            "cogvideox-5b",
            336,
            66_060_288,
            {
                "transformer.transformer_blocks.41.attn1.to_out.0.lora_A.weight": (64, 3072),
                "transformer.transformer_blocks.0.attn1.to_v.lora_B.weight": (3072, 64),
            },
        ),
    ],
)
def test_full_size_layouts(name, tensors, values, some):
    keys = expected_keys(name)
    assert len(keys) == tensors
    assert sum(a * b for a, b in keys.values()) == values
    assert some.items() <= keys.items()
    kinds = {".".join(p for p in key.split(".") if not p.isdigit()) for key in keys}
    attentions = ("attn1", "attn2") if name.startswith("wan") else ("attn1",)
    blocks = "blocks" if name.startswith("wan") else "transformer_blocks"
    assert kinds == {
        f"transformer.{blocks}.{a}.{p}.lora_{m}.weight"
        for a in attentions
        for p in ("to_q", "to_k", "to_v", "to_out")
        for m in "AB"
    }


def test_full_size_models_have_the_published_parameter_counts():
    counts = {name: sum(p.numel() for p in full_size(name).parameters()) for name in FULL_SIZE}
    assert counts["wan2.1-1.3b"] == pytest.approx(1.42e9, rel=0.01)
    assert counts["wan2.1-14b"] == pytest.approx(14.3e9, rel=0.01)
    assert counts["cogvideox-5b"] == pytest.approx(5.57e9, rel=0.01)
    wan = full_size("wan2.1-1.3b")
    assert wan.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert wan.blocks[0].scale_shift_table.dtype == torch.float32
    assert all(p.is_meta for p in wan.parameters())
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ValueError, match=r"name must be one of .*; got 'wan3'"):
        full_size("wan3")


@KINDS
def test_loading_adds_b_times_a_to_every_projection(kind, tmp_path):
    model, merged = tiny(kind), tiny(kind)
    file = lora_file(tmp_path, model)
    tensors = load_file(file)
    for name in (key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key):
        layer = merged.get_submodule(name.removeprefix("transformer."))
        layer.weight.data += tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    before = run(model, kind)
    report = load_blade_lora(model, file)
    expected = run(merged, kind)
    torch.testing.assert_close(run(model, kind), expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 0.01
    assert (report.rank, report.num_tensors, report.dtype) == (4, len(tensors), "float32")
    assert report.num_values == sum(x.numel() for x in tensors.values())
    assert report.config is None
    assert "unknown" in report.licence
    model.delete_adapters("blade")
    assert torch.equal(run(model, kind), before)


@KINDS
def test_order_with_attach_does_not_matter(kind, tmp_path):
    config = BladeConfig(block=16, samples=8, max_density=0.4)
    first, second = tiny(kind), tiny(kind)
    file = lora_file(tmp_path, first)
    load_blade_lora(first, file)
    with attach(first, config):
        expected = run(first, kind)
    with attach(second, config):
        load_blade_lora(second, file)
        assert torch.equal(run(second, kind), expected)


def test_low_precision_file_takes_the_dtype_of_the_model(tmp_path):
    model = tiny("wan").to(torch.bfloat16)
    report = load_blade_lora(model, lora_file(tmp_path, model, dtype=torch.bfloat16))
    assert report.dtype == "bfloat16"
    weights = model.blocks[0].attn1.to_q
    assert weights.lora_A["blade"].weight.dtype == torch.bfloat16
    expected = load_file(report.file)["transformer.blocks.0.attn1.to_q.lora_B.weight"]
    assert torch.equal(weights.lora_B["blade"].weight, expected)


@KINDS
def test_save_and_load_round_trip(kind, tmp_path):
    model = tiny(kind)
    tensors = load_file(lora_file(tmp_path, model))
    load_blade_lora(model, tmp_path)
    config = BladeConfig(max_density=0.1, pool=15, dense_layers=(0, 1))
    saved = save_blade_lora(model, tmp_path / "out" / "x.safetensors", config=config, licence="CC-BY-4.0")
    assert load_file(saved).keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(saved).items())
    other = tiny(kind)
    report = load_blade_lora(other, saved, adapter_name="again")
    assert report.config == config
    assert report.licence.endswith("CC-BY-4.0")
    assert torch.equal(run(other, kind), run(model, kind))


def test_save_refuses_what_the_layout_cannot_hold(tmp_path):
    model = tiny("wan")
    with pytest.raises(ValueError, match="no adapter 'blade'; it has none"):
        save_blade_lora(model, tmp_path / "x.safetensors")
    everything = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=everything), adapter_name="blade")
    with pytest.raises(ValueError, match="rank 4, alpha 8"):
        save_blade_lora(model, tmp_path / "x.safetensors")
    model = tiny("wan")
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"]), adapter_name="less")
    with pytest.raises(ValueError, match=r"missing transformer\.blocks\.0\.attn1\.to_out\.0"):
        save_blade_lora(model, tmp_path / "x.safetensors", adapter_name="less")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_blade_lora(model, tmp_path / "x.bin", adapter_name="less")


# Refusals leave the model as it was.


def rename(tensors):
    return {key.replace("transformer.", "diffusion_model."): value for key, value in tensors.items()}


def drop(tensors):
    return {key: value for key, value in tensors.items() if ".blocks.1.attn2.to_k.lora_B" not in key}


def reshape(tensors):
    key = "transformer.blocks.1.attn1.to_out.0.lora_B.weight"
    return {**tensors, key: tensors[key][:-1].contiguous()}


def other_rank(tensors):
    key = "transformer.blocks.1.attn1.to_out.0.lora_B.weight"
    return {**tensors, key: tensors[key][:, :-1].contiguous()}


def poison(value, dtype=torch.float32):
    def change(tensors):
        tensors["transformer.blocks.1.attn2.to_k.lora_B.weight"][3, 1] = value
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    return change


def more(tensors):
    return {**tensors, "transformer.blocks.0.ffn.net.2.lora_A.weight": torch.zeros(4, 128)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"32 unknown tensors, such as diffusion_model\.blocks.* and 28 more; 32 missing"),
        (drop, r"1 missing, such as transformer\.blocks\.1\.attn2\.to_k\.lora_B\.weight\. Expected 32 .*; got 31"),
        (more, r"1 unknown tensors, such as transformer\.blocks\.0\.ffn\.net\.2\.lora_A\.weight\. "),
        (reshape, r"at rank 4: 1 tensors of another shape, .*\(63, 4\) instead of \(64, 4\)"),
        (other_rank, r"at rank 4: 1 tensors of another shape, .*\(64, 3\) instead of \(64, 4\)"),
        (lambda t: {"a.weight": torch.zeros(2)}, r"no LoRA tensors; expected .*, got a\.weight"),
        (lambda t: {k: v.long() for k, v in t.items()}, "expected floating-point tensors; got I64"),
        (
            poison(float("nan")),
            r"1 tensors hold values that are not finite, such as .*\.1\.attn2\.to_k\.lora_B\.weight\. ",
        ),
        (poison(float("inf")), "1 tensors hold values that are not finite"),
        (poison(float("-inf"), torch.bfloat16), "1 tensors hold values that are not finite"),
    ],
)
def test_other_layouts_are_refused(change, message, tmp_path):
    model = tiny("wan")
    before = run(model, "wan")
    file = tmp_path / "x.safetensors"
    save_file(change(lora_tensors(model)), file)
    with pytest.raises(CheckpointError, match=message):
        load_blade_lora(model, file)
    assert not getattr(model, "peft_config", {})
    assert torch.equal(run(model, "wan"), before)


def test_a_file_for_another_size_is_refused(tmp_path):
    file = lora_file(tmp_path, tiny("wan", num_layers=3))
    with pytest.raises(CheckpointError, match=r"16 unknown tensors, .*Is it for another model"):
        load_blade_lora(tiny("wan"), file)


def test_files_that_are_not_there_or_not_safetensors(tmp_path, monkeypatch):
    model = tiny("wan")
    with pytest.raises(CheckpointError, match="does not exist; expected a safetensors file"):
        load_blade_lora(model, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=f"holds no {LORA_FILE}$"):
        load_blade_lora(model, tmp_path)
    (tmp_path / "run" / "artifacts").mkdir(parents=True)
    (tmp_path / "run" / "artifacts" / LORA_FILE).touch()
    with pytest.raises(CheckpointError, match=f"it has artifacts.{LORA_FILE}: name the file"):
        load_blade_lora(model, tmp_path / "run")
    torch.save({}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"only \.safetensors files are read"):
        load_blade_lora(model, tmp_path / "x.bin")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_blade_lora(model, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"it has half\.safetensors: name the file"):
        load_blade_lora(model, tmp_path)
    header = tmp_path / "header.safetensors"
    save_file(lora_tensors(model), header, metadata={"hone_blade_config": '{"blocks": 3}'})
    with pytest.raises(CheckpointError, match=r"settings in its header cannot be read: .*unknown key 'blocks'"):
        load_blade_lora(model, header)


def test_hub_addresses(tmp_path, monkeypatch):
    model = tiny("wan")
    file = lora_file(tmp_path, model)
    asked = []

    def fetch(repository, name, *, local_files_only):
        asked.append((repository, name, local_files_only))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    report = load_blade_lora(model, "GYP666/BLADE/BLADE_wanx_weight", local_files_only=True)
    assert asked == [("GYP666/BLADE", f"BLADE_wanx_weight/{LORA_FILE}", True)]
    assert report.licence.startswith("Licence of the published BLADE weights (GYP666/BLADE): unknown")
    load_blade_lora(tiny("wan"), "someone/else/file.safetensors")
    assert asked[-1] == ("someone/else", "file.safetensors", False)

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        CheckpointError, match=r"is no local file, and pytorch_lora.* could not be fetched .*Download it"
    ):
        load_blade_lora(model, "GYP666/BLADE", adapter_name="c")


def test_wrong_models_and_names(tmp_path):
    model = tiny("wan")
    file = lora_file(tmp_path, model)
    load_blade_lora(model, file)
    with pytest.raises(ValueError, match="already has an adapter named 'blade'"):
        load_blade_lora(model, file)
    with pytest.raises(TypeError, match=r"exists for WanTransformer3DModel, CogVideoX.*; got Linear"):
        load_blade_lora(torch.nn.Linear(2, 2), file)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        expected_keys(model, 0)
