"""Half precision over few keys on a GPU: weights in it, and training under autocast."""

import copy

import pytest
import torch
from hone_core.testing import requires_gpu
from hone_motion_anything.config import TransformerConfig
from hone_motion_anything.masking import masked_loss
from hone_motion_anything.method import Condition, MotionTransformer
from hone_motion_anything.published import MaskTransformer, MaskTransformer2D


def relative(found, want):
    return float((found.float() - want.float()).norm() / want.float().norm())


def inputs(codes, parts, dtype, music):
    g = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(codes, (4, 49, parts), generator=g, device="cuda")
    valid = torch.arange(49, device="cuda")[None] < torch.tensor([49, 30, 7, 49], device="cuda")[:, None]
    condition = Condition(
        text=torch.randn(4, 512, generator=g, device="cuda").to(dtype),
        music=torch.randn(4, 49, 35, generator=g, device="cuda").to(dtype) if music else None,
    )
    mask = (torch.rand(ids.shape, generator=g, device="cuda") < 0.5) & valid[..., None]
    return ids, condition, valid, mask


@requires_gpu()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("music", [False, True])
def test_weights_in_half_precision_on_a_gpu(dtype, music):
    cfg = TransformerConfig(dropout=0.0, codes=256, sat_condition="self_plus_condition", gate="residual")
    exact = MotionTransformer(cfg).cuda().eval()
    half = copy.deepcopy(exact).to(dtype)
    ids, condition, valid, _ = inputs(256, 6, torch.float32, music)
    told = Condition(
        text=condition.text.to(dtype), music=None if condition.music is None else condition.music.to(dtype)
    )
    with torch.no_grad():
        assert relative(half(ids, told, valid)[valid], exact(ids, condition, valid)[valid]) < 3e-2
        for found, want in zip(half.scores(ids, told, valid), exact.scores(ids, condition, valid), strict=True):
            assert relative(found[valid], want[valid]) < 3e-2


@requires_gpu()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["method", "momask", "mogents"])
def test_training_under_autocast_on_a_gpu(dtype, kind):
    torch.manual_seed(0)
    if kind == "method":
        net = MotionTransformer(TransformerConfig(dropout=0.0, sat_condition="self_plus_condition", gate="residual"))
    else:
        net = MaskTransformer(dropout=0.0) if kind == "momask" else MaskTransformer2D(dropout=0.0)
    net = net.cuda().train()
    ids, condition, valid, mask = inputs(net.mask_id, 1 if kind == "momask" else 6, torch.float32, False)
    found = []
    for enabled in (False, True):
        with torch.autocast("cuda", dtype, enabled=enabled):
            loss = masked_loss(net, ids, condition, valid, mask, torch.Generator("cuda").manual_seed(0))
        own = [p for p in net.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, own, allow_unused=True)
        found.append((loss.item(), torch.cat([g.flatten() for g in grads if g is not None])))
    (want, grads), (half, half_grads) = found
    assert abs(half - want) < 1e-2 * want
    assert relative(half_grads, grads) < 5e-2
