import copy
import weakref

import pytest
import torch
from hone_core.testing import assert_close
from hone_knockout.config import Knockout, KnockoutConfig
from hone_knockout.evaluate import EvalConfig, configurations
from hone_knockout.method import global_after, windows
from hone_knockout.models import attach
from hone_knockout.prefix import PrefixRunner, as_exit
from hone_lm.tiny import FAMILIES, tiny, tiny_inputs

LAYERS = 6


def lv(after, layers=LAYERS):
    return KnockoutConfig(knockouts=(Knockout(kind="LV", layers=global_after(after, layers)),))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exits", [True, False])
@torch.no_grad()
def test_reuse_gives_what_a_whole_run_gives(family, exits):
    model, processor = tiny(family, layers=LAYERS)
    inputs = tiny_inputs(family, processor, ["What?", "And which of the two?"])
    runner = PrefixRunner(model, inputs, exits=exits)
    configs = [KnockoutConfig(), *(lv(i) for i in range(0, LAYERS, 2))]
    configs += [KnockoutConfig(knockouts=(Knockout(kind="VT", layers=w),)) for w in windows(LAYERS, stride=2)]
    configs.append(KnockoutConfig(knockouts=(Knockout(kind="VT", layers=(1,)),), exit=4))
    for config in configs:
        with attach(model, config):
            whole = model(**inputs, logits_to_keep=1).logits[:, -1]
        assert_close(runner.run(config), whole, what=config.label)
    assert torch.equal(runner.run(KnockoutConfig()), model(**inputs, logits_to_keep=1).logits[:, -1])


@pytest.mark.parametrize("exits", [False, True])
@torch.no_grad()
def test_what_the_two_stage_sweep_takes(exits):
    """The baseline and LV-K after every second of 28 layers, as ``eval --setting global1`` runs them; then i = L."""
    layers, ran = 28, []
    model, processor = tiny("llava_onevision", layers=layers)

    def note(module, args, kwargs, out):
        ran.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in model.model.language_model.layers]
    runner = PrefixRunner(model, tiny_inputs("llava_onevision", processor), exits=exits)
    found = configurations(EvalConfig(settings=("global1",)), layers)
    for entry in found.values():
        runner.run(entry.config)
    for hook in hooks:
        hook.remove()
    frame = runner.layouts[0].frame
    tokens, text = len(frame), int((frame < 0).sum())
    assert (tokens, text) == (99, 35)
    counts = runner.counts
    assert counts.layers_without == layers * len(found) == 420
    assert counts.rows_without == 420 * tokens
    # Baseline, last layer again as a check, and 28 + 26 + ... + 2 layers.
    assert counts.layers == len(ran) == 28 + 1 + 210
    assert counts.saving == pytest.approx(1.757, abs=1e-3)
    # What an exit leaves are the text rows; LV-K in all layers is none, as visual tokens need one layer.
    whole = 28 + 1 + 28 if exits else counts.layers
    assert counts.rows == sum(ran) == whole * tokens + (counts.layers - whole) * text
    # 64 of 99 tokens are visual; with more of them it nears 420 / 57.
    assert counts.rows_without / counts.rows == pytest.approx(3.461 if exits else 1.757, abs=1e-3)
    # The paper's i runs to L, where nothing is blocked: one run more without reuse, none with it.
    runner.run(KnockoutConfig(knockouts=(), exit=layers))
    assert counts.layers_without == 448
    assert counts.layers == len(ran) == 239
    assert counts.saving == pytest.approx(1.874, abs=1e-3)


@torch.no_grad()
def test_only_states_that_a_later_configuration_needs_are_kept():
    model, processor = tiny("qwen3_vl", layers=LAYERS)
    inputs = tiny_inputs("qwen3_vl", processor, ["What?", "And which of the two?"])
    early, late = lv(2), KnockoutConfig(knockouts=(Knockout(kind="VT", layers=(4,)),), exit=5)
    configs = [KnockoutConfig(), early, late, early]
    entering = []

    def note(module, args, kwargs):
        entering.append(weakref.ref(args[0] if args else kwargs["hidden_states"]))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.language_model.layers]
    runner, seen = PrefixRunner(model, inputs, configs), []
    for config in configs:
        logits = runner.run(config)
        with attach(model, config):
            assert_close(logits, model(**inputs, logits_to_keep=1).logits[:, -1], what=config.label)
        seen.append(runner.kept_layers)
        if not config.knockouts:
            size = inputs["input_ids"].numel() * model.config.text_config.hidden_size * 4
            assert runner.kept_bytes == 2 * size
            # No other reference to a state of the baseline is left, such as among its keyword arguments.
            alive = [index for index, ref in enumerate(entering[:LAYERS]) if ref() is not None]
            assert alive == [2, 4]
    for hook in hooks:
        hook.remove()
    assert seen == [(2, 4), (2, 4), (2,), ()]
    assert runner.kept_bytes == 0
    assert not any(ref() is not None for ref in entering[:LAYERS])
    for config in (early, lv(1)):
        with pytest.raises(ValueError, match=r"states that enter layer \d are not kept"):
            runner.run(config)
    assert PrefixRunner(model, inputs).kept_layers == ()


@torch.no_grad()
def test_last_layer_is_kept_where_a_configuration_starts_there():
    model, processor = tiny("llava_onevision", layers=LAYERS)
    inputs = tiny_inputs("llava_onevision", processor)
    runner = PrefixRunner(model, inputs, [lv(LAYERS - 1)])
    with attach(model, lv(LAYERS - 1)):
        whole = model(**inputs, logits_to_keep=1).logits[:, -1]
    runner.run(KnockoutConfig())
    assert runner.kept_layers == (LAYERS - 1,)
    assert_close(runner.run(lv(LAYERS - 1)), whole, what="last layer")


def test_exits_save_rows_on_top():
    model, processor = tiny("llava_onevision", layers=LAYERS)
    inputs = tiny_inputs("llava_onevision", processor)
    rows = []
    for exits in (False, True):
        runner = PrefixRunner(model, inputs, exits=exits)
        for after in range(LAYERS):
            runner.run(lv(after))
        rows.append(runner.counts.rows)
    assert rows[1] < 0.8 * rows[0]


def test_which_configurations_are_exits():
    assert as_exit(lv(2), LAYERS) == KnockoutConfig(exit=2)
    assert as_exit(lv(0), LAYERS) == lv(0)
    assert as_exit(lv(2), LAYERS, deepstack_layers=3) == lv(2)
    window = KnockoutConfig(knockouts=(Knockout(kind="LV", layers=(2, 3)),))
    assert as_exit(window, LAYERS) == window
    for more in ({"frames": (0,)}, {"control": "random"}):
        other = KnockoutConfig(knockouts=(Knockout(kind="LV", layers=global_after(2, LAYERS), **more),))
        assert as_exit(other, LAYERS) == other
    early = Knockout(kind="VT", layers=(0, 1))
    both = KnockoutConfig(knockouts=(early, Knockout(kind="LV", layers=global_after(2, LAYERS))))
    assert as_exit(both, LAYERS) == KnockoutConfig(knockouts=(early,), exit=2)


@torch.no_grad()
def test_sliding_windows_stay_knockouts():
    """Layers 4 and 5 have a window: LV-K up to there cannot be an exit, from layer 6 on there is none."""
    types = ["full_attention"] * 4 + ["sliding_attention"] * 2
    assert as_exit(lv(2), LAYERS, layer_types=types) == lv(2)
    assert as_exit(lv(2), LAYERS, layer_types=types[::-1]) == KnockoutConfig(exit=2)
    made, processor = tiny("llava_onevision", layers=LAYERS)
    config = copy.deepcopy(made.config)
    config.text_config.layer_types, config.text_config.use_sliding_window = types, True
    config.text_config.sliding_window = 16
    model = type(made)(config).eval()
    model.load_state_dict(made.state_dict())
    inputs = tiny_inputs("llava_onevision", processor)
    with pytest.raises(ValueError, match="sliding-window"):
        attach(model, KnockoutConfig(exit=2))
    runner = PrefixRunner(model, inputs)
    assert not torch.allclose(runner.run(KnockoutConfig()), made(**inputs, logits_to_keep=1).logits[:, -1])
    with attach(model, lv(2)):
        whole = model(**inputs, logits_to_keep=1).logits[:, -1]
    assert_close(runner.run(lv(2)), whole, what="LV-K before sliding windows")


def test_a_model_with_more_after_its_layers_is_refused():
    model, processor = tiny("qwen2_vl", layers=2)
    model.lm_head.register_forward_hook(lambda module, args, out: out if args[0].requires_grad else out * 1.0)
    runner = PrefixRunner(model, tiny_inputs("qwen2_vl", processor))
    model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits.tanh()) or out)
    with pytest.raises(ValueError, match="does more between its last layer and its logits"):
        runner.run(KnockoutConfig())
