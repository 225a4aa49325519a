import base64
import json

import numpy as np
import pytest
import torch
from hone_motion_anything.exports import export_distance
from hone_motion_anything.gltf import _Buffer, write_gltf
from hone_motion_anything.grammar import draw_scenes, perform
from hone_motion_anything.motion_files import Motion, write_motion
from hone_motion_anything.rotations import multiply, rotate
from hone_motion_anything.skeletons import HUMANML3D


@pytest.fixture(scope="module")
def joints():
    return perform(draw_scenes(1, torch.Generator().manual_seed(2)))[0].double()


def array(data, number):
    """An accessor's values, by the specification."""
    entry = data["accessors"][number]
    view = data["bufferViews"][entry["bufferView"]]
    raw = base64.b64decode(data["buffers"][0]["uri"].split(",", 1)[1])
    assert len(raw) == data["buffers"][0]["byteLength"]
    assert view["byteOffset"] % 4 == 0
    kind = {5126: "<f4", 5123: "<u2", 5121: "<u1"}[entry["componentType"]]
    width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4, "MAT4": 16}[entry["type"]]
    values = np.frombuffer(raw[view["byteOffset"] : view["byteOffset"] + view["byteLength"]], kind)
    return values.reshape(entry["count"], width)


def posed(data, frame):
    """World rotation and place of each node at a frame, by walking the nodes."""
    animation = data["animations"][0]
    turns, moves = {}, {}
    for channel in animation["channels"]:
        values = array(data, animation["samplers"][channel["sampler"]]["output"])[frame]
        (turns if channel["target"]["path"] == "rotation" else moves)[channel["target"]["node"]] = values
    places, rotations = {}, {}

    def walk(node, place, rotation):
        move = torch.tensor(np.asarray(moves.get(node, data["nodes"][node]["translation"]), dtype=float))
        places[node] = place + rotate(rotation, move)
        rotations[node] = multiply(rotation, torch.tensor(turns[node][[3, 0, 1, 2]].astype(float)))
        for child in data["nodes"][node].get("children", []):
            walk(child, places[node], rotations[node])

    walk(0, torch.zeros(3).double(), torch.tensor([1.0, 0, 0, 0]).double())
    return places, rotations


@pytest.mark.parametrize("bones", ["fixed", "stretched"])
def test_nodes_stand_where_joints_are(bones, joints, tmp_path):
    data = json.loads(write_gltf(joints, tmp_path / "a.gltf", bones=bones).read_text())
    assert [node["name"] for node in data["nodes"][:22]] == list(HUMANML3D.joints)
    times = array(data, data["animations"][0]["samplers"][0]["input"])[:, 0]
    assert times == pytest.approx(np.arange(81) / 20)
    for frame in (0, 17, 40, 80):
        places, _ = posed(data, frame)
        found = torch.stack([places[node] for node in range(22)])
        assert (found - joints[frame]).norm(dim=-1).max() < 1e-5


def test_bones_that_stretch(joints, tmp_path):
    motion = joints + 0.02 * torch.randn(joints.shape, generator=torch.Generator().manual_seed(0)).double()
    off = export_distance(motion)
    for bones, tracks in (("fixed", 23), ("stretched", 44)):
        data = json.loads(write_gltf(motion, tmp_path / "a.gltf", bones=bones).read_text())
        assert len(data["animations"][0]["channels"]) == tracks
        for frame in (0, 17, 80):
            places, _ = posed(data, frame)
            found = (torch.stack([places[node] for node in range(22)]) - motion[frame]).norm(dim=-1)
            assert (found - (off[frame] if bones == "fixed" else 0)).abs().max() < 1e-5
    assert off[[0, 17, 80]].amax(1).min() > 0.02


def test_what_viewers_ask_for(joints, tmp_path):
    data = json.loads(write_gltf(joints, tmp_path / "a.gltf", fps=30).read_text())
    assert data["scenes"] == [{"nodes": [0, 22]}]
    assert (data["nodes"][22]["mesh"], data["nodes"][22]["skin"]) == (0, 0)
    assert data["skins"][0]["joints"] == list(range(22))
    primitive = data["meshes"][0]["primitives"][0]
    times = data["animations"][0]["samplers"][0]["input"]
    assert array(data, times)[-1, 0] == pytest.approx(80 / 30)
    for number in (times, primitive["attributes"]["POSITION"]):
        values, entry = array(data, number), data["accessors"][number]
        assert (entry["min"], entry["max"]) == (values.min(0).tolist(), values.max(0).tolist())
    for name, kind in (("POSITION", "VEC3"), ("JOINTS_0", "VEC4"), ("WEIGHTS_0", "VEC4")):
        assert data["accessors"][primitive["attributes"][name]]["type"] == kind
    assert array(data, primitive["attributes"]["WEIGHTS_0"]).tolist() == [[1, 0, 0, 0]] * (6 * 21)
    assert not array(data, primitive["attributes"]["JOINTS_0"])[:, 1:].any()
    # Each bone's body is closed and shows its outside: every edge is walked once in each direction, and the volume
    # that the faces enclose is positive.
    places = array(data, primitive["attributes"]["POSITION"]).astype(float).reshape(21, 6, 3)
    faces = array(data, primitive["indices"]).reshape(21, 8, 3)
    for bone in range(21):
        own = faces[bone] - 6 * bone
        edges = sorted((a, b) for face in own.tolist() for a, b in zip(face, face[1:] + face[:1], strict=True))
        assert len(set(edges)) == 24
        assert edges == sorted((b, a) for a, b in edges)
        length = np.linalg.norm(places[bone, 5] - places[bone, 0])
        middle = 0.8 * places[bone, 0] + 0.2 * places[bone, 5]
        assert places[bone, 1:5].mean(0) == pytest.approx(middle, abs=1e-6)
        # A double pyramid of the bone's length over a square whose half diagonal is 0.12 of it.
        assert np.linalg.det(places[bone][own]).sum() / 6 == pytest.approx(2 * 0.12**2 * length**3 / 3, rel=1e-3)


def test_the_body_lies_along_the_bones(joints, tmp_path):
    data = json.loads(write_gltf(joints, tmp_path / "a.gltf", fps=30).read_text())
    primitive = data["meshes"][0]["primitives"][0]
    places = torch.tensor(array(data, primitive["attributes"]["POSITION"]).astype(float))
    owners = array(data, primitive["attributes"]["JOINTS_0"])[:, 0]
    binds = array(data, data["skins"][0]["inverseBindMatrices"]).reshape(-1, 4, 4)
    assert array(data, primitive["attributes"]["WEIGHTS_0"]).sum(1) == pytest.approx(1)
    assert array(data, primitive["indices"]).max() == len(places) - 1
    nodes, rotations = posed(data, 40)
    # The last corner of each bone's body, skinned, is the joint where the bone ends.
    for bone, joint in enumerate(range(1, 22)):
        corner = 6 * bone + 5
        owner = int(owners[corner])
        local = places[corner] + torch.tensor(binds[owner][3, :3].astype(float))
        at = nodes[owner] + rotate(rotations[owner], local)
        assert (at - joints[40, joint]).norm() < 1e-5


def test_arrays_begin_at_a_multiple_of_four_bytes():
    buffer = _Buffer()
    for values in ([[1], [2], [3]], [[4], [5], [6]]):
        buffer.add(np.array(values, np.uint8))
    assert [view["byteOffset"] for view in buffer.views] == [0, 4]
    assert bytes(buffer.data) == bytes([1, 2, 3, 0, 4, 5, 6])


def test_by_suffix_and_bad_joints(joints, tmp_path):
    assert write_motion(Motion(joints, 20, HUMANML3D), tmp_path / "a.gltf").stat().st_size > 1000
    with pytest.raises(ValueError, match="of another skeleton"):
        write_gltf(joints[:, :21], tmp_path / "b.gltf")
