"""ZPressor under what else is done to a model: half precision, adapters, offload, other scenes."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from hone_splat.rendering import render
from hone_zpressor.data import graded_rooms
from hone_zpressor.host import build_arm
from peft import LoraConfig, get_peft_model
from torch import nn


@pytest.fixture(scope="module")
def scene():
    return graded_rooms([0], 8, 1, 32)


@pytest.fixture(scope="module")
def host(small):
    settings = replace(small, zpressor=replace(small.zpressor, anchors=3, precision="bfloat16"))
    built = build_arm(settings, "zpressor", seed=0).host.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in built.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return built


def apart(found, want):
    return float((found.float() - want.float()).norm() / want.norm())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_cameras_exact(host, scene, dtype):
    want = host(scene.context)
    with torch.autocast("cpu", dtype):
        found = host(scene.context)
        size = scene.context.size
        drawn = render(want.gaussians, scene.targets.cam_to_world, scene.targets.intrinsics_norm, size).image_01
    assert apart(found.depth, want.depth) < 2e-2
    for part in (found.depth, found.gaussians.means, found.gaussians.sh, found.gaussians.scales):
        assert part.dtype == torch.float32
    # Centres move along their rays, by what the depth differs.
    moved = (found.gaussians.means - want.gaussians.means).norm(dim=-1)
    along = (found.depth - want.depth).abs().flatten(1)
    assert float((moved - along).max()) < 1e-2 * float(want.depth.mean())
    exact = render(want.gaussians, scene.targets.cam_to_world, scene.targets.intrinsics_norm, size).image_01
    assert torch.equal(drawn, exact)


def test_weights_in_half_precision_are_refused_by_name(host, scene):
    with pytest.raises(TypeError, match=r"weights are torch.bfloat16 and the pictures torch.float32: keep both"):
        copy.deepcopy(host).bfloat16()(scene.context)


@torch.no_grad()
def test_adapters_and_offload(host, scene):
    want = host(scene.context).depth
    offloaded = copy.deepcopy(host)
    cpu_offload(offloaded, execution_device="cpu")
    assert torch.equal(offloaded(scene.context).depth, want)
    # An adapter on keys and values alone: it is heard where the layers call their modules.
    adapted = get_peft_model(copy.deepcopy(host), LoraConfig(target_modules=["proj_kv"], r=2))
    assert torch.equal(adapted(scene.context).depth, want)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    assert apart(adapted(scene.context).depth, want) > 1e-4


@torch.no_grad()
def test_scenes_in_any_company_give_the_same(host):
    both = graded_rooms([0, 1], 8, 1, 32).context
    first, second = (both.map(lambda part, at=at: part[at : at + 1]) for at in (0, 1))
    want = [host(one).depth[0] for one in (first, second)]
    for at, found in enumerate(host(both).depth):
        assert apart(found, want[at]) < 1e-3
    assert torch.equal(host(first).depth[0], want[0])
