import copy
import io

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.attention_processor import AttnProcessor2_0, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from hone_blade import models as blade_models
from hone_blade.config import PRESETS, BladeConfig
from hone_blade.models import BladeHandle, attach
from hone_video.architectures import FULL_SIZE, full_size, tiny
from hone_video.handle import SUPPORTED
from hone_video.orders import token_order
from torch import nn

DENSE = BladeConfig(block=32, max_density=1.0, min_density=1.0)
SPARSE = BladeConfig(block=16, samples=8, max_density=0.3, pool=8)
KINDS = pytest.mark.parametrize("kind", ["wan", "cogvideox"])


def inputs(kind, *, batch=2, frames=3, height=10, width=14, seed=0, time=500):
    """Keyword arguments of a tiny model's forward; latent sizes, patches are 1x2x2."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, 8, 32, generator=generator)
    timestep = torch.full((batch,), time)
    if kind == "wan":
        video = torch.randn(batch, 4, frames, height, width, generator=generator)
        return {"hidden_states": video, "timestep": timestep, "encoder_hidden_states": text}
    video = torch.randn(batch, frames, 4, height, width, generator=generator)
    rows, columns = height // 2, width // 2
    rotary = get_3d_rotary_pos_embed(32, ((0, 0), (rows, columns)), (rows, columns), frames)
    return {
        "hidden_states": video,
        "encoder_hidden_states": text,
        "timestep": timestep,
        "image_rotary_emb": rotary,
    }


def run(model, arguments):
    with torch.no_grad():
        return model(**arguments, return_dict=False)[0]


def blocks(model):
    return model.blocks if hasattr(model, "blocks") else model.transformer_blocks


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def is_close(actual, expected):
    return torch.allclose(actual, expected, atol=2e-5, rtol=2e-5)


# At density 1 and without pooled keys BLADE is dense attention.


@KINDS
@pytest.mark.parametrize("order", ["gilbert", "morton", "tile", "raster"])
def test_density_one_is_dense(kind, order):
    model, arguments = tiny(kind), inputs(kind)
    expected = run(model, arguments)
    with attach(model, BladeConfig(block=32, max_density=1.0, min_density=1.0, order=order)):
        close(run(model, arguments), expected)


@KINDS
@pytest.mark.parametrize("size", [(1, 4, 4), (2, 6, 10), (5, 8, 4)])
def test_one_attachment_serves_every_resolution_and_batch(kind, size):
    model = tiny(kind)
    frames, height, width = size
    arguments = inputs(kind, batch=3, frames=frames, height=height, width=width)
    expected = run(model, arguments)
    with attach(model, DENSE):
        run(model, inputs(kind))
        close(run(model, arguments), expected)


def test_wan_per_token_timesteps():
    model, arguments = tiny("wan"), inputs("wan")
    arguments["timestep"] = torch.randint(0, 1000, (2, 3 * 5 * 7), generator=torch.Generator().manual_seed(1))
    expected = run(model, arguments)
    with attach(model, DENSE):
        close(run(model, arguments), expected)
        positional = [arguments[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")]
        with torch.no_grad():
            close(model(*positional, return_dict=False)[0], expected)


def test_wan_image_conditioned():
    model = tiny("wan", in_channels=9, image_dim=16, added_kv_proj_dim=64)
    arguments = inputs("wan")
    generator = torch.Generator().manual_seed(2)
    arguments["hidden_states"] = torch.randn(2, 9, 3, 10, 14, generator=generator)
    arguments["encoder_hidden_states"] = torch.randn(2, 512, 32, generator=generator)
    arguments["encoder_hidden_states_image"] = torch.randn(2, 5, 16, generator=generator)
    expected = run(model, arguments)
    with attach(model, DENSE):
        close(run(model, arguments), expected)


@pytest.mark.parametrize("config", [{"use_rotary_positional_embeddings": False}, {"patch_size_t": 2}])
def test_cogvideox_variants(config):
    """2B has sine positions and no rotary tables; 1.5 patches pairs of frames."""
    model, arguments = tiny("cogvideox", **config), inputs("cogvideox", frames=4, height=8, width=12)
    if "patch_size_t" in config:
        arguments["image_rotary_emb"] = get_3d_rotary_pos_embed(32, ((0, 0), (4, 6)), (4, 6), 2)
    else:
        arguments["image_rotary_emb"] = None
    expected = run(model, arguments)
    with attach(model, DENSE):
        close(run(model, arguments), expected)


@KINDS
def test_fused_projections_before_attach(kind):
    model, arguments = tiny(kind), inputs(kind)
    expected = run(model, arguments)
    model.fuse_qkv_projections()
    with attach(model, DENSE):
        close(run(model, arguments), expected)


def test_bfloat16_within_its_rounding():
    model, arguments = tiny("wan").to(torch.bfloat16), inputs("wan")
    arguments = {name: x.bfloat16() if x.is_floating_point() else x for name, x in arguments.items()}
    expected = run(model, arguments)
    with attach(model, DENSE):
        out = run(model, arguments)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)


# What the attention gets: the model's own q, k, v in curve order, text last.


# torch says that it has no fused norm for these dtypes.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("wide_norms", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@KINDS
def test_autocast_within_the_rounding_of_bfloat16(kind, compiled, wide_norms):
    model, arguments = tiny(kind), inputs(kind)
    if wide_norms:  # what autocast's norms give on a GPU
        for block in blocks(model):
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.register_forward_hook(lambda module, args, output: output.float())
    with attach(model, SPARSE) as handle:
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        expected = run(model, arguments)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(call, arguments)
            with handle.disabled():
                dense = run(model, arguments)
    assert out.dtype == dense.dtype
    assert float((out - expected).norm() / expected.norm()) < 0.03
    assert float((out - dense).norm() / dense.norm()) > 0


@KINDS
def test_attention_sees_curve_order_then_text(kind, monkeypatch):
    model, arguments = tiny(kind), inputs(kind)
    dense, sparse = [], []
    sdpa = nn.functional.scaled_dot_product_attention

    def spy_dense(query, key, value, **options):
        if query.shape[2] == key.shape[2]:
            dense.append((query.clone(), key.clone(), value.clone()))
        return sdpa(query, key, value, **options)

    def spy_sparse(q, k, v, **options):
        sparse.append((q.clone(), k.clone(), v.clone(), options))
        return sdpa(q, k, v)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", spy_dense)
        expected = run(model, arguments)
    monkeypatch.setattr(blade_models, "adaptive_sparse_attention", spy_sparse)
    with attach(model, SPARSE):
        close(run(model, arguments), expected)
    order = token_order("gilbert", 3, 5, 7)
    text = 8 if kind == "cogvideox" else 0
    place = torch.cat([order + text, torch.arange(text)])
    assert len(dense) == len(sparse) == 2
    for layer, (theirs, (q, k, v, options)) in enumerate(zip(dense, sparse, strict=True)):
        for ours, stock in zip((q, k, v), theirs, strict=True):
            close(ours, stock[:, :, place])
        assert options == {"cfg": SPARSE, "text_tokens": text, "layer": layer, "grid": (3, 5, 7)}


@KINDS
def test_tokens_are_reordered_once_and_outside_the_blocks(kind):
    model, arguments = tiny(kind), inputs(kind)
    seen = []

    def keep(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = blocks(model)[0].register_forward_pre_hook(keep, with_kwargs=True)
    run(model, arguments)
    with attach(model, SPARSE):
        run(model, arguments)
    handle.remove()
    raster, curve = seen
    assert torch.equal(curve, raster[:, token_order("gilbert", 3, 5, 7)])


def test_embedding_layers_are_the_models_own_after_a_forward():
    model, arguments = tiny("wan"), inputs("wan")
    video = arguments["hidden_states"]
    with torch.no_grad():
        expected, tables = model.patch_embedding(video), model.rope(video)
        with attach(model, SPARSE):
            run(model, arguments)
            assert torch.equal(model.patch_embedding(video), expected)
            assert all(torch.equal(a, b) for a, b in zip(model.rope(video), tables, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_embedding_layers_are_the_models_own_after_a_forward_that_raised(compiled):
    model, arguments = tiny("wan"), inputs("wan")
    video = arguments["hidden_states"]

    def fail(*_):
        raise RuntimeError("out of memory")

    with torch.no_grad(), attach(model, SPARSE) as handle:
        with handle.disabled():
            expected, tables = model.patch_embedding(video), model.rope(video)
        before = run(model, arguments)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        broken = model.blocks[1].ffn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(call, arguments)
        broken.remove()
        assert torch.equal(model.patch_embedding(video), expected)
        assert all(torch.equal(a, b) for a, b in zip(model.rope(video), tables, strict=True))
        assert torch.equal(run(model, arguments), before)


@KINDS
def test_inputs_that_are_no_latents_or_missing(kind):
    model, arguments = tiny(kind), inputs(kind)
    with attach(model, SPARSE):
        image = {**arguments, "hidden_states": arguments["hidden_states"][:, :, 0]}
        with pytest.raises(ValueError, match=r"hidden_states must be latents \[batch, .*\]; got \[2, .*\]\. A single"):
            run(model, image)
        for name in ("hidden_states", "timestep", *(("encoder_hidden_states",) if kind == "cogvideox" else ())):
            left_out = {key: value for key, value in arguments.items() if key != name}
            with pytest.raises(TypeError, match=f"forward needs {name} .* got a call without it"):
                run(model, left_out)
            with pytest.raises(TypeError, match=f"forward needs {name} .* got None"):
                run(model, {**arguments, name: None})
        run(model, arguments)


@KINDS
def test_sparse_attention_changes_the_output_and_is_repeatable(kind):
    model, arguments = tiny(kind), inputs(kind, frames=4, height=16, width=16)
    expected = run(model, arguments)
    with attach(model, SPARSE):
        first = run(model, arguments)
        assert torch.equal(run(model, arguments), first)
    assert (first - expected).abs().max() > 1e-4


@KINDS
def test_batch_elements_do_not_touch_each_other(kind):
    """A guidance batch: two prompts on one latent."""
    model, arguments = tiny(kind), inputs(kind, batch=2, frames=4, height=16, width=16)
    with attach(model, SPARSE):
        together = run(model, arguments)
        for row in range(2):
            alone = {name: x[row : row + 1] if name != "image_rotary_emb" else x for name, x in arguments.items()}
            close(run(model, alone), together[row : row + 1])


# Coming and going.


@KINDS
def test_detach_restores_everything(kind):
    model, arguments = tiny(kind), inputs(kind, frames=4, height=16, width=16)
    expected, keys, hooks = run(model, arguments), list(model.state_dict()), hook_count(model)
    processors = dict(model.attn_processors)
    handle = attach(model, SPARSE)
    assert handle.attached
    assert list(model.state_dict()) == keys
    cross = [block.attn2.processor for block in blocks(model) if hasattr(block, "attn2")]
    assert all(type(processor) is WanAttnProcessor for processor in cross)
    run(model, arguments)
    handle.detach()
    assert not handle.attached
    assert torch.equal(run(model, arguments), expected)
    assert hook_count(model) == hooks
    assert model.attn_processors.keys() == processors.keys()
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    handle.detach()
    with attach(model, SPARSE):
        pass
    assert torch.equal(run(model, arguments), expected)


@KINDS
def test_dense_context_is_the_detached_model(kind):
    model, arguments = tiny(kind), inputs(kind, frames=4, height=16, width=16)
    expected = run(model, arguments)
    with attach(model, SPARSE) as handle:
        sparse = run(model, arguments)
        with handle.disabled():
            assert torch.equal(run(model, arguments), expected)
        assert torch.equal(run(model, arguments), sparse)


@KINDS
def test_attached_twice_is_an_error(kind):
    model = tiny(kind)
    handle = attach(model, SPARSE)
    with pytest.raises(ValueError, match="already attached"):
        attach(model, DENSE)
    assert handle.attached
    handle.detach()


@KINDS
def test_a_copy_and_a_pickle_are_attached_on_their_own(kind):
    model, arguments = tiny(kind), inputs(kind, frames=4, height=16, width=16)
    expected = run(model, arguments)
    handle = attach(model, SPARSE)
    sparse = run(model, arguments)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    handle.detach()
    assert torch.equal(run(model, arguments), expected)
    for other in (twin, restored):
        assert torch.equal(run(other, arguments), sparse)
        own = BladeHandle.of(other)
        assert own.attached
        assert own.config == SPARSE
        own.detach()
        assert torch.equal(run(other, arguments), expected)
        assert hook_count(other) == hook_count(model)
        with pytest.raises(ValueError, match="nothing is attached to this"):
            BladeHandle.of(other)


def test_preset_names_and_configs():
    model = tiny("wan")
    with attach(model, "tiny") as handle:
        assert handle.config == PRESETS["tiny"].config
        assert handle.models == (model,)
        assert "attached" in repr(handle)
    with pytest.raises(ValueError, match=r"no preset 'wan'; the presets are .*wan2.1-1.3b"):
        attach(model, "wan")
    with pytest.raises(TypeError, match="preset's name or a BladeConfig; got dict"):
        attach(model, {"block": 64})


# Refusals leave the model as it was.


class Altered(WanTransformer3DModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Renamed(WanTransformer3DModel):
    pass


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            "cannot attach to Linear; supported are WanTransformer3DModel, CogVideoXTransf",
        ),
        (
            lambda: WanVACETransformer3DModel(
                num_attention_heads=1,
                attention_head_dim=12,
                in_channels=2,
                out_channels=2,
                text_dim=8,
                freq_dim=8,
                ffn_dim=8,
                num_layers=1,
                rope_max_seq_len=8,
                vace_layers=[0],
                vace_in_channels=2,
            ),
            "cannot attach to WanVACETransformer3DModel",
        ),
        (lambda: Altered(**tiny("wan").config), "Altered overrides the forward of WanTransformer3DModel"),
    ],
)
def test_unsupported_classes(model, message):
    with pytest.raises(TypeError, match=message):
        attach(model(), SPARSE)


def test_subclass_with_the_same_forward_is_fine():
    model, arguments = Renamed(**tiny("wan").config), inputs("wan")
    expected = run(model, arguments)
    with attach(model, DENSE):
        close(run(model, arguments), expected)
    assert all(issubclass(kind, nn.Module) for kind in SUPPORTED)


class OwnProcessor(WanAttnProcessor):
    pass


@KINDS
def test_a_foreign_processor_is_refused_and_nothing_is_attached(kind):
    model, arguments = tiny(kind), inputs(kind)
    foreign = OwnProcessor() if kind == "wan" else AttnProcessor2_0()
    blocks(model)[1].attn1.set_processor(foreign)
    before, hooks = dict(model.attn_processors), hook_count(model)
    with pytest.raises(ValueError, match=f"layer 1 of this .* has the attention processor {type(foreign).__name__}"):
        attach(model, SPARSE)
    assert model.attn_processors == before
    assert hook_count(model) == hooks
    if kind == "cogvideox":
        model.set_attn_processor(CogVideoXAttnProcessor2_0())
        with attach(model, DENSE):
            run(model, arguments)


def test_other_refusals_leave_the_model_alone(monkeypatch):
    model = tiny("wan")
    before, hooks = dict(model.attn_processors), hook_count(model)
    with pytest.raises(ValueError, match=r"dense_layers must be below the 2 layers .* got \(1, 2\)"):
        attach(model, BladeConfig(block=32, dense_layers=(1, 2)))
    model._parallel_config = object()
    with pytest.raises(ValueError, match="active parallel config"):
        attach(model, SPARSE)
    model._parallel_config = None
    model.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match="active parallel config"):
        attach(model, SPARSE)
    model.blocks[0].attn1.processor._parallel_config = None

    def fail(*args, **kwargs):
        raise RuntimeError("no hook")

    monkeypatch.setattr(model.rope, "register_forward_hook", fail)
    with pytest.raises(RuntimeError, match="no hook"):
        attach(model, SPARSE)
    assert model.attn_processors == before
    assert hook_count(model) == hooks


def test_changes_after_attach_are_noticed():
    model, arguments = tiny("wan"), inputs("wan")
    with attach(model, SPARSE):
        with pytest.raises(RuntimeError, match="does not run under diffusers' context"):
            model.blocks[0].attn1.processor._parallel_config = object()
        model.set_attention_backend("native")
        assert model.blocks[0].attn1.processor.original._attention_backend == "native"
        model.blocks[1].attn1.set_processor(WanAttnProcessor())
        with pytest.raises(RuntimeError, match="layer 1 was replaced after attach"):
            run(model, arguments)
    assert type(model.blocks[1].attn1.processor) is WanAttnProcessor


def test_an_attention_mask_is_refused():
    model, arguments = tiny("cogvideox"), inputs("cogvideox")
    with attach(model, SPARSE), pytest.raises(ValueError, match="attention_mask must be None"):
        run(model, {**arguments, "attention_kwargs": {"attention_mask": torch.ones(2, 113)}})
    arguments["image_rotary_emb"] = tuple(x[:-1] for x in arguments["image_rotary_emb"])
    with attach(model, SPARSE), pytest.raises(ValueError, match=r"one row per video token, 105 .*; got 104"):
        run(model, arguments)


# Dense steps, layers and sequences.


@KINDS
def test_dense_steps_count_timesteps_not_calls(kind):
    model = tiny(kind)
    config = BladeConfig(block=16, samples=8, max_density=0.3, dense_steps=2)
    size = {"frames": 4, "height": 16, "width": 16}
    with attach(model, config) as handle:
        for video in range(2):
            for step, time in enumerate((999, 874, 749)):
                for seed in (0, 1):  # with and without the prompt
                    arguments = inputs(kind, seed=seed, time=time, **size)
                    with handle.disabled():
                        expected = run(model, arguments)
                    out = run(model, arguments)
                    assert handle.step == step, (video, step)
                    assert is_close(out, expected) == (step < 2)
        # A shorter second video, cut off at step 0, and a reset in between.
        handle.reset()
        assert handle.step == -1
        run(model, inputs(kind, time=499, **size))
        assert handle.step == 0


def test_a_video_that_starts_lower_has_to_be_announced():
    model = tiny("wan")
    with attach(model, BladeConfig(block=16, samples=8, max_density=0.3, dense_steps=2)) as handle:
        for time in (999, 874, 749):
            run(model, inputs("wan", time=time))
        run(model, inputs("wan", time=600))  # a new video, but it looks like the next step
        assert handle.step == 3
        handle.reset()
        run(model, inputs("wan", time=600))
        assert handle.step == 0


def test_own_step_count_overrides_timesteps():
    model = tiny("wan")
    arguments = inputs("wan", frames=4, height=16, width=16)
    with attach(model, BladeConfig(block=16, samples=8, max_density=0.3, dense_steps=2)) as handle:
        with handle.disabled():
            expected = run(model, arguments)
        for step, dense in ((0, True), (1, True), (2, False), (1, True), (5, False)):
            handle.begin_step(step)
            assert is_close(run(model, arguments), expected) == dense
            assert handle.step == step
        handle.reset()
        close(run(model, arguments), expected)
        with pytest.raises(ValueError, match="step counts from 0; got -1"):
            handle.begin_step(-1)


def count_calls(monkeypatch):
    calls = []
    real = blade_models.adaptive_sparse_attention

    def counted(*args, **kwargs):
        calls.append(kwargs["layer"])
        return real(*args, **kwargs)

    monkeypatch.setattr(blade_models, "adaptive_sparse_attention", counted)
    return calls


@KINDS
def test_dense_layers(kind, monkeypatch):
    model, arguments = tiny(kind, num_layers=3), inputs(kind)
    calls = count_calls(monkeypatch)
    expected = run(model, arguments)
    with attach(model, BladeConfig(block=32, max_density=1.0, min_density=1.0, dense_layers=(0, 2))):
        close(run(model, arguments), expected)
    assert calls == [1]


@KINDS
def test_min_tokens_counts_the_whole_sequence(kind, monkeypatch):
    model, arguments = tiny(kind), inputs(kind)
    calls = count_calls(monkeypatch)
    expected = run(model, arguments)
    tokens = 105 + (8 if kind == "cogvideox" else 0)
    with attach(model, BladeConfig(block=32, min_tokens=tokens + 1)):
        assert torch.equal(run(model, arguments), expected)
    assert calls == []
    with attach(model, BladeConfig(block=32, min_tokens=tokens)):
        run(model, arguments)
    assert calls == [0, 1]


# Training and compilation.


@KINDS
def test_gradient_checkpointing_recomputes_the_same_masks(kind):
    model = tiny(kind, num_layers=3)
    arguments = inputs(kind, frames=4, height=16, width=16)
    other = inputs(kind, frames=2, height=8, width=12, seed=3)

    def gradients():
        model.zero_grad()
        loss = model(**arguments, return_dict=False)[0].square().mean()
        # Another forward of another size between forward and backward, as in distillation.
        run(model, other)
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with attach(model, SPARSE):
        expected = gradients()
        model.enable_gradient_checkpointing()
        for ours, theirs in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)
    assert any(g.abs().max() > 0 for g in expected)


@KINDS
def test_compiles_to_one_graph_before_and_after_attach(kind):
    model, arguments = tiny(kind, num_layers=1), inputs(kind)
    other = inputs(kind, batch=1, frames=2, height=8, width=8)
    expected = run(model, arguments)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(run(compiled, arguments), expected)
    handle = attach(compiled, SPARSE)
    sparse, sparse_other = run(model, arguments), run(model, other)
    assert (sparse - expected).abs().max() > 1e-5
    close(run(compiled, arguments), sparse)
    close(run(compiled, other), sparse_other)
    close(run(compiled, arguments), sparse)
    handle.detach()
    close(run(compiled, arguments), expected)
    torch.compiler.reset()


def test_dense_steps_compile_to_one_graph_with_an_own_count():
    model, arguments = tiny("wan", num_layers=1), inputs("wan", frames=4, height=16, width=16)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with attach(model, BladeConfig(block=16, samples=8, max_density=0.3, dense_steps=1)) as handle:
        for step in range(4):
            handle.begin_step(step)
            close(run(compiled, arguments), run(model, arguments))
        handle.reset()
        with pytest.raises(Exception, match=r"handle\.begin_step"):
            run(compiled, arguments)
    torch.compiler.reset()


@KINDS
def test_compiled_blocks_share_one_graph(kind, monkeypatch):
    """diffusers' regional compilation, of more layers than the compiler would recompile for."""
    model, arguments = tiny(kind, num_layers=6), inputs(kind)
    other = inputs(kind, batch=1, frames=2, height=8, width=8)
    with attach(model, SPARSE):
        expected, expected_other = run(model, arguments), run(model, other)
        torch.compiler.reset()
        monkeypatch.setattr(type(model), "_repeated_blocks", [type(blocks(model)[0]).__name__])
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        # Two sizes. CogVideoX hands its first block a view, which is a graph of its own also without BLADE.
        limit = 2 if kind == "wan" else 4
        with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
            close(run(model, arguments), expected)
            close(run(model, other), expected_other)
    torch.compiler.reset()


# Statistics.


@KINDS
def test_statistics(kind):
    model = tiny(kind)
    size = {"frames": 4, "height": 16, "width": 16}
    with attach(model, BladeConfig(block=32, samples=8, max_density=0.5, dense_layers=(0,))) as handle:
        with handle.record(recall=True) as rows:
            for time in (999, 874):
                for seed in (0, 1):
                    run(model, inputs(kind, seed=seed, time=time, **size))
        assert [row[:4] for row in rows] == [(0, 0, 0, 1), (0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 0, 1)]
        for row in rows:
            assert 0 < float(row.stats.density.mean()) <= 1
            assert 0 <= float(row.stats.clamped.mean()) <= 1
            assert 0 < float(row.stats.recall.mean()) <= 1 + 1e-5
        run(model, inputs(kind, **size))
        assert len(rows) == 4
        with handle.record() as rows:
            run(model, inputs(kind, **size))
        assert len(rows) == 1
        assert rows[0].stats.recall is None


def test_two_transformers_count_the_steps_of_one_video():
    """The pair of a Wan2.2 pipeline; its denoising loop is run in test_sample."""
    first, second = tiny("wan", seed=0), tiny("wan", seed=1)
    config = BladeConfig(block=16, samples=8, max_density=0.3, dense_steps=1)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=first, transformer_2=second
    )
    handle = attach(pipe, config)
    assert handle.models == (first, second)
    size = {"frames": 4, "height": 16, "width": 16}
    with handle.record() as rows:
        for time, model in ((999, first), (874, first), (500, second)):
            run(model, inputs("wan", time=time, **size))
    assert [(row.step, row.model, row.layer) for row in rows] == [(1, 0, 0), (1, 0, 1), (2, 1, 0), (2, 1, 1)]
    handle.detach()
    # Nothing is attached to the first one if the second cannot take it.
    second.blocks[1].attn1.set_processor(OwnProcessor())
    before, hooks = dict(first.attn_processors), hook_count(first)
    with pytest.raises(ValueError, match="layer 1 of this WanTransformer3DModel"):
        attach(pipe, config)
    assert first.attn_processors == before
    assert hook_count(first) == hooks
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None)
    with pytest.raises(TypeError, match="WanPipeline holds no transformer; supported are"):
        attach(pipe, config)


@KINDS
def test_full_size_models_run_in_low_precision(kind, monkeypatch):
    """The builder on a small config: mixed dtypes as diffusers loads them, and attention attached."""
    small = tiny(kind)
    config = {k: v for k, v in small.config.items() if not k.startswith("_")}
    monkeypatch.setitem(FULL_SIZE, "small", (type(small), config))
    model = full_size("small", device="cpu")
    arguments = {
        name: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs(kind).items()
    }
    expected = run(model, arguments)
    assert expected.dtype == torch.bfloat16
    with attach(model, DENSE):
        torch.testing.assert_close(run(model, arguments), expected, atol=0.05, rtol=0.05)
