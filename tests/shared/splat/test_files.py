import pytest
import torch
from hone_splat import Gaussians, render
from hone_splat.cameras import look_at
from hone_splat.files import read_ply, read_splat, write_ply, write_splat
from hone_splat.videos import write_video


def cloud(degree=3, count=30):
    torch.manual_seed(0)
    return Gaussians(
        0.5 * torch.randn(count, 3), 0.05 + 0.1 * torch.rand(count, 3), torch.randn(count, 4), torch.rand(count),
        0.3 * torch.randn(count, 3, (degree + 1) ** 2),
    )  # fmt: skip


def draw(gaussians):
    pose = look_at(torch.tensor([[0.5, -0.4, -3.0]]), torch.zeros(1, 3), torch.tensor([0.0, 1, 0]))[None]
    inner = torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]).expand(1, 1, 3, 3)
    return render(gaussians.map(lambda part: part[None]), pose, inner, (32, 32)).image_01


@pytest.mark.parametrize("degree", [0, 2, 3])
def test_a_ply_comes_back_and_looks_the_same(degree, tmp_path):
    before = cloud(degree)
    after = read_ply(write_ply(before, tmp_path / "scene.ply"))
    assert torch.equal(after.means, before.means)
    assert torch.equal(after.sh, before.sh)
    assert torch.allclose(after.scales, before.scales, rtol=1e-6)
    assert torch.allclose(after.opacities, before.opacities, atol=1e-6)
    assert torch.allclose(draw(after), draw(before), atol=1e-5)


def test_sizes_and_opacities_at_their_ends_stay_finite(tmp_path):
    flat = cloud(0, 2)
    flat.scales[:, 2], flat.opacities[:] = 0, torch.tensor([0.0, 1.0])
    after = read_ply(write_ply(flat, tmp_path / "flat.ply"))
    assert after.scales[:, 2].tolist() == pytest.approx([1e-6, 1e-6])
    assert after.opacities.tolist() == pytest.approx([0.0, 1.0], abs=2e-6)


def test_layout_of_a_ply(tmp_path):
    path = write_ply(cloud(1, 1), tmp_path / "one.ply")
    head, _, body = path.read_bytes().partition(b"end_header\n")
    names = [line.split()[-1] for line in head.decode().splitlines() if line.startswith("property float")]
    assert names[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert names[-8:] == ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    values = torch.frombuffer(bytearray(body), dtype=torch.float32)
    one = cloud(1, 1)
    # All of red, then green, then blue.
    assert torch.equal(values[9:12], one.sh[0, 0, 1:])
    assert torch.equal(values[12:15], one.sh[0, 1, 1:])
    assert float(values[-8]) == pytest.approx(float(torch.logit(one.opacities[0])), rel=1e-5)


def test_damaged_plys_are_named(tmp_path):
    path = write_ply(cloud(), tmp_path / "scene.ply")
    whole = path.read_bytes()
    for data, message in (
        (whole[:-5], "is damaged: 30 Gaussians need"),
        (whole[4:], "is no .ply file"),
        (whole.replace(b"property float opacity", b"property float opaciti"), "lacks opacity"),
        (whole.replace(b"property float x", b"property uchar x"), "type float alone"),
        (whole.replace(b"binary_little_endian", b"ascii"), "expected binary_little_endian"),
        (b"ply\nend_header\n", "expected binary_little_endian; got ''"),
        (whole.replace(b"element vertex 30", b"element vertex"), "expected one element, vertex"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_ply(path)


def test_what_is_not_finite_is_not_written(tmp_path):
    bad = cloud()
    bad.means[3, 1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        write_ply(bad, tmp_path / "scene.ply")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="holds one scene"):
        write_ply(cloud().map(lambda part: part[None]), tmp_path / "scene.ply")


def test_a_splat_comes_back_within_its_eight_bits(tmp_path):
    before = cloud(0)
    after = read_splat(write_splat(before, tmp_path / "scene.splat"))
    order = (before.scales.prod(-1) * before.opacities).argsort(descending=True)
    assert torch.equal(after.means, before.means[order])
    assert torch.allclose(after.opacities, before.opacities[order], atol=0.5 / 255 + 1e-6)
    turned = torch.nn.functional.normalize(before.quats_wxyz[order], dim=-1)
    assert torch.allclose(after.quats_wxyz, turned, atol=1 / 128)
    (tmp_path / "short.splat").write_bytes(b"123")
    with pytest.raises(ValueError, match="no multiple of 32"):
        read_splat(tmp_path / "short.splat")


def test_a_video_is_whole_or_absent(tmp_path):
    frames = torch.rand(3, 3, 32, 48)
    path = write_video(frames, tmp_path / "fly.mp4", fps=5)
    assert path.stat().st_size > 500
    for bad, name in ((frames[..., :47], "odd.mp4"), (frames, "fly.avi"), (frames * float("nan"), "nan.mp4")):
        with pytest.raises(ValueError, match=r"even sides|\.mp4|not finite"):
            write_video(bad, tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["fly.mp4"]
