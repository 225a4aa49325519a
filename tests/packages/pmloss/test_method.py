import pytest
import torch
from hone_pmloss.config import PMLossConfig
from hone_pmloss.method import _Polar, nearest, pm_loss, umeyama
from hone_splat.cameras import quat_to_matrix


def eye_like(values, seed=0, reflect=False):
    """A matrix with given singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (quat_to_matrix(torch.randn(4, generator=generator, dtype=torch.float64)) for _ in range(2))
    if reflect:
        left = left @ torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


def test_values_and_gradients_are_the_oracles(clouds, pmref):
    for seed in range(4):
        means, teacher = clouds(seed)
        grads = []
        for function in (lambda p, x: pm_loss(p, x).loss, pmref.pm_loss):
            p, x = means.clone().requires_grad_(), teacher.clone().requires_grad_()
            loss = function(p, x)
            grads.append((loss.detach(), *torch.autograd.grad(loss.sum(), (p, x))))
        for ours, theirs in zip(*grads, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_case_by_hand():
    # Four points on a cross, the teacher's twice as far out.
    teacher = torch.tensor([[[2.0, 0, 0], [-2, 0, 0], [0, 2, 0], [0, -2, 0]]])
    means = teacher / 2
    found = umeyama(teacher, means)
    assert torch.allclose(found.scale, torch.tensor([0.5], dtype=torch.float64))
    assert torch.allclose(found.rotation[0], torch.eye(3, dtype=torch.float64), atol=1e-12)
    known = PMLossConfig(align="none")
    moved = teacher + torch.tensor([[0.3, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0.1]])
    assert pm_loss(moved, teacher, known).loss.item() == pytest.approx((0.09 + 0.01) / 4)
    # All centres at one teacher point: every one is near to it, the other teacher points are far from all.
    collapsed = teacher[:, :1].expand(-1, 4, -1).contiguous()
    values = {
        name: pm_loss(collapsed, teacher, PMLossConfig(align="none", direction=name)).loss.item()
        for name in ("pred2gt", "gt2pred", "both", "paired")
    }
    assert values == pytest.approx({"pred2gt": 0, "gt2pred": (16 + 8 + 8) / 4, "both": 8, "paired": 8})
    huber = PMLossConfig(align="none", direction="paired", robust="huber", huber_delta=1.0)
    assert pm_loss(collapsed, teacher, huber).loss.item() == pytest.approx(((2 * 4 - 1) + 2 * (2 * 8**0.5 - 1)) / 4)


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize(
    "values", [[3.0, 2.0, 1.0], [2.0, 2.0, 1.0], [2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 1e-9]]
)
def test_gradient_of_the_rotation_by_differences(values, reflect):
    # Planes and equal extents among them, where the decomposition's own gradient divides by zero.
    a = eye_like(values, reflect=reflect).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: _Polar.apply(a)[:2], (a,), eps=1e-7, atol=1e-5)


def test_gradient_of_the_rotation_beside_the_decompositions():
    for reflect in (False, True):
        a = eye_like([3.0, 2.0, 1.0], seed=5, reflect=reflect).requires_grad_()
        weight = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        u, d, vh = torch.linalg.svd(a)
        sign = torch.tensor([1.0, 1.0, -1.0 if reflect else 1.0], dtype=torch.float64)
        slow = ((u @ torch.diag(sign) @ vh) * weight).sum() + (d * sign).sum()
        rotation, trace, determined = _Polar.apply(a)
        assert bool(determined)
        assert float(torch.linalg.det(rotation.detach())) == pytest.approx(1)
        (ours,), (theirs,) = (torch.autograd.grad(v, a) for v in ((rotation * weight).sum() + trace, slow))
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"robust": "huber", "huber_delta": 0.05},
        {"direction": "both"},
        {"confidence": True},
        {"trim": 0.2},
        {"align": "none"},
        {"direction": "paired"},
    ],
)
def test_gradient_of_the_loss_by_differences(clouds, options):
    means, teacher = clouds(3, count=8)
    confidence = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5

    def function(means, teacher):
        return pm_loss(means, teacher, PMLossConfig(cap=None, **options), confidence=confidence).loss

    assert torch.autograd.gradcheck(function, (means.requires_grad_(), teacher.requires_grad_()))


def test_a_similarity_of_the_teacher_costs_nothing_and_changes_nothing(clouds):
    means, teacher = clouds(noise=0.0)
    assert float(pm_loss(means, teacher).loss.max()) < 1e-24
    means, teacher = clouds(noise=0.2)
    turn = quat_to_matrix(torch.tensor([0.3, -1.0, 0.2, 0.7], dtype=torch.float64))
    other = pm_loss(means, 7 * teacher @ turn.T + 3)
    assert torch.allclose(other.loss, pm_loss(means, teacher).loss, rtol=1e-10)


def test_order_matters_to_the_alignment_and_not_to_the_neighbours(clouds):
    means, teacher = clouds(noise=0.2)
    shuffled = teacher[:, torch.randperm(teacher.shape[1], generator=torch.Generator().manual_seed(0))]
    assert float((pm_loss(means, shuffled).loss / pm_loss(means, teacher).loss).min()) > 2
    known = PMLossConfig(align="none")
    assert torch.allclose(pm_loss(means, shuffled, known).loss, pm_loss(means, teacher, known).loss)


def test_scaling_and_moving_the_prediction(clouds):
    means, teacher = clouds(noise=0.2)
    base = pm_loss(means, teacher).loss
    assert torch.allclose(pm_loss(3 * means, teacher).loss, 9 * base)
    whole, detached = (PMLossConfig(scale_normalised=kind) for kind in ("full", "detached"))
    for cfg in (whole, detached):
        assert torch.allclose(pm_loss(3 * means, teacher, cfg).loss, pm_loss(means, teacher, cfg).loss)
    factor = torch.ones(2, 1, 1, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(2, 1, 3, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(pm_loss(factor * means + shift, teacher).loss.sum(), (factor, shift))
    assert torch.allclose(grads[0][:, 0, 0], 2 * base)  # a constant pull to shrink, named in the README
    assert float(grads[1].abs().max()) < 1e-12
    # Divided by a constant the pull stays; with the variance's own gradient there is none.
    pulls = [
        torch.autograd.grad(pm_loss(factor * means, teacher, cfg).loss.sum(), factor)[0] for cfg in (whole, detached)
    ]
    assert float(pulls[0].abs().max()) < 1e-12
    assert torch.allclose(pulls[1][:, 0, 0], 2 * pm_loss(means, teacher, detached).loss)


def test_the_scale_is_of_the_points_that_the_teacher_has(clouds):
    means, teacher = clouds(noise=0.2)
    broken = teacher.clone()
    broken[:, :6] = torch.nan
    cfg = PMLossConfig(direction="paired", scale_normalised="detached")
    assert torch.allclose(pm_loss(means, broken, cfg).loss, pm_loss(means[:, 6:], teacher[:, 6:], cfg).loss)


def test_a_detached_similarity_has_the_value_and_another_gradient(clouds):
    means, teacher = clouds(noise=0.2)
    means.requires_grad_()
    full, detached = (pm_loss(means, teacher, PMLossConfig(align=a)).loss for a in ("umeyama", "umeyama_detached"))
    assert torch.equal(full, detached)
    first, second = (torch.autograd.grad(loss.sum(), means)[0] for loss in (full, detached))
    assert not torch.allclose(first, second, atol=1e-6)


def test_autocast_and_16_bits_lose_nothing_more(clouds):
    means, teacher = (cloud.float() + 100 for cloud in clouds(noise=0.01))
    want = pm_loss(means, teacher).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pm_loss(means, teacher).loss, want)
    short = (means - 100).bfloat16()
    found = pm_loss(short, teacher)
    assert found.loss.dtype == torch.float32
    assert torch.allclose(found.loss, pm_loss(short.float(), teacher).loss)


def test_the_cap_takes_a_scene_out_and_says_so(clouds, pmref):
    means, teacher = clouds(noise=0.3)
    means = means * torch.tensor([1.0, 100.0], dtype=torch.float64)[:, None, None]
    term = pm_loss(means, teacher)
    assert term.capped.tolist() == [False, True]
    assert float(term.loss[1]) == pytest.approx(1e-5 * float(term.raw[1]))
    assert torch.allclose(term.loss, pmref.pm_loss(means, teacher))
    assert not pm_loss(means, teacher, PMLossConfig(cap=None)).capped.any()
    # What is left of the gradient is as small, and what is logged has none.
    grads = {}
    for cap in (100.0, None):
        term = pm_loss(means.requires_grad_(), teacher, PMLossConfig(cap=cap))
        assert not term.raw.requires_grad
        (grads[cap],) = torch.autograd.grad(term.loss.sum(), means)
    assert torch.allclose(grads[100.0][1], 1e-5 * grads[None][1])
    assert torch.equal(grads[100.0][0], grads[None][0])
    off = torch.tensor([[[1.0, 0, 0], [3, 0, 0], [0, 5, 0]]])
    cfg = PMLossConfig(align="none", direction="paired", cap=1.0)
    assert not pm_loss(off, off - torch.tensor([1.0, 0, 0]), cfg).capped.any()


def test_confidence_of_zero_is_as_absence(clouds):
    means, teacher = clouds(noise=0.1)
    spoilt = teacher.clone()
    spoilt[:, :5] += 50
    confidence = torch.ones(means.shape[:2], dtype=torch.float64)
    confidence[:, :5] = 0
    cfg = PMLossConfig(confidence=True, direction="paired")
    found = pm_loss(means, spoilt, cfg, confidence=confidence)
    assert torch.allclose(found.loss, pm_loss(means[:, 5:], teacher[:, 5:], PMLossConfig(direction="paired")).loss)


def test_confidence_weighs_every_direction():
    # Three pixels on a line, one of which counts threefold; the last centre is 2 off, the first teacher point 1.
    teacher = torch.tensor([[[0.0, 0, 0], [10, 0, 0], [20, 0, 0]]])
    means = torch.tensor([[[1.0, 0, 0], [10, 0, 0], [20, 2, 0]]])
    confidence = torch.tensor([[1.0, 1.0, 3.0]])
    for direction, factor in (("pred2gt", 1), ("gt2pred", 1), ("both", 2), ("paired", 1)):
        cfg = PMLossConfig(align="none", direction=direction, confidence=True)
        assert pm_loss(means, teacher, cfg, confidence=confidence).loss.item() == pytest.approx(factor * 13 / 5)
        plain = PMLossConfig(align="none", direction=direction)
        assert pm_loss(means, teacher, plain).loss.item() == pytest.approx(factor * 5 / 3)


def test_hubers_gradient_is_finite_where_a_centre_lies_on_its_point():
    teacher = torch.tensor([[[0.0, 0, 0], [10, 0, 0], [0, 10, 0]]])
    means = (teacher + torch.tensor([[[0.0, 0, 0], [0.5, 0, 0], [0, 3, 0]]])).requires_grad_()
    term = pm_loss(means, teacher, PMLossConfig(align="none", robust="huber"))
    assert term.loss.item() == pytest.approx((0 + 0.25 + 2 * 3 - 1) / 3)
    (grad,) = torch.autograd.grad(term.loss.sum(), means)
    assert torch.allclose(grad, torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 2, 0]]]) / 3)


@pytest.mark.parametrize("direction", ["pred2gt", "gt2pred", "both", "paired"])
@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_what_is_not_finite_is_left_out_of_every_direction(clouds, direction, trim):
    means, teacher = clouds(noise=0.1)
    broken = teacher.clone()
    broken[:, :6] = torch.nan
    cfg = PMLossConfig(direction=direction, trim=trim)
    found, want = pm_loss(means, broken, cfg), pm_loss(means[:, 6:], teacher[:, 6:], cfg)
    assert torch.allclose(found.similarity.scale, want.similarity.scale)
    if direction == "paired":
        assert torch.allclose(found.loss, want.loss)
    else:
        gaps = (want.similarity(teacher[:, 6:])[:, :, None] - means[:, None]).square().sum(-1)
        # A centre without a teacher's point, such as one in a masked sky, is drawn to no other.
        ways = {"gt2pred": gaps.amin(2).mean(1), "pred2gt": gaps.amin(1)[:, 6:].mean(1)}
        assert torch.allclose(found.loss, ways[direction] if direction in ways else sum(ways.values()))


def test_trimming_finds_the_similarity_despite_outliers(clouds):
    means, teacher = clouds(noise=0.0)
    spoilt = teacher.clone()
    spoilt[:, :4] += 0.5
    true = umeyama(teacher, means)
    trimmed = pm_loss(means, spoilt, PMLossConfig(trim=0.1)).similarity
    untrimmed = pm_loss(means, spoilt).similarity
    assert torch.allclose(trimmed.scale, true.scale)
    assert torch.allclose(trimmed.rotation, true.rotation)
    assert not torch.allclose(untrimmed.scale, true.scale, rtol=1e-3)


def test_trimming_leaves_three_points_at_least(clouds):
    means, teacher = clouds(noise=0.1, count=5)
    term = pm_loss(means, teacher, PMLossConfig(trim=0.95))
    residual = (umeyama(teacher, means)(teacher) - means).square().sum(-1)
    kept = residual.argsort(1)[:, :3, None].expand(-1, -1, 3)
    want = umeyama(teacher.gather(1, kept), means.gather(1, kept))
    assert torch.allclose(term.similarity.scale, want.scale)


@pytest.mark.parametrize(("trim", "left"), [(0.3, 4), (0.2, 4), (0.7, 3)])
def test_trimming_counts_what_the_teacher_has(clouds, trim, left):
    means, teacher = clouds(noise=0.1, count=25)
    teacher[:, 5:] = torch.nan  # of which nothing may be chosen
    known, seen = teacher[:, :5], means[:, :5]
    # Where the teacher has nothing, the prediction lies where its origin goes.
    means[:, 5:] = umeyama(known, seen).shift[:, None]
    term = pm_loss(means, teacher, PMLossConfig(trim=trim))
    residual = (umeyama(known, seen)(known) - seen).square().sum(-1)
    kept = residual.argsort(1)[:, :left, None].expand(-1, -1, 3)
    want = umeyama(known.gather(1, kept), seen.gather(1, kept))
    assert torch.allclose(term.similarity.scale, want.scale)
    assert torch.allclose(term.similarity.shift, want.shift)


def test_teacher_points_that_are_not_finite_are_left_out(clouds):
    means, teacher = clouds(noise=0.1)
    broken = teacher.clone()
    broken[:, :6] = torch.nan
    broken[:, 6] = torch.inf
    term = pm_loss(means.requires_grad_(), broken)
    assert term.valid.tolist() == pytest.approx([33 / 40] * 2)
    same = umeyama(teacher[:, 7:], means[:, 7:])
    assert torch.allclose(term.similarity.scale, same.scale)
    (grad,) = torch.autograd.grad(term.loss.sum(), means)
    assert grad.isfinite().all()
    assert not grad[:, :7].any()
    assert grad[:, 7:].any()


def test_lines_and_mirrors_are_said_to_leave_a_turn_open():
    time = torch.linspace(0, 1, 10, dtype=torch.float64)
    line = torch.stack([time, 2 * time, 0 * time], -1)[None].requires_grad_()
    found = umeyama(3 * line.detach(), line)
    assert not bool(found.determined)
    assert float(found.scale.detach()) == pytest.approx(1 / 3)
    (grad,) = torch.autograd.grad(found.rotation.sum() + found.scale.sum(), line)
    assert grad.isfinite().all()
    # A turn about the line changes nothing, and has no gradient: the loss sees the line alone.
    axis = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    covariance = torch.outer(axis, axis).requires_grad_()
    rotation, _, _ = _Polar.apply(covariance)
    cross = torch.tensor([[0.0, 0, 2], [0, 0, -1], [-2, 1, 0]], dtype=torch.float64)
    (grad,) = torch.autograd.grad((rotation * (rotation.detach() @ cross)).sum(), covariance)
    assert float(grad.abs().max()) < 1e-12
    # In directions whose products are rounded, too.
    ways = torch.randn(2, 20, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    source, slanted = time[:, None] * ways + ways.flip(1)
    slanted.requires_grad_()
    found = umeyama(source, slanted)
    assert not bool(found.determined.any())
    (grad,) = torch.autograd.grad(found.rotation.square().sum() + found.rotation[:, 0, 1].sum(), slanted)
    assert float(grad.abs().max()) < 100
    ball = torch.randn(1, 4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mirrored = umeyama(ball, ball * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert float(torch.linalg.det(mirrored.rotation)) == pytest.approx(1)
    assert bool(umeyama(ball, ball).determined)


def test_alignment_by_camera_centres(clouds):
    means, teacher = clouds(noise=0.0)
    truth = umeyama(teacher, means)
    centres = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    cfg = PMLossConfig(align="pose")
    term = pm_loss(means, teacher, cfg, centres=(centres, truth(centres)))
    assert float(term.loss.max()) < 1e-20
    with pytest.raises(ValueError, match="at least three that do not lie on a line; got 2"):
        pm_loss(means, teacher, cfg, centres=(centres[:, :2], truth(centres)[:, :2]))
    line = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None] * centres[:, :1] + 1
    with pytest.raises(ValueError, match="at least three that do not lie on a line; got 4"):
        pm_loss(means, teacher, cfg, centres=(line, truth(line)))
    # Cameras are given, not learned.
    given = [part.detach().requires_grad_() for part in (centres, truth(centres) + 0.1 * centres.flip(1))]
    term = pm_loss(means.requires_grad_(), teacher, cfg, centres=(given[0], given[1]))
    assert float(term.raw.min()) > 1e-3
    term.loss.sum().backward()
    assert [part.grad for part in given] == [None, None]
    with pytest.raises(ValueError, match="camera centres belong to"):
        pm_loss(means, teacher, cfg)


@pytest.mark.parametrize("backend", ["torch", "kdtree"])
def test_nearest_by_brute_force(backend, monkeypatch):
    monkeypatch.setattr("hone_kernels.nearest_points.reference.CHUNK", 500)
    generator = torch.Generator().manual_seed(0)
    # Differences of a thousandth at coordinates of a hundred, in float32.
    points, cloud = (100 + 1e-2 * torch.randn(n, 3, generator=generator) for n in (67, 101))
    index = nearest(points, cloud, backend=backend)
    distances = (points[:, None].double() - cloud.double()).square().sum(-1)
    assert torch.equal(distances.gather(1, index[:, None])[:, 0], distances.amin(1))
    short = nearest(points.bfloat16(), cloud, backend=backend)
    assert torch.equal(short, nearest(points.bfloat16().float(), cloud, backend=backend))
    assert torch.equal(nearest(points.double(), cloud, backend=backend), index)
    with pytest.raises(ValueError, match="no point to be near to"):
        nearest(points, cloud[:0], backend=backend)


def test_bad_input_is_named(clouds):
    means, teacher = clouds()
    with pytest.raises(ValueError, match=r"of the same pixels; got \[2, 40, 3\] and \[2, 39, 3\]"):
        pm_loss(means, teacher[:, :39])
    with pytest.raises(ValueError, match="confidence must be"):
        pm_loss(means, teacher, PMLossConfig(confidence=True))
    broken = means.clone()
    broken[1, 3] = torch.nan
    with pytest.raises(ValueError, match="scene 1: predicted centres are not finite"):
        pm_loss(broken, teacher)
    gone = teacher.clone()
    gone[0, 2:] = torch.nan
    with pytest.raises(ValueError, match="scene 0: fewer than three teacher points"):
        pm_loss(means, gone)
    with pytest.raises(ValueError, match="scene 0: the points to be aligned have no extent"):
        pm_loss(means, torch.ones_like(teacher))
    one = means.clone()
    one[1] = one[1, :1]
    with pytest.raises(ValueError, match="scene 1: all predicted centres lie at one place"):
        pm_loss(one, teacher)
    assert pm_loss(one, teacher, PMLossConfig(align="none", cap=None)).loss.isfinite().all()
    trust = torch.ones(means.shape[:2], dtype=torch.float64)
    for value, where in ((torch.nan, 3), (torch.inf, 3), (-0.5, 3), (0.0, slice(None))):
        wrong = trust.clone()
        wrong[1, where] = value
        for align in ("umeyama", "none"):
            cfg = PMLossConfig(confidence=True, align=align)
            with pytest.raises(ValueError, match="scene 1: confidence must be finite and at least 0"):
                pm_loss(means, teacher, cfg, confidence=wrong)
    # What a teacher says of points that it does not have is not looked at.
    gone, trust[1, 3] = teacher.clone(), torch.nan
    gone[1, 3] = torch.nan
    assert pm_loss(means, gone, PMLossConfig(confidence=True), confidence=trust).loss.isfinite().all()
