import copy
import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from hone_core.errors import UnsupportedHardwareError
from hone_core.testing import assert_close
from hone_fpsattention.config import PRESETS, FPSAttentionConfig, Regime
from hone_fpsattention.models import FPSAttentionHandle, _FPSAttention, attach, check_hardware, describe_model
from hone_fpsattention.schedule import Schedule
from hone_video.architectures import tiny, tiny_inputs, tiny_pipeline
from peft import LoraConfig

FULL = Regime(window=(9, 9, 9), e4m3=False)
"""Goes through tiles and lists, and is dense attention."""
NEAR = Regime(window=(1, 1, 1), e4m3=False)
SMALL = FPSAttentionConfig(tile=(2, 4, 4), block=64, shift=3.0)


def config(*regimes, boundaries=(), **change):
    return dataclasses.replace(SMALL, regimes=regimes, boundaries=boundaries, **change)


def inputs(kind, timestep=500.0, batch=1):
    timestep = torch.full((batch,), timestep)
    if kind == "wan":
        return torch.randn(batch, 4, 3, 10, 14), timestep, torch.randn(batch, 8, 32)
    if kind == "hunyuan":
        made = tiny_inputs(kind, batch=batch)
        names = ("encoder_attention_mask", "pooled_projections", "guidance")
        text = torch.randn(batch, 8, 32)
        return torch.randn(batch, 4, 3, 10, 14), timestep, text, *(made[name] for name in names)
    return torch.randn(batch, 3, 4, 8, 12), torch.randn(batch, 8, 32), timestep


def run(model, args):
    if type(getattr(model, "_orig_mod", model)).__name__.startswith("CogVideoX"):
        hidden, text, timestep = args
        angle = torch.rand(3 * 4 * 6, 16, generator=torch.Generator().manual_seed(0)) * 6
        tables = tuple(f.repeat_interleave(2, -1) for f in (angle.cos(), angle.sin()))
        return model(hidden, text, timestep, image_rotary_emb=tables, return_dict=False)[0]
    return model(*args, return_dict=False)[0]


@pytest.fixture(params=["wan", "cogvideox", "hunyuan"])
def kind(request):
    return request.param


@torch.no_grad()
def test_everything_read_is_the_model_itself(kind):
    model, args = tiny(kind), inputs(kind, batch=2)
    expected = run(model, args)
    with attach(model, config(FULL)):
        assert_close(run(model, args), expected)
    with attach(model, config(Regime(e4m3=False))):
        assert_close(run(model, args), expected)


@torch.no_grad()
@pytest.mark.parametrize("regime", [NEAR, Regime(), Regime(window=(1, 1, 1))])
def test_windows_and_rounding_change_the_output_and_detach_restores_it(kind, regime):
    model, args = tiny(kind), inputs(kind)
    expected = run(model, args)
    handle = attach(model, config(regime))
    changed = run(model, args)
    assert float((changed - expected).abs().max()) > 1e-5
    with handle.disabled():
        assert torch.equal(run(model, args), expected)
    assert torch.equal(run(model, args), changed)
    handle.detach()
    assert torch.equal(run(model, args), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", [NEAR, Regime(window=(1, 1, 1)), Regime(window=(1, 1, 1), scales="token")])
def test_rotating_with_the_rounding_changes_no_bit(kind, regime, dtype, monkeypatch):
    # Both rotate in float32 and round to the model's own dtype once, so the emulation agrees exactly; a GPU's fused
    # multiply-add may turn the last bit of a rotated channel.
    model, args = tiny(kind).to(dtype), [x.to(dtype) for x in inputs(kind)]
    if kind == "wan":
        model.rope.float()  # as from_pretrained keeps it
    outs = []
    for rotates in (False, True):
        monkeypatch.setattr(_FPSAttention, "rotates", rotates)
        with attach(model, config(regime)):
            outs.append(run(model, args))
    assert torch.equal(*outs)


@torch.no_grad()
@pytest.mark.parametrize(("timestep", "regime"), [(900.0, 0), (800.0, 1), (500.0, 1), (300.0, 2)])
def test_the_noise_level_chooses_the_regime(kind, timestep, regime):
    # With shift 3 the boundaries lie at sigma 0.857 and 0.429.
    regimes = (NEAR, Regime(), Regime(window=(1, 3, 1)))
    staged = config(*regimes, boundaries=(1 / 3, 0.8))
    args = inputs(kind, timestep)
    model = tiny(kind)
    with attach(model, staged):
        got = run(model, args)
    with attach(model, staged.constant(regime)):
        assert torch.equal(got, run(model, args))
    for other in {0, 1, 2} - {regime}:
        with attach(model, staged.constant(other)):
            assert not torch.equal(got, run(model, args))


@torch.no_grad()
def test_the_regime_does_not_depend_on_how_often_the_model_was_called():
    model = tiny("wan")
    staged = config(NEAR, Regime(), boundaries=(0.5,))
    early, late = inputs("wan", 900.0), inputs("wan", 100.0)
    with attach(model, staged):
        first = [run(model, args) for args in (early, late)]
        again = [run(model, args) for args in (late, late, early, early)]
    assert torch.equal(first[0], again[2])
    assert torch.equal(first[0], again[3])
    assert torch.equal(first[1], again[0])
    assert torch.equal(first[1], again[1])


@torch.no_grad()
def test_a_plain_regime_is_the_model_s_own_attention():
    model, args = tiny("wan"), inputs("wan", 900.0)
    expected = run(model, args)
    with attach(model, config(Regime(e4m3=False), NEAR, boundaries=(0.5,))):
        assert_close(run(model, args), expected)


@torch.no_grad()
def test_per_token_timesteps_take_the_largest():
    # Wan2.2 TI2V: tokens of the given image are at 0.
    model = tiny("wan")
    hidden, _, text = inputs("wan")
    times = torch.full((1, 3 * 5 * 7), 900.0)
    times[:, :35] = 0
    staged = config(FULL, NEAR, boundaries=(0.5,))
    expected = model(hidden, times, text, return_dict=False)[0]
    with attach(model, staged):
        assert_close(model(hidden, times, text, return_dict=False)[0], expected)


@pytest.mark.parametrize("regimes", [(NEAR, FULL), (NEAR, Regime(e4m3=False)), (Regime(window=(1, 1, 1)), NEAR)])
def test_samples_at_different_noise_levels_have_each_their_regime(kind, regimes):
    # In float64: float32 products of another batch size can round a value to the next E4M3. Scales are float32.
    model, args = tiny(kind).double(), [x.double() if x.is_floating_point() else x for x in inputs(kind, batch=4)]
    place = next(i for i, x in enumerate(args) if x.dim() == 1)
    args[place] = torch.tensor([900.0, 100.0, 950.0, 200.0])
    settings = config(*regimes, boundaries=(0.5,))
    with attach(model, settings):
        alone = [run(model, [x[i : i + 1] for x in args]) for i in range(4)]
        together = run(model, args)
        assert_close(together, torch.cat(alone), dtype=torch.float32)
        together.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with attach(model, settings) as handle:
        torch.cat([run(model, [x[i : i + 1] for x in args]) for i in range(4)]).square().sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                # Sums in another order may round a value to the next E4M3.
                assert float((p.grad - grads[name]).norm()) <= 1e-3 * float(grads[name].norm()) + 1e-6
        # Said beforehand, nothing is read back.
        handle.begin_step(0, sigma=[0.9, 0.1, 0.95, 0.2])
        assert_close(run(model, args), together, dtype=torch.float32)
        handle.reset()
        # All in one regime: as ever.
        args[place] = torch.tensor([900.0, 950.0, 990.0, 800.0])
        mixed = run(model, args)
    with attach(model, settings.constant(0)):
        assert_close(mixed, run(model, args), dtype=torch.float32)


@torch.no_grad()
def test_samples_with_times_per_token_go_by_their_largest():
    model, (hidden, _, text) = tiny("wan"), inputs("wan", batch=2)
    tokens = torch.tensor([[900.0], [100.0]]).repeat(1, 3 * 5 * 7)
    tokens[:, :35] = 0
    with attach(model, config(NEAR, FULL, boundaries=(0.5,))):
        together = model(hidden, tokens, text, return_dict=False)[0]
        alone = [model(hidden[i : i + 1], tokens[i : i + 1], text[i : i + 1], return_dict=False)[0] for i in range(2)]
    assert_close(together, torch.cat(alone))


@torch.no_grad()
def test_begin_step_says_the_noise_level():
    model, args = tiny("wan"), inputs("wan", 900.0)
    staged = config(FULL, NEAR, boundaries=(0.5,))
    expected = run(model, args)
    with attach(model, staged) as handle:
        for low in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
            handle.begin_step(0, sigma=low)
            assert not torch.equal(run(model, args), expected)
            handle.begin_step(0, sigma=0.9)
            assert_close(run(model, args), expected)
        with pytest.raises(ValueError, match="sigma, the noise level in"):
            handle.begin_step(1)
        with pytest.raises(ValueError, match="those of a batch's samples; got none"):
            handle.begin_step(1, sigma=[])
        with pytest.raises(ValueError, match=r"sigma must lie in \[0, 1\]"):
            handle.begin_step(1, sigma=900.0)
    with attach(model, config(FULL)) as handle:
        handle.begin_step(3)
        assert_close(run(model, args), expected)


def test_gradients_flow_and_checkpointing_changes_nothing(kind):
    staged = config(Regime(window=(1, 1, 1)), Regime(), boundaries=(0.5,))
    grads = []
    args = inputs(kind, 900.0)
    for checkpointing in (False, True):
        model = tiny(kind).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        with attach(model, staged):
            run(model, args).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any(float(grad.abs().max()) > 0 for name, grad in grads[0].items() if ".to_q" in name)
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, what=name)


@torch.no_grad()
def test_two_threads_on_one_model():
    model = tiny("wan")
    staged = config(NEAR, Regime(), boundaries=(0.5,))
    args = {"early": inputs("wan", 900.0), "late": inputs("wan", 100.0)}
    results = {}
    with attach(model, staged):
        expected = {name: run(model, values) for name, values in args.items()}

        def work(name):
            with torch.no_grad():
                results[name] = [run(model, args[name]) for _ in range(5)]

        threads = [threading.Thread(target=work, args=(name,)) for name in args]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name, outs in results.items():
        assert all(torch.equal(out, expected[name]) for out in outs)


@torch.no_grad()
def test_lora_before_and_after_attach(kind):
    lora = LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    args, found = inputs(kind, 900.0), {}
    for when in ("never", "before", "after"):
        model = tiny(kind)
        if when == "before":
            torch.manual_seed(1)
            model.add_adapter(lora)
        with attach(model, config(NEAR)):
            if when == "after":
                torch.manual_seed(1)
                model.add_adapter(lora)
            found[when] = run(model, args)
            if when != "never":
                model.disable_adapters()
                assert torch.equal(run(model, args), found["never"])
                model.enable_adapters()
                assert torch.equal(run(model, args), found[when])
    assert torch.equal(found["before"], found["after"])
    assert float((found["before"] - found["never"]).abs().max()) > 1e-3


@torch.no_grad()
def test_group_offload_before_and_after_attach():
    model, args = tiny("wan"), inputs("wan", 900.0)
    with attach(model, config(NEAR)):
        expected = run(model, args)
    for before in (True, False):
        offloaded = tiny("wan")
        handle = None if before else attach(offloaded, config(NEAR))
        offloaded.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
        handle = attach(offloaded, config(NEAR)) if handle is None else handle
        assert torch.equal(run(offloaded, args), expected)
        handle.detach()


@torch.no_grad()
def test_a_copy_and_a_first_call_in_inference_mode():
    model, args = tiny("wan"), inputs("wan")
    with attach(model, config(Regime(window=(1, 3, 1)), tile=(3, 4, 4))):
        with torch.inference_mode():
            expected = run(model, args)
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin, args), expected)
        assert FPSAttentionHandle.of(twin).attached
        with torch.enable_grad():
            run(model, args).sum().backward()


def test_pipelines_with_two_transformers():
    pipe = tiny_pipeline("wan", transformer_2=tiny("wan", seed=1, num_layers=1), boundary_ratio=0.5)
    handle = attach(pipe, config(NEAR, Regime(), boundaries=(0.5,)))
    assert handle.models == (pipe.transformer, pipe.transformer_2)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}
    out = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).frames
    assert bool(out.isfinite().all())
    handle.detach()


def test_a_sequence_of_transformers():
    models = (tiny("wan"), tiny("wan", seed=1, num_layers=1))
    with attach(models, config(NEAR, Regime(), boundaries=(0.5,))) as handle:
        assert handle.models == models
    schedule = Schedule(
        config=SMALL, model=describe_model(models[0]), sampler="", steps=4, grid=(3, 2, 2), budget=0.5, provenance=""
    )
    attach(models, schedule).detach()


# ---- what is refused


@pytest.mark.parametrize("given", ["a folder", None, (), torch.nn.Identity()])
def test_what_is_no_transformer_is_refused_by_name(given):
    with pytest.raises(TypeError, match=f"cannot attach to {type(given).__name__}; supported are WanTransformer3D"):
        attach(given, SMALL)
    with pytest.raises(TypeError, match="WanPipeline holds no transformer; supported are"):
        attach(WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None), SMALL)


def test_a_preset_takes_the_schedulers_shift():
    pipe = tiny_pipeline("wan")
    assert PRESETS["wan2.1-14b"].config.shift == 5.0
    with attach(pipe, "wan2.1-14b") as handle:
        assert handle.config == dataclasses.replace(PRESETS["wan2.1-14b"].config, shift=3.0)
    with attach(pipe.transformer, "wan2.1-14b") as handle:
        assert handle.config == PRESETS["wan2.1-14b"].config


def test_another_shift_is_refused():
    pipe = tiny_pipeline("wan")
    staged = config(NEAR, Regime(), boundaries=(0.5,), shift=5.0)
    with pytest.raises(ValueError, match="scheduler has shift 3, but these settings map steps to noise levels by 5"):
        attach(pipe, staged)
    attach(pipe, dataclasses.replace(staged, shift=3.0)).detach()
    attach(pipe, dataclasses.replace(SMALL, shift=5.0)).detach()  # one regime knows no boundary


def test_a_schedule_of_another_model_or_sampler_is_refused():
    pipe = tiny_pipeline("wan")
    schedule = Schedule(
        config=config(NEAR, Regime(), boundaries=(0.5,)),
        model=describe_model(pipe),
        sampler="UniPCMultistepScheduler",
        steps=4,
        grid=(3, 2, 2),
        budget=0.5,
        provenance="a test",
    )
    assert schedule.model == "WanTransformer3DModel, 1 layers, 2 heads of 32"
    attach(pipe, schedule).detach()
    attach(pipe.transformer, schedule).detach()
    with pytest.raises(ValueError, match="calibrated with model"):
        attach(tiny("wan", num_layers=2), schedule)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="calibrated with sampler 'UniPC"):
        attach(pipe, schedule)


def test_unknown_presets_and_layers_are_refused():
    with pytest.raises(ValueError, match="no preset 'best'; the presets are"):
        attach(tiny("wan"), "best")
    with pytest.raises(ValueError, match="dense_layers must be below the 2 layers"):
        attach(tiny("wan"), config(NEAR, dense_layers=(2,)))


@torch.no_grad()
def test_dense_layers_keep_the_model_s_own_attention():
    model, args = tiny("wan"), inputs("wan")
    expected = run(model, args)
    with attach(model, config(NEAR, dense_layers=(0, 1))):
        assert_close(run(model, args), expected)
    with attach(model, config(NEAR, dense_layers=(0,))):
        assert float((run(model, args) - expected).abs().max()) > 1e-5


def test_a_window_larger_than_the_grid_is_warned_of_once(caplog):
    model = tiny("wan")
    config = FPSAttentionConfig(tile=(2, 2, 2), block=64, regimes=(Regime(window=(3, 5, 7), e4m3=False),))
    with attach(model, config), torch.no_grad():
        for _ in range(2):
            model(**tiny_inputs("wan", height=10, width=10))
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
            "window (3, 5, 7) is larger than the grid of (3, 5, 5) tokens in tiles of (2, 2, 2): it reads every tile. "
            "Make a larger video, or take a smaller window, or smaller tiles"
        ]
        model(**tiny_inputs("wan", height=10, width=32))  # 8 tiles wide: no longer
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1


def test_presets_run():
    for name, preset in PRESETS.items():
        kind = name.split("-")[0] if name.startswith(("cogvideox", "hunyuan")) else "wan"
        model = tiny(kind, num_layers=1)
        with torch.no_grad(), attach(model, preset.config):
            assert bool(run(model, inputs(kind)).isfinite().all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.compile's own
@torch.no_grad()
@pytest.mark.parametrize("regime", [NEAR, Regime(window=(1, 3, 1))])
@pytest.mark.parametrize("kind", ["wan", "cogvideox"])  # HunyuanVideo's prompt has its length read
def test_compiles_to_one_graph_with_inductor(kind, regime):
    model, args = tiny(kind, num_layers=1), inputs(kind)
    torch.compiler.reset()
    with attach(model, config(regime)) as handle:
        expected = run(model, args)
        handle.begin_step(0)
        assert_close(run(torch.compile(model, fullgraph=True), args), expected, atol=1e-4)
    torch.compiler.reset()


# ---- hardware


class OnAGpu:
    """What ``check_hardware`` looks at of a transformer on a GPU."""

    def __init__(self, dim=128):
        self.config = SimpleNamespace(attention_head_dim=dim)

    def parameters(self):
        yield SimpleNamespace(device=torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch):
    def make(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")

    return make


def test_a_gpu_without_e4m3_is_refused_unless_what_runs_instead_was_asked_for(gpu):
    gpu((8, 0))
    with pytest.raises(
        UnsupportedHardwareError, match=r"needs compute capability 8\.9 .*; found a card, 8\.0\. Use"
    ) as no:
        check_hardware(config(Regime()), OnAGpu())
    assert "backend='triton', which rounds in torch and multiplies in bfloat16" in str(no.value)
    check_hardware(config(Regime(), backend="triton"), OnAGpu())
    check_hardware(config(Regime(window=(1, 1, 1), e4m3=False)), OnAGpu())


def test_a_head_size_or_a_scale_without_a_kernel_is_refused(gpu):
    gpu((9, 0))
    check_hardware(config(Regime()), OnAGpu())
    with pytest.raises(
        UnsupportedHardwareError, match=r"no E4M3 kernel takes this call; found .*head_dim.*96.*Use backend="
    ):
        check_hardware(config(Regime()), OnAGpu(dim=96))
    with pytest.raises(UnsupportedHardwareError, match=r"found scales='token'\. Use backend='reference'"):
        check_hardware(config(Regime(scales="token")), OnAGpu())
    check_hardware(config(Regime(scales="token"), backend="reference"), OnAGpu(dim=96))
