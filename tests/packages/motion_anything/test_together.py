"""What users combine with the method and its models: each row of the README's "works together with" is a test."""

import copy
import threading
import warnings

import accelerate
import pytest
import torch
from hone_core.testing import assert_close
from hone_motion_anything import MotionAnythingConfig, MotionAnythingHandle, attach, tiny
from hone_motion_anything.config import UnmaskConfig
from hone_motion_anything.decoding import draw_motion, passes, unmask
from hone_motion_anything.masking import masked_loss
from hone_motion_anything.method import Condition
from hone_motion_anything.models import draw_mask
from hone_motion_anything.published import MaskTransformer, MaskTransformer2D, ResidualTransformer, refine
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

ALWAYS = MotionAnythingConfig(p_attention=1.0)


@pytest.fixture
def model(small):
    return tiny(small.transformer)


def published(kind=MaskTransformer, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(20, 12, 24, 32, 1, 3, **options).eval()


def batch(music=False, seed=0):
    """Motions of 12, 9, 5 and 12 time steps."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(16, (4, 12, 6), generator=g)
    heard = torch.randn(4, 12, 35, generator=g) if music else None
    valid = torch.arange(12) < torch.tensor([[12], [9], [5], [12]])
    return ids, Condition(text=torch.randn(4, 8, generator=g), music=heard), valid


def texts(width=512):
    g = torch.Generator().manual_seed(0)
    ids, valid = torch.randint(20, (2, 7, 1), generator=g), torch.arange(7) < torch.tensor([[7], [4]])
    return ids, Condition(text=torch.randn(2, width, generator=g)), valid


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def all_of(net, arguments):
    """Everything that is asked of a model: logits, attention, a mask and a motion."""
    with torch.no_grad():
        logits = net(*arguments)
    own = net if hasattr(type(net), "scores") else net.scores.__self__
    mask, _ = draw_mask(net, *arguments, generator())
    motion = draw_motion(own, *arguments[1:], generator(), UnmaskConfig(steps=3, remask="attention"))
    return [logits, *own.scores(*arguments), mask, motion]


def same(found, wanted, atol=0.0):
    for one, other in zip(found, wanted, strict=True):
        if atol and one.is_floating_point():
            assert_close(one, other, atol=atol)
        else:
            assert torch.equal(one, other)


def differ(found, wanted):
    return not torch.allclose(found[0], wanted[0], atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_before_or_after_attach(model, when):
    kinds = [batch(), batch(music=True)]
    with torch.no_grad():
        plain = [model(*arguments) for arguments in kinds]
    with attach(model, ALWAYS):
        wanted = [all_of(model, arguments) for arguments in kinds]
    if when == "before":
        compiled = torch.compile(model, fullgraph=True)
        handle = attach(compiled, ALWAYS)
    else:
        handle = attach(model, ALWAYS)
        compiled = torch.compile(model, fullgraph=True)
    assert handle.models == (model,)
    for arguments, want in zip(kinds, wanted, strict=True):
        found = all_of(compiled, arguments)
        assert_close(found[0], want[0], atol=1e-5)
        same(found[1:4], want[1:4])
    handle.detach()
    with torch.no_grad():
        for arguments, want in zip(kinds, plain, strict=True):
            assert_close(compiled(*arguments), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["method", "momask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_dtype_take_a_condition_of_float32(model, kind, dtype):
    ids, condition, valid = batch(music=True) if kind == "method" else texts()
    net = (model if kind == "method" else published()).to(dtype)
    told = Condition(
        text=condition.text.to(dtype), music=None if condition.music is None else condition.music.to(dtype)
    )
    with torch.no_grad():
        found, wanted = net(ids, condition, valid), net(ids, told, valid)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)
    same(net.scores(ids, condition, valid), net.scores(ids, told, valid))
    with attach(net, ALWAYS):
        mask, rows = draw_mask(net, ids, condition, valid, generator())
    assert rows.all()
    assert not mask[~valid].any()
    drawn = unmask(
        lambda now: passes(net, now, condition, valid, 4.0, 2.0), valid, ids.shape[2], net.mask_id, generator(), steps=3
    )
    assert (drawn[valid] < net.mask_id).all()
    assert (drawn[~valid] == net.pad_id).all()
    assert masked_loss(net, ids, condition, valid, mask, generator()).isfinite()


def test_autocast_trains_as_float32_does(model):
    arguments = batch(music=True)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), attach(model, ALWAYS):
            mask, rows = draw_mask(model, *arguments, generator())
            # One mask for both: near ties of attention are broken otherwise in 16 bits.
            found.append((mask, masked_loss(model, *arguments, found[0][0] if found else mask, generator())))
        assert rows.all()
    assert torch.equal(found[0][0].sum((1, 2)), found[1][0].sum((1, 2)))
    grads = [torch.autograd.grad(loss, model.heads)[0] for _, loss in found]
    assert grads[1].dtype == torch.float32
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 5e-2
    assert_close(found[1][1].detach(), found[0][1].detach(), atol=5e-2)


def test_several_threads_on_one_model(model):
    kinds = [batch(seed=seed) for seed in (1, 2)]
    with attach(model, ALWAYS) as handle:
        wanted = [all_of(model, arguments) for arguments in kinds]
        found, ready, apart = {}, threading.Barrier(3), threading.Event()

        def work(number):
            ready.wait(60)
            found[number] = [all_of(model, kinds[number]) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        with handle.disabled():  # in this thread alone
            ready.wait(60)
            apart.set()
            assert not draw_mask(model, *kinds[0], generator())[1].any()
            for thread in threads:
                thread.join()
    for number, want in enumerate(wanted):
        assert len(found[number]) == 3
        for each in found[number]:
            same(each, want)


def test_a_second_prompt_finds_nothing_of_the_first(model):
    first, second = batch(seed=1), batch(music=True, seed=2)
    with attach(model, ALWAYS):
        alone = all_of(copy.deepcopy(model), second)
        wanted = all_of(model, first)
        same(all_of(model, second), alone)
        same(all_of(model, first), wanted)


def test_an_error_in_between_leaves_nothing(model):
    arguments = batch()
    plain = draw_mask(model, *arguments, generator())

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.blocks[0].temporal.attention.q.register_forward_pre_hook(stop)
    handle = attach(model, ALWAYS)
    with pytest.raises(KeyboardInterrupt), handle, handle.disabled():
        model(*arguments)
    with attach(model, ALWAYS), pytest.raises(KeyboardInterrupt):
        draw_mask(model, *arguments, generator())
    hook.remove()
    assert not handle.attached
    same(draw_mask(model, *arguments, generator()), plain)
    with attach(model, ALWAYS):
        assert draw_mask(model, *arguments, generator())[1].all()


@pytest.mark.parametrize("how", ["blocks", "model"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_the_model_or_its_blocks(model, how, reentrant):
    arguments = batch(music=True)
    model.train()  # with dropout
    found = []
    with attach(model, ALWAYS):
        for checkpointed in (False, True):
            net = copy.deepcopy(model)
            parts = list(net.blocks) if how == "blocks" else [net]
            for part in parts if checkpointed else []:
                run = part.forward

                def again(*args, run=run):
                    # A reentrant checkpoint wants an input with a gradient.
                    needed = torch.zeros((), requires_grad=True)
                    return checkpoint(lambda _, *rest: run(*rest), needed, *args, use_reentrant=reentrant)

                part.forward = again
            mask, _ = draw_mask(net, *arguments, generator())
            torch.manual_seed(0)
            masked_loss(net, *arguments, mask, generator(1)).backward()
            found.append([parameter.grad for parameter in net.parameters() if parameter.grad is not None])
    assert len(found[0]) > 10
    same(found[1], found[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_the_draws_is_refused(model, reentrant):
    arguments = batch()
    needed, g = torch.zeros((), requires_grad=True), generator()
    mask, _ = draw_mask(model, *arguments, generator())
    loss = checkpoint(lambda _: masked_loss(model, *arguments, mask, g), needed, use_reentrant=reentrant)
    with pytest.raises(
        RuntimeError, match=r"masked_loss ran again within backward.*Checkpoint the model or its blocks"
    ):
        loss.backward()

    def both(_):
        return masked_loss(model, *arguments, draw_mask(model, *arguments, g)[0], g)

    with pytest.raises(RuntimeError, match="draw_mask ran again within backward"):
        checkpoint(both, needed, use_reentrant=reentrant).backward()


def test_copies_and_whole_saved_models_have_the_method_and_a_handle(model, tmp_path):
    arguments = batch(music=True)
    plain = all_of(copy.deepcopy(model), arguments)
    with pytest.raises(ValueError, match="nothing is attached to this MotionTransformer"):
        MotionAnythingHandle.of(model)
    handle = attach(model, ALWAYS)
    wanted = all_of(model, arguments)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        same(all_of(twin, arguments), wanted)
        with pytest.raises(ValueError, match=r"of a copy or a loaded model is MotionAnythingHandle\.of\(model\)"):
            attach(twin)
        own = MotionAnythingHandle.of(twin)
        assert own.config == ALWAYS
        with own.disabled():
            same(all_of(twin, arguments), plain)
            same(all_of(model, arguments), wanted)
        own.detach()
        same(all_of(twin, arguments), plain)
    assert handle.attached
    handle.detach()
    same(all_of(model, arguments), plain)


def test_weights_saved_and_loaded_while_attached(model, small, tmp_path):
    arguments = batch()
    before = model.state_dict().keys()
    with attach(model, ALWAYS):
        wanted = all_of(model, arguments)
        assert model.state_dict().keys() == before
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = tiny(small.transformer, seed=1)
        handle = attach(other, ALWAYS)
        assert differ(all_of(other, arguments), wanted)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        same(all_of(other, arguments), wanted)
        assert handle.attached


@pytest.mark.parametrize("when", ["before", "after", "on the PeftModel"])
def test_lora_before_and_after_attach(model, when):
    arguments = batch(music=True)
    settings = LoraConfig(r=2, target_modules=["q", "k", "text_in", "music_in"], init_lora_weights=False)
    base = copy.deepcopy(model)
    attach(base, ALWAYS)
    plain = all_of(base, arguments)
    handle = attach(model, ALWAYS) if when == "before" else None
    wrapped = get_peft_model(model, settings).eval()
    handle = handle or attach(wrapped if when == "on the PeftModel" else model, ALWAYS)
    assert handle.models == (model,)
    found = all_of(wrapped, arguments)
    assert differ(found, plain)
    assert differ(found[1:], plain[1:])  # what the condition attends to is the adapted model's
    assert torch.equal(draw_mask(model, *arguments, generator())[0], found[3])
    with wrapped.disable_adapter():
        same(all_of(wrapped, arguments), plain)
    loss = masked_loss(wrapped, *arguments, found[3], generator())
    loss.backward()
    assert {name.split(".")[-3] for name, p in wrapped.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    wrapped.merge_adapter()
    same(all_of(wrapped, arguments)[:3], found[:3], atol=1e-5)
    handle.detach()
    assert not draw_mask(wrapped, *arguments, generator())[1].any()


@torch.no_grad()
def test_lora_on_published_transformers():
    arguments = texts()
    for target in ("self_attn", "linear1", "cond_emb"):
        model = published()
        plain = [model(*arguments), *model.scores(*arguments)]
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False)).eval()
        found = [wrapped(*arguments), *model.scores(*arguments)]
        assert differ(found, plain), target
        with wrapped.disable_adapter():
            same([wrapped(*arguments), *model.scores(*arguments)], plain, atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, that it merged self_attn's out_proj already
            wrapped.merge_adapter()
        same([wrapped(*arguments), *model.scores(*arguments)], found, atol=1e-5)
    # The level's table is read by a call, which a LoRA changes.
    ids, condition, valid = arguments
    residual = published(ResidualTransformer, levels=4)
    plain = residual(ids[..., None], condition, valid)
    wrapped = get_peft_model(residual, LoraConfig(r=2, target_modules=["quant_emb"], init_lora_weights=False)).eval()
    found = wrapped(ids[..., None], condition, valid)
    assert (found - plain).abs().max() > 1e-4
    wrapped.merge_adapter()
    assert_close(wrapped(ids[..., None], condition, valid), found, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", [MaskTransformer, MaskTransformer2D, ResidualTransformer])
def test_a_layer_that_torchs_attention_would_not_call_is_refused(kind):
    ids, condition, valid = texts()
    model = published(kind)
    get_peft_model(model, LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False))
    if kind is ResidualTransformer:
        ids = ids[..., None]
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.out_proj is a Linear now.*peft's LoRA takes self_attn"
    ):
        model(ids, condition, valid)
    if kind is not ResidualTransformer:
        with attach(model, ALWAYS), pytest.raises(ValueError, match="would do nothing"):
            draw_mask(model, ids, condition, valid, generator())


class Rounded(nn.Module):
    """What quantisation puts in place of a linear layer: another module, without weights of its name."""

    def __init__(self, layer):
        super().__init__()
        self.step = float(layer.weight.abs().max()) / 127
        self.register_buffer("numbers", (layer.weight / self.step).round().to(torch.int8))
        self.offset = layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.numbers.to(x.dtype) * self.step, self.offset)


def quantise(model):
    """Every linear layer but those that torch's attention reads the weights of."""
    exact = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Rounded(layer))
            weight = exact.get_submodule(name).weight
            weight.data = model.get_submodule(name).numbers.float() * model.get_submodule(name).step
    return exact


@torch.no_grad()
def test_quantised_before_and_after_attach(model):
    arguments = batch(music=True)
    with attach(model, ALWAYS):
        exact = quantise(model)
        wanted = all_of(exact, arguments)
        same(all_of(model, arguments), wanted)
    with attach(model, ALWAYS):
        same(all_of(model, arguments), wanted)
    ids, condition, valid = texts()
    net, residual = published(), published(ResidualTransformer, levels=4)
    exact, exact_residual = quantise(net), quantise(residual)
    assert torch.equal(net(ids, condition, valid), exact(ids, condition, valid))
    levels = refine(residual, ids, condition, valid, generator())
    assert torch.equal(levels, refine(exact_residual, ids, condition, valid, generator()))


@torch.no_grad()
def test_offloaded_by_accelerate(model):
    arguments = batch(music=True)
    settings = UnmaskConfig(steps=3)

    def made(net):
        return [net(*arguments), draw_motion(net, *arguments[1:], generator(), settings)]

    wanted = made(model)
    attach(model, ALWAYS)
    mask = draw_mask(model, *arguments, generator())
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.time_emb.is_meta
    same(made(model), wanted)
    with pytest.raises(ValueError, match=r"weights are on meta.*remove_hook_from_module\(model, recurse=True\)"):
        draw_mask(model, *arguments, generator())
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    same(draw_mask(model, *arguments, generator()), mask)

    arguments = texts()
    net = published()
    wanted = [net(*arguments), *net.scores(*arguments)]
    bare = accelerate.cpu_offload(copy.deepcopy(net), execution_device="cpu")
    with pytest.raises(ValueError, match=r"Offload with preload_module_classes=\['MultiheadAttention'\]"):
        bare(*arguments)
    told = accelerate.cpu_offload(
        copy.deepcopy(net), execution_device="cpu", preload_module_classes=["MultiheadAttention"]
    )
    same([told(*arguments), *told.scores(*arguments)], wanted)
    layered = accelerate.cpu_offload(net, execution_device="cpu", preload_module_classes=["TransformerEncoderLayer"])
    assert torch.equal(layered(*arguments), wanted[0])
    with pytest.raises(ValueError, match="reads them without the call"):
        layered.scores(*arguments)


def test_a_trainers_wrapper(model, tmp_path):
    arguments = batch()
    with attach(model, ALWAYS):
        mask = draw_mask(model, *arguments, generator())[0]
        masked_loss(model, *arguments, mask, generator(1)).backward()
    wanted = model.heads.grad.clone()
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        with attach(wrapped, ALWAYS) as handle:
            assert handle.models == (model,)
            found = draw_mask(wrapped, *arguments, generator())[0]
            assert torch.equal(found, mask)
            masked_loss(wrapped, *arguments, found, generator(1)).backward()
        assert_close(model.heads.grad, wanted, atol=1e-7)
    finally:
        torch.distributed.destroy_process_group()


def test_training_after_inference_mode(model):
    arguments = batch(music=True)
    with attach(model, ALWAYS):
        with torch.inference_mode():
            model(*arguments)
            inside = draw_mask(model, *arguments, generator())[0]
        mask = draw_mask(model, *arguments, generator())[0]
        assert torch.equal(mask, inside)
        masked_loss(model, *arguments, mask, generator()).backward()
    assert model.heads.grad.abs().sum() > 0
