import math

import pytest
import torch
from hone_core.testing import requires_gpu
from hone_zpressor import method
from hone_zpressor.anchors import Clusters, assign, cluster_views, farthest_points, least_seen
from hone_zpressor.method import ViewStream, ZPressor, information_loss


def brute_farthest(centres, count):
    """One scene, from the rule."""
    mean = [sum(axis) / len(centres) for axis in zip(*centres, strict=True)]
    chosen = [max(range(len(centres)), key=lambda k: (math.dist(centres[k], mean), -k))]
    while len(chosen) < count:
        left = [k for k in range(len(centres)) if k not in chosen]
        chosen.append(max(left, key=lambda k: (min(math.dist(centres[k], centres[j]) for j in chosen), -k)))
    return chosen


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    built = ZPressor()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return built.eval()


def scene(batch, views, size=(4, 6), channels=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, views, channels, *size, generator=generator)
    return features, torch.randn(batch, views, 3, generator=generator)


def fuse(module, features, centres, count, present=None, precision="float32"):
    anchors = farthest_points(centres, count, present)
    return module(features, cluster_views(centres, anchors, present), precision), anchors


def poses(centres):
    pose = torch.eye(4).repeat(*centres.shape[:-1], 1, 1)
    pose[..., :3, 3] = centres
    return pose


@pytest.mark.parametrize("views", [6, 9, 20])
def test_anchors_are_brute_force(views):
    _, centres = scene(3, views)
    found = farthest_points(centres.double(), 5)
    assert found.tolist() == [brute_farthest(one.tolist(), 5) for one in centres.double()]


def test_anchors_by_hand_and_ties():
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0]]])
    # Both ends are as far from the middle: the lower number. Then the other end, then the middle.
    assert farthest_points(line, 3).tolist() == [[0, 4, 2]]
    # Cameras at one place are each chosen once.
    assert farthest_points(torch.zeros(1, 4, 3), 4).tolist() == [[0, 1, 2, 3]]
    present = torch.tensor([[False, True, True, True, False]])
    assert farthest_points(line, 2, present).tolist() == [[1, 3]]
    with pytest.raises(ValueError, match="at least 4 views for 4 anchors"):
        farthest_points(line, 4, present)
    # A view that is not there moves no mean: 2.5 is farthest from theirs, and 0 would be with 100 among them.
    far = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2.5, 0, 0], [100, 0, 0]]])
    assert farthest_points(far, 1, torch.tensor([[True, True, True, False]])).tolist() == [[2]]


def test_what_stands_in_padding_chooses_no_anchor():
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2.5, 0, 0], [torch.nan, 0, torch.inf]]])
    present = torch.tensor([[True, True, True, False]])
    anchors = farthest_points(line, 2, present)
    assert anchors.tolist() == [[2, 0]]
    clusters = cluster_views(line, anchors, present)
    assert clusters.support[clusters.real].tolist() == [1]
    with pytest.raises(ValueError, match="scene 0, view 3: the camera's centre is not finite"):
        farthest_points(line, 2)


def test_support_by_hand():
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3.5, 0, 0], [4, 0, 0]]])
    anchors = torch.tensor([[4, 0]])
    # The view in the middle is as far from both: the first anchor.
    assert assign(line, anchors).tolist() == [[1, 1, 0, 0, 0]]
    found = cluster_views(line, anchors)
    assert found.support[0, found.real[0]].tolist() == [2, 3]
    assert found.support[1, found.real[1]].tolist() == [1]
    # An anchor at the place of an earlier one supports that.
    same = torch.tensor([[[0.0, 0, 0], [0, 0, 0], [1, 0, 0]]])
    twins = cluster_views(same, torch.tensor([[0, 1, 2]]))
    assert twins.support[0, twins.real[0]].tolist() == [1]
    assert not twins.real[1:].any()


@pytest.mark.parametrize(("views", "count"), [(7, 4), (12, 6), (6, 6)])
def test_equals_the_oracle(module, hostref, views, count, monkeypatch):
    features, centres = scene(2, views, seed=views)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    found, anchors = fuse(module, features, centres, count)
    for item in range(2):
        want, chosen = hostref.zpressor(hostref.SD(module.state_dict()), features[item], poses(centres[item]), count)
        assert anchors[item].tolist() == chosen
        assert torch.allclose(found[item], want, atol=1e-4)


@torch.no_grad()
def test_bfloat16_is_the_oracles(module, hostref):
    features, centres = scene(1, 9)
    found, _ = fuse(module, features, centres, 4, precision="bfloat16")
    want, _ = hostref.zpressor(hostref.SD(module.state_dict()), features[0], poses(centres[0]), 4)
    plain, _ = fuse(module, features, centres, 4)
    assert float((found[0] - want).abs().max()) < 1e-2
    assert not torch.equal(found, plain)


@torch.no_grad()
def test_self_attention_is_in_16_bits_on_a_gpu_alone(module):
    tokens = scene(1, 1)[0][0].flatten(2).mT
    block = module.self_attn_layers[0][0]
    assert torch.equal(block(tokens, "bfloat16"), block(tokens, "float32"))


def test_scenes_of_different_views_are_each_as_alone(module):
    features, centres = scene(2, 9)
    present = torch.ones(2, 9, dtype=torch.bool)
    present[1, [2, 5, 6]] = False
    found, anchors = fuse(module, features, centres, 4, present)
    keep = present[1].nonzero()[:, 0]
    alone, chosen = fuse(module, features[1:, keep], centres[1:, keep], 4)
    assert anchors[1].tolist() == keep[chosen[0]].tolist()
    assert torch.allclose(found[1], alone[0], atol=1e-5)


def ragged(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None):
    """What torch's varlen_attn documents, sequence by sequence."""
    spans = [list(zip(cu.tolist(), cu.tolist()[1:], strict=False)) for cu in (cu_seq_q, cu_seq_k)]
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == tuple(max(b - a for a, b in some) for some in spans)
    assert all(part.is_contiguous() for part in (query, key, value))
    out, lse = torch.empty_like(query), query.new_empty(1, len(query))
    for (a, b), (c, d) in zip(*spans, strict=True):
        logits = query[a:b, 0] @ key[c:d, 0].mT / query.shape[-1] ** 0.5
        out[a:b, 0], lse[0, a:b] = torch.softmax(logits, -1) @ value[c:d, 0], logits.logsumexp(-1)
    assert (b, d) == (len(query), len(key))
    return (out, lse.detach()) if return_aux is not None and return_aux.lse else out


@pytest.mark.parametrize("alone", [False, True])
def test_ragged_lists_of_support_hold_what_padded_ones_do(module, monkeypatch, alone):
    calls = []

    def counted(*args, **rest):
        calls.append(len(args[3]) - 1)
        return ragged(*args, **rest)

    monkeypatch.setattr(method, "varlen_attn", counted)
    features, centres = scene(2, 9)
    present = torch.ones(2, 9, dtype=torch.bool)
    present[1, 3:] = False  # two anchors and one view, so that a pair of this scene has no support
    clusters = cluster_views(centres, farthest_points(centres, 2, present), present)
    counts = clusters.real.sum(1).tolist()
    if alone:
        clusters = Clusters(clusters.anchors[:1], clusters.support[:2], clusters.real[:2])
        features, counts = features[:1], counts[:2]
    else:
        assert sorted(counts)[:2] == [0, 1]
    tokens = features.flatten(0, 1).flatten(2).mT
    first = torch.arange(len(features))[:, None] * 9
    own, support = tokens[(clusters.anchors + first).flatten()], tokens[clusters.lists.views]

    def fused(attention):
        support_ = support.clone().requires_grad_()
        out = module.fuse(own, support_, clusters.lists, "float32", attention)
        return out, *torch.autograd.grad(out.square().sum(), [support_, *module.parameters()], allow_unused=True)

    # With gradients a list is a sequence; without, each view is one, and they are joined.
    for plain, found in zip(fused("padded"), fused("varlen"), strict=True):
        assert torch.allclose(plain, found, atol=1e-4, rtol=1e-4)
    assert set(calls) == {sum(count > 0 for count in counts)}
    calls.clear()
    with torch.no_grad():
        plain, found = (module.fuse(own, support, clusters.lists, "float32", way) for way in ("padded", "varlen"))
    assert torch.allclose(plain, found, atol=1e-5)
    assert set(calls) == {sum(counts)}


def test_ragged_lists_need_bfloat16_on_a_gpu(module):
    features, centres = scene(1, 4)
    clusters = cluster_views(centres, farthest_points(centres, 2))
    with pytest.raises(ValueError, match="needs precision"):
        module(features, clusters, "bfloat16", "varlen")


@requires_gpu(min_sm=80)
def test_ragged_lists_on_a_gpu():
    torch.manual_seed(0)
    built = ZPressor(128, 2).cuda()
    features, centres = (part.cuda() for part in scene(2, 14, (16, 28)))
    clusters = cluster_views(centres, farthest_points(centres, 6))
    found = []
    for attention in ("padded", "varlen"):
        given = features.clone().requires_grad_()
        fused = built(given, clusters, "bfloat16", attention)
        (grad,) = torch.autograd.grad(fused.square().sum(), given)
        found.append((fused.detach(), grad))
    with torch.no_grad():
        found[1] += (built(features, clusters, "bfloat16", "varlen"),)
    found[0] += (found[0][0],)
    for plain, ragged_ in zip(*found, strict=True):
        assert float((plain - ragged_).norm() / plain.norm()) < 1e-2


def test_the_order_of_support_does_not_matter(module):
    features, centres = scene(1, 8)
    anchors = farthest_points(centres, 3)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    before = module(features, cluster_views(centres, anchors), "float32")
    moved = order.argsort()[anchors]
    after = module(features[:, order], cluster_views(centres[:, order], moved), "float32")
    assert torch.allclose(before, after, atol=1e-5)


def test_without_support_only_self_attention_is_applied(module):
    features, _ = scene(1, 2)
    none = Clusters(torch.tensor([[0, 1]]), torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.bool))
    tokens = features[0].flatten(2).mT
    for block in module.self_attn_layers[0]:
        tokens = block(tokens, "float32")
    want = tokens.mT.view_as(features)
    assert torch.allclose(module(features, none, "float32"), want, atol=1e-6)
    # Beside an anchor that has some, too.
    mixed = Clusters(torch.tensor([[0, 1]]), torch.tensor([[1], [0]]), torch.tensor([[True], [False]]))
    found = module(features, mixed, "float32")
    assert torch.allclose(found[0, 1], want[0, 1], atol=1e-5)
    assert not torch.allclose(found[0, 0], want[0, 0], atol=1e-2)


def test_gradients_reach_support_and_skip_strangers():
    torch.manual_seed(0)
    small = ZPressor(8, 2).double()
    features = torch.randn(1, 3, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    clusters = Clusters(torch.tensor([[0, 2]]), torch.tensor([[1], [0]]), torch.tensor([[True], [False]]))
    assert torch.autograd.gradcheck(lambda x: small(x, clusters, "float32"), (features,))
    (grad,) = torch.autograd.grad(small(features, clusters, "float32")[0, 1].sum(), features)
    assert not grad[0, :2].any()
    assert grad[0, 2].any()


def test_published_layout():
    shapes = {name: tuple(part.shape) for name, part in ZPressor().state_dict().items()}
    assert len(shapes) == 102
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_485_312
    want = {
        "self_attn_layers.0.{}.norm.weight": (128,),
        "self_attn_layers.0.{}.norm.bias": (128,),
        "self_attn_layers.0.{}.to_qkv.weight": (384, 128),
        "self_attn_layers.0.{}.mlp.norm.weight": (128,),
        "self_attn_layers.0.{}.mlp.norm.bias": (128,),
        "self_attn_layers.0.{}.mlp.fc1.weight": (512, 128),
        "self_attn_layers.0.{}.mlp.fc1.bias": (512,),
        "self_attn_layers.0.{}.mlp.fc2.weight": (128, 512),
        "self_attn_layers.0.{}.mlp.fc2.bias": (128,),
        "cross_attn_layers.0.{}.projq.weight": (128, 128),
        "cross_attn_layers.0.{}.proj_kv.weight": (256, 128),
        "cross_attn_layers.0.{}.proj.weight": (128, 128),
        "cross_attn_layers.0.{}.proj.bias": (128,),
        "cross_attn_layers.0.{}.norm1.weight": (128,),
        "cross_attn_layers.0.{}.norm1.bias": (128,),
        "cross_attn_layers.0.{}.norm2.weight": (128,),
        "cross_attn_layers.0.{}.norm2.bias": (128,),
    }
    assert shapes == {name.format(layer): shape for layer in range(6) for name, shape in want.items()}


def test_information_by_hand():
    # Mean 1 and deviation 2: 0.5 (1 + 4 - 1 - ln 4) nats per channel.
    flat = torch.tensor([-1.0, 3.0]).view(1, 1, 1, 1, 2).expand(2, 3, 5, 1, 2)
    want = 5 * 0.5 * (4 + 1 - 1 - math.log(4)) / math.log(2)
    assert float(information_loss(flat)) == pytest.approx(want, rel=1e-5)


@torch.no_grad()
def test_views_added_one_by_one_give_what_all_at_once_give():
    torch.manual_seed(0)
    module = ZPressor(16, 3)
    for parameter in module.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    features, centres = torch.randn(1, 9, 16, 2, 3), torch.randn(1, 9, 3)
    anchors = farthest_points(centres, 3)
    stream = ViewStream(module, features[0, anchors[0]], centres[0, anchors[0]], "float32")
    for view in [view for view in range(9) if view not in anchors[0].tolist()]:
        before = stream.features
        touched = stream.add(features[0, view], centres[0, view])
        changed = (stream.features - before).abs().flatten(1).amax(1) > 0
        assert changed.tolist() == [anchor == touched for anchor in range(3)]
        assert touched == int(assign(centres, anchors)[0, view])
    together = module(features, cluster_views(centres, anchors), "float32")[0]
    assert torch.allclose(stream.features, together, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected features \[16, 2, 3\]"):
        stream.add(features[0, 0, :, :1], centres[0, 0])


def test_the_least_seen_view_is_the_next_anchor():
    overlap = torch.tensor([[1.0, 0.9, 0.1, 0.0], [0.9, 1.0, 0.2, 0.0], [0.1, 0.2, 1.0, 0.3], [0.0, 0.0, 0.3, 1.0]])
    assert least_seen(overlap, 3).tolist() == [1, 3, 2]
    # Cameras that see all of each other are each chosen once.
    assert least_seen(torch.ones(3, 3), 3).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="expected 1 to 4 anchors; got 5"):
        least_seen(overlap, 5)
