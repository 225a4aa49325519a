"""What an attached model works together with: a row of the README's table each."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hone_core.testing import assert_close
from hone_sparsevar import SparsePolicy, SparseVARConfig, attach
from hone_visual_ar import InfinityPipeline, Policy, Sampling, generate
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

SETTINGS = SparseVARConfig(ratio=0.6, window=3, start_scale=-2, detector=1)
SAMPLING = Sampling(guidance=2.0)


def draw(model, condition=None, policy=None, transformer=None):
    body, tokenizer, known, schedule = model
    return generate(
        transformer or body, tokenizer, condition or known, schedule, seeds=[3, 4], sampling=SAMPLING, policy=policy
    )


@pytest.fixture
def own(model):
    """The model, to change."""
    return copy.deepcopy(model[0]), *model[1:]


class LowRank(nn.Module):
    """A layer in another one's place, as a LoRA is: its own weight, and a product beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(0.3 * torch.randn(4, base.in_features, generator=torch.Generator().manual_seed(0)))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, 4, generator=torch.Generator().manual_seed(1)))

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def test_lora_on_every_product_of_a_block(own):
    """Unmerged equals merged: no product reads the weight of a layer that was replaced."""
    merged, texts = own[0], torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(2))
    unmerged = copy.deepcopy(merged)
    for plain, block in zip(merged.layers, unmerged.layers, strict=True):
        for part, name in (("sa", "mat_qkv"), ("sa", "proj"), ("ca", "mat_q"), ("ca", "mat_kv"), ("ffn", "fc1")):
            layer = LowRank(getattr(getattr(block, part), name))
            setattr(getattr(block, part), name, layer)
            with torch.no_grad():
                getattr(getattr(plain, part), name).weight += layer.up @ layer.down
    found = []
    for body in (merged, unmerged):
        with torch.no_grad(), attach(body, SETTINGS):
            found.append(draw(own, body.condition(texts, [6, 4]), transformer=body))
    assert_close(found[1].latent, found[0].latent)
    assert not torch.equal(found[0].latent, draw(own, found[0].condition, SparsePolicy(SETTINGS), own[0]).latent[:1])


@pytest.mark.parametrize("first", ["lora", "attach"])
def test_lora_of_peft_on_every_linear_layer(own, first):
    """Before the method or after it: its images are those of the policy, and detaching leaves the LoRA."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(2, 6, 128, generator=generator)

    def adapt():
        inject_adapter_in_model(LoraConfig(target_modules="all-linear", r=2), own[0])
        # Large enough to matter, too small for every bit to be sure.
        for name, weight in own[0].named_parameters():
            if "lora_" in name:
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator)

    if first == "lora":
        adapt()
    with attach(own[0], SETTINGS):
        if first == "attach":
            adapt()
        with torch.no_grad():
            condition = own[0].condition(texts, [6, 4])
        sparse = draw(own, condition).latent
    assert torch.equal(sparse, draw(own, condition, SparsePolicy(SETTINGS)).latent)
    dense = draw(own, condition).latent
    assert not torch.equal(dense, sparse)
    for module in own[0].modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    assert not torch.equal(draw(own, condition).latent, dense)


class EightBits(nn.Module):
    """A linear layer's place taken by integers and a scale of each row, as quantisers do."""

    def __init__(self, base):
        super().__init__()
        scale = base.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (base.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Replaced(nn.Linear):
    """A linear layer that is called as a replaced one is."""


def quantise(part):
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, EightBits(child))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_text_encoder_and_blocks(folder, dtype):
    pipe = InfinityPipeline.from_pretrained(folder)
    rounded = InfinityPipeline.from_pretrained(folder)
    pipe.transformer.to_body_dtype(dtype)
    rounded.transformer.to_body_dtype(dtype)
    quantise(pipe.text_encoder)
    for block, plain in zip(pipe.transformer.layers, rounded.transformer.layers, strict=True):
        quantise(block)
        for name, layer in block.named_modules():
            if isinstance(layer, EightBits):
                same = Replaced(layer.in_features, layer.out_features, bias=layer.bias is not None)
                same.weight.data, same.bias = layer.weight.to(dtype) * layer.scale, layer.bias
                plain.set_submodule(name, same)
    rounded.text_encoder = pipe.text_encoder
    options = {"pixels": "0.06M", "output_type": "pt", "seeds": 5, "guidance_scale": 2.0}
    with attach(pipe, SETTINGS), attach(rounded, SETTINGS):
        found, want = (p("cat", **options).images for p in (pipe, rounded))
    assert torch.equal(found, want)
    assert not torch.equal(found, InfinityPipeline.from_pretrained(folder)("cat", **options).images)


def test_blocks_of_lower_precision(own):
    own[0].to_body_dtype(torch.bfloat16)
    with torch.no_grad():
        condition = own[0].condition(torch.randn(2, 6, 128), [6, 4])
    dense = draw(own, condition, Policy())
    assert torch.equal(draw(own, condition, SparsePolicy(replace(SETTINGS, ratio=0.0))).latent, dense.latent)
    sparse = draw(own, condition, SparsePolicy(SETTINGS))
    assert sparse.cache.k[0].dtype == torch.bfloat16
    assert sparse.latent.isfinite().all()


def test_threads_of_one_transformer(model):
    """One switches its call off, another draws sparse, at the same time."""
    dense, sparse = draw(model, policy=Policy()).latent, draw(model, policy=SparsePolicy(SETTINGS)).latent
    found = {}
    with attach(model[0], SETTINGS) as handle:
        meet = threading.Barrier(2)

        def without():
            with handle.disabled():
                meet.wait()
                found["dense"] = draw(model).latent

        def within():
            meet.wait()
            found["sparse"] = draw(model).latent

        threads = [threading.Thread(target=work) for work in (without, within)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(found["dense"], dense)
    assert torch.equal(found["sparse"], sparse)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_blocks(own):
    before = draw(own, policy=SparsePolicy(SETTINGS)).latent
    for block in own[0].layers:
        block.compile_around(backend="eager", dynamic=True, fullgraph=True)
    with attach(own[0], SETTINGS):
        assert torch.equal(draw(own).latent, before)
        fused = draw(own, policy=SparsePolicy(replace(SETTINGS, backend="reference"))).latent
    assert_close(fused, before)


def test_a_pipeline_its_negative_prompts_and_saving(folder, tmp_path):
    pipe = InfinityPipeline.from_pretrained(folder)
    options = {"pixels": "0.06M", "output_type": "pt", "negative_prompt": "a", "seeds": 5, "guidance_scale": 2.0}
    dense = pipe("cat", **options).images
    with attach(pipe, SETTINGS):
        sparse = pipe("cat", **options).images
        assert not torch.equal(sparse, dense)
        pipe.save_pretrained(tmp_path)
    # Nothing of a method is saved with a model.
    again = InfinityPipeline.from_pretrained(tmp_path)
    assert torch.equal(again("cat", **options).images, dense)
    with attach(again, SETTINGS):
        assert torch.equal(again("cat", **options).images, sparse)


def test_inference_mode(own):
    with attach(own[0], SETTINGS):
        sparse = draw(own).latent
        with torch.inference_mode():
            assert torch.equal(draw(own).latent, sparse)
    assert torch.equal(draw(own).latent, draw(own, policy=Policy()).latent)
