import pytest
import torch
from hone_blade import models as blade_models
from hone_blade.config import PRESETS, BladeConfig
from hone_blade.models import BladeHandle, attach
from hone_video.architectures import tiny, tiny_inputs
from hone_video.orders import token_order
from torch import nn

DENSE = BladeConfig(block=32, max_density=1.0, min_density=1.0)
SPARSE = BladeConfig(block=16, samples=8, max_density=0.3, pool=8)
KINDS = pytest.mark.parametrize("kind", ["wan", "cogvideox"])


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


@pytest.mark.parametrize("kind", ["wan", "cogvideox", "hunyuan"])
@pytest.mark.parametrize("order", ["gilbert", "morton", "tile", "raster"])
def test_density_one_is_dense(kind, order):
    model, arguments = tiny(kind), tiny_inputs(kind)
    expected = run(model, arguments)
    with attach(model, BladeConfig(block=32, max_density=1.0, min_density=1.0, order=order)):
        close(run(model, arguments), expected)


def test_hunyuan_video_changes_and_is_restored():
    model, arguments = tiny("hunyuan"), tiny_inputs("hunyuan")
    expected = run(model, arguments)
    with attach(model, SPARSE):
        assert not is_close(run(model, arguments), expected)
    assert torch.equal(run(model, arguments), expected)


# What the attention gets: the model's own q, k, v in curve order, text last.


# torch says that it has no fused norm for these dtypes.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("wide_norms", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@KINDS
def test_autocast_within_the_rounding_of_bfloat16(kind, compiled, wide_norms):
    model, arguments = tiny(kind, num_layers=1), tiny_inputs(kind)
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
    model, arguments = tiny(kind), tiny_inputs(kind)
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
def test_sparse_attention_changes_the_output_and_is_repeatable(kind):
    model, arguments = tiny(kind), tiny_inputs(kind, frames=4, height=16, width=16)
    expected = run(model, arguments)
    with attach(model, SPARSE):
        first = run(model, arguments)
        assert torch.equal(run(model, arguments), first)
    assert (first - expected).abs().max() > 1e-4


@KINDS
def test_batch_elements_do_not_touch_each_other(kind):
    """A guidance batch: two prompts on one latent."""
    model, arguments = tiny(kind), tiny_inputs(kind, batch=2, frames=4, height=16, width=16)
    with attach(model, SPARSE):
        together = run(model, arguments)
        for row in range(2):
            alone = {name: x[row : row + 1] if name != "image_rotary_emb" else x for name, x in arguments.items()}
            close(run(model, alone), together[row : row + 1])


# Coming and going.


@KINDS
def test_detach_restores_everything(kind):
    model, arguments = tiny(kind), tiny_inputs(kind, frames=4, height=16, width=16)
    expected = run(model, arguments)
    with attach(model, SPARSE) as handle:
        sparse = run(model, arguments)
        with handle.disabled():
            assert torch.equal(run(model, arguments), expected)
        assert torch.equal(run(model, arguments), sparse)
        own = BladeHandle.of(model)
        assert (own.attached, own.config) == (True, SPARSE)
    assert torch.equal(run(model, arguments), expected)


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


# Dense steps, layers and sequences.


def test_own_step_count_overrides_timesteps():
    model = tiny("wan")
    arguments = tiny_inputs("wan", frames=4, height=16, width=16)
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
    model, arguments = tiny(kind, num_layers=3), tiny_inputs(kind)
    calls = count_calls(monkeypatch)
    expected = run(model, arguments)
    with attach(model, BladeConfig(block=32, max_density=1.0, min_density=1.0, dense_layers=(0, 2))):
        close(run(model, arguments), expected)
    assert calls == [1]


@KINDS
def test_min_tokens_counts_the_whole_sequence(kind, monkeypatch):
    model, arguments = tiny(kind), tiny_inputs(kind)
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
    arguments = tiny_inputs(kind, frames=4, height=16, width=16)
    other = tiny_inputs(kind, frames=2, height=8, width=12, seed=3)

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
    model, arguments = tiny(kind, num_layers=1), tiny_inputs(kind)
    other = tiny_inputs(kind, batch=1, frames=2, height=8, width=8)
    expected = run(model, arguments)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
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
    model, arguments = tiny("wan", num_layers=1), tiny_inputs("wan", frames=4, height=16, width=16)
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
    model, arguments = tiny(kind, num_layers=6), tiny_inputs(kind)
    other = tiny_inputs(kind, batch=1, frames=2, height=8, width=8)
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
                    run(model, tiny_inputs(kind, seed=seed, timestep=time, **size))
        assert [row[:4] for row in rows] == [(0, 0, 0, 1), (0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 0, 1)]
        for row in rows:
            assert 0 < float(row.stats.density.mean()) <= 1
            assert 0 <= float(row.stats.clamped.mean()) <= 1
            assert 0 < float(row.stats.recall.mean()) <= 1 + 1e-5
        run(model, tiny_inputs(kind, **size))
        assert len(rows) == 4
        with handle.record() as rows:
            run(model, tiny_inputs(kind, **size))
        assert len(rows) == 1
        assert rows[0].stats.recall is None


def test_samples_at_different_times_are_of_no_step():
    model, inputs = tiny("wan"), tiny_inputs("wan", batch=2)
    inputs["timestep"] = torch.tensor([900, 100])
    with torch.no_grad(), attach(model, BladeConfig(block=16, samples=8, max_density=0.3, dense_steps=1)) as handle:
        with pytest.raises(ValueError, match="are at different timesteps, from 100 to 900, and BLADE goes by the"):
            model(**inputs)
        handle.begin_step(1)
        assert model(**inputs)[0].isfinite().all()
