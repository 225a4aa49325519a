"""PM-Loss under what else is done to a host or in a trainer: adapters, accumulated gradients, compilation."""

import copy

import pytest
import torch
from hone_pmloss import attach
from hone_pmloss.config import HostConfig, PMLossConfig
from hone_pmloss.data import training_batch
from hone_pmloss.models import PMLoss, tiny
from hone_pmloss.teachers import OracleTeacher
from hone_pmloss.vggt import VGGT, VGGTTeacher
from hone_splat.rooms import Rooms
from peft import LoraConfig, get_peft_model

from .test_vggt import TINY

SMALL = HostConfig(channels=(8, 8, 32), layers=1, candidates=8, refine_channels=32, size=32)
ROOMS = [0, 1]


@pytest.fixture(scope="module")
def scene():
    return training_batch(ROOMS, 2, (8, 18), 32)


@pytest.fixture(scope="module")
def oracle():
    return OracleTeacher(Rooms.draw(ROOMS))


@pytest.fixture(scope="module")
def vggt():
    torch.manual_seed(0)
    net = VGGT(TINY)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return VGGTTeacher(net, name="tiny")


def gradients(host):
    return {name: part.grad.clone() for name, part in host.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("where", ["before", "inside", "wrapper"])
def test_lora_on_a_host_learns_from_the_term(scene, oracle, where):
    host = tiny(SMALL).train()
    frozen = copy.deepcopy(host.state_dict())
    want = PMLoss(oracle)(host(scene.context).gaussians.means, scene.context).loss.detach()
    handle = attach(host, teacher=oracle) if where == "before" else None
    torch.manual_seed(0)
    adapted = get_peft_model(host, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    handle = handle or attach({"inside": host, "wrapper": adapted}[where], teacher=oracle)
    output = adapted(scene.context)
    assert torch.allclose(output.pm.loss, want, rtol=1e-5)
    output.pm_loss.backward()
    found = gradients(adapted)
    assert found
    assert all("lora_" in name for name in found)
    assert all(bool((grad != 0).any()) for name, grad in found.items() if "lora_B" in name)
    optimizer = torch.optim.Adam((part for part in adapted.parameters() if part.requires_grad), 3e-3)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        output = adapted(scene.context)
        output.pm_loss.backward()
    assert float(output.pm.raw.mean()) < 0.99 * float(want.mean())
    handle.detach()
    bare = adapted.unload()
    assert not hasattr(bare(scene.context), "pm")
    assert all(torch.equal(value, frozen[name]) for name, value in bare.state_dict().items())


def test_gradients_of_a_trainer_that_accumulates_are_those_of_one_batch(scene, vggt):
    # Scenes of one micro-batch each, the term called with centres and pictures.
    pm = PMLoss(vggt)
    whole = tiny(SMALL).train()
    term = pm(whole(scene.context).gaussians.means, scene.context.image_01)
    (pm.config.weight * term.loss.mean()).backward()
    parts = tiny(SMALL).train()
    for at in range(len(ROOMS)):
        views = scene.context.map(lambda part, at=at: part[at : at + 1])
        loss = pm(parts(views).gaussians.means, views.image_01).loss
        assert torch.allclose(loss, term.loss[at], rtol=1e-4)
        (pm.config.weight * loss.mean() / len(ROOMS)).backward()
    want, found = gradients(whole), gradients(parts)
    assert want.keys() == found.keys()
    largest = max(float(grad.abs().max()) for grad in want.values())
    assert largest > 0
    for name, grad in want.items():
        assert float((found[name] - grad).abs().max()) < 1e-4 * largest, name


def test_pictures_are_what_a_teacher_without_cameras_is_asked_about(scene, oracle, vggt):
    means = (scene.points() + 0.05).flatten(1, 3)
    pictures = scene.context.image_01
    assert torch.equal(PMLoss(vggt)(means, pictures).loss, PMLoss(vggt)(means, scene.context).loss)
    kept = torch.tensor([[1], [0]])
    some = means.unflatten(1, (2, -1))[torch.arange(2)[:, None], kept].flatten(1, 2)
    asked = [PMLoss(vggt)(some, given, anchors=kept).loss for given in (pictures, scene.context)]
    assert torch.equal(*asked)
    for pm in (PMLoss(oracle), PMLoss(vggt, PMLossConfig(align="pose"))):
        with pytest.raises(ValueError, match="needs their cameras too: give Views"):
            pm(means, pictures)


@pytest.mark.filterwarnings("ignore")  # dynamo names what it cannot trace, and goes on without
def test_a_compiled_caller_gets_the_same_term_and_gradients(scene):
    points = scene.points().flatten(1, 3)
    torch.manual_seed(0)
    means = (points + 0.05 * torch.randn_like(points)).requires_grad_()

    def step(means, points):
        return PMLoss()(2 * means, points).loss.mean()

    want = step(means, points)
    (grad,) = torch.autograd.grad(want, means)
    found = torch.compile(step, backend="aot_eager")(means, points)
    assert torch.allclose(found, want, rtol=1e-5)
    assert torch.allclose(torch.autograd.grad(found, means)[0], grad, rtol=1e-4, atol=1e-9)
