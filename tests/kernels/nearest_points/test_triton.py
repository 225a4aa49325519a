import pytest
import torch
from hone_core.testing import assert_close, nan_poison, requires_gpu
from hone_kernels.nearest_points import nearest_points

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
KINDS = ("near", "random", "plane", "far", "one place")


def pair(kind, count, size, device="cpu"):
    """Points beside a surface, anywhere, on a plane, with a few far away, all at one place."""
    generator = torch.Generator().manual_seed(count)
    side = torch.rand(size, 2, generator=generator)
    cloud = torch.stack([side[:, 0], side[:, 1], torch.sin(4 * side[:, 0]) + 2], 1)
    if kind == "near":
        points = cloud[torch.randint(size, (count,), generator=generator)] + 0.01 * torch.randn(count, 3)
    elif kind == "plane":
        cloud[:, 2] = 1.0
        points = torch.cat([torch.rand(count, 2, generator=generator), torch.ones(count, 1)], 1)
    elif kind == "one place":
        points, cloud = torch.ones(count, 3), torch.ones(size, 3)
    else:
        points = torch.rand(count, 3, generator=generator) * 3
        if kind == "far":
            points[::7] *= 200
            cloud[::5] *= 90
    return points.to(device), cloud.to(device)


def compare(kind, count, size, device="cpu", prune=True):
    from hone_kernels.nearest_points.triton import nearest_points_triton

    points, cloud = pair(kind, count, size, device)
    with nan_poison():
        index, squared, looks = nearest_points_triton(points, cloud, prune=prune)
    want = torch.cdist(points.double(), cloud.double()).amin(1).square()
    exact = (points.double() - cloud[index].double()).square().sum(1)
    assert_close(exact, want, atol=1e-12, rtol=2e-6)
    assert_close(squared.double(), want, atol=1e-9, rtol=2e-6)
    assert index.min() >= 0
    assert index.max() < size
    return looks


@pytest.mark.interpret
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted(kind):
    for count, size in ((100, 300), (64, 64), (1, 130), (70, 3)):
        compare(kind, count, size)


@pytest.mark.interpret
def test_interpreted_passes_over_what_is_far():
    looks = compare("near", 200, 5000)
    assert looks.float().mean() < 0.3 * -(-5000 // 128)
    assert compare("near", 40, 500, prune=False).tolist() == [8, 8]


@pytest.mark.interpret
def test_interpreted_op():
    points, cloud = pair("near", 100, 200)
    found = nearest_points(points, cloud, backend="triton")
    assert torch.equal(found[0], nearest_points(points, cloud, backend="reference")[0])
    empty = nearest_points(points[:0], cloud, backend="triton")
    assert [len(part) for part in empty] == [0, 0]


@pytest.mark.compile
@pytest.mark.parametrize("prune", [True, False])
def test_compiles_without_spills(prune):
    from hone_kernels.compile import compile_launch, record_launches
    from hone_kernels.nearest_points import triton as module

    with record_launches(module, "_nearest_kernel") as launches:
        index = torch.zeros(70, dtype=torch.long)
        module._nearest_kernel[(2,)](
            torch.zeros(70, 3), torch.zeros(200, 3), torch.zeros(4, 6), index, torch.zeros(70),
            torch.zeros(9, dtype=torch.int32), 70, 200, 4, BOXES=module.BOXES, PRUNE=prune,
            **(module.PRUNED if prune else module.ALL_PAIRS),
        )  # fmt: skip
    for sm in (80, 90):
        assert compile_launch(launches[0], sm).spills == 0


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind):
    compare(kind, 20_000, 30_001, "cuda")
    compare(kind, 5_000, 3_000, "cuda", prune=False)
    points, cloud = pair(kind, 3000, 4000, "cuda")
    runs = [nearest_points(points, cloud)[0] for _ in range(2)]
    assert torch.equal(*runs)
