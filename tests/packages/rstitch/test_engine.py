import threading

import pytest
import torch
from hone_rstitch.config import EngineConfig, SamplingConfig, StitchConfig
from hone_rstitch.engine import Engine, QueueFullError, warp
from hone_rstitch.host import load_host
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

QUESTIONS = ("123*45", "999*11", "100*10", "507*62", "481*37", "7*8")


@pytest.fixture(scope="module")
def pair():
    return load_host(0)


def wishes():
    """Requests that differ in everything a request may choose."""
    stitches = [
        StitchConfig(tau=0.05),
        StitchConfig(policy="large"),
        StitchConfig(policy="small"),
        StitchConfig(tau=0.02, prefill="both"),
        StitchConfig(gate="confidence", tau=0.8, window=2),
        StitchConfig(policy="random", share=0.5),
    ]
    samplings = [SamplingConfig(max_new_tokens=30), SamplingConfig(max_new_tokens=9, temperature=0.9, top_p=0.8)]
    return [
        (question, stitches[at], samplings[at % 2 if at != 4 else 1], 10 + at) for at, question in enumerate(QUESTIONS)
    ]


def alone(pair, question, stitch, sampling, seed):
    """What ``stitch_generate`` writes with nobody else around."""
    _, output = pair.answer([question], stitch, sampling, seed=seed)
    new = output.sequences[0, -output.models.shape[1] :]
    return new.tolist(), output.models[0].tolist(), output.usage[0]


def submit(engine, question, stitch, sampling, seed, **calls):
    small, large = engine.pair.prompts([question])
    return engine.submit((small[0], large[0]), stitch, sampling, seed=seed, **calls)


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(cache=cache, page=16, **changes)
        for cache in ("paged", "dynamic")
        for changes in ({}, {"max_batch": 2}, {"large_batch": 3})
    ],
)
def test_a_request_in_company_is_written_as_alone(pair, config):
    engine = Engine(pair, config)
    jobs = [submit(engine, *wish) for wish in wishes()[:4]]
    for _ in range(3):
        engine.step()
    jobs += [submit(engine, *wish) for wish in wishes()[4:]]  # these join a batch that is under way
    while engine.step():
        pass
    for job, wish in zip(jobs, wishes(), strict=True):
        tokens, models, usage = alone(pair, *wish)
        assert [token.token for token in job.tokens] == tokens
        assert [token.model for token in job.tokens] == models
        assert job.usage.calls == usage.calls
        assert job.usage.gaps == usage.gaps
        assert job.usage.discarded == usage.discarded
        assert job.finish == ("stop" if tokens[-1] in pair.vocabulary.eos else "length")
    assert engine.paged == (config.cache == "paged")
    if engine.paged:
        # Every page and row of the table is free again.
        free = engine._sides[0].free
        assert len(set(free.rows)) == config.max_batch
        assert len(set(free.pages)) == 65536 // 16 + config.max_batch
    stats = engine.snapshot()
    assert (stats.waiting, stats.running) == (0, 0)
    assert sum(stats.tokens) == sum(len(job.tokens) for job in jobs)
    assert not engine.jobs


def test_a_full_batch_runs_fewer_large_calls(pair):
    calls = []
    for large_batch in (1, 4):
        engine = Engine(pair, EngineConfig(large_batch=large_batch))
        jobs = [submit(engine, q, StitchConfig(tau=0.02), SamplingConfig(max_new_tokens=30), 0) for q in QUESTIONS]
        while engine.step():
            pass
        assert all(job.done.is_set() for job in jobs)
        calls.append(engine.stats.calls[1])
    assert calls[1] < calls[0]


def test_threads_cancel_timeout_and_the_bound_of_the_queue(pair):
    sampling = SamplingConfig(max_new_tokens=30)
    engine = Engine(pair, EngineConfig(max_batch=1, max_queue=2))
    first = submit(engine, "123*45", StitchConfig(), sampling, 0)
    engine.step()
    second, third = (submit(engine, "99*99", StitchConfig(), sampling, 0) for _ in range(2))
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        submit(engine, "1*1", StitchConfig(), sampling, 0)
    first.cancel()
    third.deadline = 0.0
    while engine.step():
        pass
    assert [job.finish for job in (first, second, third)] == ["cancelled", "stop", "timeout"]
    assert 1 <= len(first.tokens) < len(second.tokens)
    with Engine(pair) as running:
        found = []
        threads = [
            threading.Thread(
                target=lambda q=q: found.append(
                    (q, submit(running, q, StitchConfig(), sampling, 0).wait(60).tokens[-1].last)
                )
            )
            for q in QUESTIONS
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == sorted((q, True) for q in QUESTIONS)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        submit(running, "1*1", StitchConfig(), sampling, 0)


def test_what_a_request_cannot_have_is_refused_when_it_comes(pair):
    engine = Engine(pair, EngineConfig(max_tokens=40))
    ask = StitchConfig()
    with pytest.raises(ValueError, match=r"may come to 47 tokens, and the engine holds 40 in all"):
        submit(engine, "123*45", ask, SamplingConfig(max_new_tokens=40), 0)
    with pytest.raises(ValueError, match="a prompt of a token at least"):
        engine.submit(([], [1]), ask, SamplingConfig())
    with pytest.raises(ValueError, match="positions of the small model"):
        engine.submit(([1], [1]), ask, SamplingConfig(max_new_tokens=10**7))
    with pytest.raises(ValueError, match="max_batch must be positive and finite; got 0"):
        EngineConfig(max_batch=0)


@pytest.mark.parametrize("cache", ["paged", "dynamic"])
def test_an_error_ends_the_requests_and_not_the_engine(pair, monkeypatch, cache):
    engine = Engine(pair, EngineConfig(cache=cache))
    job = submit(engine, "123*45", StitchConfig(), SamplingConfig(max_new_tokens=30), 0)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_look", lambda *args: 1 / 0)
        engine.step()
    assert job.finish == "error"
    with pytest.raises(ZeroDivisionError):
        job.wait(0)
    after = submit(engine, "123*45", StitchConfig(), SamplingConfig(max_new_tokens=30), 0)
    while engine.step():
        pass
    assert after.finish == "stop"


@pytest.mark.parametrize("cache", ["paged", "dynamic"])
def test_a_request_that_fails_takes_no_other_along(pair, monkeypatch, cache):
    engine = Engine(pair, EngineConfig(cache=cache))
    sampling = SamplingConfig(max_new_tokens=30)
    bad = submit(engine, "123*45", StitchConfig(), sampling, 0, on_token=lambda token: [][1])
    odd = submit(engine, "999*11", StitchConfig(), sampling, 0)
    good = submit(engine, "123*45", StitchConfig(), sampling, 0, on_end=lambda: [][1])
    look = Engine._look

    def overflows(self, model, wanted, side):
        seen, started = look(self, model, wanted, side)
        for at, (row, _) in enumerate(wanted):
            if row.index == 1 and len(row.tokens) == 3:
                seen.entropy[at] = float("nan")
        return seen, started

    monkeypatch.setattr(Engine, "_look", overflows)
    while engine.step():
        pass
    assert [job.finish for job in (bad, odd, good)] == ["error", "error", "stop"]
    assert (len(bad.tokens), len(odd.tokens)) == (1, 3)
    with pytest.raises(IndexError):
        bad.wait(0)
    with pytest.raises(ValueError, match="logits are not numbers at token 3 of row 1"):
        odd.wait(0)
    assert [token.token for token in good.tokens] == alone(pair, "123*45", StitchConfig(), sampling, 0)[0]
    assert engine.snapshot().requests == {"error": 2, "stop": 1}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("cache", ["paged", "dynamic"])
def test_logits_that_are_no_numbers_end_their_own_request(cache, temperature):
    pair = load_host(0)
    star = pair.small_tokenizer.encode("?")[0]
    with torch.no_grad():
        pair.small.model.embed_tokens.weight[star] = torch.nan
    engine = Engine(pair, EngineConfig(cache=cache))
    sampling = SamplingConfig(max_new_tokens=30, temperature=temperature)
    broken = submit(engine, "12?*45", StitchConfig(), sampling, 0)
    whole = submit(engine, "123*45", StitchConfig(), sampling, 0)
    while engine.step():
        pass
    assert (broken.finish, whole.finish) == ("error", "stop")
    with pytest.raises(ValueError, match="the small model's logits are not numbers at token 0"):
        broken.wait(0)
    assert [token.token for token in whole.tokens] == alone(pair, "123*45", StitchConfig(), sampling, 0)[0]


@pytest.mark.parametrize("cache", ["paged", "dynamic"])
def test_a_request_that_cannot_be_admitted_ends_and_leaves_nothing(pair, monkeypatch, cache):
    with Engine(pair, EngineConfig(cache=cache, page=16)) as engine:
        sampling = SamplingConfig(max_new_tokens=30)
        with monkeypatch.context() as patch:
            # As when memory runs out while the prompt is read.
            side = type(engine._sides[1])
            patch.setattr(side, "absorb" if cache == "paged" else "extend", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                submit(engine, "123*45", StitchConfig(prefill="both"), sampling, 0).wait(20)
        assert engine.running
        if cache == "paged":
            free = engine._sides[0].free
            assert len(set(free.pages)) == 65536 // 16 + engine.config.max_batch
            assert len(set(free.rows)) == engine.config.max_batch
            assert not any(side.place or side.read for side in engine._sides)
        assert submit(engine, "123*45", StitchConfig(prefill="both"), sampling, 0).wait(20).finish == "stop"


def test_who_has_left_the_queue_waits_no_more(pair):
    engine = Engine(pair, EngineConfig(max_queue=2))
    ended = []
    jobs = [submit(engine, "1*1", StitchConfig(), SamplingConfig(), 0, on_end=lambda: ended.append(1)) for _ in "12"]
    with pytest.raises(QueueFullError):
        submit(engine, "1*1", StitchConfig(), SamplingConfig(), 0)
    jobs[0].cancel()
    jobs[1].deadline = 0.0
    submit(engine, "1*1", StitchConfig(), SamplingConfig(), 0)
    assert [job.finish for job in jobs] == ["cancelled", "timeout"]
    assert ended == [1, 1]
    before = engine.snapshot()
    engine.close()
    assert (before.requests, before.waiting) == ({"cancelled": 1, "timeout": 1}, 1)
    assert engine.snapshot().requests == {"cancelled": 2, "timeout": 1}


def test_the_token_budget_holds_requests_back(pair):
    engine = Engine(pair, EngineConfig(max_tokens=60))
    jobs = [submit(engine, "123*45", StitchConfig(), SamplingConfig(max_new_tokens=30), 0) for _ in range(2)]
    engine.step()
    assert engine.snapshot().running == 1
    while engine.step():
        pass
    assert [job.finish for job in jobs] == ["stop", "stop"]


@pytest.mark.parametrize("sampling", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 7, "top_p": 0.9}, {}])
def test_warping_is_transformers(sampling):
    logits = torch.randn(1, 40)
    logits[0, 3] = logits[0, 8]
    want = TemperatureLogitsWarper(0.7)(None, logits)
    if "top_k" in sampling:
        want = TopKLogitsWarper(sampling["top_k"])(None, want)
    if "top_p" in sampling:
        want = TopPLogitsWarper(sampling["top_p"])(None, want)
    assert torch.equal(warp(logits[0], SamplingConfig(temperature=0.7, **sampling)), want[0])
