"""Exports in Blender itself, where it is installed: its bones stand where the joints are."""

import json
import shutil
import subprocess

import pytest
import torch
from hone_motion_anything.exports import write_bvh
from hone_motion_anything.gltf import write_gltf
from hone_motion_anything.grammar import draw_scenes, perform
from hone_motion_anything.skeletons import HUMANML3D

BLENDER = shutil.which("blender")
pytestmark = pytest.mark.skipif(BLENDER is None, reason="there is no Blender here")
FRAMES = (0, 17, 40, 80)

# Debian's Blender is older than its Python and its NumPy: the first lines give its importers back what those dropped.
SCRIPT = """
import builtins, json, sys
import numpy
plain = builtins.open
builtins.open = lambda path, mode="r", *args, **kwargs: plain(path, mode.replace("U", ""), *args, **kwargs)
numpy.bool = bool
import bpy
*sources, target = sys.argv[sys.argv.index("--") + 1 :]
shown = {}
for source in sources:
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.context.scene.render.fps = 20
    if source.endswith("bvh"):
        bpy.ops.import_anim.bvh(
            filepath=source, axis_forward="-Z", axis_up="Y", global_scale=0.01, update_scene_fps=True
        )
    else:
        bpy.ops.import_scene.gltf(filepath=source)
    (body,) = [found for found in bpy.data.objects if found.type == "ARMATURE"]
    first, last = bpy.data.actions[0].frame_range
    found = {"frames": last - first, "fps": bpy.context.scene.render.fps, "kinds": [o.type for o in bpy.data.objects]}
    for frame in FRAMES:
        bpy.context.scene.frame_set(int(first) + frame)
        found[frame] = {bone.name: list(body.matrix_world @ bone.head) for bone in body.pose.bones}
    shown[source] = found
json.dump(shown, plain(target, "w"))
""".replace("FRAMES", str(FRAMES))


def test_bones_stand_where_joints_are(tmp_path):
    rigid = perform(draw_scenes(1, torch.Generator().manual_seed(2)))[0].double()
    stretching = rigid + 0.02 * torch.randn(rigid.shape, generator=torch.Generator().manual_seed(0)).double()
    sources = {}
    for kind, write in (("bvh", write_bvh), ("gltf", write_gltf)):
        sources[write(rigid, tmp_path / f"fixed.{kind}")] = rigid
        sources[write(stretching, tmp_path / f"stretched.{kind}", bones="stretched")] = stretching
    target = tmp_path / "found.json"
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [BLENDER, "--background", "--python-exit-code", "1", "--python", tmp_path / "script.py", "--"]
    subprocess.run([*command, *sources, target], check=True, timeout=120, stdout=subprocess.DEVNULL)
    shown = json.loads(target.read_text())
    for source, joints in sources.items():
        found = shown[str(source)]
        assert (found["frames"], found["fps"]) == (80, 20)
        assert ("MESH" in found["kinds"]) == (source.suffix == ".gltf")
        for frame in FRAMES:
            assert set(found[str(frame)]) == set(HUMANML3D.joints)
            places = torch.tensor([found[str(frame)][name] for name in HUMANML3D.joints], dtype=torch.float64)
            # There +z is up, and a person looks along -y.
            there = torch.stack([joints[frame, :, 0], -joints[frame, :, 2], joints[frame, :, 1]], -1)
            assert (places - there).norm(dim=-1).max() < 1e-3, (source, frame)
