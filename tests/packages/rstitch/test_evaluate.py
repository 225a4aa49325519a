import itertools
import random

import pytest
from hone_rstitch.config import LARGE, SMALL, EvalConfig, SamplingConfig, StitchConfig
from hone_rstitch.data import Problem, products
from hone_rstitch.evaluate import (
    Answer,
    Answers,
    EvalReport,
    Outcome,
    auroc,
    cascade,
    evaluate,
    matched_random,
)
from hone_rstitch.host import load_host
from hone_rstitch.inputs import find_evaluated


def answer(right=True, tokens=(4, 0), calls=None, doubt=0.0, discarded=0, switches=0):
    return Answer("", right, tokens, calls or tokens, discarded, switches, (0.0, 0.0), doubt)


def test_auroc_is_the_share_of_pairs_in_order():
    rng = random.Random(0)
    scores = [rng.randrange(6) for _ in range(40)]
    positive = [rng.random() < 0.4 for _ in scores]
    pairs = [
        (a, b) for (a, p), (b, q) in itertools.product(zip(scores, positive, strict=True), repeat=2) if p and not q
    ]
    wanted = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert auroc(scores, positive) == pytest.approx(wanted)
    assert auroc([1, 2], [True, True]) == 0.5


def test_an_outcome_sums_tokens_not_answers():
    outcome = Outcome(
        "x",
        (
            answer(True, (6, 2), (7, 2), discarded=1, switches=1),
            answer(False, (0, 12), (1, 12), discarded=1, switches=1),
        ),
    )
    assert outcome.accuracy == 0.5
    assert outcome.share == pytest.approx(14 / 20)
    assert outcome.discards == pytest.approx(2 / 20)
    assert outcome.run_length == 7
    assert outcome.tokens == 10
    assert outcome.cost(0.25) == 7 + 0.25 * 4


def test_samples_of_a_problem_are_no_new_problems():
    right = [True, True, False, False, True, False]
    once = Outcome("x", tuple(answer(value) for value in right))
    fourfold = Outcome("x", tuple(answer(value) for value in right for _ in range(4)), samples=4)
    assert fourfold.accuracy == once.accuracy
    assert fourfold.interval == once.interval
    assert cascade(fourfold, fourfold, calls=0).interval == once.interval


def test_the_cascade_spends_its_steps_where_doubt_is_highest():
    small = Outcome("small", tuple(answer(False, (5, 0), doubt=doubt) for doubt in (0.1, 0.9, 0.5, 0.3)))
    large = Outcome("large", tuple(answer(True, (0, 10)) for _ in range(4)))
    found = cascade(small, large, calls=5)
    assert found.right == [False, True, True, False]
    assert found.calls(LARGE) == 5
    assert found.calls(SMALL) == 5
    assert cascade(small, large, calls=4.9).right == [False, True, False, False]
    assert cascade(small, large, calls=0).right == [False] * 4
    assert cascade(small, large, calls=10).right == [True] * 4


def test_matched_random_routing():
    outcome = Outcome("x", (answer(True, (6, 4), switches=2), answer(True, (9, 1), switches=1)))
    assert matched_random(outcome) == StitchConfig(policy="random", share=0.25)
    assert matched_random(outcome, runs=True) == StitchConfig(policy="random", share=0.25, run_length=5 / 3)
    nothing = Outcome("x", (answer(True, (6, 0)),))
    assert matched_random(nothing, runs=True).share == 0.0


@pytest.fixture
def pair(untrained):
    return load_host(path=untrained)


def ask(path, pair, problems, **options):
    return Answers(path, pair, problems, SamplingConfig(max_new_tokens=12), quiet=True, **options)


def test_what_was_asked_is_not_asked_again(pair, tmp_path, monkeypatch):
    file, problems = tmp_path / "answers.jsonl", products(7)
    first = ask(file, pair, problems, batch=3).ask(StitchConfig(tau=0.4))
    assert len(file.read_text().splitlines()) == 7
    # Half a line, as a crash leaves it: that answer is asked for anew, alone, and comes out the same.
    file.write_bytes(file.read_bytes()[:-9])
    asked = []
    original = type(pair).answer
    monkeypatch.setattr(
        type(pair),
        "answer",
        lambda self, questions, *a, **k: asked.extend(questions) or original(self, questions, *a, **k),
    )
    second = ask(file, pair, problems).ask(StitchConfig(tau=0.4))
    assert asked == [problems[-1].question]
    assert [a.text for a in second.answers] == [a.text for a in first.answers]
    assert second.answers[:-1] == first.answers[:-1]
    # An edited problem is another one.
    changed = [*problems[:-1], Problem(problems[-1].id, "111*11", problems[-1].answer)]
    ask(file, pair, changed).ask(StitchConfig(tau=0.4))
    assert asked[1:] == ["111*11"]


def test_samples_differ_and_do_not_depend_on_the_batch(pair, tmp_path):
    sampling = SamplingConfig(max_new_tokens=12, temperature=1.0)
    found = []
    for batch in (2, 5):
        answers = Answers(
            tmp_path / f"{batch}.jsonl", pair, products(3), sampling, samples=3, batch=batch, seed=1, quiet=True
        )
        found.append([a.text for a in answers.ask(StitchConfig(tau=0.5)).answers])
    assert found[0] == found[1]
    assert len(set(found[0])) > 3


def test_doubt_is_the_small_models_highest_entropy(pair, tmp_path):
    problems = products(6)
    outcome = ask(tmp_path / "a.jsonl", pair, problems).ask(StitchConfig(tau=0.5))
    _, output = pair.answer(
        [problem.question for problem in problems], StitchConfig(tau=0.5), SamplingConfig(max_new_tokens=12)
    )
    for row, found in enumerate(outcome.answers):
        own = [float(h) for h, who in zip(output.entropy[row], output.models[row], strict=True) if who == SMALL]
        thrown = [float(h) for h in output.discarded_entropy[row] if h == h]
        assert found.doubt == pytest.approx(max([*own, *thrown]))


def test_the_verb_writes_its_curve_and_prints_it_again(packaged, start):
    cfg = EvalConfig(limit=10, taus=(0.3, 0.6), batch=5, sampling=SamplingConfig(max_new_tokens=12))
    with start(cfg) as run:
        report = evaluate(cfg, run)
    text = str(report)
    for label in ("small", "large", "tau 0.3", "random as tau 0.6", "cascade as tau 0.3"):
        assert f"\n{label} " in text
    assert report.chart.is_file()
    again = start(cfg)
    assert again.done
    assert str(EvalReport.of(again)) == text
    shares = {row.variant: row.value for row in report.rows if row.metric == "large_share"}
    assert shares["small"] == 0
    assert shares["large"] == 1
    assert shares["tau 0.3"] >= shares["tau 0.6"]


def test_inputs_are_looked_for_first(tmp_path):
    with pytest.raises(ValueError, match="multiplies"):
        find_evaluated(EvalConfig(data=str(tmp_path / "x.jsonl")))
    assert find_evaluated(EvalConfig()).data is None
