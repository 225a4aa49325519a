import pytest
import torch
from hone_core.testing import assert_close
from hone_nar import NARConfig, attach, generate, tiny, warm_start
from hone_visual_ar import Sampling

TOKENS = torch.randint(32, (2, 36), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 5])


def test_attach_mixes_forwards_and_draws_alike_and_detach_gives_back():
    model = tiny("nar")
    before = model(TOKENS, LABELS).logits
    with attach(model, "right-only") as handle:
        alone = model(TOKENS, LABELS).logits
        assert torch.equal(alone, model(TOKENS, LABELS, kind="right").logits)
        drawn = generate(model, model.condition(LABELS), seeds=[0, 1], sampling=Sampling(greedy=True))
        assert torch.equal(model(drawn, LABELS).logits.argmax(-1), drawn)
        with handle.disabled():
            assert torch.equal(model(TOKENS, LABELS).logits, before)
        with pytest.raises(RuntimeError, match="attached to this model already"):
            attach(model)
    assert not torch.allclose(alone, before)
    # The first row and column have one head anyway; the corner averages both.
    first = torch.tensor([1, 2, 3, 4, 5, 6, 12, 18])
    assert torch.equal(alone[:, first], before[:, first])
    assert torch.equal(model(TOKENS, LABELS).logits, before)


def test_what_attach_does_not_take():
    with pytest.raises(TypeError, match="A raster LlamaGen has no head to mix"):
        attach(tiny("llamagen"))
    with pytest.raises(ValueError, match="one of right, below; got 'back'"):
        attach(tiny("nar"), NARConfig(mix="back"))
    with attach(tiny("video"), NARConfig(mix="back")) as handle:
        assert handle.attached


def test_a_warm_start_keeps_the_raster_models_head():
    raster = tiny("llamagen")
    model = warm_start(raster).eval()
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in raster.parameters())
    # The second token is predicted by the right head alone, from the first one, as in the raster model.
    with torch.no_grad():
        wanted, found = raster(TOKENS, LABELS).logits, model(TOKENS, LABELS).logits
    assert_close(found[:, 1], wanted[:, 1])
    assert torch.equal(model.medusa_output.weight, raster.output.weight)
    assert model.medusa_output.weight.data_ptr() != model.output.weight.data_ptr()
    with pytest.raises(TypeError, match="in raster order"):
        warm_start(tiny("llamagen", diagonal=True))


def test_tiny_models_leave_the_global_generator_alone():
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    tiny("nar")
    assert torch.equal(torch.rand(1), wanted)
    with pytest.raises(ValueError, match="kind must be one of nar, llamagen, flashar, video"):
        tiny("var")
