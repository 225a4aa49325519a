import importlib.util
from pathlib import Path

import pytest
import torch
from hone_splat.views import Views


@pytest.fixture(scope="session")
def hostref():
    """The oracle."""
    spec = importlib.util.spec_from_file_location("hostref", Path(__file__).with_name("hostref.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def perturb():
    """Move every weight off zero and one, so that nothing is hidden behind an initial value."""

    def change(module, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim == 1:
                    parameter += 0.1 * noise
                elif not parameter.any():
                    parameter += 0.05 * noise
        return module

    return change


@pytest.fixture(scope="session")
def make_views():
    """Random pictures from rotated cameras."""

    def make(count, height, width, seed=0, batch=1, far=100.0):
        generator = torch.Generator().manual_seed(seed)
        angle = 0.15 * torch.randn(batch, count, 3, generator=generator)
        x, y, z = angle.unbind(-1)
        o = torch.zeros_like(x)
        skew = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))
        pose = torch.eye(4).repeat(batch, count, 1, 1)
        pose[..., :3, :3] = torch.linalg.matrix_exp(skew)
        pose[..., :3, 3] = 0.5 * torch.randn(batch, count, 3, generator=generator)
        inner = torch.eye(3).repeat(batch, count, 1, 1)
        inner[..., 0, 0] = 0.9 + 0.05 * torch.rand(batch, count, generator=generator)
        inner[..., 1, 1] = 1.2
        inner[..., :2, 2] = 0.5
        near = torch.ones(batch, count)
        return Views(torch.rand(batch, count, 3, height, width, generator=generator), pose, inner, near, far * near)

    return make
