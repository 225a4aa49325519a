"""Write generated rooms as a person's COLMAP and nerfstudio folders."""

import json
import struct

import numpy as np
import torch
from hone_splat.cameras import intrinsics_px, matrix_to_quat, opengl_to_opencv, unproject
from hone_splat.rooms import Rooms
from PIL import Image


def room(views=6, height=48, width=64, seed=3):
    """Pictures, poses, intrinsics in pixels and some true points of a room."""
    rooms = Rooms.draw([seed])
    poses = rooms.cam_to_world[:, :: 50 // views][:, :views]
    image, distance = rooms.see(poses, (height, width))
    inner = rooms.intrinsics_norm
    points = unproject(distance, poses, inner[:, None].expand(1, views, 3, 3), "distance")[0, :, ::8, ::8].reshape(
        -1, 3
    )
    return image[0], poses[0].double(), intrinsics_px(inner[0], height, width).double(), points.double()


def save_pictures(folder, image):
    folder.mkdir(parents=True)
    names = [f"{index:03d}.png" for index in range(len(image))]
    for name, picture in zip(names, image, strict=True):
        pixels = (picture.movedim(0, -1).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name)
    return names


def write_colmap(folder, *, binary, model="PINHOLE", extra=(), **options):
    image, poses, inner, points = room(**options)
    names = save_pictures(folder / "images", image)
    height, width = image.shape[-2:]
    world_to_cam = torch.linalg.inv(poses)
    quats, shifts = matrix_to_quat(world_to_cam[:, :3, :3]).tolist(), world_to_cam[:, :3, 3].tolist()
    params = [float(inner[0, 0]), float(inner[1, 1]), float(inner[0, 2]), float(inner[1, 2]), *extra]
    place = folder / "sparse" / "0"
    place.mkdir(parents=True)
    entries = list(zip(names, quats, shifts, strict=True))[::-1]  # COLMAP's order is any
    if binary:
        number = {"PINHOLE": 1, "OPENCV": 4}[model]
        cameras = struct.pack("<QiiQQ", 1, 7, number, width, height) + struct.pack(f"<{len(params)}d", *params)
        (place / "cameras.bin").write_bytes(cameras)
        data = struct.pack("<Q", len(entries))
        for index, (name, quat, shift) in enumerate(entries):
            data += struct.pack("<i7di", index, *quat, *shift, 7) + name.encode() + b"\0"
            data += struct.pack("<Q", index) + struct.pack("<ddq", 1.0, 2.0, -1) * index
        (place / "images.bin").write_bytes(data)
        data = struct.pack("<Q", len(points))
        for index, point in enumerate(points.tolist()):
            data += struct.pack("<Q3d3BdQ", index, *point, 9, 9, 9, 0.5, index % 3) + struct.pack("<ii", 0, 0) * (
                index % 3
            )
        (place / "points3D.bin").write_bytes(data)
    else:
        text = f"# Camera list\n7 {model} {width} {height} {' '.join(map(repr, params))}\n"
        (place / "cameras.txt").write_text(text)
        lines = ["# Image list"]
        for index, (name, quat, shift) in enumerate(entries):
            lines += [" ".join(map(repr, [index, *quat, *shift, 7])) + f" {name}", "1.0 2.0 -1" if index % 2 else ""]
        (place / "images.txt").write_text("\n".join(lines) + "\n")
        lines = [f"{i} {x!r} {y!r} {z!r} 9 9 9 0.5 0 0" for i, (x, y, z) in enumerate(points.tolist())]
        (place / "points3D.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_transforms(folder, *, points=True, change=None, **options):
    image, poses, inner, cloud = room(**options)
    names = save_pictures(folder / "images", image)
    height, width = image.shape[-2:]
    data = {"fl_x": float(inner[0, 0]), "fl_y": float(inner[1, 1]), "cx": float(inner[0, 2]), "cy": float(inner[1, 2])}
    data |= {"w": width, "h": height, "k1": 0.0, "camera_model": "OPENCV"}
    data["frames"] = [
        {"file_path": f"images/{name}", "transform_matrix": pose}
        for name, pose in zip(names, opengl_to_opencv(poses).tolist(), strict=True)
    ]
    if points:
        header = (
            f"ply\nformat binary_little_endian 1.0\nelement vertex {len(cloud)}\nproperty float x\nproperty float y\n"
        )
        header += "property float z\nproperty uchar red\nend_header\n"
        body = b"".join(struct.pack("<fffB", *point, 9) for point in cloud.tolist())
        (folder / "sparse.ply").write_bytes(header.encode() + body)
        data["ply_file_path"] = "sparse.ply"
    if change:
        change(data)
    (folder / "transforms.json").write_text(json.dumps(data))
    return folder / "transforms.json"
