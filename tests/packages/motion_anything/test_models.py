import pytest
import torch
from hone_motion_anything import MotionAnythingConfig, attach, tiny
from hone_motion_anything.method import Condition, attention_mask
from hone_motion_anything.models import draw_mask
from hone_motion_anything.published import MaskTransformer


@pytest.fixture
def model(small):
    return tiny(small.transformer)


def batch(model, rows=64):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(16, (rows, 12, 6), generator=g)
    return ids, Condition(text=torch.randn(rows, 8, generator=g)), torch.ones(rows, 12, dtype=torch.bool)


def generator():
    return torch.Generator().manual_seed(0)


def test_attached_trainings_hide_what_the_condition_attends_to(model):
    ids, condition, valid = batch(model)
    with attach(model, MotionAnythingConfig(p_attention=1.0)) as handle:
        mask, rows = draw_mask(model, ids, condition, valid, generator())
        assert rows.all()
        assert torch.equal(mask, attention_mask(*model.scores(ids, condition, valid), valid, 0.3, 0.3))
        with handle.disabled():
            assert not draw_mask(model, ids, condition, valid, generator())[1].any()
    assert not handle.attached
    plain, rows = draw_mask(model, ids, condition, valid, generator())
    assert not rows.any()
    assert not torch.equal(plain, mask)


def test_draws_name_what_is_wrong(model):
    ids, condition, valid = batch(model, 3)
    g = generator()
    past = valid.clone()
    past[:, 10:] = False
    draw_mask(model, ids.masked_fill(~past[..., None], model.pad_id), condition, past, g)
    hidden, high, low = ids.clone(), ids.clone(), ids.clone()
    hidden[1, 2, 3], high[2, 11, 5], low[0, 11, 0] = model.mask_id, model.pad_id + 1, -1
    none = past.clone()
    none[1] = False
    text = condition.text
    wrong = [
        ((ids.numpy(), condition, valid, g), TypeError, "ids must be a Tensor; got ndarray"),
        ((ids.float(), condition, valid, g), TypeError, r"ids must be int64, .* got torch\.float32\. Tokenise"),
        ((ids[..., 0], condition, valid, g), ValueError, r"ids must be \[batch, time, parts\] .* got \[3, 12\] and"),
        ((hidden, condition, valid, g), ValueError, "codes from 0 to 15 .* row 1, time step 2, part 3 has 16"),
        ((high, condition, past, g), ValueError, "past the end at most 17, .* row 2, time step 11, part 5 has 18"),
        ((low, condition, past, g), ValueError, "row 0, time step 11, part 0 has -1"),
        ((ids, text, valid, g), TypeError, "condition must be a Condition; got Tensor"),
        ((ids, condition.rows(slice(0, 2)), valid, g), ValueError, "the condition has 2 rows and ids have 3"),
        ((ids, condition, valid.long(), g), TypeError, "valid must be bool, .* got torch.int64"),
        ((ids, condition, valid[:, :5], g), ValueError, r"got \[3, 12, 6\] and \[3, 5\]"),
        ((ids, condition, valid.to("meta"), g), ValueError, "ids are on cpu and valid is on meta"),
        ((ids, condition, none, g), ValueError, "row 1 of valid has no time step: leave empty motions out"),
        ((ids, condition, valid, None), TypeError, "generator must be a Generator; got NoneType"),
        ((ids.to("meta"), condition, valid.to("meta"), g), ValueError, r"make it with torch\.Generator\('meta'\)"),
        ((ids, condition, valid, g, ids), ValueError, r"events must be bool \[3, 12, 6\] on cpu.* got torch\.int64"),
        ((ids, condition, valid, g, ids[:, :5] > 0), ValueError, r"events must be .* got torch\.bool \[3, 5, 6\]"),
    ]
    for attached in (False, True):
        for arguments, kind, message in wrong:
            state = g.get_state()
            with pytest.raises(kind, match=message):
                draw_mask(model, *arguments)
            assert torch.equal(g.get_state(), state)  # nothing was drawn
        if not attached:
            attach(model, "paper")
    with pytest.raises(TypeError, match=r"Linear is no masked motion transformer: it needs scores\(\)"):
        draw_mask(torch.nn.Linear(2, 2), ids, condition, valid, g)


def test_models_name_what_does_not_fit_them(model):
    ids, condition, valid = batch(model, 3)
    text, music = condition.text, torch.zeros(3, 12, 35)
    long = (ids.repeat(1, 3, 1), condition, valid.repeat(1, 3))
    wrong = [
        (long, ValueError, r"ids must be \[batch, time, 6\] of at most 24 time steps; got \[3, 36, 6\]"),
        ((ids[..., :4], condition, valid), ValueError, r"ids must be \[batch, time, 6\] .* got \[3, 12, 4\]"),
        ((ids, Condition(text=text[:, :4]), valid), ValueError, r"text must be \[3, 8\] .* got \[3, 4\]"),
        (
            (ids, Condition(text=text.long()), valid),
            TypeError,
            "text must be vectors of floating-point numbers, not ids",
        ),
        ((ids, Condition(text=text.to("meta")), valid), ValueError, "text is on meta and the tokens are on cpu"),
        ((ids, Condition(music=music[..., :9]), valid), ValueError, r"music must be \[3, time, 35\] .* \[3, 12, 9\]"),
        ((ids, Condition(text=text, music=music[:1]), valid), ValueError, r"music must be .* got \[1, 12, 35\]"),
        ((ids, Condition(text=text, no_text=valid), valid), ValueError, r"no_text must be \[3\] .* got \[3, 12\]"),
    ]
    with attach(model, "paper"):
        for arguments, kind, message in wrong:
            for call in (model, model.scores, lambda *given: draw_mask(model, *given, generator())):
                with pytest.raises(kind, match=message):
                    call(*arguments)
    momask = MaskTransformer(16, 12, 24, 32, 1, 3).eval()
    for call in (momask, momask.scores):
        with pytest.raises(ValueError, match=r"ids must be \[batch, time, 1\]; got \[3, 12, 6\]"):
            call(ids, condition, valid)
        with pytest.raises(ValueError, match=r"text must be \[3, 512\] .* got \[3, 8\]"):
            call(ids[..., :1], condition, valid)


def test_outputs_do_not_depend_on_what_is_attached(model):
    ids, condition, valid = batch(model, 2)
    before = model(ids, condition, valid)
    handle = attach(model, "random")
    assert torch.equal(model(ids, condition, valid), before)
    handle.detach()
    handle.detach()
    assert torch.equal(model(ids, condition, valid), before)


def test_what_cannot_be_attached(model):
    attach(model)
    with pytest.raises(ValueError, match="has the method already"):
        attach(model)
    with pytest.raises(TypeError, match="Linear is no masked motion transformer"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="a preset's name"):
        attach(model, 3)


def test_tiny_leaves_the_global_generator(small):
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    tiny(small.transformer)
    assert torch.equal(torch.rand(1), first)
