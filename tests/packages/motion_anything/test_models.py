import pytest
import torch
from hone_motion_anything import MotionAnythingConfig, attach, tiny
from hone_motion_anything.method import Condition, attention_mask
from hone_motion_anything.models import draw_mask


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
