import math
from pathlib import Path

import pytest
import torch
from hone_rstitch import reinforce
from hone_rstitch.config import LARGE, SMALL, EngineConfig, SamplingConfig, StitchConfig, TrainRouterConfig
from hone_rstitch.engine import Engine
from hone_rstitch.evaluate import Answer, Outcome
from hone_rstitch.generation import stitch_generate
from hone_rstitch.method import stitch
from hone_rstitch.models import Pair
from hone_rstitch.reinforce import advantages, at_cost, dapo_loss, price_of, reward, train_router
from hone_rstitch.router import EXTRA, Router, Routing, load_router, route_features, save_router
from hone_rstitch.vocabulary import Vocabulary
from safetensors.torch import save_file


@pytest.fixture
def router():
    """One that keeps some tokens and hands over others."""
    torch.manual_seed(0)
    found = Router(32, 16)
    torch.nn.init.normal_(found.out.weight, std=3.0)
    return found.eval()


GATE = StitchConfig(policy="router", tau=0.3)


def write(pairs, routing, stitch=GATE, rows=1, **options):
    small, large = pairs()
    ids = torch.arange(3, 3 + 9 * rows).view(rows, 9)
    return stitch_generate(
        large, small, ids, stitch=stitch, routing=routing, seed=5, vocabulary=Vocabulary.shared(96, 112, (2,)),
        max_new_tokens=40, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, **options,
    )  # fmt: skip


def test_a_router_in_the_loop_is_one_without_caches(pairs, router):
    small, large = pairs()
    prompt = list(range(3, 12))
    vocabulary = Vocabulary.shared(96, 112, (2,))

    def model(which):
        @torch.no_grad()
        def logits(tokens):
            out = (small, large)[which](torch.tensor([prompt + tokens])).logits[:, -1]
            return vocabulary.read(out, which)[0].float()

        return logits

    asked = []

    @torch.no_grad()
    def keep(tokens, signals):
        out = small(torch.tensor([prompt + tokens]), output_hidden_states=True)
        logits = vocabulary.read(out.logits[:, -1], SMALL)
        features = route_features(
            out.hidden_states[-1][:, -1], logits, signals.entropy, torch.tensor([len(prompt) + len(tokens)])
        )
        asked.append(int(router(features).argmax()) == SMALL)
        return asked[-1]

    want = stitch([model(SMALL), model(LARGE)], GATE, size=vocabulary.size, budget=40, keep=keep)
    output = write(pairs, Routing(router))
    assert output.sequences[0, 9:].tolist() == [step.token for step in want]
    assert output.models[0].tolist() == [step.model for step in want]
    assert {True, False} <= set(asked)
    assert output.usage[0].discarded == asked.count(False)


def test_rows_and_engines_decide_alike(pairs, router):
    small, large = pairs()
    together = write(pairs, Routing(router), rows=3)
    pair = Pair(small, large, None, None, Vocabulary.shared(96, 112, ()))
    for cache in ("paged", "dynamic"):
        engine = Engine(pair, EngineConfig(cache=cache, max_tokens=512), router=router)
        sampling = SamplingConfig(max_new_tokens=40)
        jobs = [
            engine.submit((ids, ids), GATE, sampling)
            for ids in torch.arange(3, 30).view(3, 9).tolist()
        ]  # fmt: skip
        while engine.step():
            pass
        for row, job in enumerate(jobs):
            job.wait(0)
            assert [token.token for token in job.tokens] == together.sequences[row, 9:].tolist()
            assert [token.model for token in job.tokens] == together.models[row].tolist()
    with pytest.raises(ValueError, match="needs a router, which this engine has not"):
        Engine(pair).submit(([3], [3]), GATE, sampling)


def test_a_router_that_always_hands_over_is_the_gate(pairs):
    router = Router(32)
    assert torch.equal(write(pairs, Routing(router)).sequences, write(pairs, None, StitchConfig(tau=0.3)).sequences)
    with torch.no_grad():
        router.out.bias.copy_(torch.tensor([9.0, 0.0]))
    assert not write(pairs, Routing(router)).models.any()
    for routing, stitch_ in ((Routing(router), StitchConfig()), (None, GATE)):
        with pytest.raises(ValueError, match="routing belongs to policy='router'"):
            write(pairs, routing, stitch_)


def test_samples_follow_the_chances(router):
    routing = Routing(router, sample=True)
    features = torch.zeros(2000, 32 + EXTRA)
    actions = routing.decide(features, [0] * 2000, [3] * 2000, list(range(2000)))
    chance = float(router(features[:1]).detach().softmax(-1)[0, LARGE])
    assert abs(sum(actions) / 2000 - chance) < 0.04
    assert actions == routing.decide(features, [0] * 2000, [3] * 2000, list(range(2000)))
    record = routing.records[0]
    assert record.logprob == pytest.approx(math.log(chance if record.action == LARGE else 1 - chance), abs=1e-5)


def test_files(tmp_path, router):
    save_router(tmp_path / "r.safetensors", router)
    again = load_router(tmp_path / "r.safetensors", hidden=32)
    x = torch.randn(3, 36)
    assert torch.equal(router(x), again(x))
    with pytest.raises(ValueError, match="of 32 channels; this one has 40"):
        load_router(tmp_path / "r.safetensors", hidden=40)
    (tmp_path / "text").write_text("no weights")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other.safetensors"):
        with pytest.raises(ValueError, match="holds no router; make one with hone-rstitch train-router"):
            load_router(tmp_path / name)


def test_rewards_and_advantages_by_hand():
    assert reward(True, 20.0, 0.01) == 0.8
    assert reward(False, 20.0, 0.01) == 0.0
    assert advantages([[1.0, 0.0], [0.5, 0.5]]) == [[1.0, -1.0], None]
    # A saved step among right answers, beside a right answer among wrong ones.
    rewards = [[1.0, 0.0], [0.9, 0.8]]
    assert advantages(rewards)[1] == pytest.approx([1.0, -1.0])
    first, second = advantages(rewards, "batch")
    assert first[0] / second[0] == pytest.approx(10.0)
    assert sum(value**2 for value in first + second) / 4 == pytest.approx(1.0)


def test_the_objective_is_clipped_on_each_side():
    old = torch.zeros(4, dtype=torch.float64)
    new = torch.tensor([1.5, 0.5, 1.5, 0.5], dtype=torch.float64).log().requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    loss = dapo_loss(new, old, advantage, low=0.2, high=0.28)
    # min(r A, clip(r) A): 1.28, 0.5, -1.5, -0.8
    assert float(loss.detach()) == pytest.approx(-(1.28 + 0.5 - 1.5 - 0.8) / 4)
    loss.backward()
    assert (new.grad != 0).tolist() == [False, True, True, False]


def outcome(right, large):
    answers = tuple(
        Answer("", bool(ok), tokens=(1, 0), calls=(0, large), discarded=0, switches=0, seconds=(0.0, 0.0), doubt=0.0)
        for ok in right
    )
    return Outcome(f"{large}", answers)


def test_thresholds_at_a_cost():
    curve = [outcome([0, 0, 0], 1), outcome([1, 1, 0], 3), outcome([0, 0, 0], 4), outcome([1, 1, 1], 5)]
    assert at_cost(curve, 2.0, 0.5).tolist() == [0.5, 0.5, 0.0]
    # The setting of cost 4 is worse than a mixture of its neighbours.
    assert at_cost(curve, 4.0, 0.5).tolist() == [1.0, 1.0, 0.5]
    assert at_cost(curve, 9.0, 0.5).tolist() == [1.0, 1.0, 1.0]
    assert at_cost(curve, 0.5, 0.5).tolist() == [0.0, 0.0, 0.0]


def test_features_by_hand():
    logits = torch.tensor([[math.log(6), math.log(3), 0.0, -torch.inf]])
    found = route_features(torch.tensor([[2.0, -1.0]]), logits, torch.tensor([0.25]), torch.tensor([99]))
    assert found[0].tolist() == pytest.approx([2.0, -1.0, math.log(100) / 12, 0.25, 0.6, 0.3])


@pytest.mark.parametrize("data", [False, True])
def test_a_stopped_training_goes_on_exactly(packaged, start, monkeypatch, tmp_path, data):
    file = tmp_path / "products.jsonl"
    file.write_text(
        "".join(f'{{"question": "{100 + at}*{10 + at}", "answer": {(100 + at) * (10 + at)}}}\n' for at in range(30))
    )
    cfg = TrainRouterConfig(
        steps=3, batch=2, rollouts=4, epochs=2, items=2, taus=(0.1,), width=8, log_every=1, checkpoint_seconds=0.0,
        sampling=SamplingConfig(max_new_tokens=6),
        **dict.fromkeys(("data", "held_out_data"), str(file)) if data else {},
    )  # fmt: skip
    # An untrained pair is never right: what is right here follows from the text.
    monkeypatch.setattr(reinforce, "grade", lambda text, *rest: sum(map(ord, text)) % 2 == 0)
    asked, seeds, answer = [], [], Pair.answer

    def noted(self, questions, *args, seed=0, routing=None, **options):
        if routing is not None and routing.sample:
            asked.append(questions)
            seeds.extend(seed)
        return answer(self, questions, *args, seed=seed, routing=routing, **options)

    monkeypatch.setattr(Pair, "answer", noted)
    with start(cfg, "whole") as run:
        whole = load_router(train_router(cfg, run).router)
    assert len(asked) == 3
    assert len({tuple(questions) for questions in asked}) == 3
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 4
    update, left = reinforce._update, [2]

    def halting(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(reinforce, "_update", halting)
    with pytest.raises(KeyboardInterrupt), start(cfg) as run:
        train_router(cfg, run)
    monkeypatch.setattr(reinforce, "_update", update)
    with start(cfg) as run:
        assert run.resumed
        again = load_router(train_router(cfg, run).router)
    assert again.out.weight.abs().sum() > 0
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert asked[3:] == [*asked[:3], asked[2]]  # the step that was cut is asked again


def test_training_runs_and_compares(packaged, start, monkeypatch):
    cfg = TrainRouterConfig(
        steps=2, batch=2, rollouts=3, epochs=1, items=4, taus=(0.1, 0.3), width=8, log_every=1,
        sampling=SamplingConfig(max_new_tokens=6),
    )  # fmt: skip
    # An untrained pair is never right; every other answer counts as if it were.
    import itertools

    flips = itertools.cycle([True, False, False])
    monkeypatch.setattr("hone_rstitch.reinforce.grade", lambda *args: next(flips))
    with start(cfg) as run:
        report = train_router(cfg, run)
    assert {row.variant for row in report.rows if row.metric == "accuracy"} == {
        "small", "large", "tau 0.1", "tau 0.3", "router tau 0.001",
    }  # fmt: skip
    assert sum(row.metric == "margin" for row in report.rows) == 1
    trained = load_router(report.router)
    assert trained.out.weight.abs().sum() > 0
    assert "router over thresholds at its cost" in str(report)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"rollouts": 1}, "rollouts must be at least 2"),
        ({"price": -1.0}, "price must be at least 0"),
        ({"stitch": StitchConfig()}, "policy 'router'"),
        ({"data": "a.jsonl"}, "data and held_out_data"),
    ],
)
def test_bad_training_is_named(values, match):
    with pytest.raises(ValueError, match=match):
        TrainRouterConfig(**values)


def test_the_price_is_of_the_unit_that_latencies_have():
    assert price_of(TrainRouterConfig(latency=Path("latency.json"))) == 5e-6
    assert price_of(TrainRouterConfig()) == 0.01
    assert price_of(TrainRouterConfig(price=0.0)) == 0.0
