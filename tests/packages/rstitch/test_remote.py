"""R-Stitch over servers, against a stub that speaks vLLM's completions, with the packaged pair behind it."""

import json
import math
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hone_rstitch.config import (
    EngineConfig,
    EvalConfig,
    ModelsConfig,
    ProfileConfig,
    SamplingConfig,
    ServeConfig,
    StitchConfig,
)
from hone_rstitch.engine import QueueFullError
from hone_rstitch.host import load_host, load_models
from hone_rstitch.method import entropy_nats
from hone_rstitch.remote import RemoteEngine, RemotePair, Server, entropy_bounds

ASKED = ["123*45", "987*65", "640*38"]
SHORT = SamplingConfig(max_new_tokens=40)


class Stub:
    """One model as vLLM serves it: ids in, one or two tokens an event out, raw log-probabilities, logit_bias heeded."""

    def __init__(self, model, eos, heeds_bias=True):
        stub = self
        self.bodies, self.written, self.keys = [], [], []
        self.lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(200, {"data": [{"id": "a-model"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.bodies.append(body)
                    stub.keys.append(self.headers.get("Authorization"))
                if body["model"] != "a-model" or body["logprobs"] > 30:
                    return self.reply(400, {"error": {"message": "logprobs: at most 30"}})
                self.send_response(200)
                self.end_headers()
                count, held = 0, []
                try:
                    for token in stub.tokens(model, eos, body, heeds_bias):
                        held.append(token)
                        count += 1
                        if len(held) == 1 + count % 2:
                            self.event(held)
                            held = []
                    if held:
                        self.event(held)
                    self.wfile.write(b"data: [DONE]\n\n")
                except (BrokenPipeError, ConnectionResetError):
                    pass
                with stub.lock:
                    stub.written.append(count)

            def event(self, tokens):
                names, values, tops = zip(*tokens, strict=True)
                said = {"tokens": names, "token_logprobs": values, "top_logprobs": tops}
                self.wfile.write(f"data: {json.dumps({'choices': [{'text': '', 'logprobs': said}]})}\n\n".encode())
                self.wfile.flush()

            def reply(self, status, value):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    @torch.no_grad()
    def tokens(model, eos, body, heeds_bias):
        ids = list(body["prompt"])
        for _ in range(body["max_tokens"]):
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            biased = logprobs.clone()
            for id, bias in body.get("logit_bias", {}).items():
                biased[int(id)] += bias * heeds_bias
            token = int(biased.argmax())
            top = logprobs.topk(min(body["logprobs"], len(logprobs)))
            likely = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) | {token: float(logprobs[token])}
            named = {f"token_id:{id}": max(value, -9999.0) for id, value in likely.items()}
            yield f"token_id:{token}", float(logprobs[token]), named
            ids.append(token)
            if token in eos:
                return

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def local():
    return load_host(0)


@pytest.fixture(scope="module")
def stubs(local):
    ends = [[model.generation_config.eos_token_id] for model in (local.small, local.large)]
    stubs = [Stub(model, eos) for model, eos in zip((local.small, local.large), ends, strict=True)]
    yield stubs
    for stub in stubs:
        stub.close()


@pytest.fixture
def remote(stubs):
    for stub in stubs:
        for noted in (stub.bodies, stub.written, stub.keys):
            noted.clear()
    return load_models(ModelsConfig(servers=tuple(stub.url for stub in stubs), top=30))


@pytest.mark.parametrize(
    "stitch",
    [
        StitchConfig(tau=0.01),
        StitchConfig(tau=0.1, policy="one-token"),
        StitchConfig(gate="confidence", tau=0.9),
        StitchConfig(tau=0.02, window=4, min_large_run=3),
        StitchConfig(policy="random", share=0.5, run_length=3.0),
        StitchConfig(policy="random", share=0.3, run_length=2.0, discards=True),
        StitchConfig(policy="small"),
        StitchConfig(policy="large"),
    ],
    ids=lambda stitch: stitch.label,
)
def test_servers_write_what_the_models_write(local, remote, stitch):
    texts, got = remote.answer(ASKED, stitch, SHORT, seed=5)
    want_texts, want = local.answer(ASKED, stitch, SHORT, seed=[5, 6, 7])
    assert texts == want_texts
    assert torch.equal(got.models, want.models)
    for name in ("entropy", "confidence", "logprobs", "discarded_entropy"):
        mine, theirs = getattr(got, name), getattr(want, name)
        assert torch.allclose(mine, theirs, atol=1e-4, equal_nan=True), name
    for mine, theirs in zip(got.usage, want.usage, strict=True):
        assert (mine.tokens, mine.calls, mine.discarded, mine.switches, mine.gaps, mine.prompt_tokens) == (
            theirs.tokens, theirs.calls, theirs.discarded, theirs.switches, theirs.gaps, theirs.prompt_tokens
        )  # fmt: skip
    large = stitch.policy != "small"
    assert (max(usage.tokens[1] for usage in got.usage) > 0) == large


def test_what_is_sent(stubs, remote, monkeypatch):
    monkeypatch.setenv("HONE_RSTITCH_SERVER_KEY", "secret")
    remote.answer(ASKED[:1], StitchConfig(tau=0.01), SHORT)
    small, large = stubs
    assert set(small.keys + large.keys) == {"Bearer secret"}
    body = large.bodies[0]
    assert (body["return_tokens_as_token_ids"], body["stream"], body["temperature"]) == (True, True, 0)
    # What is not said vLLM takes from the model's generation_config.json.
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)
    # Ids that only the large model has; what ends its text stays open.
    assert remote.large.generation_config.eos_token_id not in map(int, body["logit_bias"])
    assert set(range(20, 24)) <= set(map(int, body["logit_bias"]))
    assert body["max_tokens"] < 40
    assert "seed" not in body
    for stub in stubs:
        stub.bodies.clear()
    warm = SamplingConfig(max_new_tokens=20, temperature=0.8, top_p=0.9, top_k=7)
    remote.answer(ASKED[:2], StitchConfig(tau=0.01), warm, seed=3)
    bodies = small.bodies + large.bodies
    assert all((body["temperature"], body["top_p"], body["top_k"]) == (0.8, 0.9, 7) for body in bodies)
    # A seed of its own for each request and position at which a server is asked.
    seeds = {(3 + at) * 1_000_003 + position for at in range(2) for position in range(20)}
    assert {body["seed"] for body in bodies} <= seeds
    assert len({body["seed"] for body in small.bodies}) == len(small.bodies) > 2


def test_stop_strings_and_fewer_log_probabilities(local, remote, caplog):
    text, _ = remote.answer(ASKED[:1], StitchConfig(tau=0.01), SHORT, stop=("#",))
    assert text == [local.answer(ASKED[:1], StitchConfig(tau=0.01), SHORT, stop=("#",))[0][0]]
    assert text[0].endswith("#")
    few = replace(remote, top=1)
    with caplog.at_level("INFO", "hone_rstitch.remote"):
        _, less = few.answer(ASKED, StitchConfig(tau=0.005), SHORT)
    assert "the top 1 log-probabilities left the gate's answer open at" in caplog.text
    _, whole = remote.answer(ASKED, StitchConfig(tau=0.005), SHORT)
    assert (less.entropy[0, :3] <= whole.entropy[0, :3] + 1e-9).all()


def test_bounds_of_an_entropy():
    logprobs = torch.randn(40, dtype=torch.float64).mul(3).log_softmax(0).sort(descending=True).values
    exact = float(entropy_nats(logprobs[None]))
    for known in (1, 3, 10, 39):
        low, high = entropy_bounds(logprobs[:known].tolist(), 40)
        # What lies beyond a millionth counts as nothing.
        assert low <= exact + 1e-12
        assert exact <= high + 2e-5
    assert entropy_bounds(logprobs.tolist(), 40) == pytest.approx((exact, exact))
    # Half on one token: the rest on one other, or spread over three.
    low, high = entropy_bounds([math.log(0.5)], 4)
    assert low == pytest.approx(math.log(2))
    assert high == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(6))
    # The known ones bound the others: 0.4 is at least four tokens of 0.1.
    low, _ = entropy_bounds([math.log(0.5), math.log(0.1)], 40)
    assert low == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(10))


def test_what_servers_cannot_do_is_said(local, stubs, remote):
    with pytest.raises(ConnectionError, match=r"refuses with status 400.*at most 30"):
        replace(remote, top=31).answer(ASKED[:1], StitchConfig(), SHORT)
    with pytest.raises(ValueError, match="hidden states"):
        remote.answer(ASKED[:1], StitchConfig(policy="router"), SHORT)
    with pytest.raises(ValueError, match="leave entropy_on at raw"):
        remote.answer(ASKED[:1], StitchConfig(entropy_on="processed"), SHORT)
    with pytest.raises(ConnectionError, match="does not answer"):
        replace(remote, servers=(Server("http://127.0.0.1:9"), remote.servers[1])).answer(ASKED, StitchConfig(), SHORT)
    with pytest.raises(ValueError, match="servers are two addresses"):
        ModelsConfig(servers=("http://one",))
    models = ModelsConfig(servers=("http://one", "http://two"))
    with pytest.raises(ValueError, match="runs the models itself"):
        ProfileConfig(models=models)
    with pytest.raises(ValueError, match="hidden states"):
        ServeConfig(models=models, router="a-file")
    with pytest.raises(ValueError, match="which servers do not give"):
        EvalConfig(models=models, baselines=("speculative",))


def test_an_id_that_the_other_model_has_not_is_no_token(local):
    class Stubborn:
        config = local.large.config

        def __call__(self, ids):
            out = local.large(ids)
            out.logits[..., 22] = 50.0
            return out

    stubs = [Stub(local.small, [local.small.generation_config.eos_token_id]), Stub(Stubborn(), [], heeds_bias=False)]
    models = ModelsConfig(servers=tuple(stub.url for stub in stubs), top=30)
    with pytest.raises(ConnectionError, match="wrote id 22, which the other model has not; does it heed logit_bias"):
        load_models(models).answer(ASKED[:1], StitchConfig(policy="large"), SHORT)
    for stub in stubs:
        stub.close()


def test_mass_of_ids_that_must_not_come_is_left_out(local):
    class Noisy:
        """As likely as its likeliest token is an id that the small model has not."""

        config = local.large.config

        def __call__(self, ids):
            out = local.large(ids)
            out.logits[..., 22] = out.logits.amax(-1)
            return out

    ends = [[model.generation_config.eos_token_id] for model in (local.small, local.large)]
    stubs = [Stub(local.small, ends[0]), Stub(Noisy(), ends[1])]
    pair = load_models(ModelsConfig(servers=tuple(stub.url for stub in stubs), top=30))
    for stitch in (StitchConfig(policy="large"), StitchConfig(gate="confidence", tau=0.9)):
        texts, got = pair.answer(ASKED[:1], stitch, SHORT)
        want_texts, want = local.answer(ASKED[:1], stitch, SHORT)
        assert texts == want_texts
        for name in ("entropy", "confidence", "logprobs"):
            assert torch.allclose(getattr(got, name), getattr(want, name), atol=1e-4, equal_nan=True), name
    for stub in stubs:
        stub.close()


def test_eval_over_servers(stubs, packaged, start):
    from hone_rstitch.evaluate import evaluate

    cfg = EvalConfig(
        models=ModelsConfig(servers=tuple(stub.url for stub in stubs), top=30), limit=4, taus=(0.03,),
        baselines=("small", "large"), batch=4,
    )  # fmt: skip
    assert isinstance(load_models(cfg.models), RemotePair)
    with start(cfg) as run:
        evaluate(cfg, run)
    shares = {row.variant: row.value for row in run.rows if row.metric == "large_share"}
    assert (shares["small"], shares["large"]) == (0, 1)
    assert 0 < shares["tau 0.03"] < 1


def test_one_server_before_two(local, remote):
    from fastapi.testclient import TestClient
    from hone_rstitch.serve import app_of

    (want,), output = local.answer(["123*45"], StitchConfig(tau=0.01), SHORT)
    with RemoteEngine(remote) as engine, TestClient(app_of(engine, stitch=StitchConfig(tau=0.01))) as client:
        body = {"messages": [{"role": "user", "content": "123*45"}], "max_tokens": 40, "logprobs": True}
        reply = client.post("/v1/chat/completions", json=body).json()
        assert reply["choices"][0]["message"]["content"] == want
        assert reply["choices"][0]["finish_reason"] == "stop"
        who = [("small", "large")[model] for model in output.models[0].tolist()]
        assert [token["model"] for token in reply["choices"][0]["logprobs"]["content"]] == who
        assert reply["usage"]["rstitch"]["large_calls"] == output.usage[0].calls[1]
        lines = client.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")
        parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == want
        refused = client.post("/v1/chat/completions", json=body | {"rstitch": {"policy": "router"}})
        assert (refused.status_code, "hidden states" in refused.text) == (400, True)
        assert client.get("/health").json() == {"status": "ok"}
        assert 'hone_rstitch_requests_total{finish="stop"} 2' in client.get("/metrics").text
    assert not engine.running


def test_requests_to_servers_queue_end_and_fail(remote):
    ids = ([1, 2, 3], [1, 2, 3])
    engine = RemoteEngine(remote, EngineConfig(max_batch=1, max_queue=2))
    jobs = [engine.submit(ids, StitchConfig(), SHORT) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait"):
        engine.submit(ids, StitchConfig(), SHORT)
    jobs[0].cancel()
    # Who has left makes room for another.
    jobs.append(engine.submit(ids, StitchConfig(), SHORT))
    assert jobs[0].finish == "cancelled"
    with engine:
        assert jobs[0].wait(20).finish == "cancelled"
        assert jobs[1].wait(20).finish in ("stop", "length")
        with pytest.raises(ValueError, match="exceed the 256 positions of the small model"):
            engine.submit(ids, StitchConfig(), SamplingConfig(max_new_tokens=254))
        seen = threading.Event()
        job = engine.submit(ids, StitchConfig(policy="large"), SHORT, on_token=lambda token: (seen.set(), job.cancel()))
        assert job.wait(20).finish == "cancelled"
        assert len(job.tokens) == 1
    assert engine.snapshot().requests["cancelled"] == 2
    assert engine.snapshot().running == 0
    late = RemoteEngine(remote, EngineConfig(timeout=1e-6))
    with late:
        assert late.submit(ids, StitchConfig(), SHORT).wait(20).finish == "timeout"
    broken = RemoteEngine(remote)
    broken.pair = replace(remote, top=31)
    with broken, pytest.raises(ConnectionError, match="at most 30"):
        broken.submit(ids, StitchConfig(), SHORT).wait(20)
    with pytest.raises(RuntimeError, match="closed"):
        broken.submit(ids, StitchConfig(), SHORT)


class Silent(Stub):
    """A server that says nothing for a while after its first token."""

    @staticmethod
    def tokens(*args):
        for at, token in enumerate(Stub.tokens(*args)):
            if at == 1:
                time.sleep(10)
            yield token


def test_a_server_that_breaks_off_is_named():
    listener = socket.create_server(("127.0.0.1", 0))

    def once():
        client, _ = listener.accept()
        client.recv(10_000)
        client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\ndata: {")
        client.close()

    threading.Thread(target=once, daemon=True).start()
    server = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=10)
    with pytest.raises(ConnectionError, match=rf"{server.url} broke off: "):
        list(server.tokens({"prompt": [1]}))
    listener.close()


def test_a_server_that_says_nothing_holds_no_request_beyond_its_time(local):
    stubs = [Silent(local.small, []), Stub(local.large, [])]
    pair = load_models(ModelsConfig(servers=tuple(stub.url for stub in stubs), top=30))
    engine = RemoteEngine(pair, EngineConfig(max_batch=1, timeout=0.3))
    with engine:
        began = time.monotonic()
        job = engine.submit(([1, 2, 3], [1, 2, 3]), StitchConfig(policy="small"), SHORT)
        assert job.wait(20).finish == "timeout"
        assert time.monotonic() - began < 8
    for stub in stubs:
        stub.close()


def test_an_engine_before_servers_leaves_no_thread(remote):
    with RemoteEngine(remote, EngineConfig(max_batch=3)) as engine:
        jobs = [engine.submit(([1, 2, 3], [1, 2, 3]), StitchConfig(policy="large"), SHORT) for _ in range(5)]
    assert all(job.done.is_set() for job in jobs)
    assert not any(thread.is_alive() for thread in engine._threads)
    assert not engine.jobs
    assert sum(engine.snapshot().requests.values()) == 5
