import gzip
import struct

import pytest
import torch
from hone_splat import Gaussians, render
from hone_splat.cameras import look_at, quat_to_matrix
from hone_splat.harmonics import evaluate_sh
from hone_splat.spz import FLIP, SH_FLIP, read_spz, write_spz


def cloud(count=200, degree=3):
    generator = torch.Generator().manual_seed(degree)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return Gaussians(
        draw(count, 3), 0.05 + 0.1 * draw(count, 3).abs(), draw(count, 4), draw(count).sigmoid(),
        0.2 * draw(count, 3, (degree + 1) ** 2),
    )  # fmt: skip


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_round_trip_within_its_steps(tmp_path, degree):
    before = cloud(degree=degree)
    after = read_spz(write_spz(before, tmp_path / "a.spz"))
    assert (after.means - before.means).abs().max() <= 0.5 / 4096 + 1e-7
    assert (after.scales.log() - before.scales.log()).abs().max() <= 0.5 / 16 + 1e-5
    assert (after.opacities - before.opacities).abs().max() <= 0.5 / 255 + 1e-6
    assert (after.sh[..., 0] - before.sh[..., 0]).abs().max() <= 0.5 / 255 / 0.15 + 1e-6
    turn = quat_to_matrix(after.quats_wxyz).mT @ quat_to_matrix(before.quats_wxyz)
    angle = ((turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1).acos()
    assert angle.max() < 6e-3
    for first, last, step in ((1, 4, 8), (4, 16, 16)):
        gap = (after.sh[..., first:last] - before.sh[..., first:last].clamp(-1, 1 - step / 128)).abs()
        assert not gap.numel() or gap.max() <= (step / 2 + 0.5) / 128 + 1e-6


def test_pictures_stay(tmp_path):
    before = cloud(degree=1)
    poses = look_at(torch.tensor([[0.5, -0.4, -5.0]]), torch.zeros(1, 3), torch.tensor([0.0, 1.0, 0.0]))[None]
    inner = torch.tensor([[1.1, 0.0, 0.5], [0.0, 1.1, 0.5], [0.0, 0.0, 1.0]]).expand(1, 1, 3, 3)
    after = read_spz(write_spz(before, tmp_path / "a.spz"))
    first, second = (render(one[None], poses, inner, (32, 32)).image_01 for one in (before, after))
    assert first.std() > 0.1
    assert (first - second).square().mean().sqrt() < 0.02


def test_signs_of_the_harmonics_are_those_of_the_flipped_axes():
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(50, 3, generator=generator), dim=-1)
    sh = torch.rand(50, 3, 16, generator=generator) * 0.1
    flipped = torch.cat([sh[..., :1], sh[..., 1:] * torch.tensor(SH_FLIP)], -1)
    assert torch.allclose(evaluate_sh(flipped, direction * torch.tensor(FLIP)), evaluate_sh(sh, direction), atol=1e-6)


def test_bytes_by_hand(tmp_path):
    """One Gaussian at (1, -0.5, 2), opacity 0.2, grey of 0.5, deviation 1, turned by 90 degrees about z."""
    half = 0.5**0.5
    one = Gaussians(
        torch.tensor([[1.0, -0.5, 2.0]]), torch.ones(1, 3), torch.tensor([[half, 0.0, 0.0, half]]), torch.tensor([0.2]),
        torch.zeros(1, 3, 1),
    )  # fmt: skip
    data = gzip.decompress(write_spz(one, tmp_path / "a.spz").read_bytes())
    assert data[:16] == b"NGSP" + struct.pack("<IIBBBB", 3, 1, 0, 12, 0, 0)
    assert data[16:25] == bytes([0, 16, 0, 0, 8, 0, 0, 0xE0, 0xFF])  # 4096, 2048, -8192
    assert data[25:32] == bytes([51, 128, 128, 128, 160, 160, 160])
    # In the file's axes z is -0.7071 and w 0.7071, and z, the first of the two largest, is left out and made positive.
    assert struct.unpack("<I", data[32:36])[0] == (2 << 30) | (1 << 9) | 511


def test_version_2_holds_three_bytes_of_a_rotation(tmp_path):
    body = bytes(9) + bytes([255, 128, 128, 128, 160, 160, 160, 128, 255, 128])
    (tmp_path / "b.spz").write_bytes(gzip.compress(struct.pack("<IIIBBBB", 0x5053474E, 2, 1, 0, 12, 0, 0) + body))
    found = read_spz(tmp_path / "b.spz")
    assert found.quats_wxyz[0].tolist() == pytest.approx([0.0, 0.004, -1.0, -0.004], abs=1e-3)
    assert float(found.opacities) == 1.0


def test_a_wide_scene_takes_fewer_bits(tmp_path):
    wide = cloud(20, 0)
    wide.means[0, 0] = 30_000.0
    after = read_spz(write_spz(wide, tmp_path / "a.spz"))
    assert (after.means - wide.means).abs().max() <= 0.5 / 128
    wide.means[0, 0] = 1e7
    with pytest.raises(ValueError, match="Scale the scene first"):
        write_spz(wide, tmp_path / "b.spz")


@pytest.mark.parametrize("far", [2048.0, -2048.0, 2.0**22])
def test_the_farthest_position_keeps_its_sign(tmp_path, far):
    wide = cloud(2)
    wide.means[0, 0] = far
    assert read_spz(write_spz(wide, tmp_path / "a.spz")).means[0, 0] == far


def test_damage_is_named(tmp_path):
    path = write_spz(cloud(20, 1), tmp_path / "a.spz")
    data = path.read_bytes()
    (tmp_path / "cut.spz").write_bytes(data[:-30])
    with pytest.raises(ValueError, match="cut short"):
        read_spz(tmp_path / "cut.spz")
    whole = gzip.decompress(data)
    for change, message in ((whole[:-1], "is damaged: 20 Gaussians need"), (b"none" + whole[4:], "expected .spz of")):
        (tmp_path / "bad.spz").write_bytes(gzip.compress(change))
        with pytest.raises(ValueError, match=message):
            read_spz(tmp_path / "bad.spz")
    newer = whole[:4] + struct.pack("<I", 4) + whole[8:]
    (tmp_path / "new.spz").write_bytes(gzip.compress(newer))
    with pytest.raises(ValueError, match="got version 4"):
        read_spz(tmp_path / "new.spz")
    with pytest.raises(ValueError, match="a file holds one scene"):
        write_spz(cloud(3)[None], tmp_path / "c.spz")
