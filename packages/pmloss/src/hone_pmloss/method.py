"""The paper: a similarity from the teacher's points to the predicted ones, and the distance to the nearest of them.

Rows of both clouds belong to the same pixels, in the order view, row, column. The teacher is moved onto the prediction,
never the other way round, and neighbours are looked for only afterwards.

Source: arXiv 2506.05327, and the loss of its release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from hone_kernels.nearest_points import nearest_points
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .config import PMLossConfig

__all__ = ["Backend", "PMTerm", "Similarity", "nearest", "pm_loss", "umeyama"]

Backend = Literal["auto", "torch", "triton", "kdtree"]
FLAT = 1e-9
"""Share of the largest below which a singular value, or a sum of two, counts as zero."""


@dataclass(frozen=True)
class Similarity:
    """``x -> scale * rotation @ x + shift``, one per scene.

    Attributes:
        scale: ``[B]``.
        rotation: ``[B, 3, 3]``, proper.
        shift: ``[B, 3]``.
        determined: ``[B]``, False where the points lie on a line, or are mirrored with two equal extents, so that a
            turn about some axis is arbitrary.
    """

    scale: Tensor
    rotation: Tensor
    shift: Tensor
    determined: Tensor

    def __call__(self, points: Float[Tensor, "batch point 3"]) -> Float[Tensor, "batch point 3"]:
        """Move points."""
        turned = points @ self.rotation.to(points).mT
        return self.scale.to(points)[:, None, None] * turned + self.shift.to(points)[:, None]

    def detach(self) -> Similarity:
        """The same, without gradients."""
        return Similarity(self.scale.detach(), self.rotation.detach(), self.shift.detach(), self.determined)


@dataclass(frozen=True)
class PMTerm:
    """The loss, and what it was made of.

    Attributes:
        loss: ``[B]``, after the cap; times a weight, its mean is what a trainer adds.
        raw: ``[B]``, before the cap, without gradients.
        capped: ``[B]``, True where the cap took a scene out: log how often, since a run in which it always fires learns
            nothing of geometry.
        similarity: From the teacher to the prediction; None where nothing is aligned.
        valid: ``[B]``, share of teacher points that are finite.
    """

    loss: Tensor
    raw: Tensor
    capped: Tensor
    similarity: Similarity | None
    valid: Tensor


class _Polar(torch.autograd.Function):
    """The rotation R that maximises tr(R^T A), and that maximum, of 3x3 matrices A.

    R = U S V^T of the singular value decomposition A = U D V^T, with S = diag(1, 1, -1) where det(U V^T) < 0. With
    H = R^T A = V D S V^T, the differential of R is R [w]x with (tr(H) I - H) w = vex(R^T dA - dA^T R), which has no
    division by differences of singular values, only by sums of two of them.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, d, vh = torch.linalg.svd(a)
        sign = torch.where(torch.linalg.det(u) * torch.linalg.det(vh) < 0, -1.0, 1.0).to(a)
        signed = torch.cat([d[..., :2], d[..., 2:] * sign[..., None]], -1)
        rotation = torch.cat([u[..., :2], u[..., 2:] * sign[..., None, None]], -1) @ vh
        trace = signed.sum(-1)
        stiffness = trace[..., None] - signed  # eigenvalues of tr(H) I - H
        fixed = stiffness > FLAT * d[..., :1]
        ctx.save_for_backward(rotation, vh, stiffness, fixed)
        determined = fixed.all(-1)
        ctx.mark_non_differentiable(determined)
        return rotation, trace, determined

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rotation: Tensor, grad_trace: Tensor, _: Any) -> Tensor:
        rotation, vh, stiffness, fixed = ctx.saved_tensors
        m = rotation.mT @ grad_rotation
        b = torch.stack([m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], -1)
        # An axis about which the turn is arbitrary gets no gradient.
        inverse = torch.where(fixed, 1 / torch.where(fixed, stiffness, 1.0), 0.0)
        y = vh.mT @ (inverse[..., None] * (vh @ b[..., None]))
        x, y, z = y[..., 0].unbind(-1)
        zero = torch.zeros_like(x)
        cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
        return rotation @ (cross + grad_trace[..., None, None] * torch.eye(3).to(rotation))


def umeyama(
    source: Float[Tensor, "batch point 3"],
    target: Float[Tensor, "batch point 3"],
    weights: Float[Tensor, "batch point"] | None = None,
) -> Similarity:
    """The similarity that moves ``source`` onto ``target`` with the least squared error, row to row, in float64.

    Gradients reach both, without the backward pass of a singular value decomposition: they are finite for planes and
    for clouds with equal extents, where that one's are not.

    Args:
        source: The teacher's points.
        target: The predicted points, of the same rows.
        weights: Of each row, at least 0; equal if None.

    Raises:
        ValueError: Shapes differ, or a source has no extent or no weight, so that its scale is arbitrary.

    Source: Umeyama, 1991; used by the release on pixel correspondences.
    """
    if source.shape != target.shape or source.ndim != 3 or source.shape[-1] != 3:
        raise ValueError(
            f"expected two clouds [B, N, 3] of the same rows; got {list(source.shape)}, {list(target.shape)}"
        )
    x, y = source.double(), target.double()
    share = torch.full_like(x[..., 0], 1 / x.shape[1]) if weights is None else weights.double()
    if weights is not None:
        share = share / share.sum(1, keepdim=True)
    mean_x, mean_y = ((share[..., None] * points).sum(1, keepdim=True) for points in (x, y))
    x, y = x - mean_x, y - mean_y
    spread = (share * x.square().sum(-1)).sum(1)
    # What rounding leaves of equal points is no extent.
    flat = ~(spread.detach() > 1e-24 * source.detach().double().square().sum(-1).amax(1))
    if bool(flat.any()):
        bad = int(flat.nonzero()[0, 0])
        raise ValueError(
            f"scene {bad}: the points to be aligned have no extent or no weight; expected at least three that differ"
        )
    covariance = (share[..., None] * y).mT @ x
    rotation, trace, determined = _Polar.apply(covariance)
    scale = trace / spread
    shift = mean_y[:, 0] - scale[:, None] * (rotation @ mean_x.mT)[..., 0]
    return Similarity(scale, rotation, shift, determined)


@torch.no_grad()
def nearest(
    points: Float[Tensor, "n 3"], cloud: Float[Tensor, "m 3"], *, backend: Backend = "auto"
) -> Int[Tensor, " n"]:
    """Row of ``cloud`` that is nearest to each point; exact, any of them where several are.

    Args:
        points: Queries.
        cloud: At least one point.
        backend: ``torch`` compares all pairs, in chunks, by differences of coordinates, on any device; ``triton`` is
            hone-kernels' on a GPU, which passes over what is far, in float32; ``kdtree`` is scipy's on the CPU;
            ``auto`` takes the tree on a CPU and the kernel on a GPU.

    Raises:
        ValueError: The cloud is empty.
    """
    if not len(cloud):
        raise ValueError("there is no point to be near to: expected at least one")
    if backend == "kdtree" or (backend == "auto" and points.device.type == "cpu"):
        from scipy.spatial import cKDTree

        _, found = cKDTree(cloud.double().cpu().numpy()).query(points.double().cpu().numpy())
        return torch.as_tensor(found, dtype=torch.long, device=points.device)
    points = points.float() if points.dtype.itemsize < 4 else points
    cloud = cloud.to(points)
    return nearest_points(points, cloud, backend="reference" if backend == "torch" else backend)[0]


def pm_loss(
    means: Float[Tensor, "batch point 3"],
    teacher: Float[Tensor, "batch point 3"],
    config: PMLossConfig | None = None,
    *,
    confidence: Float[Tensor, "batch point"] | None = None,
    centres: tuple[Float[Tensor, "batch view 3"], Float[Tensor, "batch view 3"]] | None = None,
    backend: Backend = "auto",
) -> PMTerm:
    """Mean squared distance from each predicted centre to the nearest point of the teacher, moved onto the prediction.

    Args:
        means: Predicted centres, in the order view, row, column; 16 bits are taken to float32, under autocast too.
        teacher: Points of the same pixels, in any frame and scale; those that are not finite are left out, and no
            centre is drawn to others for them.
        config: Options; the paper's if None. Its ``weight`` is not applied.
        confidence: Of the teacher, at least 0; needed where the config weights by it.
        centres: Camera centres in the teacher's frame and true ones, for ``align="pose"``.
        backend: Of ``nearest``.

    Raises:
        ValueError: Shapes differ, a prediction is not finite or, where it is aligned to, all at one place, a scene has
            fewer than three teacher points, or what the config asks for is not given or no confidence.

    Source: the released ``pmloss``; options other than the defaults are ours.
    """
    with torch.autocast(means.device.type, enabled=False):
        # Distances of a thousandth at coordinates of a hundred need float32 at least.
        means = means.float() if means.dtype.itemsize < 4 else means
        return _pm_loss(means, teacher, config or PMLossConfig(), confidence, centres, backend)


def _pm_loss(
    means: Tensor,
    teacher: Tensor,
    config: PMLossConfig,
    confidence: Tensor | None,
    centres: tuple[Tensor, Tensor] | None,
    backend: Backend,
) -> PMTerm:
    valid = _check(means, teacher, config, confidence, centres)
    x = torch.where(valid[..., None], teacher, 0.0).to(means.dtype)
    trust = valid.to(means.dtype)
    if config.confidence:
        assert confidence is not None
        trust = trust * torch.where(valid, confidence, 0.0).to(means.dtype)
    similarity = _align(x, means, trust, config, centres)
    y = x if similarity is None else similarity(x)
    losses = [_distance(p, q, keep, w, config, backend) for p, q, keep, w in zip(means, y, valid, trust, strict=True)]
    raw = torch.stack(losses)
    if config.scale_normalised is not None:
        variance = _variance(y, trust)
        raw = raw / (variance if config.scale_normalised == "full" else variance.detach())
    capped = raw.detach() > config.cap if config.cap is not None else torch.zeros_like(raw, dtype=torch.bool)
    loss = torch.where(capped, raw * config.cap_factor, raw)
    return PMTerm(loss, raw.detach(), capped, similarity, valid.double().mean(1))


def _check(
    means: Tensor,
    teacher: Tensor,
    config: PMLossConfig,
    confidence: Tensor | None,
    centres: tuple[Tensor, Tensor] | None,
) -> Bool[Tensor, "batch point"]:
    """Which teacher points are finite."""
    if means.ndim != 3 or means.shape[-1] != 3 or teacher.shape != means.shape:
        raise ValueError(
            f"expected centres and teacher points [B, N, 3] of the same pixels; got {list(means.shape)} and "
            f"{list(teacher.shape)}. With anchors, gather the teacher's views in their order."
        )
    if config.confidence and (confidence is None or confidence.shape != means.shape[:2]):
        got = None if confidence is None else list(confidence.shape)
        raise ValueError(f"confidence must be {list(means.shape[:2])}, as the config weights by it; got {got}")
    if (config.align == "pose") != (centres is not None):
        some = "none" if centres is None else "some"
        raise ValueError(f'camera centres belong to align="pose", and to it alone; got {some} with {config.align!r}')
    valid = teacher.isfinite().all(-1)
    centres_now = means.detach()
    faults = {
        "predicted centres are not finite; the step before diverged": ~centres_now.isfinite().flatten(1).all(1),
        "fewer than three teacher points are finite": valid.sum(1) < 3,
    }
    if config.align in ("umeyama", "umeyama_detached"):
        one = (centres_now == centres_now[:, :1]).flatten(1).all(1)
        faults["all predicted centres lie at one place, onto which any teacher shrinks without loss"] = one
    if config.confidence:
        assert confidence is not None
        known = torch.where(valid, confidence, 0.0)
        faults["confidence must be finite and at least 0 where there are teacher points, and not 0 at all of them"] = ~(
            known.isfinite() & (known >= 0)
        ).all(1) | (known.sum(1) == 0)
    # One look for all, since each makes a GPU wait.
    if bool(torch.stack(list(faults.values())).any()):
        scene, fault = next((int(bad.nonzero()[0, 0]), fault) for fault, bad in faults.items() if bool(bad.any()))
        raise ValueError(f"scene {scene}: {fault}")
    return valid


def _align(
    x: Tensor, means: Tensor, trust: Tensor, config: PMLossConfig, centres: tuple[Tensor, Tensor] | None
) -> Similarity | None:
    if config.align == "none":
        return None
    if config.align == "pose":
        assert centres is not None
        found = umeyama(centres[0], centres[1])
        if not bool(found.determined.all()):
            raise ValueError(
                f"camera centres leave a turn open: expected at least three that do not lie on a line; got "
                f"{centres[0].shape[1]}"
            )
        return found.detach()
    target = means if config.align == "umeyama" else means.detach()
    if config.trim:
        with torch.no_grad():
            residual = (umeyama(x, target, trust)(x) - target).square().sum(-1).masked_fill(trust == 0, torch.inf)
            kept = ((trust > 0).sum(1) * (1 - config.trim)).ceil().long().clamp(min=3)
            limit = residual.sort(1).values.gather(1, kept[:, None] - 1)
            trust = trust * (residual <= limit)
    return umeyama(x, target, trust)


def _distance(
    p: Tensor, y: Tensor, keep: Tensor, trust: Tensor, config: PMLossConfig, backend: Backend
) -> Float[Tensor, ""]:
    """Loss of one scene."""
    total = p.new_zeros(())
    cloud = y[keep]
    if config.direction == "paired":
        return _mean(p - y, trust, config)
    if config.direction in ("pred2gt", "both"):
        total = total + _mean(p - cloud[nearest(p.detach(), cloud.detach(), backend=backend)], trust, config)
    if config.direction in ("gt2pred", "both"):
        total = total + _mean(cloud - p[nearest(cloud.detach(), p.detach(), backend=backend)], trust[keep], config)
    return total


def _mean(difference: Tensor, weights: Tensor, config: PMLossConfig) -> Tensor:
    squared = difference.square().sum(-1)
    if config.robust == "huber":
        delta = config.huber_delta
        near = squared <= delta**2
        # The root of what the other branch takes must not reach the gradient.
        root = torch.where(near, delta**2, squared).sqrt()
        squared = torch.where(near, squared, 2 * delta * root - delta**2)
    return (weights * squared).sum() / weights.sum()


def _variance(points: Tensor, weights: Tensor) -> Float[Tensor, " batch"]:
    """Mean squared distance from the centre, ``[B]``."""
    share = (weights / weights.sum(1, keepdim=True))[..., None]
    centred = points - (share * points).sum(1, keepdim=True)
    return (share * centred.square()).sum((1, 2))
