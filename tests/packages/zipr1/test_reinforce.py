"""The loop on a small host: what it optimises, that it goes on exactly, and what its budgets learn."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hone_core.training import Training
from hone_zipr1.config import ArmConfig, ReinforceConfig, SparseConfig
from hone_zipr1.host import load_host
from hone_zipr1.models import attach
from hone_zipr1.objectives import BudgetPolicy, grpo_loss
from hone_zipr1.reinforce import Drawn, Reinforcement
from hone_zipr1.rollouts import HostTask

SELECTION = SparseConfig(rows="all", compute="mask", cache="retrieve")
PAPER = ReinforceConfig(ps=(0.5, 0.9), group=4, prompts=3, lr=1e-3)
OBJECTIVES = {
    "paper": PAPER,
    "budget-policy": replace(PAPER, objective="budget-policy", budget_lr=0.1),
    "soft-ratio": replace(PAPER, objective="soft-ratio", soft_weight=1.0),
    "supervised": replace(PAPER, objective="supervised"),
}


@pytest.fixture
def task(stored):
    original, host = load_host(path=stored), load_host(path=stored)
    return HostTask(host, original.model.requires_grad_(False) and original, seed=0)


def weights(task):
    return torch.cat([p.detach().flatten() for p in task.model.parameters()])


@pytest.mark.parametrize("name", ["paper", "budget-policy", "soft-ratio"])
def test_importance_ratios_are_one_at_the_first_update_and_the_reference_is_the_start(task, name):
    with attach(task.model, SELECTION) as handle:
        loop = Reinforcement(OBJECTIVES[name], task, handle)
        before = weights(task)
        found = loop.advance(0)
        assert float(found["ratio_error"]) < 1e-3
        # The policy is sparse and the reference dense: they differ although the weights are the same.
        assert float(found["kl"]) > 1e-4
        assert not torch.equal(before, weights(task))
    dense = replace(PAPER, ps=(1.0,))
    with attach(task.model, SELECTION) as handle:
        task.model.load_state_dict(task.original.model.state_dict())
        assert float(Reinforcement(dense, task, handle).advance(0)["kl"]) < 1e-6


def test_the_gradient_is_that_of_the_papers_objective(task):
    # Written out: one rollout at a time, each at its own threshold.
    with attach(task.model, SELECTION) as handle:
        loop = Reinforcement(replace(PAPER, lr=1e-30), task, handle)
        rows = task.draw(0, 3, 4)
        p = torch.tensor([0.5, 0.9] * 6)
        drawn = task.sample(rows, handle, p, 1.0, loop._seed)
        loop.advance(0)
        found = [x.grad.clone() for x in loop.trained if x.grad is not None]
        correct, tau = drawn.correct.view(3, 4).double(), drawn.ratio.view(3, 4).double()
        reward = correct + correct.amax(1, keepdim=True) * (1 - tau)
        advantage = (reward - reward.mean(1, keepdim=True)) / reward.std(1, keepdim=True).clamp(min=0.05)
        total = torch.zeros(())
        for row, a in enumerate(advantage.flatten()):
            one = rows.part(slice(row, row + 1))
            ids, mask = drawn.ids[row : row + 1], drawn.mask[row]
            logp = task.logps(one, ids, handle, p[row : row + 1], 1.0, False)[0][mask]
            distance = task.reference(one, ids, 1.0, handle)[0][mask] - logp
            rho = (logp - logp.detach()).exp()
            total = total + (rho * a.float() - 0.04 * (distance.exp() - distance - 1)).mean() / 12
        grads = torch.autograd.grad(-total, [x for x in loop.trained if x.grad is not None])
    norm = torch.cat([g.flatten() for g in grads]).norm()
    for one, other in zip(found, grads, strict=True):
        torch.testing.assert_close(one, other * min(1.0, 1 / float(norm)), atol=2e-5, rtol=2e-3)


def test_a_budget_is_the_answers_first_token():
    # Where the budget alone decides the reward, its gradient is REINFORCE's.
    policy = BudgetPolicy((0.5, 0.9), 4)
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    choice, old = policy.draw(features, torch.Generator().manual_seed(1))
    assert len(choice.unique()) == 2
    torch.testing.assert_close(old, torch.full((6,), 0.5).log())
    advantage = torch.where(choice == 0, 1.0, -1.0)
    logp = policy(features).gather(1, choice[:, None])
    mask = torch.ones(6, 1, dtype=torch.bool)
    grpo_loss(logp, old[:, None], logp.detach(), advantage, mask, epsilon=0.2, beta=0.04).loss.backward()
    expected = -(advantage[:, None] * (torch.nn.functional.one_hot(choice, 2) - 0.5)).mean(0)
    torch.testing.assert_close(policy.out.bias.grad, expected)


def test_a_learned_budget_goes_where_the_reward_is(task):
    # Only efficiency counts, so that the smaller threshold wins.
    cfg = replace(OBJECTIVES["budget-policy"], performance=0.0, gated=False, prompts=8, lr=1e-9)
    with attach(task.model, SELECTION) as handle:
        loop = Reinforcement(cfg, task, handle)
        for step in range(15):
            loop.advance(step)
    assert loop.budget is not None
    assert set(loop.budget.best(task.features(task.draw(99, 20, 1))).tolist()) == {0.5}


def test_the_soft_ratio_has_the_gradient_that_the_papers_objective_lacks(task):
    # No answer's reward differs: whatever moves tau is the support's size.
    cfg = replace(OBJECTIVES["soft-ratio"], performance=0.0, beta=0.0, prompts=8, lr=3e-3)
    with attach(task.model, SELECTION) as handle:
        loop = Reinforcement(cfg, task, handle)
        taus = [float(loop.advance(step)["tau"]) for step in range(15)]
    assert taus[-1] < taus[0] - 0.02
    task.model.load_state_dict(task.original.model.state_dict())
    before = weights(task)
    with attach(task.model, SELECTION) as handle:
        Reinforcement(replace(PAPER, ps=(0.5,), performance=0.0, beta=0.0, gated=False), task, handle).advance(0)
    assert torch.equal(before, weights(task))


def test_soft_ratio_rewards_right_answers_and_weighs_the_support(task):
    with attach(task.model, SELECTION) as handle:
        loop = Reinforcement(OBJECTIVES["soft-ratio"], task, handle)
        correct, none = torch.arange(12) < 5, torch.zeros(12, 1)
        reward, _ = loop.judge(Drawn(none, none, none, torch.linspace(0.1, 0.9, 12), correct))
        assert reward.flatten().tolist() == correct.float().tolist()
        handle.stats = SimpleNamespace(soft={0: torch.tensor([0.5]), 1: torch.tensor([0.125])})
        assert float(loop._soft()) == 0.3125
        loop.cfg = replace(loop.cfg, soft_weight=2.0, soft_log=True)
        assert float(loop._soft()) == pytest.approx(math.log(0.5) + math.log(0.125))


def test_gradients_are_cut_to_length_one(task):
    with attach(task.model, SELECTION) as handle:
        loop = Reinforcement(PAPER, task, handle)
        for length, left in ((30.0, 1.0), (0.5, 0.5)):
            size = sum(x.numel() for x in loop.trained) ** 0.5
            for x in loop.trained:
                x.grad = torch.full_like(x, length / size)
            loop._step()
            assert float(torch.cat([x.grad.flatten() for x in loop.trained]).norm()) == pytest.approx(left, rel=1e-4)


def test_what_is_logged_is_of_the_first_update(task):
    with attach(task.model, SELECTION) as handle:
        found = Reinforcement(replace(PAPER, updates=2, lr=1e-2), task, handle).advance(0)
    assert float(found["ratio_error"]) < 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stopped_training_goes_on_exactly(task, tmp_path, name):
    def run(path, steps, stop=None):
        task.model.load_state_dict(task.original.model.state_dict())
        cfg = ArmConfig(reinforce=OBJECTIVES[name], sparse=SELECTION, host="x", seed=0, steps=steps)
        with attach(task.model, SELECTION) as handle:
            loop = Reinforcement(cfg.reinforce, task, handle)
            training = Training(cfg, path, loop.parts)
            training.resume()
            for _ in loop.loop(training):
                if training.step == stop:
                    training.save()
                    break
        return weights(task)

    whole = run(tmp_path / "whole.pt", 4)
    run(tmp_path / "parts.pt", 4, stop=2)
    assert torch.equal(run(tmp_path / "parts.pt", 4), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "none"}, "objective must be one of paper"),
        ({"group": 3}, "multiple"),
        ({"group": 1, "ps": (0.5,)}, "at least 2 rollouts"),
        ({"ps": (0.5, 1.5)}, "distinct shares"),
        ({"lr": 0.0}, "must be positive"),
        ({"epsilon": 1.0}, "epsilon lies in"),
        ({"objective": "soft-ratio"}, "soft_weight is positive with soft-ratio"),
        ({"soft_weight": 1.0}, "soft_weight is positive with soft-ratio"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PAPER, **change)
