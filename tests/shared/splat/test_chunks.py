import io
import json

import hone_splat.chunks as chunks_module
import numpy as np
import pytest
import torch
from hone_core.testing import full_disk
from hone_splat.chunks import ChunkScene, ChunkSet, read_evaluation_index, write_chunks
from hone_splat.rooms import Rooms
from PIL import Image


@pytest.fixture(scope="module")
def rooms():
    drawn = Rooms.draw([0, 1, 2])
    poses = drawn.cam_to_world[:, ::10]
    return drawn.see(poses, (32, 32))[0], poses, drawn.intrinsics_norm


def scenes(rooms):
    image, poses, inner = rooms
    return [
        ChunkScene.of(f"room{i}", image[i], poses[i], inner[i].expand(len(poses[i]), 3, 3)) for i in range(len(image))
    ]


def test_scenes_come_back_from_several_chunks(rooms, tmp_path):
    image, poses, inner = rooms
    write_chunks(scenes(rooms), tmp_path, chunk_bytes=1)
    chunks = ChunkSet(tmp_path)
    assert chunks.index == {f"room{i}": f"{i:06d}.torch" for i in range(3)}
    for i in (2, 0):
        views = chunks.scene(f"room{i}").views([3, 1], (32, 32), 0.4, 12.0)
        views.check()
        assert torch.allclose(views.image_01[0], image[i, [3, 1]].clamp(0, 1), atol=0.51 / 255)
        assert torch.allclose(views.cam_to_world[0], poses[i, [3, 1]], atol=1e-5)
        assert torch.allclose(views.intrinsics_norm[0, 0], inner[i], atol=1e-6)
    with pytest.raises(FileExistsError, match="holds chunks already"):
        write_chunks(scenes(rooms), tmp_path)


def test_a_chunk_is_read_once_for_scenes_in_the_order_of_the_index(rooms, tmp_path, monkeypatch):
    size = sum(image.numel() for image in scenes(rooms)[0].images)
    write_chunks(scenes(rooms), tmp_path, chunk_bytes=size)  # closed as soon as it holds so much
    chunks = ChunkSet(tmp_path)
    assert chunks.index["room0"] != chunks.index["room1"]
    read, plain = [], chunks_module._read_chunk
    monkeypatch.setattr(chunks_module, "_read_chunk", lambda path: read.append(path.name) or plain(path))
    for key in chunks.index:
        chunks.scene(key)
        chunks.scene(key)
    assert read == list(dict.fromkeys(chunks.index.values()))


def test_the_layout_is_the_published_one(rooms, tmp_path):
    write_chunks(scenes(rooms), tmp_path)
    data = torch.load(tmp_path / "000000.torch", weights_only=True)
    assert [scene["key"] for scene in data] == ["room0", "room1", "room2"]
    assert set(data[0]) == {"url", "timestamps", "cameras", "images", "key"}
    row, pose, inner = data[1]["cameras"][2], rooms[1][1, 2], rooms[2][1]
    assert row[:6].tolist() == pytest.approx([float(inner[0, 0]), float(inner[1, 1]), 0.5, 0.5, 0, 0])
    assert torch.allclose(row[6:].view(3, 4) @ pose, torch.eye(4)[:3], atol=1e-5)
    assert data[0]["images"][0].dtype == torch.uint8


def test_a_full_disk_is_named_and_leaves_no_index(rooms, tmp_path):
    with full_disk(1000), pytest.raises(OSError, match=r"000000\.torch could not be written"):
        write_chunks(scenes(rooms), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_damaged_is_named(rooms, tmp_path):
    write_chunks(scenes(rooms), tmp_path)
    chunks = ChunkSet(tmp_path)
    with pytest.raises(KeyError, match="no scene 'other' among its 3"):
        chunks.scene("other")
    scene = chunks.scene("room0")
    with pytest.raises(ValueError, match="room0 has 5 views; view 7"):
        scene.views([0, 7], (32, 32), 1, 2)
    broken = ChunkScene("room0", scene.cameras, (scene.images[0][:40], *scene.images[1:]))
    with pytest.raises(ValueError, match="room0, 0: the picture cannot be read"):
        broken.views([0, 1], (32, 32), 1, 2)
    deep = io.BytesIO()
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(deep, "PNG")
    deep = torch.frombuffer(bytearray(deep.getvalue()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="room0, 1: the picture has more than 8 bits a value"):
        ChunkScene("room0", scene.cameras, (scene.images[0], deep, *scene.images[2:])).views([0, 1], (32, 32), 1, 2)
    mirrored = scene.cameras.clone()
    mirrored[1, 6:10] *= -1
    with pytest.raises(ValueError, match="room0, 1: the pose is left-handed"):
        ChunkScene("room0", mirrored, scene.images).views([0, 1], (32, 32), 1, 2)
    with pytest.raises(ValueError, match=r"expected cameras \[5, 18\]"):
        ChunkScene("room0", scene.cameras[:, :12], scene.images)
    file = tmp_path / "000000.torch"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"000000.torch is cut short"):
        ChunkSet(tmp_path).scene("room0")
    for other in ([1], {"key": "room0"}, [{"key": "room0"}]):
        torch.save(other, file)
        with pytest.raises(ValueError, match="is no chunk: expected a list of scenes"):
            ChunkSet(tmp_path).scene("room0")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"which index.json names"):
        ChunkSet(tmp_path).scene("room0")
    with pytest.raises(FileNotFoundError):
        ChunkSet(tmp_path / "none")


def test_evaluation_indices(tmp_path):
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"a": {"context": [0, 9], "target": [3]}, "b": None}))
    assert read_evaluation_index(path) == {"a": ((0, 9), (3,))}
    for entry, message in (
        ({"context": [0], "target": [3]}, "two contexts"),
        ({"context": [0, 1]}, "or null"),
        ({"context": 2, "target": [3]}, "or null"),
    ):
        path.write_text(json.dumps({"a": entry}))
        with pytest.raises(ValueError, match=message):
            read_evaluation_index(path)


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_chunk_is_executed(tmp_path):
    torch.save([{"key": Planted(tmp_path / "planted")}], tmp_path / "000000.torch")
    (tmp_path / "index.json").write_text(json.dumps({"room": "000000.torch"}))
    with pytest.raises(ValueError, match=r"000000.torch is cut short, or no chunk"):
        ChunkSet(tmp_path).scene("room")
    assert not (tmp_path / "planted").exists()
