import pytest
import torch
from hone_splat import Gaussians
from hone_splat.formats import SUFFIXES, read_cloud, write_cloud


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_suffix_names_the_format(tmp_path, suffix):
    cloud = Gaussians(
        torch.eye(3), torch.full((3, 3), 0.1), torch.eye(4)[:3], torch.tensor([0.2, 0.5, 0.9]), torch.zeros(3, 3, 1)
    )
    found = read_cloud(write_cloud(cloud, tmp_path / f"a{suffix}"))
    # .splat sorts by what is most visible.
    assert torch.allclose(found.opacities.sort().values, cloud.opacities, atol=0.5 / 255 + 1e-6)
    assert torch.allclose(found.means.sum(0), torch.ones(3), atol=1e-3)


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a file ending in \.ply, \.splat, \.spz"):
        read_cloud(tmp_path / "a.obj")
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_cloud(tmp_path / "a.ply")
