import pytest
import torch
import torch.nn.functional as F
from hone_core.testing import assert_close
from hone_motion_anything import attach
from hone_motion_anything.decoding import guided, unmask
from hone_motion_anything.evaluator import MotionEncoderBiGRUCo, MovementConvEncoder, TextEncoderBiGRUCo
from hone_motion_anything.masking import masked_loss
from hone_motion_anything.method import Condition
from hone_motion_anything.models import draw_mask
from hone_motion_anything.mogents import MoGenTSTokenizer, from_joints, to_joints
from hone_motion_anything.published import (
    LengthEstimator,
    MaskTransformer,
    MaskTransformer2D,
    ResidualTransformer,
    ResidualTransformer2D,
    refine,
)
from hone_motion_anything.tokenizers import RVQVAE

B, T = 3, 7
SIZES = (20, 12, 24, 32, 2, 3)


def filled(model, seed):
    """Weights that any implementation of the published names can make again: drawn in the order of the sorted names."""
    g = torch.Generator().manual_seed(seed)
    for name, value in sorted(model.state_dict().items()):
        if value.is_floating_point() and not name.endswith("pe"):
            base = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            value.copy_(0.15 * torch.randn(value.shape, generator=g) + base)
    return model.eval()


def text_and_valid():
    g = torch.Generator().manual_seed(0)
    text = torch.randn(B, 512, generator=g)
    return g, Condition(text=text), torch.arange(T)[None] < torch.tensor([7, 5, 3])[:, None]


def check(golden, name, values):
    """Some values and two sums that the authors' code gave."""
    flat = values.detach().flatten()
    found = golden["models"][name]
    at = [int(i) for i in torch.linspace(0, len(flat) - 1, 8)]
    assert_close(flat[at], torch.tensor(found["values"]), atol=2e-5)
    assert float(flat.double().sum()) == pytest.approx(found["sum"], abs=2e-3, rel=1e-5)
    assert float(flat.double().abs().sum()) == pytest.approx(found["absum"], abs=2e-3, rel=1e-5)


@pytest.mark.parity
@torch.no_grad()
def test_momask(golden):
    g, condition, valid = text_and_valid()
    mask = filled(MaskTransformer(*SIZES), 1)
    ids = torch.where(valid[..., None], torch.randint(20, (B, T, 1), generator=g), 21)
    check(golden, "momask.mask", mask(ids, condition, valid)[:, :, 0][valid])
    residual = filled(ResidualTransformer(*SIZES, levels=4), 2)
    levels = torch.where(valid[..., None, None], torch.randint(20, (B, T, 1, 2), generator=g), 20)
    check(golden, "momask.residual", residual(levels, condition, valid)[:, :, 0][valid])
    tokenizer = filled(RVQVAE(263, 16, 8, 8, 2, 3), 3)
    check(golden, "momask.rvqvae", tokenizer(torch.randn(2, 16, 263, generator=g))[0])
    check(golden, "momask.length", filled(LengthEstimator(), 4)(condition.text))
    x = torch.randn(3, 40, 259, generator=g)
    check(golden, "t2m.movement", filled(MovementConvEncoder(259, 8, 8), 5)(x))
    x = torch.randn(3, 10, 8, generator=g)
    check(golden, "t2m.motion", filled(MotionEncoderBiGRUCo(8, 8, 6), 6)(x, torch.tensor([10, 8, 5])))
    words, tags = torch.randn(3, 11, 9, generator=g), torch.randn(3, 11, 15, generator=g)
    check(golden, "t2m.text", filled(TextEncoderBiGRUCo(9, 15, 8, 6), 7)(words, tags, torch.tensor([11, 6, 2])))


@pytest.mark.parity
@torch.no_grad()
def test_mogents(golden):
    g, condition, valid = text_and_valid()
    mask = filled(MaskTransformer2D(*SIZES), 1)
    ids = torch.where(valid[..., None], torch.randint(20, (B, T, 6), generator=g), 21)
    check(golden, "mogents.mask", mask(ids, condition, valid)[valid])
    residual = filled(ResidualTransformer2D(*SIZES, levels=4), 2)
    levels = torch.where(valid[..., None, None], torch.randint(20, (B, T, 6, 2), generator=g), 21)
    check(golden, "mogents.residual", residual(levels, condition, valid)[valid])
    tokenizer = filled(MoGenTSTokenizer(22, 16, 8, 10, 8, 8, 2, 3), 3)
    x = torch.randn(2, 16, 263, generator=g)
    check(golden, "mogents.tokenizer", tokenizer.forward_decoder(*tokenizer.encode(x)))


@pytest.mark.parametrize("kind", [MaskTransformer, MaskTransformer2D])
@torch.no_grad()
def test_the_method_generation_and_edits_work_on_published_transformers(kind):
    g, condition, valid = text_and_valid()
    model = filled(kind(*SIZES), 1)
    parts = 1 if kind is MaskTransformer else 6
    ids = torch.randint(20, (B, T, parts), generator=g)
    with attach(model, "paper"):
        mask, rows = draw_mask(model, ids, condition, valid, g)
        assert rows.all()
        temporal, _ = model.scores(ids, condition, valid, "condition")
        best = temporal.masked_fill(~valid, -1).argmax(1)
        assert mask[torch.arange(B), best].all()
        assert not mask[~valid].any()
        if parts == 1:
            assert mask.sum((1, 2)).tolist() == [3, 2, 1]
        hidden = masked_loss(model, ids, condition, valid, mask, g, corrupt=0.0)
        shown = torch.where(mask, 20, torch.where(valid[..., None], ids, 21))
        assert_close(hidden, F.cross_entropy(model(shown, condition, valid)[mask], ids[mask]))
    found = unmask(lambda now: guided(model, now, condition, valid, 4.0, 1.0), valid, parts, 20, g, steps=4)
    assert (found[valid] < 20).all()
    assert (found[~valid] == 21).all()
    residual = filled((ResidualTransformer if parts == 1 else ResidualTransformer2D)(*SIZES, levels=4), 2)
    levels = refine(residual, found, condition, valid, g)
    assert levels.shape == (B, T, parts, 4)
    assert torch.equal(levels[..., 0][valid], found[valid])
    assert (levels[~valid] == -1).all()
    with pytest.raises(ValueError, match="and no music"):
        model(ids, Condition(text=condition.text, music=torch.zeros(B, T, 4)), valid)


@torch.no_grad()
def test_rows_of_a_batch_do_not_mix():
    g, condition, valid = text_and_valid()
    for kind, shape in ((MaskTransformer2D, (B, T, 6)), (ResidualTransformer2D, (B, T, 6, 2))):
        model = filled(kind(*SIZES), 1)
        ids = torch.randint(20, shape, generator=g)
        whole = model(ids, condition, valid)
        for row in range(B):
            one = slice(row, row + 1)
            assert_close(whole[one], model(ids[one], condition.rows(one), valid[one]), atol=1e-5)


def test_lengths_are_frames():
    g, condition, _ = text_and_valid()
    frames = filled(LengthEstimator(), 4).draw(condition.text, g)
    assert frames.shape == (B,)
    assert (frames % 4 == 0).all()
    assert (frames >= 4).all()


def test_joints_of_mogents_hold_every_column_but_the_roots():
    x = torch.randn(2, 3, 263)
    back = from_joints(to_joints(x))
    kept = [*range(4, 259)]
    assert torch.equal(back[..., kept], x[..., kept])
    assert not back[..., :4].any()
    assert not back[..., 259:].any()
    joints = torch.randn(2, 3, 22, 12)
    full = from_joints(joints)
    assert full.shape == (2, 3, 263)
    assert torch.equal(full[..., 259:], joints[..., 0, 4:8])
