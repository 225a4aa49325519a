"""R-Stitch over two servers that speak OpenAI's completions as vLLM does: each model on as many GPUs as it takes.

The gate runs here, over the log-probabilities that a server streams. When it hands over, the stream is closed, which
ends the request at the server, and the other server is asked to go on; with prefix caching (vLLM's default) it reads
the gap and nothing else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from .config import LARGE, NAMES, SMALL, EngineConfig, ModelsConfig, SamplingConfig, StitchConfig
from .engine import Finish, Intake, Job
from .generation import StitchOutput, StitchToken, StopStrings, Usage
from .method import Gate
from .models import Pair, pad_left
from .router import Routing

__all__ = ["RemoteEngine", "RemotePair", "Server", "entropy_bounds", "remote_pair"]

log = logging.getLogger(__name__)

KEY = "HONE_RSTITCH_SERVER_KEY"
LEAST = -9000.0
"""A server's log-probability of what cannot come is below this (vLLM: -9999)."""
CLOSING = 2.0
"""Seconds that an engine which closes waits for its threads."""
MOST_CLOSED = 1024
"""Ids that a request names at most as ones that must not come."""


def entropy_bounds(logprobs: Sequence[float], size: int) -> tuple[float, float]:
    """Least and largest entropy of a distribution of which the likeliest tokens are known, in nats.

    Args:
        logprobs: Of the likeliest tokens; no other is likelier than the last of them.
        size: Tokens in all.
    """
    chances = [math.exp(value) for value in logprobs]
    known = -math.fsum(chance * math.log(chance) for chance in chances if chance > 0)
    rest, others = 1.0 - math.fsum(chances), size - len(chances)
    # Sums of rounded numbers miss 1 by as much.
    if rest < 1e-6 or others < 1:
        return known, known
    # At least: as few tokens as may hold the rest. At most: all others alike.
    return known - rest * math.log(min(rest, min(chances))), known - rest * math.log(rest / others)


@dataclass(frozen=True)
class Server:
    """A server of one model.

    Attributes:
        url: Up to and without ``/v1``.
        timeout: Seconds without a token after which it is given up.
    """

    url: str
    timeout: float = 600.0

    def model(self) -> str:
        """Name of what it serves.

        Raises:
            ConnectionError: It does not answer.
        """
        with self._open("models", None) as reply:
            return str(json.load(reply)["data"][0]["id"])

    def tokens(self, body: Mapping[str, Any]) -> Generator[tuple[int, float, dict[int, float]]]:
        """Ids as they come, with their log-probability and those of the likeliest ids. Leaving ends the request.

        Args:
            body: Of the request, ``logprobs`` in it.

        Raises:
            ConnectionError: The server refuses the request, or breaks off.
        """
        with self._open("completions", {**body, "stream": True, "return_tokens_as_token_ids": True}) as reply:
            for line in self._lines(reply):
                data = line.decode().strip().removeprefix("data:").strip()
                if not data or data.startswith(":"):
                    continue
                if data == "[DONE]":
                    return
                part = json.loads(data)
                if "error" in part:
                    raise ConnectionError(f"{self.url}: {part['error'].get('message', part['error'])}")
                for choice in part["choices"]:
                    said = choice.get("logprobs") or {"tokens": [], "token_logprobs": [], "top_logprobs": []}
                    for name, value, top in zip(
                        said["tokens"], said["token_logprobs"], said["top_logprobs"], strict=True
                    ):
                        yield self._id(name), value, {self._id(key): chance for key, chance in top.items()}

    def _lines(self, reply: Any) -> Iterator[bytes]:
        try:
            yield from reply
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"{self.url} broke off: {error or type(error).__name__}") from error

    def _id(self, name: str) -> int:
        prefix, _, number = name.rpartition(":")
        if prefix != "token_id":
            raise ConnectionError(
                f"{self.url} names the token {name!r} and not its id; return_tokens_as_token_ids is vLLM's"
            )
        return int(number)

    def _open(self, route: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}/v1/{route}", data, headers)
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(2000).decode()
            raise ConnectionError(f"{self.url} refuses with status {error.code}: {said}") from error
        except OSError as error:
            raise ConnectionError(f"{self.url} does not answer: {error}") from error


@dataclass(eq=False, kw_only=True)
class RemotePair(Pair):
    """Two models on servers of their own, in place of a ``Pair`` wherever answers are wanted.

    Attributes:
        servers: Of the small and the large model.
        top: Log-probabilities that each token comes with. With all of a vocabulary the entropy is exact; with fewer it
            is the least that they leave possible.
    """

    servers: tuple[Server, Server]
    top: int = 20

    @cached_property
    def from_small(self) -> dict[int, int]:
        """What the small model's ids are to the large one."""
        return {small: large for large, small in enumerate(self.vocabulary.to_small.tolist()) if small >= 0}

    @cached_property
    def closed(self) -> tuple[set[int], set[int]]:
        """Ids of the small and the large model that must not come, since the other model could not read them.

        An end of the large model's text nobody has to read.
        """
        rows, eos = self.small.config.get_text_config().vocab_size, self.vocabulary.eos
        only_large = {id for id, small in enumerate(self.vocabulary.to_small.tolist()) if small < 0 and id not in eos}
        return {id for id in range(rows) if id not in self.from_small}, only_large

    def served(self) -> list[str]:
        """Names of what the servers serve.

        Raises:
            ConnectionError: One does not answer.
        """
        return [server.model() for server in self.servers]

    def answer(
        self,
        questions: Sequence[str],
        stitch: StitchConfig,
        sampling: SamplingConfig,
        *,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        on_token: Callable[[StitchToken], None] | None = None,
        routing: Routing | None = None,
    ) -> tuple[list[str], StitchOutput]:
        """See ``Pair.answer``; rows are asked at the same time, and the servers batch them.

        Raises:
            ValueError: The policy or the gate needs more than log-probabilities.
            ConnectionError: A server refuses, or breaks off.
        """
        if routing is not None:
            raise ValueError("the router reads hidden states, which servers do not give")
        check_gate(stitch)
        seeds = [seed + at for at in range(len(questions))] if isinstance(seed, int) else list(seed)
        names = self.served()
        lock = threading.Lock()

        def told(token: StitchToken) -> None:
            if on_token is not None:
                with lock:
                    on_token(token)

        small, large = self.prompts(questions)
        rows = [
            _Row(self, at, (small[at], large[at]), stitch, sampling, seeds[at], names, stop, told)
            for at in range(len(questions))
        ]
        with ThreadPoolExecutor(max_workers=len(rows)) as pool:
            for task in [pool.submit(row.write) for row in rows]:
                task.result()
        open_, asked = sum(row.open for row in rows), sum(row.asked for row in rows)
        if open_:
            log.info(
                "of %d tokens, the top %d log-probabilities left the gate's answer open at %d", asked, self.top, open_
            )
        texts = [self.tokenizer.decode([t.token for t in row.tokens], skip_special_tokens=True) for row in rows]
        return texts, StitchOutput.of(pad_left(large)[0], [row.tokens for row in rows], [row.usage for row in rows])


def check_gate(stitch: StitchConfig) -> None:
    """Whether log-probabilities are enough for a policy.

    Raises:
        ValueError: They are not.
    """
    if stitch.policy == "router":
        raise ValueError("the router reads hidden states, which servers do not give")
    if stitch.entropy_on != "raw":
        raise ValueError("servers give log-probabilities before temperature and top-p; leave entropy_on at raw")


def remote_pair(cfg: ModelsConfig, pair: Pair) -> RemotePair:
    """The pair on the servers that a config names.

    Args:
        cfg: With ``servers``.
        pair: Tokenizers and shapes of the models.
    """
    small, large = (Server(url) for url in cfg.servers)
    return RemotePair(
        small=pair.small, large=pair.large, small_tokenizer=pair.small_tokenizer, tokenizer=pair.tokenizer,
        vocabulary=pair.vocabulary, small_prompt=pair.small_prompt, large_prompt=pair.large_prompt, chat=pair.chat,
        servers=(small, large), top=cfg.top,
    )  # fmt: skip


class _Row:
    """One text on its way."""

    def __init__(
        self,
        pair: RemotePair,
        row: int,
        prompts: tuple[list[int], list[int]],
        stitch: StitchConfig,
        sampling: SamplingConfig,
        seed: int,
        names: Sequence[str],
        stop: Sequence[str],
        told: Callable[[StitchToken], None],
    ) -> None:
        self.pair, self.row, self.prompts, self.stitch, self.sampling = pair, row, prompts, stitch, sampling
        self.seed, self.names, self.told = seed, names, told
        self.gate = Gate(stitch, seed)
        self.tokens: list[StitchToken] = []
        self.usage = Usage()
        self.began = time.perf_counter()
        self.asked = self.open = 0
        self.read = [0, 0]
        self.thrown: float | None = None
        self.stops = StopStrings(pair.tokenizer, stop, 0) if stop else None

    def write(self) -> None:
        """Ask one server after the other until the text ends."""
        while not (self.tokens and self.tokens[-1].last):
            self._turn(self.gate.active)

    def _turn(self, active: int) -> None:
        ids = [token.token for token in self.tokens]
        ids = self.prompts[active] + (ids if active == LARGE else self.pair.vocabulary.small_ids(ids))
        server, calls = self.pair.servers[active], self.usage.calls[active]
        started = time.perf_counter()
        with contextlib.closing(server.tokens(self._body(active, ids))) as stream:
            for token, logprob, top in stream:
                self._count(active)
                if self._step(active, token, logprob, top):
                    break
        self.usage.seconds[active] += time.perf_counter() - started
        if self.usage.calls[active] == calls:
            raise ConnectionError(f"{server.url} wrote nothing after {len(ids)} tokens")

    def _count(self, active: int) -> None:
        """Book a step; a server keeps what it has read."""
        usage, known = self.usage, len(self.prompts[active]) + len(self.tokens)
        usage.prompt_tokens[active] = len(self.prompts[active])
        if usage.calls[active]:
            usage.gaps[active].append(known - self.read[active])
        usage.calls[active] += 1
        self.read[active] = known

    def _body(self, active: int, ids: list[int]) -> dict[str, Any]:
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.names[active],
            "prompt": ids,
            "max_tokens": sampling.max_new_tokens - len(self.tokens),
            "logprobs": self.pair.top,
            # All of them: what is left out vLLM takes from the model's generation_config.json.
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        if sampling.temperature > 0:
            body["seed"] = (self.seed * 1_000_003 + len(self.tokens)) % 2**31
        if 0 < len(self.pair.closed[active]) <= MOST_CLOSED:
            body["logit_bias"] = {str(id): -100 for id in sorted(self.pair.closed[active])}
        return body

    def _step(self, active: int, token: int, logprob: float, top: Mapping[int, float]) -> bool:
        """Put a token through the gate; whether another stream is wanted, or none."""
        if token in self.pair.closed[active]:
            raise ConnectionError(
                f"the {NAMES[active]} model's server wrote id {token}, which the other model has not; does it heed "
                "logit_bias?"
            )
        size = self.pair.vocabulary.size
        # A drawn token that is none of the likeliest comes as one more.
        top = dict(sorted(top.items(), key=lambda item: -item[1])[: self.pair.top])
        closed = math.fsum(math.exp(value) for id, value in top.items() if id in self.pair.closed[active])
        shift = math.log1p(-closed)
        likely = [value - shift for id, value in top.items() if id not in self.pair.closed[active] and value > LEAST]
        low, high = (min(1.0, max(0.0, bound / math.log(size))) for bound in entropy_bounds(likely, size))
        confidence = math.exp(max(likely))
        signal = low if self.stitch.gate == "entropy" else confidence
        if self.stitch.gate == "entropy" and self.stitch.policy in ("stitch", "one-token"):
            self.asked += 1
            asks = self.stitch.uncertain if active == SMALL else self.stitch.certain
            self.open += asks(low) != asks(high)
        decision = self.gate.step(signal)
        if not decision.emit:
            self.usage.discarded += 1
            self.usage.switches += 1
            self.thrown = low
            return True
        id = token if active == LARGE else self.pair.from_small[token]
        self.usage.tokens[active] += 1
        ids = [*(t.token for t in self.tokens), id]
        last = id in self.pair.vocabulary.eos or len(ids) >= self.sampling.max_new_tokens
        if self.stops is not None and not last:
            last = bool(self.stops(torch.tensor([ids]), None))
        found = StitchToken(
            self.row, len(self.tokens), id, active, low, confidence, logprob - shift, self.thrown,
            time.perf_counter() - self.began, last,
        )  # fmt: skip
        self.thrown = None
        self.tokens.append(found)
        self.told(found)
        self.usage.switches += int(active == SMALL and decision.model == LARGE)
        return last or decision.model != active


class _Left(Exception):
    """A request that nobody waits for any more, and why."""


class RemoteEngine(Intake):
    """Requests on a pair of servers, for ``serve``: what ``engine.Engine`` is for models of its own.

    Args:
        pair: On servers that batch; each request is a thread here.
        config: ``max_batch`` requests are written at once, ``max_queue`` wait; sizes of caches are the servers' affair.
    """

    pair: RemotePair

    def __init__(self, pair: RemotePair, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        # A server that says nothing may not hold a request beyond its time.
        small, large = (replace(one, timeout=min(one.timeout, config.timeout)) for one in pair.servers)
        super().__init__(replace(pair, servers=(small, large)), config)
        self.names = pair.served()
        self._threads: list[threading.Thread] = []

    def _check(self, stitch: StitchConfig) -> None:
        check_gate(stitch)

    def __enter__(self) -> RemoteEngine:
        for at in range(self.config.max_batch):
            thread = threading.Thread(target=self._work, args=[at], name=f"hone-rstitch request {at}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._closing = True
            left = [*self.jobs.values(), *self._queue]
            self._queue.clear()
            self._changed.notify_all()
        for job in left:
            job.cancel()
            self._end(job, "cancelled")
        # A thread that waits for a server hears of it with the next token; it need not be waited for.
        until = time.monotonic() + CLOSING
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    @property
    def running(self) -> bool:
        """Whether requests are taken."""
        return bool(self._threads) and not self._closing

    def _work(self, at: int) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._closing):
                    self._changed.wait()
                if self._closing:
                    return
                job = self.jobs[at] = self._queue.popleft()
            finish, error = self._write(job)
            with self._changed:
                del self.jobs[at]
                self.stats.calls = [a + b for a, b in zip(self.stats.calls, job.usage.calls, strict=True)]
            self._end(job, finish, error)

    def _write(self, job: Job) -> tuple[Finish, Exception | None]:
        def check() -> None:
            self._end_late()
            if why := job.overdue():
                raise _Left(why)

        def told(token: StitchToken) -> None:
            check()
            job.tokens.append(token)
            if job.on_token is not None:
                job.on_token(token)

        row = _Row(self.pair, 0, job.prompts, job.stitch, job.sampling, job.seed, self.names, (), told)
        row.usage = job.usage
        try:
            check()
            row.write()
        except _Left as left:
            return left.args[0], None
        except Exception as error:
            why = job.overdue()
            return (why, None) if why else ("error", error)
        return "stop" if job.tokens[-1].token in self.pair.vocabulary.eos else "length", None
