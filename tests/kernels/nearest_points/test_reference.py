import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.nearest_points import nearest_points
from scipy.spatial import cKDTree


def test_equals_a_tree():
    generator = torch.Generator().manual_seed(0)
    points, cloud = (torch.randn(count, 3, generator=generator, dtype=torch.float64) for count in (200, 333))
    index, squared = nearest_points(points, cloud)
    distance, found = cKDTree(cloud.numpy()).query(points.numpy())
    assert index.tolist() == found.tolist()
    assert_close(squared, torch.from_numpy(distance) ** 2, atol=1e-12, rtol=0)


def test_small_distances_far_from_the_origin_survive():
    cloud = torch.tensor([[100.0, 0.0, 0.0], [100.002, 0.0, 0.0]])
    index, squared = nearest_points(cloud + torch.tensor([4e-4, 0.0, 0.0]), cloud)
    assert index.tolist() == [0, 1]
    assert squared.max() < 3e-7


@pytest.mark.parametrize(
    ("points", "cloud", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(2, 3), r"points must be \[N, 3\]; got \[2, 2\]"),
        (torch.zeros(2, 3), torch.zeros(0, 3), "no point to be near to"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64), "expected one dtype and device"),
    ],
)
def test_bad_clouds_are_named(points, cloud, message):
    with pytest.raises(ValueError, match=message):
        nearest_points(points, cloud)
