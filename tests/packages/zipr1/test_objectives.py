"""The objective against its formula, term by term, and its limits."""

import math

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_zipr1.objectives import BudgetPolicy, advantages, grpo_loss, rewards
from safetensors.torch import save_file


def test_rewards_by_hand():
    correct = torch.tensor([[True, False], [False, False]])
    ratio = torch.tensor([[0.5, 0.25], [0.5, 0.25]])
    # The gate shuts the efficiency of a group without a right answer.
    assert rewards(correct, ratio).tolist() == [[1.5, 0.75], [0.0, 0.0]]
    assert rewards(correct, ratio, gated=False).tolist() == [[1.5, 0.75], [0.5, 0.75]]
    assert rewards(correct, ratio, efficiency=0.0).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert rewards(correct, ratio, performance=0.0).tolist() == [[0.5, 0.75], [0.0, 0.0]]


def test_advantages():
    reward = torch.tensor([[1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.001, 1.0, 1.001]])
    found = advantages(reward)
    std = math.sqrt(1 / 3)
    assert found[0].tolist() == pytest.approx([0.5 / std, -0.5 / std, 0.5 / std, -0.5 / std])
    assert not found[1].any()
    # A spread below the floor is not blown up.
    assert found[2].tolist() == pytest.approx([-0.01, 0.01, -0.01, 0.01], rel=1e-3)


def by_hand(logp, old, reference, advantage, mask, epsilon, beta):
    rows = []
    for r in range(len(logp)):
        terms = []
        for t in range(logp.shape[1]):
            if mask[r, t]:
                rho = math.exp(logp[r, t] - old[r, t])
                clipped = min(max(rho, 1 - epsilon), 1 + epsilon)
                d = float(reference[r, t] - logp[r, t])
                gain = min(rho * float(advantage[r]), clipped * float(advantage[r]))
                terms.append(-gain + beta * (math.exp(d) - d - 1))
        rows.append(sum(terms) / len(terms))
    return sum(rows) / len(rows)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    logp, old, reference = (-torch.rand(3, 3, 4, generator=generator, dtype=torch.float64) * 3).unbind(0)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    return logp, old, reference, torch.tensor([1.0, -0.7, 0.3], dtype=torch.float64), mask


def test_loss_by_hand(tensors):
    found = grpo_loss(*tensors, epsilon=0.2, beta=0.04)
    assert float(found.loss) == pytest.approx(by_hand(*tensors, 0.2, 0.04))
    assert float(found.ratio_error) > 0.2


def test_what_is_watched_is_of_the_answers_tokens_alone(tensors):
    logp, old, reference, advantage, mask = tensors
    for x, value in ((old, -9.0), (reference, -20.0)):
        x[~mask] = value
    found = grpo_loss(logp, old, reference, advantage, mask, epsilon=0.2, beta=0.04)
    rho, distance = (logp - old)[mask].exp(), (reference - logp)[mask]
    assert float(found.ratio_error) == pytest.approx(float((rho - 1).abs().max()))
    assert float(found.kl) == pytest.approx(float((distance.exp() - distance - 1).mean()))
    # A row without an answer adds nothing, and is no division by 0.
    none = mask.clone()
    none[2] = False
    two = grpo_loss(logp[:2], old[:2], reference[:2], advantage[:2], mask[:2], epsilon=0.2, beta=0.04)
    three = grpo_loss(logp, old, reference, advantage, none, epsilon=0.2, beta=0.04)
    assert float(three.loss) == pytest.approx(float(two.loss) * 2 / 3)


def test_a_budget_is_read_as_it_was_written(tmp_path):
    policy = BudgetPolicy((0.5, 0.9, 0.95), 4)
    torch.nn.init.normal_(policy.out.weight)
    features = torch.randn(20, 4)
    policy.save(tmp_path / "budget.safetensors")
    read = BudgetPolicy.load(tmp_path / "budget.safetensors")
    assert torch.equal(read.best(features), policy.best(features))
    assert len(set(read.best(features).tolist())) > 1
    with pytest.raises(FileNotFoundError, match=r"expected the budget\.safetensors of a training"):
        BudgetPolicy.load(tmp_path)
    broken = tmp_path / "broken.safetensors"
    for state in ({"out.bias": torch.zeros(3)}, {**policy.state_dict(), "out.bias": torch.zeros(2)}):
        save_file(state, broken)
        with pytest.raises(CheckpointError, match="holds no learned budget"):
            BudgetPolicy.load(broken)
    broken.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="holds no learned budget"):
        BudgetPolicy.load(broken)
    save_file({**policy.state_dict(), "out.bias": torch.full((3,), torch.nan)}, broken)
    with pytest.raises(CheckpointError, match=r"out\.bias of .* holds NaN or infinity"):
        BudgetPolicy.load(broken)


def test_a_budget_depends_on_what_prompts_are_like_not_on_how_large_their_features_are():
    policy = BudgetPolicy((0.5, 0.9), 4)
    torch.nn.init.normal_(policy.out.weight)
    features = torch.randn(3, 4)
    torch.testing.assert_close(policy(100 * features + 7), policy(features), atol=1e-4, rtol=1e-4)


def test_at_the_rollouts_policy_the_gradient_is_the_score_functions(tensors):
    logp, _, _, advantage, mask = tensors
    logp = logp.clone().requires_grad_()
    found = grpo_loss(logp, logp.detach(), logp.detach(), advantage, mask, epsilon=0.2, beta=0.04)
    assert float(found.ratio_error) == 0
    assert float(found.kl) == 0
    found.loss.backward()
    expected = -(advantage[:, None] * mask / mask.sum(-1, keepdim=True)) / len(logp)
    torch.testing.assert_close(logp.grad, expected)


def test_gradient(tensors):
    logp, old, reference, advantage, mask = tensors
    loss = lambda l: grpo_loss(l, old, reference, advantage, mask, epsilon=0.2, beta=0.04).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, (logp.clone().requires_grad_(),))
