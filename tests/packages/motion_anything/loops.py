"""HumanML3D's features one frame and one joint at a time: slow, and plain to read beside the format's description."""

import math
from itertools import pairwise

import numpy as np


def multiply(a, b):
    w, x, y, z = a
    p, q, r, s = b
    first, second = w * p - x * q - y * r - z * s, w * q + x * p + y * s - z * r
    return np.array([first, second, w * r - x * s + y * p + z * q, w * s + x * r - y * q + z * p])


def inverse(a):
    return a * np.array([1, -1, -1, -1])


def rotate(a, v):
    return multiply(multiply(a, np.array([0, *v])), inverse(a))[1:]


def between(a, b):
    quat = np.array([math.sqrt((a @ a) * (b @ b)) + a @ b, *np.cross(a, b)])
    return quat / np.linalg.norm(quat)


def six(a):
    return np.concatenate([rotate(a, np.eye(3)[0]), rotate(a, np.eye(3)[1])])


def extract(joints, skeleton, offsets):
    joints, offsets = joints.numpy().copy(), offsets.double().numpy()
    frames, count = joints.shape[:2]
    parent = skeleton.parents
    # One leg's upper and the other's lower bone give the scale.
    legs = sum(np.linalg.norm(joints[0, j] - joints[0, parent[j]]) for j in skeleton.legs)
    scale = sum(np.linalg.norm(offsets[j]) for j in skeleton.legs) / legs
    put = np.zeros_like(joints)
    for t in range(frames):
        put[t, 0] = joints[t, 0] * scale
        for chain in skeleton.chains:
            for j, child in pairwise(chain):
                bone = joints[t, child] - joints[t, j]
                put[t, child] = put[t, j] + bone / np.linalg.norm(bone) * np.linalg.norm(offsets[child])
    put[..., 1] -= put[..., 1].min()
    first = put[0].copy()
    put -= first[0] * [1, 0, 1]
    rhip, lhip, rsho, lsho = skeleton.facing
    across = first[rhip] - first[lhip] + first[rsho] - first[lsho]
    forward = np.cross([0, 1, 0], across)
    turn = between(forward / np.linalg.norm(forward), np.array([0.0, 0, 1]))
    put = np.array([[rotate(turn, put[t, j]) for j in range(count)] for t in range(frames)])

    forwards = []
    for t in range(frames):
        # The release's hips have the wrong sign here.
        across = put[t, lhip] - put[t, rhip] + put[t, rsho] - put[t, lsho]
        forwards.append(np.cross([0, 1, 0], across / np.linalg.norm(across)))
    weights = [math.exp(-0.5 * (k / 20) ** 2) for k in range(-80, 81)]
    smooth = []
    for t in range(frames):
        total = sum(w * forwards[min(max(t + k, 0), frames - 1)] for w, k in zip(weights, range(-80, 81), strict=True))
        smooth.append(total / np.linalg.norm(total))
    heading = [between(f, np.array([0.0, 0, 1])) for f in smooth]
    heading[0] = np.array([1.0, 0, 0, 0])

    rows = []
    for t in range(frames - 1):
        q, after = heading[t], heading[t + 1]
        move = rotate(after, put[t + 1, 0] - put[t, 0])
        row = [math.asin(multiply(after, inverse(q))[2]), move[0], move[2], put[t, 0, 1]]
        for j in range(1, count):
            row.extend(rotate(q, put[t, j] - put[t, 0] * [1, 0, 1]))
        local = {}
        for chain in skeleton.chains:
            total = q
            for j, child in pairwise(chain):
                bone = put[t, child] - put[t, j]
                world = between(np.array(skeleton.directions[child], dtype=float), bone / np.linalg.norm(bone))
                local[child] = multiply(inverse(total), world)
                total = multiply(total, local[child])
        for j in range(1, count):
            row.extend(six(local[j]))
        for j in range(count):
            row.extend(rotate(q, put[t + 1, j] - put[t, j]))
        for j in skeleton.feet:
            row.append(float(((put[t + 1, j] - put[t, j]) ** 2).sum() < skeleton.contact))
        rows.append(row)
    return np.array(rows)
