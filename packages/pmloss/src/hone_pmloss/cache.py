"""A cache of teachers' answers on disk: a teacher looks at a scene's views once, not at every step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from hone_splat.views import Views
from torch import Tensor

from .teachers import PointMap, Shots, Teacher, name_views, shots_of

__all__ = ["CachedTeacher"]

FORMAT = "hone pointmap 1"


class CachedTeacher:
    """A teacher whose answers are kept at its own size, one file per scene, frames, size of the views and teacher.

    A file is written whole or not at all, under a name of its own until it is done, so that an interruption leaves
    nothing half-written and two writers of the same answer do no harm. Each file holds a digest of the pictures and
    cameras that it was made from; views of the same name made of others are refused.

    Args:
        teacher: Asked where the cache does not know.
        folder: Of the files; made where it is missing.

    Attributes:
        asked: Scenes that the teacher was asked about.
        found: Scenes that were read.
    """

    def __init__(self, teacher: Teacher, folder: Path) -> None:
        self.teacher, self.folder = teacher, folder
        self.asked = self.found = 0

    @property
    def name(self) -> str:
        """The teacher's."""
        return self.teacher.name

    def path(self, shots: Shots, size: tuple[int, int]) -> Path:
        """Where the answer to a scene's views lies."""
        key = json.dumps(self._key(shots, size), sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    @torch.no_grad()
    def __call__(self, views: Views) -> PointMap:
        """See ``Teacher``; the views need names.

        Raises:
            ValueError: The views have no names, or a file was made from other pictures or cameras.
            CheckpointError: A file is damaged.
        """
        answers: list[dict[str, Tensor]] = []
        for row, shots in enumerate(shots_of(views)):
            scene = views.map(lambda part, row=row: part[row : row + 1])  # type: ignore[misc]
            answers.append(self._one(name_views(scene, [shots]), shots))
        kinds = {tuple(sorted(answer)) for answer in answers}
        if len(kinds) > 1:
            raise CheckpointError(f"{self.folder}: scenes of the batch hold different things: {sorted(kinds)}")
        parts = {key: torch.stack([answer[key] for answer in answers]).to(views.image_01.device) for key in answers[0]}
        return PointMap(**parts)

    def _one(self, scene: Views, shots: Shots) -> dict[str, Tensor]:
        path, header = self.path(shots, scene.size), self._key(shots, scene.size) | {"pictures": _digest(scene)}
        if path.is_file():
            self.found += 1
            return self._read(path, header, shots)
        self.asked += 1
        answer = self.teacher(scene)
        parts = {"points": answer.points, "confidence": answer.confidence, "centres": answer.centres}
        tensors = {key: part[0].float() for key, part in parts.items() if part is not None}
        shape = tensors["points"].shape
        if len(shape) != 4 or (shape[0], shape[3]) != (scene.count, 3):
            raise ValueError(f"{self.name} gave points {list(shape)} for {scene.count} views; expected [V, H, W, 3]")
        save_safetensors({key: part.cpu() for key, part in tensors.items()}, path, metadata=header)
        return tensors

    def _read(self, path: Path, header: dict[str, str], shots: Shots) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                written = file.metadata() or {}
                if written != header:
                    wrong = [key for key in header if written.get(key) != header[key]]
                    raise ValueError(
                        f"{path} does not belong to scene {shots.scene!r}, frames {list(shots.frames)}: its "
                        f"{', '.join(wrong)} differ. Name these views otherwise, or use another folder."
                    )
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it, and it is made anew") from error

    def _key(self, shots: Shots, size: tuple[int, int]) -> dict[str, str]:
        return {
            "format": FORMAT,
            "teacher": self.name,
            "scene": shots.scene,
            "frames": json.dumps(shots.frames),
            "size": json.dumps(size),
        }


def _digest(scene: Views) -> str:
    """Of the pictures, to 8 bits, and the cameras."""
    pictures = (scene.image_01.clamp(0, 1) * 255).round().to(torch.uint8)
    digest = hashlib.sha256(pictures.cpu().contiguous().numpy().tobytes())
    for part in (scene.cam_to_world, scene.intrinsics_norm):
        digest.update(part.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
