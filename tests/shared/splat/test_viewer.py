import math
import socket

import pytest
import torch
from hone_splat import Gaussians
from hone_splat.cameras import look_at, quat_to_matrix
from hone_splat.harmonics import C0
from hone_splat.viewer import MARKED, PLAIN, Viewer


@pytest.fixture
def viewer(capsys):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    page = Viewer(port=port)
    yield page
    page.stop()
    assert capsys.readouterr().out == ""


def test_the_page_holds_the_cloud_and_the_cameras(viewer):
    quats = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]])
    cloud = Gaussians(
        torch.tensor([[0.0, 0, 1], [1, 0, 2]]), torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]]), quats,
        torch.tensor([0.3, 0.6]), torch.full((2, 3, 1), 0.25 / C0),
    )  # fmt: skip
    shown = viewer.splat(cloud)
    assert torch.allclose(torch.as_tensor(shown.centers), cloud.means)
    # Turned by 120 degrees about (1, 1, 1): x becomes y, y becomes z.
    assert torch.as_tensor(shown.covariances[1]).diagonal().tolist() == pytest.approx([0.09, 0.01, 0.04], rel=1e-3)
    places = torch.tensor([[0.0, 0.0, -3.0], [2.0, 0.0, -3.0]])
    poses = look_at(places, torch.zeros(2, 3), torch.tensor([0.0, 1.0, 0.0]))
    inner = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]]).expand(2, 3, 3)
    first, second = viewer.cameras(poses, inner, (32, 64), images_01=torch.rand(2, 3, 32, 64), marked=[1])
    assert (first.color, second.color) == (PLAIN, MARKED)
    assert first.fov == pytest.approx(2 * math.atan(0.5))
    assert first.aspect == 2.0
    assert second.position.tolist() == places[1].tolist()
    turn = quat_to_matrix(torch.as_tensor(second.wxyz))
    assert torch.allclose(turn, poses[1, :3, :3].double(), atol=1e-5)
