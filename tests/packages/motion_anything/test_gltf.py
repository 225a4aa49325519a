import base64
import json

import numpy as np
import pytest
import torch
from hone_motion_anything.gltf import write_gltf
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


def test_nodes_stand_where_joints_are(joints, tmp_path):
    data = json.loads(write_gltf(joints, tmp_path / "a.gltf").read_text())
    assert [node["name"] for node in data["nodes"][:22]] == list(HUMANML3D.joints)
    times = array(data, data["animations"][0]["samplers"][0]["input"])[:, 0]
    assert times == pytest.approx(np.arange(81) / 20)
    for frame in (0, 17, 40, 80):
        places, _ = posed(data, frame)
        found = torch.stack([places[node] for node in range(22)])
        assert (found - joints[frame]).norm(dim=-1).max() < 1e-3


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
        assert (at - joints[40, joint]).norm() < 2e-3


def test_by_suffix_and_bad_joints(joints, tmp_path):
    assert write_motion(Motion(joints, 20, HUMANML3D), tmp_path / "a.gltf").stat().st_size > 1000
    with pytest.raises(ValueError, match="of another skeleton"):
        write_gltf(joints[:, :21], tmp_path / "b.gltf")
