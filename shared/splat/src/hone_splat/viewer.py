"""A page in the browser with a splat and the cameras that it came from, by viser."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from hone_core.errors import MissingExtraError
from torch import Tensor

from .cameras import matrix_to_quat
from .gaussians import Gaussians
from .harmonics import C0

__all__ = ["Viewer"]

MARKED, PLAIN = (230, 90, 30), (110, 110, 110)


class Viewer:
    """A server of one scene; what is shown again replaces what was shown before. Colours have no direction in it.

    Args:
        address: To listen at.
        port: Likewise.

    Raises:
        MissingExtraError: viser is not installed.
    """

    def __init__(self, address: str = "127.0.0.1", port: int = 8080) -> None:
        try:
            import viser
        except ImportError as error:
            raise MissingExtraError("view", "hone-splat", "The viewer") from error
        # It greets on stdout, which belongs to results.
        with contextlib.redirect_stdout(sys.stderr):
            self.server: Any = viser.ViserServer(host=address, port=port, verbose=False)
        self.server.scene.set_up_direction("-y")

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self.server.get_host()}:{self.server.get_port()}"

    def stop(self) -> None:
        """Close the page."""
        with contextlib.redirect_stdout(sys.stderr):
            self.server.stop()

    def splat(self, gaussians: Gaussians) -> Any:
        """Show one scene's cloud; returns viser's handle."""
        cloud = gaussians.map(lambda part: part.detach().float().cpu())
        return self.server.scene.add_gaussian_splats(
            "/splat",
            centers=cloud.means.numpy(),
            covariances=cloud.covariances.numpy(),
            rgbs=(0.5 + C0 * cloud.sh[..., 0]).clamp(0, 1).numpy(),
            opacities=cloud.opacities[:, None].numpy(),
        )

    def cameras(
        self,
        cam_to_world: Tensor,
        intrinsics_norm: Tensor,
        size: tuple[int, int],
        *,
        images_01: Tensor | None = None,
        marked: Collection[int] = (),
    ) -> list[Any]:
        """Show cameras as frustums, some of them in another colour; returns viser's handles.

        Args:
            cam_to_world: ``[V, 4, 4]``.
            intrinsics_norm: ``[V, 3, 3]``.
            size: Height and width of their pictures.
            images_01: ``[V, 3, H, W]``, drawn in the frustums.
            marked: Numbers of those that stand out, such as anchors.
        """
        poses, inner = cam_to_world.detach().double().cpu(), intrinsics_norm.detach().double().cpu()
        centres = poses[:, :3, 3]
        gaps = torch.cdist(centres, centres).fill_diagonal_(math.inf).amin(1) if len(poses) > 1 else torch.ones(1)
        length = float(gaps.median().clamp(min=1e-3)) / 2
        quats = matrix_to_quat(poses[:, :3, :3]).numpy()
        handles = []
        for number, (centre, quat) in enumerate(zip(centres.numpy(), quats, strict=True)):
            picture = None
            if images_01 is not None:
                picture = (images_01[number].clamp(0, 1) * 255).byte().movedim(0, -1).cpu().numpy()
            handles.append(
                self.server.scene.add_camera_frustum(
                    f"/cameras/{number}",
                    fov=2 * math.atan(0.5 / float(inner[number, 1, 1])),
                    aspect=size[1] / size[0],
                    scale=length,
                    color=MARKED if number in marked else PLAIN,
                    image=picture,
                    wxyz=np.asarray(quat),
                    position=centre,
                )
            )
        return handles

    def slider(self, name: str, low: int, high: int, value: int, changed: Callable[[int], None]) -> Any:
        """A number that whoever looks can set; returns viser's handle."""
        handle = self.server.gui.add_slider(name, min=low, max=high, step=1, initial_value=value)
        handle.on_update(lambda _: changed(int(handle.value)))
        return handle

    def text(self, name: str, value: str) -> Any:
        """A line beside the scene, whose ``value`` can be set; returns viser's handle."""
        return self.server.gui.add_text(name, initial_value=value, disabled=True)
