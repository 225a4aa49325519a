import pytest
import torch
from hone_splat.cameras import quat_to_matrix
from hone_splat.harmonics import _tables, evaluate_sh, rotate_sh, sh_basis


def directions(count=50):
    torch.manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(count, 3, dtype=torch.float64), dim=-1)


def test_basis_is_orthonormal_on_the_sphere():
    # Gauss-Legendre in z, even steps around: exact for these degrees.
    import numpy as np

    z, weight = np.polynomial.legendre.leggauss(8)
    angle = torch.arange(16, dtype=torch.float64) * (2 * torch.pi / 16)
    z, weight = torch.from_numpy(z), torch.from_numpy(weight)
    radius = (1 - z**2).sqrt()
    points = torch.stack([radius[:, None] * angle.cos(), radius[:, None] * angle.sin(), z[:, None].expand(-1, 16)], -1)
    values = sh_basis(points, 3)
    gram = torch.einsum("zai,zaj,z->ij", values, values, weight) * (2 * torch.pi / 16)
    assert torch.allclose(gram, torch.eye(16, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_right_rotation_turns_colours_with_the_camera(degree):
    torch.manual_seed(1)
    turn = quat_to_matrix(torch.randn(2, 4, dtype=torch.float64))
    sh = torch.randn(2, 5, 3, (degree + 1) ** 2, dtype=torch.float64)
    seen = directions(5)
    turned = rotate_sh(sh, turn, "right")
    world = seen @ turn.mT
    assert torch.allclose(evaluate_sh(turned, world), evaluate_sh(sh, seen.expand(2, 5, 3)), atol=1e-9)


def test_the_official_rotation_is_the_oracles(hostref):
    torch.manual_seed(2)
    turn = quat_to_matrix(torch.randn(4))
    sh = torch.randn(6, 3, 16)
    raster = hostref.rotate_sh(sh, turn, 3)
    ours = rotate_sh(sh, turn, "official")
    seen = directions(6).float()
    want = (raster * hostref.sh_std(seen[:, [2, 0, 1]])[:, None]).sum(-1)
    assert torch.allclose((ours * sh_basis(seen, 3)[:, None]).sum(-1), want, atol=1e-4)
    assert not torch.allclose(ours, rotate_sh(sh, turn, "right"), atol=0.1)


def test_change_of_basis_is_the_documented_one():
    change = _tables(3)[2]
    assert torch.allclose(change @ change.T, torch.eye(16, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(change[1:4, 1:4], torch.tensor([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]]).double(), atol=1e-9)
    assert float(change[6, 8]) == pytest.approx(0.75**0.5)
    assert float(change[9, 12]) == pytest.approx(0.790569, abs=1e-6)


def test_degrees_that_no_file_holds_are_refused():
    with pytest.raises(ValueError, match=r"degree must be in 0..3; got 4"):
        sh_basis(directions(2), 4)
