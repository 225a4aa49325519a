import copy
import io
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig, WanPipeline, WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.attention_processor import AttnProcessor2_0, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from hone_video.architectures import FULL_SIZE, full_size, tiny, tiny_inputs
from hone_video.attachment import Method, reorder_patches
from hone_video.grids import Order
from hone_video.handle import SUPPORTED, VideoHandle, attach_kernel, attach_method
from hone_video.host import Host
from hone_video.orders import inverse_order, token_order
from torch import nn

KINDS = pytest.mark.parametrize("kind", ["wan", "cogvideox", "hunyuan"])


@dataclass(frozen=True)
class Settings:
    order: Order = "gilbert"
    run: int | None = None
    dense_steps: int = 0
    dense_layers: tuple[int, ...] = ()
    min_tokens: int = 0


class Runs(Method):
    """Tokens attend to those of their own run of the order, and to the text; without a run, to all."""

    name = "runs"

    def __init__(self, config):
        self.config, self.order, self.tile = config, config.order, (2, 2, 4)
        self.dense_layers, self.min_tokens = config.dense_layers, config.min_tokens
        self.counts_steps = config.dense_steps > 0

    def plan(self, step, timestep):
        return None if step < self.config.dense_steps else "sparse"

    def attend(self, q, k, v, *, plan, layer, grid, text_tokens):
        assert plan == "sparse"
        assert q.shape[2] == grid[0] * grid[1] * grid[2] + text_tokens
        if self.config.run is None:
            return F.scaled_dot_product_attention(q, k, v)
        place = torch.arange(q.shape[2])
        text = place >= q.shape[2] - text_tokens
        number = place // self.config.run
        mask = (number[:, None] == number) | text | text[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def measure(self, q, k, v, *, scale=1, **where):
        return self.attend(q, k, v, **where), scale * where["layer"]


DENSE, SPARSE = Settings(), Settings(run=16)


def attach(model, config):
    return attach_method(model, Runs(config), VideoHandle)


def run(model, arguments):
    with torch.no_grad():
        return model(**arguments, return_dict=False)[0]


TEXT = {"wan": 0, "cogvideox": 8, "hunyuan": 5}
"""Tokens of the text inside self-attention: HunyuanVideo's without its padding."""


def blocks(model):
    if hasattr(model, "single_transformer_blocks"):
        return [*model.transformer_blocks, *model.single_transformer_blocks]
    return model.blocks if hasattr(model, "blocks") else model.transformer_blocks


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def is_close(actual, expected):
    return torch.allclose(actual, expected, atol=2e-5, rtol=2e-5)


def differs(actual, expected):
    return float((actual - expected).abs().max()) > 1e-4


# Attention over all tokens is the model's own, in whatever order they are.


@KINDS
@pytest.mark.parametrize("order", ["gilbert", "morton", "tile", "raster"])
def test_attention_over_all_tokens_is_the_models_own(kind, order):
    model, arguments = tiny(kind), tiny_inputs(kind)
    expected = run(model, arguments)
    with attach(model, Settings(order=order)):
        close(run(model, arguments), expected)
        close(model(**arguments).sample.detach(), expected)
    with attach(model, Settings(order=order, run=16)):
        assert differs(run(model, arguments), expected)


def test_patches_are_reordered_by_hand():
    # One frame, 2 x 3 patches of 1 x 2 x 1 latents; the last row of latents is no whole patch.
    video = torch.arange(15).view(1, 1, 1, 5, 3)
    order = torch.tensor([5, 0, 1, 4, 2, 3])
    moved = reorder_patches(video, order, (1, 2, 3), (1, 2, 1))
    assert moved[0, 0, 0].tolist() == [[8, 0, 1], [11, 3, 4], [7, 2, 6], [10, 5, 9]]
    back = reorder_patches(moved, inverse_order(order), (1, 2, 3), (1, 2, 1))
    assert torch.equal(back, video[:, :, :, :4])


@KINDS
@pytest.mark.parametrize("size", [(1, 4, 4), (2, 6, 10), (5, 8, 4)])
def test_one_attachment_serves_every_resolution_and_batch(kind, size):
    model = tiny(kind)
    frames, height, width = size
    arguments = tiny_inputs(kind, batch=3, frames=frames, height=height, width=width)
    expected = run(model, arguments)
    with attach(model, DENSE):
        run(model, tiny_inputs(kind))
        close(run(model, arguments), expected)


def test_wan_per_token_timesteps():
    model, arguments = tiny("wan"), tiny_inputs("wan")
    arguments["timestep"] = torch.randint(0, 1000, (2, 3 * 5 * 7), generator=torch.Generator().manual_seed(1))
    expected = run(model, arguments)
    with attach(model, DENSE):
        close(run(model, arguments), expected)
        positional = [arguments[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")]
        with torch.no_grad():
            close(model(*positional, return_dict=False)[0], expected)


def test_wan_image_conditioned():
    model = tiny("wan", in_channels=9, image_dim=16, added_kv_proj_dim=64)
    arguments = tiny_inputs("wan")
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
    model, arguments = tiny("cogvideox", **config), tiny_inputs("cogvideox", frames=4, height=8, width=12)
    if "patch_size_t" in config:
        arguments["image_rotary_emb"] = get_3d_rotary_pos_embed(32, ((0, 0), (4, 6)), (4, 6), 2)
    else:
        arguments["image_rotary_emb"] = None
    expected = run(model, arguments)
    with attach(model, DENSE):
        close(run(model, arguments), expected)


class Rotates(Runs):
    """The same, which rotates q and k itself where they are not yet."""

    rotates = True

    def attend(self, q, k, v, *, rope, **where):
        self.got = rope
        if rope is not None:
            cos, sin = (x.repeat_interleave(2, -1).double() for x in rope)

            def turn(x):
                other = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
                return (x.double() * cos + other.double() * sin).to(x.dtype)

            q, k = turn(q), turn(k)
        return super().attend(q, k, v, **where)


@KINDS
def test_a_method_that_rotates_gets_tables_in_its_order(kind):
    model, arguments = tiny(kind), tiny_inputs(kind)
    with attach(model, SPARSE):
        expected = run(model, arguments)
    method = Rotates(SPARSE)
    with attach_method(model, method, VideoHandle):
        close(run(model, arguments), expected)
    cos, sin = method.got
    text = TEXT[kind]
    assert cos.shape == sin.shape == (3 * 5 * 7 + text, 16)
    assert bool((cos[105:] == 1).all() & (sin[105:] == 0).all())


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight:UserWarning"
)  # float32 norms, 16-bit inputs
@torch.no_grad()
def test_norms_in_more_bits_are_rotated_before_they_are_rounded():
    model, arguments = tiny("wan"), tiny_inputs("wan")
    for block in model.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            # As RMSNorm is under autocast on a GPU.
            norm.register_forward_hook(lambda module, args, output: output.float())
    outs = []
    for method in (Runs(SPARSE), Rotates(SPARSE)):
        with attach_method(model, method, VideoHandle), torch.autocast("cpu", torch.bfloat16):
            outs.append(run(model, arguments))
    assert torch.equal(*outs)
    assert method.got is None


@torch.no_grad()
def test_a_model_without_rotary_embedding_has_no_tables():
    method = Rotates(SPARSE)
    model = tiny("cogvideox", use_rotary_positional_embeddings=False)
    arguments = {k: v for k, v in tiny_inputs("cogvideox").items() if k != "image_rotary_emb"}
    with attach_method(model, method, VideoHandle):
        run(model, arguments)
    assert method.got is None


@pytest.mark.parametrize("order", ["gilbert", "tile"])
@pytest.mark.parametrize(
    "config",
    [
        {"guidance_embeds": False},
        {"image_condition_type": "latent_concat"},
        {"patch_size": 1, "patch_size_t": 3},
        {"num_layers": 0, "num_single_layers": 2},
        {"num_layers": 2, "num_single_layers": 0},
    ],
    ids=str,
)
def test_hunyuan_variants(config, order):
    model, arguments = tiny("hunyuan", **config), tiny_inputs("hunyuan")
    expected = run(model, arguments)
    with attach(model, Settings(order=order)):
        close(run(model, arguments), expected)
    with attach(model, Settings(order=order, run=16)):
        assert differs(run(model, arguments), expected)
    assert torch.equal(run(model, arguments), expected)


def test_padding_of_a_prompt_is_cut_off():
    model, arguments = tiny("hunyuan"), tiny_inputs("hunyuan")
    method = Rotates(SPARSE)
    with attach_method(model, method, VideoHandle):
        padded = run(model, arguments)
        short = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"][:, :5]}
        short["encoder_attention_mask"] = arguments["encoder_attention_mask"][:, :5]
        close(run(model, short), padded)
        assert len(method.got[0]) == 105 + 5
        arguments["encoder_attention_mask"][1, 3:] = 0
        with pytest.raises(ValueError, match=r"must have equally many tokens, .* has \[5, 3\]. Run prompts one by one"):
            run(model, arguments)


def test_tokens_that_are_treated_by_their_place_keep_it():
    model = tiny("hunyuan", image_condition_type="token_replace")
    with pytest.raises(ValueError, match=r"runs orders tokens, but .* \(image_condition_type='token_replace'\)"):
        attach(model, SPARSE)
    arguments = tiny_inputs("hunyuan")
    expected = run(model, arguments)
    with attach(model, Settings(order="raster")):
        close(run(model, arguments), expected)
    assert torch.equal(run(model, arguments), expected)


@KINDS
def test_fused_projections_before_attach(kind):
    model, arguments = tiny(kind), tiny_inputs(kind)
    expected = run(model, arguments)
    model.fuse_qkv_projections()
    with attach(model, DENSE):
        close(run(model, arguments), expected)


def test_bfloat16_within_its_rounding():
    model, arguments = tiny("wan").to(torch.bfloat16), tiny_inputs("wan")
    arguments = {name: x.bfloat16() if x.is_floating_point() else x for name, x in arguments.items()}
    expected = run(model, arguments)
    with attach(model, DENSE):
        out = run(model, arguments)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)


@KINDS
def test_tokens_are_reordered_once_and_outside_the_blocks(kind):
    model, arguments = tiny(kind), tiny_inputs(kind)
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
    model, arguments = tiny("wan"), tiny_inputs("wan")
    video = arguments["hidden_states"]
    with torch.no_grad():
        expected, tables = model.patch_embedding(video), model.rope(video)
        with attach(model, SPARSE):
            run(model, arguments)
            assert torch.equal(model.patch_embedding(video), expected)
            assert all(torch.equal(a, b) for a, b in zip(model.rope(video), tables, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_embedding_layers_are_the_models_own_after_a_forward_that_raised(compiled):
    model, arguments = tiny("wan", num_layers=1), tiny_inputs("wan")
    video = arguments["hidden_states"]

    def fail(*_):
        raise RuntimeError("out of memory")

    with torch.no_grad(), attach(model, SPARSE) as handle:
        with handle.disabled():
            expected, tables = model.patch_embedding(video), model.rope(video)
        before = run(model, arguments)
        call = torch.compile(model, backend="eager") if compiled else model
        broken = model.blocks[0].ffn.register_forward_pre_hook(fail)  # of later ones dynamo takes no notice
        with pytest.raises(RuntimeError, match="out of memory"):
            run(call, arguments)
        broken.remove()
        assert torch.equal(model.patch_embedding(video), expected)
        assert all(torch.equal(a, b) for a, b in zip(model.rope(video), tables, strict=True))
        assert torch.equal(run(model, arguments), before)


@KINDS
def test_inputs_that_are_no_latents_or_missing(kind):
    model, arguments = tiny(kind), tiny_inputs(kind)
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


# Coming and going.


@KINDS
def test_detach_restores_everything(kind):
    model, arguments = tiny(kind), tiny_inputs(kind, frames=4, height=16, width=16)
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
    model, arguments = tiny(kind), tiny_inputs(kind, frames=4, height=16, width=16)
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
    model, arguments = tiny(kind), tiny_inputs(kind, frames=4, height=16, width=16)
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
        own = VideoHandle.of(other)
        assert own.attached
        assert own.config == SPARSE
        own.detach()
        assert torch.equal(run(other, arguments), expected)
        assert hook_count(other) == hook_count(model)
        with pytest.raises(ValueError, match="nothing is attached to this"):
            VideoHandle.of(other)


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
    model, arguments = Renamed(**tiny("wan").config), tiny_inputs("wan")
    expected = run(model, arguments)
    with attach(model, DENSE):
        close(run(model, arguments), expected)
    assert all(issubclass(kind, nn.Module) for kind in SUPPORTED)


class OwnProcessor(WanAttnProcessor):
    pass


@KINDS
def test_a_foreign_processor_is_refused_and_nothing_is_attached(kind):
    model, arguments = tiny(kind), tiny_inputs(kind)
    foreign = OwnProcessor() if kind == "wan" else AttnProcessor2_0()
    block = blocks(model)[1]
    (block.attn if kind == "hunyuan" else block.attn1).set_processor(foreign)
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
        attach(model, Settings(dense_layers=(1, 2)))
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
    model, arguments = tiny("wan"), tiny_inputs("wan")
    with attach(model, SPARSE):
        with pytest.raises(RuntimeError, match="does not run under tensor parallelism"):
            model.blocks[0].attn1.processor._parallel_config = object()
        model.set_attention_backend("native")
        assert model.blocks[0].attn1.processor.original._attention_backend == "native"
        model.blocks[1].attn1.set_processor(WanAttnProcessor())
        with pytest.raises(RuntimeError, match="layer 1 was replaced after attach"):
            run(model, arguments)
    assert type(model.blocks[1].attn1.processor) is WanAttnProcessor


def test_an_attention_mask_is_refused():
    model, arguments = tiny("cogvideox"), tiny_inputs("cogvideox")
    with attach(model, SPARSE), pytest.raises(ValueError, match="attention_mask must be None"):
        run(model, {**arguments, "attention_kwargs": {"attention_mask": torch.ones(2, 113)}})
    arguments["image_rotary_emb"] = tuple(x[:-1] for x in arguments["image_rotary_emb"])
    with attach(model, SPARSE), pytest.raises(ValueError, match=r"one row per video token, 105 .*; got 104"):
        run(model, arguments)


# Steps.


@KINDS
def test_dense_steps_count_timesteps_not_calls(kind):
    model = tiny(kind)
    config = Settings(run=16, dense_steps=2)
    size = {"frames": 4, "height": 16, "width": 16}
    with attach(model, config) as handle:
        for video in range(2):
            for step, time in enumerate((999, 874, 749)):
                for seed in (0, 1):  # with and without the prompt
                    arguments = tiny_inputs(kind, seed=seed, timestep=time, **size)
                    with handle.disabled():
                        expected = run(model, arguments)
                    out = run(model, arguments)
                    assert handle.step == step, (video, step)
                    assert is_close(out, expected) == (step < 2)
        # A shorter second video, cut off at step 0, and a reset in between.
        handle.reset()
        assert handle.step == -1
        run(model, tiny_inputs(kind, timestep=499, **size))
        assert handle.step == 0


def test_a_video_that_starts_lower_has_to_be_announced():
    model = tiny("wan")
    with attach(model, Settings(run=16, dense_steps=2)) as handle:
        for time in (999, 874, 749):
            run(model, tiny_inputs("wan", timestep=time))
        run(model, tiny_inputs("wan", timestep=600))  # a new video, but it looks like the next step
        assert handle.step == 3
        handle.reset()
        run(model, tiny_inputs("wan", timestep=600))
        assert handle.step == 0


def test_two_transformers_count_the_steps_of_one_video():
    """The pair of a Wan2.2 pipeline; its denoising loop is run in test_sample."""
    first, second = tiny("wan", seed=0), tiny("wan", seed=1)
    config = Settings(run=16, dense_steps=1)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=first, transformer_2=second
    )
    handle = attach(pipe, config)
    assert handle.models == (first, second)
    size = {"frames": 4, "height": 16, "width": 16}
    with handle.record() as rows:
        for time, model in ((999, first), (874, first), (500, second)):
            run(model, tiny_inputs("wan", timestep=time, **size))
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
        for name, x in tiny_inputs(kind).items()
    }
    expected = run(model, arguments)
    assert expected.dtype == torch.bfloat16
    with attach(model, DENSE):
        torch.testing.assert_close(run(model, arguments), expected, atol=0.05, rtol=0.05)


def test_own_step_count_holds_in_its_thread():
    model = tiny("wan")
    with attach(model, Settings(run=16, dense_steps=2)) as handle:
        handle.begin_step(5)
        steps = []
        other = threading.Thread(target=lambda: (run(model, tiny_inputs("wan")), steps.append(handle.step)))
        other.start()
        other.join()
        assert (steps, handle.step) == ([0], 5)


@KINDS
def test_dense_layers_and_short_sequences(kind):
    # HunyuanVideo: two layers of two streams and one of one.
    model, arguments = tiny(kind, num_layers=2 if kind == "hunyuan" else 3), tiny_inputs(kind)
    expected = run(model, arguments)
    tokens = 105 + TEXT[kind]
    with attach(model, Settings(run=16, dense_layers=(0, 1, 2))):
        close(run(model, arguments), expected)
    with attach(model, Settings(run=16, min_tokens=tokens + 1)):
        assert torch.equal(run(model, arguments), expected)
    with attach(model, Settings(run=16, min_tokens=tokens, dense_layers=(0, 2))) as handle:
        with handle.record() as rows:
            assert differs(run(model, arguments), expected)
        assert [row.layer for row in rows] == [1]


# What other people do to a model that something is attached to.


@pytest.mark.parametrize(
    ("kind", "target"),
    [("wan", "proj_out"), ("wan", "patch_embedding"), ("cogvideox", "proj_out"), ("cogvideox", "patch_embed.proj")],
)
def test_adapters_on_any_module_after_attach(kind, target):
    peft = pytest.importorskip("peft")
    model, arguments = tiny(kind), tiny_inputs(kind)
    with attach(model, DENSE) as handle:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False))
        out = run(model, arguments)
        with handle.disabled():
            expected = run(model, arguments)
        close(out, expected)
        model.unload_lora()
        out = run(model, arguments)
    close(out, run(model, arguments))
    assert differs(out, expected)


@pytest.mark.parametrize(("kind", "name"), [("wan", "rope"), ("cogvideox", "patch_embed")])
def test_a_replaced_module_that_makes_positions_is_noticed(kind, name):
    model, arguments = tiny(kind), tiny_inputs(kind)
    expected = run(model, arguments)
    with attach(model, SPARSE):
        setattr(model, name, copy.deepcopy(getattr(model, name)))
        with pytest.raises(RuntimeError, match=f"{name} was replaced after attach"):
            run(model, arguments)
    assert torch.equal(run(model, arguments), expected)


@KINDS
def test_caches_over_steps_see_one_order(kind):
    """The first step runs the model's own attention, and what the cache keeps of it is used in the next."""
    model = tiny(kind, num_layers=3)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))

    def video():
        model._reset_stateful_cache()
        with model.cache_context("cond"):
            return [run(model, tiny_inputs(kind, timestep=time, seed=time)) for time in (999, 874, 749)]

    expected = video()
    model.disable_cache()
    assert differs(run(model, tiny_inputs(kind, timestep=749, seed=749)), expected[2])  # the cache was used
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with attach(model, Settings(dense_steps=1)):
        for ours, theirs in zip(video(), expected, strict=True):
            close(ours, theirs)


@KINDS
def test_threads_on_one_transformer_keep_apart(kind):
    model = tiny(kind)
    sizes = [(3, 10, 14), (2, 8, 12), (4, 6, 8)]
    inputs = [tiny_inputs(kind, frames=f, height=h, width=w, seed=f) for f, h, w in sizes]
    wrong = []

    def serve(arguments, expected):
        for _ in range(10):
            if not torch.equal(run(model, arguments), expected):
                wrong.append(arguments["hidden_states"].shape)

    with attach(model, Settings(run=16, dense_steps=1)) as handle:
        handle.begin_step(1)
        expected = [run(model, arguments) for arguments in inputs]
        handle.reset()
        first = [run(model, arguments) for arguments in inputs]

        def in_thread(arguments, sparse, dense):
            serve(arguments, dense)  # counted from 0 in each thread
            handle.begin_step(1)
            serve(arguments, sparse)

        threads = [threading.Thread(target=in_thread, args=row) for row in zip(inputs, expected, first, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert all(differs(a, b) for a, b in zip(expected, first, strict=True))


@KINDS
def test_records_under_offload(kind):
    model, arguments = tiny(kind), tiny_inputs(kind)
    with attach(model, SPARSE) as handle:
        expected = run(model, arguments)
        cpu_offload(model, execution_device=torch.device("cpu"))
        with handle.record(scale=3) as rows:
            assert torch.equal(run(model, arguments), expected)
    assert [tuple(row) for row in rows] == [(0, 0, 0, 0, 0), (0, 0, 0, 1, 3)]


def test_recording_twice_at_once_is_an_error():
    model, arguments = tiny("wan"), tiny_inputs("wan")
    with attach(model, SPARSE) as handle:
        with handle.record() as rows:
            with pytest.raises(RuntimeError, match=r"record\(\) is open already"), handle.record():
                pass
            run(model, arguments)
        assert [row.layer for row in rows] == [0, 1]
        with handle.record() as rows:
            run(model, arguments)
        assert len(rows) == 2


@KINDS
def test_training_after_inference_mode(kind):
    model, arguments = tiny(kind), tiny_inputs(kind, frames=5, height=4, width=6)
    with attach(model, SPARSE):
        with torch.inference_mode():
            expected = model(**arguments, return_dict=False)[0]
        out = model(**arguments, return_dict=False)[0]
        out.square().mean().backward()
    assert torch.equal(out, expected)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# HunyuanVideo's text has the length of its prompt, which no exported graph knows.
@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_export_before_the_first_forward(kind):
    model, arguments = tiny(kind), tiny_inputs(kind, frames=7, height=4, width=6)
    arguments["return_dict"] = False
    with attach(model, SPARSE):
        exported = torch.export.export(model, (), arguments, strict=False).module()
        with torch.no_grad():
            out, expected = exported(**arguments)[0], model(**arguments)[0]
    close(out, expected)
    with attach(tiny(kind), SPARSE) as handle, torch.no_grad():
        close(handle.models[0](**arguments)[0], expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_where_steps_are_counted_wants_to_be_told_the_step(strict):
    model, arguments = tiny("wan"), tiny_inputs("wan")
    arguments["return_dict"] = False
    with attach(model, Settings(run=16, dense_steps=1)) as handle:
        with pytest.raises(Exception, match=r"begin_step\(i\)"):
            torch.export.export(model, (), arguments, strict=strict)
        outputs = []
        for step in (0, 1):
            handle.begin_step(step)
            exported = torch.export.export(model, (), arguments, strict=False).module()
            with torch.no_grad():
                outputs.append(model(**arguments)[0])
                close(exported(**arguments)[0], outputs[-1])
    assert not torch.allclose(*outputs)


@KINDS
def test_a_checkpointed_backward_after_detach_says_so(kind):
    model, arguments = tiny(kind), tiny_inputs(kind)
    model.enable_gradient_checkpointing()
    handle = attach(model, SPARSE)
    loss = model(**arguments, return_dict=False)[0].square().mean()
    handle.detach()
    with pytest.raises(RuntimeError, match=r"runs again after detach\(\).*Call backward before detach"):
        loss.backward()


def test_processors_that_unfusing_brings_back():
    model, arguments = tiny("cogvideox"), tiny_inputs("cogvideox")
    expected = run(model, arguments)
    handle = attach(model, SPARSE)
    model.fuse_qkv_projections()
    handle.detach()
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, arguments), expected)
    with attach(model, DENSE):
        close(run(model, arguments), expected)
    with attach(model, SPARSE):
        assert differs(run(model, arguments), expected)
    assert all(type(processor) is CogVideoXAttnProcessor2_0 for processor in model.attn_processors.values())


def test_a_wrapper_says_what_to_pass():
    with pytest.raises(TypeError, match=r"cannot attach to DataParallel around a WanTransf.*its \.module; supported"):
        attach(nn.DataParallel(tiny("wan")), SPARSE)


def test_a_holder_of_a_transformer_says_what_to_pass():
    host = Host.untrained()
    with pytest.raises(
        TypeError, match=r"cannot attach to Host, which holds a WanTransf.* pass its \.transformer; supp"
    ):
        attach(host, SPARSE)
    attach(host.transformer, SPARSE).detach()


@KINDS
def test_another_kernel_takes_the_place_of_the_models_own(kind):
    model, inputs, calls = tiny(kind), tiny_inputs(kind), []
    if kind == "hunyuan":  # no kernel gets its mask
        inputs["encoder_attention_mask"] = torch.ones_like(inputs["encoder_attention_mask"])
    want = model(**inputs, return_dict=False)[0]

    def kernel(q, k, v):
        calls.append(q.shape)
        return F.scaled_dot_product_attention(q, k, v)

    with attach_kernel(model, kernel):
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], want, rtol=1e-5, atol=1e-5)
        with_kernel = len(calls)
        assert with_kernel >= 2
    assert torch.equal(model(**inputs, return_dict=False)[0], want)
    assert len(calls) == with_kernel
    with attach_kernel(model, lambda q, k, v: kernel(q, k, v) + 1):
        assert not torch.allclose(model(**inputs, return_dict=False)[0], want, atol=1e-3)
