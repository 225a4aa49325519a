import pytest
import torch
from hone_core.testing import assert_close
from hone_nar import FlashARForImageGeneration, attach, post_train_start, tiny
from hone_nar.method import separate_loss
from torch.nn import functional as F

TOKENS = torch.randint(32, (2, 36), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 5])


def test_the_gate_reads_normed_and_clipped_logits_of_both_heads():
    model = tiny("flashar", vocab_size=4, gate_dim=3, grid=(2, 2)).double()
    right, below = torch.tensor([[[9.0, 0, 0, 0]]]).double(), torch.tensor([[[0.0, 0, 0, -1]]]).double()
    values = torch.cat([right, below], -1).flatten()
    normed = (values - 1.0) / ((values - 1.0) ** 2).mean().sqrt()
    first, last = model.hv_gate_mlp[0].weight, model.hv_gate_mlp[2]
    wanted = torch.sigmoid(last.weight[0] @ F.silu(first @ normed) + last.bias[0])
    assert_close(model.gate(right, below).flatten()[0], wanted)
    # The gate's own weights are trained through it, and the heads are not.
    right.requires_grad_()
    model.gate(right, below).sum().backward()
    assert right.grad is None
    assert first.grad.abs().sum() > 0
    far = torch.zeros(1, 1, 400)
    far[..., 0] = 1e4
    wide = tiny("flashar", vocab_size=400, gate_dim=1, grid=(2, 2))
    with torch.no_grad():
        wide.hv_gate_mlp[0].weight.zero_()
        wide.hv_gate_mlp[0].weight[0, 0] = 1.0
        # One logit of 800 stands out by sqrt(799), of which 6 are seen.
        share = wide.gate(far, torch.zeros_like(far)).flatten()
        assert_close(
            share,
            torch.sigmoid(wide.hv_gate_mlp[2].weight[0, 0] * F.silu(torch.tensor(6.0)) + wide.hv_gate_mlp[2].bias),
        )


def test_the_gate_weighs_where_both_heads_reach():
    model = tiny("flashar")
    with torch.no_grad(), attach(model, "right-only"):
        right = model(TOKENS, LABELS).logits
    with torch.no_grad(), attach(model, "below-only"):
        below = model(TOKENS, LABELS).logits
    with torch.no_grad():
        mixed = model(TOKENS, LABELS).logits
        share = model.gate(right, below)
    inner = (torch.arange(36).view(6, 6)[1:, 1:].flatten()).tolist()
    assert share[:, inner].std() > 1e-3
    assert_close(mixed[:, inner], (share * right + (1 - share) * below)[:, inner], atol=1e-5, rtol=1e-5)
    # The first row has the right head alone, the first column the one below.
    assert torch.equal(mixed[:, 1:6], right[:, 1:6])
    assert torch.equal(mixed[:, 6::6], below[:, 6::6])
    with torch.no_grad():
        model.hv_gate_mlp[2].weight.zero_()
        model.hv_gate_mlp[2].bias.zero_()
        half = model(TOKENS, LABELS).logits
    assert_close(half[:, inner], ((right + below) / 2)[:, inner], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_branch_runs_beside_the_last_blocks(depth):
    raster = tiny("llamagen", n_layer=3)
    model = post_train_start(raster, depth=depth).eval()
    with torch.no_grad():
        whole = model(TOKENS, LABELS).logits
        # A clone beside its original: both heads say the same of the same token.
        condition = model.condition(LABELS).embedding
        right, below = model.run_blocks(condition)
        assert torch.equal(right, below)
        assert torch.equal(model.head(0, right), model.head(1, below))
        # The second token follows from the first by the right head alone, as in the raster model.
        assert_close(whole[:, 1], raster(TOKENS, LABELS).logits[:, 1], atol=1e-5, rtol=1e-5)
        model.layers[2].feed_forward.w2.weight.zero_()
        changed_right, same_below = model.run_blocks(condition)
    assert not torch.allclose(changed_right, right)
    assert torch.equal(same_below, below)
    new = set(model.new_names())
    assert {name for name in model.state_dict() if name not in raster.state_dict()} == new
    assert f"layers.{3 + depth - 1}.attention.wo.weight" in new
    # A half each at first.
    assert torch.equal(model.gate(torch.randn(1, 1, 32), torch.randn(1, 1, 32)).detach(), torch.full((1, 1, 1), 0.5))


def test_its_loss_is_of_the_mixture_and_a_twentieth_of_each_head():
    model = tiny("flashar")
    heads = {}
    for kind in ("right", "below"):
        logits = model(TOKENS, LABELS, kind=kind).logits
        reached = torch.ones(6, 6, dtype=torch.bool)
        reached[(slice(1, None), 0) if kind == "right" else (0, slice(1, None))] = False
        flat = reached.flatten()
        heads[kind] = F.cross_entropy(logits[:, flat].flatten(0, 1), TOKENS[:, flat].flatten())
    found = model(TOKENS, LABELS, loss="flashar").loss
    mixture = model(TOKENS, LABELS, loss="mixture").loss
    assert_close(found, mixture + 0.05 * (heads["right"] + heads["below"]))
    found.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_separate_losses_are_of_what_each_head_reaches():
    logits = [torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)]
    logits[0][0, 2] = torch.tensor([5.0, -5.0])
    weight = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    assert float(separate_loss(logits, weight, torch.tensor([[0, 0, 1]]))) == pytest.approx(0.6931, abs=1e-4)


def test_what_does_not_exist_is_refused(tmp_path):
    with pytest.raises(TypeError, match="in raster order"):
        post_train_start(tiny("nar"))
    with pytest.raises(ValueError, match="depth must be 1 to the 2 blocks; got 3"):
        post_train_start(tiny("llamagen"), depth=3)
    with pytest.raises(ValueError, match="rows and columns"):
        FlashARForImageGeneration(grid=(2, 2, 2))
    model = tiny("flashar")
    model.save_pretrained(tmp_path)
    again = FlashARForImageGeneration.from_pretrained(tmp_path)
    assert torch.equal(model(TOKENS, LABELS).logits, again(TOKENS, LABELS).logits)
