import asyncio
import json
import random
import re
import socket
import threading
import time

import httpx
import openai
import pytest
import torch
import uvicorn
from hone_rstitch.config import EngineConfig, ServeConfig, StitchConfig
from hone_rstitch.engine import Engine
from hone_rstitch.host import load_host
from hone_rstitch.serve import _Text, app_of

KEY = "a-key"


class Served:
    """A server on a port of its own."""

    def __init__(self, pair, config=None, router=None, **options):
        self.engine = Engine(pair, config, router=router).start()
        self.server = uvicorn.Server(uvicorn.Config(app_of(self.engine, **options), log_level="error"))
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.engine.close()
        self.socket.close()

    def client(self, key=KEY, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)


@pytest.fixture(scope="module")
def pair():
    return load_host(0)


@pytest.fixture(scope="module")
def served(pair):
    served = Served(pair, api_key=KEY, stitch=StitchConfig(tau=0.02))
    yield served
    served.close()


def wait_until_idle(engine):
    deadline = time.monotonic() + 20
    while (now := engine.snapshot()).running or now.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return now


def direct(pair, question, **options):
    from hone_rstitch.config import SamplingConfig

    return pair.answer([question], StitchConfig(tau=0.02, **options), SamplingConfig(max_new_tokens=40))


def test_chat_with_the_real_client(pair, served):
    text, output = direct(pair, "123*45")
    ask = {"model": "hone-rstitch", "messages": [{"role": "user", "content": "123*45"}], "max_tokens": 40}
    reply = served.client().chat.completions.create(**ask, logprobs=True)
    assert reply.choices[0].message.content == text[0]
    assert reply.choices[0].finish_reason == "stop"
    usage = output.usage[0]
    assert reply.usage.completion_tokens == sum(usage.tokens)
    assert reply.usage.rstitch["large_tokens"] == usage.tokens[1]
    assert reply.usage.rstitch["discarded"] == usage.discarded
    assert reply.usage.rstitch["large_calls"] == usage.calls[1]
    who = [entry.model for entry in reply.choices[0].logprobs.content]
    assert who == [("small", "large")[model] for model in output.models[0].tolist()]
    assert [e.logprob for e in reply.choices[0].logprobs.content] == pytest.approx(
        output.logprobs[0].tolist(), abs=1e-4
    )
    options = {"stream_options": {"include_usage": True}, "extra_body": {"rstitch": {"trace": True}}}
    parts = list(served.client().chat.completions.create(**ask, stream=True, **options))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == text[0]
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == "stop"
    assert parts[-1].usage.rstitch == reply.usage.rstitch
    trace = [token for p in parts if p.choices for token in p.choices[0].rstitch]
    assert [token["model"] for token in trace] == who
    assert sum(token["discarded_entropy"] is not None for token in trace) == usage.discarded
    assert len(parts) > 3


def test_completions_with_the_real_client(pair, served):
    client = served.client()
    reply = client.completions.create(model="hone-rstitch", prompt="123*45=", max_tokens=5, logprobs=1)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == len(reply.choices[0].logprobs.tokens) == 5
    assert len(reply.choices[0].logprobs.models) == 5
    whole = client.completions.create(model="hone-rstitch", prompt="123*45=", max_tokens=40).choices[0].text
    at = whole.index("#")
    stopped = client.completions.create(model="hone-rstitch", prompt="123*45=", max_tokens=40, stop=["+", "#"])
    assert stopped.choices[0].text == re.split(r"[+#]", whole)[0]
    assert stopped.choices[0].finish_reason == "stop"
    parts = client.completions.create(model="hone-rstitch", prompt="123*45=", max_tokens=40, stop="#", stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole[:at]
    small = client.completions.create(
        model="hone-rstitch", prompt="123*45=", max_tokens=9, extra_body={"rstitch": {"policy": "small"}}
    )
    assert small.usage.rstitch["large_tokens"] == 0
    free = {"model": "hone-rstitch", "prompt": "987*65=", "max_tokens": 30, "temperature": 2}
    free["extra_body"] = {"rstitch": {"policy": "small"}}
    drawn = [client.completions.create(**free, seed=seed) for seed in (1, 1, 2, 3, 4)]
    texts = [reply.choices[0].text for reply in drawn]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    assert [model.id for model in client.models.list()] == ["hone-rstitch"]


def test_wrong_requests_are_told_what_is_wrong(served):
    client = served.client()
    ask = {"model": "hone-rstitch", "prompt": "1*1=", "max_tokens": 4}
    for change, words in (
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"n": 3}, "n: Input should be 1"),
        ({"presence_penalty": 1.0}, "presence_penalty: Extra inputs are not permitted"),
        ({"extra_body": {"rstitch": {"taw": 1}}}, "rstitch.taw: Extra inputs"),
        ({"extra_body": {"rstitch": {"policy": "random"}}}, "share belongs to policy='random'"),
        ({"extra_body": {"rstitch": {"tau": 0.1, "tau_back": 0.5}}}, "tau_back must be at most tau"),
        ({"extra_body": {"rstitch": {"gate": "confidence"}}}, "the gate 'confidence' has thresholds of its own"),
        ({"max_tokens": 10**7}, "exceed the"),
        ({"temperature": 1e-300}, "temperature must be 0 (greedy) or at least 0.001"),
        ({"stop": ["#", ""]}, "stop: an empty string would end every text"),
        ({"extra_body": {"rstitch": {"window": 10**21}}}, "window and min_large_run must lie in 1 .. 1048576"),
        ({"prompt": ""}, "a prompt of a token at least"),
        ({"prompt": "123x45="}, "it would read 'x' as <unk>"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(words)):
            client.completions.create(**(ask | change))
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.completions.create(**(ask | {"model": "gpt"}))
    with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
        served.client(key="another").models.list()
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(
            model="hone-rstitch", messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "1*1"}]
        )
    with pytest.raises(openai.BadRequestError, match="it would read ' ' as <unk>"):
        client.chat.completions.create(model="hone-rstitch", messages=[{"role": "user", "content": "12 * 3"}])
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    broken = httpx.post(f"{served.url}/v1/completions", content=b'{"prompt": ', headers=headers)
    assert broken.status_code == 400
    assert "JSON decode error" in broken.json()["error"]["message"]
    # Nobody was hurt.
    assert client.completions.create(**ask).choices[0].text
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


def test_what_is_open_without_a_key(served):
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert httpx.get(f"{served.url}/").status_code == 200
    for route in ("metrics", "v1/models"):
        assert httpx.get(f"{served.url}/{route}").status_code == 401
        assert httpx.get(f"{served.url}/{route}", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    for route in ("v1/completions", "v1/chat/completions"):
        assert httpx.post(f"{served.url}/{route}", json={}).status_code == 401


def test_a_request_may_leave_random_routing(pair):
    served = Served(pair, stitch=StitchConfig(policy="random", share=0.5, run_length=2.0, discards=True))
    ask = {"model": "hone-rstitch", "prompt": "123*45=", "max_tokens": 40}
    try:
        own, drawn = (
            served.client().completions.create(**ask, extra_body={"rstitch": change})
            for change in ({"policy": "stitch", "tau": 0.02}, {"share": 1.0, "run_length": 40.0})
        )
    finally:
        served.close()
    assert own.usage.rstitch["large_tokens"] == direct(pair, "123*45")[1].usage[0].tokens[1]
    assert drawn.usage.rstitch["small_tokens"] == 0


def test_a_client_that_leaves_takes_its_request_along(served):
    before = wait_until_idle(served.engine).requests.get("cancelled", 0)
    # Without an end of text, so that it ends only by being left.
    ask = {"model": "hone-rstitch", "prompt": "123*45=", "max_tokens": 240, "extra_body": {"rstitch": {"tau": 1}}}
    ends, served.engine.ends = served.engine.ends, set()
    try:
        with served.client().completions.create(**ask, stream=True) as stream:
            next(iter(stream))
        after = wait_until_idle(served.engine)
        assert after.requests["cancelled"] == before + 1
        with pytest.raises(openai.APITimeoutError):
            served.client(timeout=0.05).completions.create(**ask)
        assert wait_until_idle(served.engine).requests["cancelled"] == before + 2
    finally:
        served.engine.ends = ends
    assert not served.engine.jobs


def test_clients_that_leave_the_queue_make_room(pair, monkeypatch):
    served = Served(pair, EngineConfig(max_batch=1, max_queue=2))
    held, step = threading.Event(), Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: held.wait(20) and step(self))
    body = json.dumps({"prompt": "123*45=", "max_tokens": 9, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"

    def ask():
        client = socket.create_connection(("127.0.0.1", served.socket.getsockname()[1]))
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        return client

    try:
        gone = [ask(), ask()]
        while served.engine.snapshot().waiting < 2:
            time.sleep(0.02)
        with pytest.raises(openai.RateLimitError):
            served.client().completions.create(model="", prompt="1*1=")
        for client in gone:
            client.close()
        deadline = time.monotonic() + 10
        while not all(job._cancelled for job in [*served.engine._queue]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        held.set()
        reply = served.client().completions.create(model="hone-rstitch", prompt="123*45=", max_tokens=40)
        assert reply.choices[0].text == "615+4920=#5535."
        assert wait_until_idle(served.engine).requests == {"cancelled": 2, "stop": 1}
    finally:
        held.set()
        served.close()


def test_a_huge_prompt_is_refused_while_others_are_answered(pair, monkeypatch):
    served = Served(pair, EngineConfig(max_tokens=1000))
    client, huge = served.client(), {"model": "hone-rstitch", "prompt": "1" * 17_000}
    ask = {"model": "hone-rstitch", "prompt": "123*45=", "max_tokens": 40}
    try:
        with pytest.raises(openai.APIStatusError, match="more than 16000 bytes") as refused:
            client.completions.create(**huge)
        assert refused.value.status_code == 413
        with pytest.raises(openai.BadRequestError, match="exceed the 256 positions"):
            client.completions.create(**(huge | {"prompt": "1" * 15_000}))
        with pytest.raises(openai.BadRequestError, match="exceed the 256 positions"):
            client.chat.completions.create(model="", messages=[{"role": "user", "content": "1" * 15_000}])
        # A tokenizer that takes its time holds nobody up.
        encode, busy, go, waited = type(pair.tokenizer).encode, threading.Event(), threading.Event(), []

        def slow(self, text, **options):
            if text == "9*9=":
                busy.set()
                waited.append(go.wait(10))
            return encode(self, text, **options)

        monkeypatch.setattr(type(pair.tokenizer), "encode", slow)
        other = threading.Thread(target=lambda: client.completions.create(**(ask | {"prompt": "9*9="})))
        other.start()
        assert busy.wait(10)
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        assert client.completions.create(**ask).choices[0].text == "615+4920=#5535."
        go.set()
        other.join()
        assert all(waited)
    finally:
        served.close()


def test_what_fails_is_said_and_harms_nobody_else(pair, monkeypatch):
    served = Served(pair, api_key=KEY)
    client, ask = served.client(), {"model": "hone-rstitch", "prompt": "123*45=", "max_tokens": 40}
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_look", lambda *args: 1 / 0)
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError, match="ZeroDivisionError: division by zero"):
                    client.completions.create(**ask, stream=stream)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "submit", lambda *args, **options: (_ for _ in ()).throw(ConnectionError("no host")))
            with pytest.raises(openai.InternalServerError, match="no host") as failed:
                client.completions.create(**ask)
            assert failed.value.status_code == 502
        assert client.completions.create(**ask).choices[0].text == "615+4920=#5535."
        no_json = httpx.post(f"{served.url}/v1/completions", content=b'{"prompt": "1"}', headers={"Authorization": KEY})
        assert no_json.status_code == 401
        assert no_json.headers["www-authenticate"] == "Bearer"
        no_json = httpx.post(
            f"{served.url}/v1/completions", content=b'{"prompt": "1"}', headers={"Authorization": f"Bearer {KEY}"}
        )
        assert (no_json.status_code, no_json.json()["error"]["message"]) == (
            415, "the body must be JSON and say so: Content-Type: application/json"
        )  # fmt: skip
        half = httpx.post(
            f"{served.url}/v1/completions", content=b'{"prompt": "\\ud800"}',
            headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )  # fmt: skip
        assert half.status_code == 400
        assert "surrogates not allowed" in half.json()["error"]["message"]
        assert httpx.get(f"{served.url}/v1/none").json()["error"]["message"] == "Not Found"
    finally:
        served.close()


def test_two_hundred_at_once_and_a_full_queue(pair):
    served = Served(pair, EngineConfig(max_batch=32, max_queue=400))

    async def ask(count):
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="-", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.completions.create(
                        model="hone-rstitch", prompt=f"{100 + i}*{11 + i % 80}=", max_tokens=6, temperature=0
                    )
                    for i in range(count)
                ),
                return_exceptions=True,
            )

    try:
        replies = asyncio.run(ask(200))
        assert all(reply.choices[0].text for reply in replies)
        again = served.client("-").completions.create(model="hone-rstitch", prompt="107*18=", max_tokens=6)
        assert again.choices[0].text == replies[7].choices[0].text
        assert wait_until_idle(served.engine).running == 0
        metrics = httpx.get(f"{served.url}/metrics").text
        written = re.findall(r'tokens_total\{model="\w+"\} (\d+)', metrics)
        assert sum(map(int, written)) == sum(reply.usage.completion_tokens for reply in [*replies, again])
    finally:
        served.close()
    served = Served(pair, EngineConfig(max_batch=1, max_queue=3))
    try:
        replies = asyncio.run(ask(40))
        refused = [reply for reply in replies if isinstance(reply, openai.RateLimitError)]
        assert refused
        assert len(refused) + sum(not isinstance(reply, Exception) for reply in replies) == 40
        assert refused[0].response.headers["Retry-After"] == "1"
    finally:
        served.close()


def test_the_page_and_what_it_asks_for(served):
    page = httpx.get(served.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "http" not in page.text.replace("http-equiv", "")  # it loads nothing from elsewhere
    body = {"messages": [{"role": "user", "content": "12*34"}], "stream": True, "rstitch": {"trace": True}}
    headers = {"Authorization": f"Bearer {KEY}"}
    lines = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=30).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    first = json.loads(lines[0].removeprefix("data: "))["choices"][0]
    assert {"text", "model", "entropy", "discarded_entropy"} <= first["rstitch"][0].keys()


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode(errors="replace")


def test_text_shows_whole_characters_and_no_part_of_a_stop_string():
    text = _Text(Bytes(), ["END"])
    assert [text.add(byte) for byte in "é".encode()] == ["", "é"]
    assert [text.add(ord(c)) for c in "aENxEN"] == ["a", "", "", "ENx", "", ""]
    assert not text.ended
    assert text.add(ord("D")) == ""
    assert text.ended
    rest = _Text(Bytes(), ["END"])
    assert [rest.add(ord(c)) for c in "EN"] == ["", ""]
    assert rest.add(None) == "EN"


def test_text_as_it_comes_is_the_text_as_a_whole():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(sorted(letters))}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    rng = random.Random(0)
    for words in ("größer als 漢字 🙂 x", "a\ufffdb", "  ends in part 🙂"):
        ids = tokenizer.encode(words)[: -1 if "part" in words else None]
        text = _Text(tokenizer, [])
        parts = [text.add(id) for id in ids]
        assert "".join(parts) + text.add(None) == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(parts).replace("a\ufffdb", "")
    # Bytes that are no text at all.
    ids = [rng.randrange(256) for _ in range(300)]
    text = _Text(tokenizer, [])
    assert "".join(text.add(id) for id in [*ids, None]) == tokenizer.decode(ids)
    # The time of a token does not grow with the text.
    text, seen = _Text(tokenizer, ["zz"]), []
    decode = text._decode
    text._decode = lambda ids: seen.append(len(ids)) or decode(ids)
    for id in tokenizer.encode("word " * 200):
        text.add(id)
    assert max(seen) < 8


def test_a_router_of_its_own(pair):
    from hone_rstitch.router import Router

    router = Router(pair.small.config.hidden_size)
    with torch.no_grad():
        router.out.bias.copy_(torch.tensor([9.0, 0.0]))  # it keeps every small token
    ask = {"model": "hone-rstitch", "messages": [{"role": "user", "content": "123*45"}], "max_tokens": 40}
    extra = {"rstitch": {"policy": "router", "tau": 0.0001}}
    for given in (router, None):
        served = Served(pair, router=given, api_key=KEY)
        try:
            if given is None:
                with pytest.raises(openai.BadRequestError, match="needs a router"):
                    served.client().chat.completions.create(**ask, extra_body=extra)
                continue
            reply = served.client().chat.completions.create(**ask, extra_body=extra)
            assert reply.usage.rstitch["large_tokens"] == 0
        finally:
            served.close()
    with pytest.raises(ValueError, match="make one with train-router"):
        ServeConfig(stitch=StitchConfig(policy="router"))
