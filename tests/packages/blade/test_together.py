"""What users combine with an attached model: each row of the README's "works together with" names a test of this file.

At density 1, without pooled keys, the attached model computes what the detached one does, whatever is combined with it.
"""

import threading
from contextlib import nullcontext
from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    WanModularPipeline,
)
from diffusers.hooks import apply_group_offloading
from hone_blade.config import BladeConfig
from hone_blade.models import attach
from hone_video.architectures import tiny, tiny_inputs
from peft import LoraConfig, get_peft_model
from torch import nn

KINDS = pytest.mark.parametrize("kind", ["wan", "cogvideox"])
D1 = BladeConfig(block=16, samples=8, max_density=1.0, min_density=1.0)
SPARSE = BladeConfig(block=16, samples=8, max_density=0.3, pool=8)


def run(model, arguments):
    with torch.no_grad():
        return model(**arguments, return_dict=False)[0]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def far(actual, expected):
    return float((actual - expected).norm() / expected.norm()) > 1e-3


# Modules that are wrapped or replaced after attach.

WRAPPED = {
    "wan": ["proj_out", "patch_embedding", "blocks.0.attn1.to_q", "blocks.1.ffn.net.2"],
    "cogvideox": ["proj_out", "patch_embed.proj", "transformer_blocks.0.attn1.to_q"],
}


@pytest.mark.parametrize(("kind", "target"), [(kind, name) for kind, names in WRAPPED.items() for name in names])
def test_lora_on_any_module_after_attach(kind, target):
    model, arguments = tiny(kind), tiny_inputs(kind)
    plain = run(model, arguments)
    with attach(model, D1) as handle:
        model.add_adapter(LoraConfig(r=4, target_modules=[target], init_lora_weights=False))
        with_lora = run(model, arguments)
        with handle.disabled():
            expected = run(model, arguments)
        model.unload_lora()
        close(run(model, arguments), plain)
    assert far(expected, plain)
    close(with_lora, expected)
    assert torch.equal(run(model, arguments), plain)


class Rounded(nn.Module):
    """What quantisation puts in place of a layer: another module, with the weights rounded."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        step = layer.weight.abs().max() / 127
        layer.weight.data = (layer.weight / step).round() * step

    def forward(self, x):
        return self.layer(x)


@KINDS
def test_quantised_after_attach(kind):
    model, arguments = tiny(kind), tiny_inputs(kind)
    plain = run(model, arguments)
    with attach(model, D1):
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                model.set_submodule(path, Rounded(module))
        quantised = run(model, arguments)
    expected = run(model, arguments)
    assert far(expected, plain)
    close(quantised, expected)


# Caches of diffusers keep what one step computed for the next ones.

CACHES = {
    "first block": lambda at: FirstBlockCacheConfig(threshold=0.5),
    "PAB": lambda at: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 950),
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(100, 950),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks"),
        current_timestep_callback=at,
    ),
    "MagCache": lambda at: MagCacheConfig(
        threshold=0.5, max_skip_steps=2, retention_ratio=0.1, num_inference_steps=6, mag_ratios=[1.0] * 6
    ),
    "TaylorSeer": lambda at: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=1, taylor_factors_dtype=torch.float32
    ),
}
TIMES = (999, 874, 749, 624, 500, 374)


def cached_video(model, kind, cache, around=lambda step: nullcontext()):
    """Outputs of the steps of one video, on slowly changing latents."""
    now = [0]
    model.enable_cache(CACHES[cache](lambda: now[0]))
    arguments, outputs = tiny_inputs(kind), []
    try:
        with model.cache_context("cond"):
            for step, time in enumerate(TIMES):
                now[0] = time
                arguments["timestep"] = torch.full_like(arguments["timestep"], time)
                arguments["hidden_states"] = arguments["hidden_states"] * 0.98
                with around(step):
                    outputs.append(run(model, arguments))
    finally:
        model.disable_cache()
    return outputs


@KINDS
@pytest.mark.parametrize("cache", CACHES)
def test_caches_of_diffusers_over_dense_and_sparse_steps(kind, cache):
    model = tiny(kind, num_layers=3)
    expected = cached_video(model, kind, cache)
    with attach(model, replace(D1, dense_steps=2)) as handle:
        for out, want in zip(cached_video(model, kind, cache), expected, strict=True):
            close(out, want)
        handle.reset()
        switched = cached_video(model, kind, cache, lambda step: handle.disabled() if step in (1, 2) else nullcontext())
        for out, want in zip(switched, expected, strict=True):
            close(out, want)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_starts_anew_at_attach_and_detach(cache):
    model = tiny("wan", num_layers=3)
    at, arguments = [500], tiny_inputs("wan")
    expected = run(model, arguments)
    model.enable_cache(CACHES[cache](lambda: at[0]))
    with model.cache_context("cond"):
        close(run(model, arguments), expected)
    with attach(model, D1), model.cache_context("cond"):
        close(run(model, arguments), expected)
    with model.cache_context("cond"):
        close(run(model, arguments), expected)


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
def test_a_cache_that_reads_whole_latents_is_refused():
    model, arguments = tiny("wan"), tiny_inputs("wan")
    with attach(model, D1):
        model.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: 500))
        with pytest.raises(RuntimeError, match=r"\(FasterCache, SeaCache\) looks at whole latents .* or detach first"):
            run(model, arguments)
    with attach(model, replace(D1, order="raster")):
        run(model, arguments)


# Threads and offloading.


def test_threads_of_one_transformer():
    model = tiny("wan")
    sizes = [
        tiny_inputs("wan", frames=f, height=h, width=w) for f, h, w in ((3, 10, 14), (2, 8, 12), (4, 16, 16), (1, 4, 4))
    ]
    expected = [run(model, arguments) for arguments in sizes]
    wrong = []
    start = threading.Barrier(len(sizes))

    def serve(index):
        start.wait()
        for _ in range(10):
            try:
                close(run(model, sizes[index]), expected[index])
            except BaseException as error:
                wrong.append(error)

    with attach(model, D1):
        threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(sizes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


OFFLOADS = {
    "sequential": lambda model: accelerate.cpu_offload(model, torch.device("cpu")),
    "group": lambda model: apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
    "leaf": lambda model: apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level"),
    "device map": lambda model: accelerate.dispatch_model(
        model,
        {name: "cpu" for name, _ in [*model.named_children(), *model.named_parameters(recurse=False)]},
        main_device="cpu",
        force_hooks=True,
    ),
    "model": lambda model: accelerate.cpu_offload_with_hook(model, torch.device("cpu")),
}


# accelerate wants a device for a parameter of the model itself, and says that it is no module.
@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")
@KINDS
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("first", ["attach", "offload"])
def test_recording_under_offload(kind, offload, first):
    model, arguments = tiny(kind), tiny_inputs(kind)
    with attach(model, SPARSE) as handle, handle.record() as wanted:
        expected = run(model, arguments)
    if first == "offload":
        OFFLOADS[offload](model)
    with attach(model, SPARSE) as handle:
        if first == "attach":
            OFFLOADS[offload](model)
        with handle.record() as rows:
            out = run(model, arguments)
    assert torch.equal(out, expected)
    assert [row[:4] for row in rows] == [row[:4] for row in wanted] == [(0, 0, 0, 0), (0, 0, 0, 1)]
    assert torch.equal(rows[0].stats.density, wanted[0].stats.density)


# Compilation.


# Inductor imports a part of torch that torch has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.slow
@KINDS
def test_compiled_by_the_default_backend(kind):
    model, arguments = tiny(kind, num_layers=1), tiny_inputs(kind)
    with attach(model, SPARSE):
        expected = run(model, arguments)
        torch.compiler.reset()
        close(run(torch.compile(model, fullgraph=True), arguments), expected)
    torch.compiler.reset()


def test_compiled_sizes_are_a_graph_each():
    model = tiny("wan", num_layers=1)
    sizes = [tiny_inputs("wan", batch=1, frames=frames, height=8, width=8) for frames in (1, 2, 3)]
    with attach(model, D1):
        expected = [run(model, arguments) for arguments in sizes]
        for limit in (3, 2):
            torch.compiler.reset()
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            with torch._dynamo.config.patch(recompile_limit=limit):
                for arguments, want in zip(sizes[:limit], expected, strict=False):
                    close(run(compiled, arguments), want)
                if limit < len(sizes):
                    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
                        run(compiled, sizes[limit])
    torch.compiler.reset()


# Pipelines.


def test_the_transformers_of_one_video_count_together():
    pair = tiny("wan", seed=0), tiny("wan", seed=1)
    config = replace(SPARSE, dense_steps=2)
    high, low = tiny_inputs("wan", timestep=999), tiny_inputs("wan", timestep=500)
    with attach(pair, config) as handle:
        assert handle.models == pair
        run(pair[0], high)
        run(pair[0], {**high, "timestep": torch.tensor([874, 874])})
        with handle.record() as rows:
            run(pair[1], low)
    assert {(row.step, row.model) for row in rows} == {(2, 1)}
    with pytest.raises(ValueError, match="one transformer was given twice"):
        attach((pair[0], pair[0]), config)


def test_a_modular_pipeline():
    pipe = WanModularPipeline()
    pipe.update_components(transformer=tiny("wan"))
    arguments = tiny_inputs("wan")
    expected = run(pipe.transformer, arguments)
    with attach(pipe, D1) as handle:
        assert handle.models == (pipe.transformer,)
        close(run(pipe.transformer, arguments), expected)
    with pytest.raises(TypeError, match="WanModularPipeline holds no transformer"):
        attach(WanModularPipeline(), D1)


def test_a_wrapper_is_to_be_unwrapped():
    wrapped = get_peft_model(tiny("wan"), LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(
        TypeError, match=r"PeftModel around a WanTransf.*pass the model inside, its \.base_model\.model"
    ):
        attach(wrapped, D1)
    attach(wrapped.base_model.model, D1).detach()
