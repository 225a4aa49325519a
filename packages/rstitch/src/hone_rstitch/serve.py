"""The pair behind OpenAI's routes, so that any client of theirs can ask it; tokens say which model wrote them.

``/v1/chat/completions`` and ``/v1/completions`` with streaming, ``/v1/models``, ``/health``, ``/metrics`` in the format
of Prometheus, and a page at ``/`` that shows an answer coloured by model as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Annotated, Any, Literal

from hone_core.devices import resolve_device
from hone_core.errors import MissingExtraError
from hone_core.runs import Report, Run

from .config import NAMES, SMALL, SamplingConfig, ServeConfig, StitchConfig
from .engine import Engine, Intake, Job, QueueFullError
from .generation import StitchToken
from .host import load_models
from .models import Pair
from .remote import RemoteEngine, RemotePair
from .router import load_router

try:
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
    from starlette.exceptions import HTTPException as StarletteHTTPException
except ImportError as error:
    raise MissingExtraError("serve", "hone-rstitch", "The server") from error

__all__ = ["ServeReport", "app_of", "serve"]

log = logging.getLogger(__name__)

BEARER = HTTPBearer(auto_error=False)


BYTES_PER_TOKEN = 16
"""Bytes of a request's body for each token that the engine holds; a longer body is not read."""


def _whole(text: str) -> str:
    # JSON can hold half of a surrogate pair, which is no text.
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_whole)]


class Stitch(BaseModel):
    """``rstitch`` in the body of a request: what of the gate it wants otherwise than the server does."""

    model_config = ConfigDict(extra="forbid")
    policy: Literal["stitch", "one-token", "router", "random", "small", "large"] | None = None
    gate: Literal["entropy", "confidence"] | None = None
    tau: float | None = None
    tau_back: float | None = None
    window: int | None = None
    min_large_run: int | None = None
    share: float | None = None
    run_length: float | None = None
    trace: bool = False


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Body(BaseModel):
    """What both routes take. A field of OpenAI's that this server has not is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None
    rstitch: Stitch = Field(default_factory=Stitch)

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop == "" or (isinstance(stop, list) and "" in stop):
            raise ValueError("an empty string would end every text")
        return stop

    def stops(self) -> list[str]:
        """Strings that end the text."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class Completion(Body):
    """Of ``/v1/completions``."""

    prompt: Text
    max_tokens: int = Field(16, ge=1)
    logprobs: Literal[0, 1] | None = None


class Message(BaseModel):
    """Of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: Text


class Chat(Body):
    """Of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False


class _Text:
    """Text of tokens as they come: whole characters only, and nothing that may be the start of a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.ended = False
        # Text that is certain but for stop strings, and the ids that the next one is decoded with: a tokenizer may
        # write the first of some ids otherwise than the same id after others.
        self._held = ""
        self._before, self._read = 0, 0

    def add(self, token: int | None) -> str:
        """Text that is certain after this token; None: after the last one."""
        if token is not None:
            self.ids.append(token)
        known = self._decode(self.ids[self._before : self._read])
        text = self._decode(self.ids[self._before :])
        if token is None or not text.endswith("\ufffd"):
            self._held += text[len(known) :]
            self._before, self._read = self._read, len(self.ids)
        at = min((found for stop in self.stops if (found := self._held.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.ended, end = True, at
        elif token is None:
            end = len(self._held)
        else:
            longest = (
                next((n for n in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:n])), 0)
                for stop in self.stops
            )
            end = len(self._held) - max(longest, default=0)
        new, self._held = self._held[:end], self._held[end:]
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class _FailedError(RuntimeError):
    """The engine could not write a request."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error


@dataclass
class _Answer:
    """One request's way through the engine, as an async iterator of (text, tokens that it comes from)."""

    engine: Intake
    job: Job
    events: asyncio.Queue[StitchToken | None]
    text: _Text
    finish: str = "length"

    @classmethod
    def of(
        cls,
        engine: Intake,
        prompts: tuple[list[int], list[int]],
        body: Body,
        stitch: StitchConfig,
        most: int,
    ) -> _Answer:
        """Submit a request.

        Raises:
            ValueError: It asks for what there is not.
            QueueFullError: Too many wait.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[StitchToken | None] = asyncio.Queue()

        def put(event: StitchToken | None = None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        sampling = SamplingConfig(
            max_new_tokens=most, temperature=body.temperature,
            top_p=body.top_p if body.temperature else 1.0, top_k=body.top_k if body.temperature else 0,
        )  # fmt: skip
        seed = uuid.uuid4().int % 2**62 if body.seed is None else body.seed
        job = engine.submit(prompts, stitch, sampling, seed=seed, on_token=put, on_end=put)
        return cls(engine, job, events, _Text(engine.pair.tokenizer, body.stops()))

    async def pieces(self) -> AsyncIterator[tuple[str, list[StitchToken]]]:
        """Text as it becomes certain. Leaving the loop early cancels the request."""
        held: list[StitchToken] = []
        try:
            while (token := await self.events.get()) is not None:
                held.append(token)
                if new := self.text.add(token.token):
                    yield new, held
                    held = []
                if self.text.ended:
                    self.finish = "stop"
                    return
            if (error := self.job.error) is not None:
                raise error if isinstance(error, ConnectionError) else _FailedError(error)
            if self.job.finish in ("timeout", "cancelled"):
                raise TimeoutError("the request took too long" if self.job.finish == "timeout" else "the server stops")
            self.finish = str(self.job.finish)
            if (new := self.text.add(None)) or held:
                yield new, held
        finally:
            self.job.cancel()

    def usage(self) -> dict[str, Any]:
        """``usage`` of the reply, with what each model did under ``rstitch``."""
        used, large = self.job.usage, len(self.job.prompts[1])
        written = len(self.text.ids)
        return {
            "prompt_tokens": large,
            "completion_tokens": written,
            "total_tokens": large + written,
            "rstitch": {
                "small_tokens": sum(token.model == SMALL for token in self.job.tokens[:written]),
                "large_tokens": sum(token.model != SMALL for token in self.job.tokens[:written]),
                "small_calls": used.calls[0],
                "large_calls": used.calls[1],
                "discarded": used.discarded,
                "switches": used.switches,
                "small_read": used.prompt_tokens[0] + sum(used.gaps[0]),
                "large_read": used.prompt_tokens[1] + sum(used.gaps[1]),
            },
        }


def app_of(
    engine: Engine | RemoteEngine, *, model: str = "hone-rstitch", stitch: StitchConfig | None = None, api_key: str = ""
) -> Any:
    """The application, on an engine that runs.

    Args:
        engine: Started.
        model: Name under ``/v1/models``; a request that names another is refused.
        stitch: What a request gets that says nothing of the gate.
        api_key: What requests must bear; none if empty.
    """
    app = FastAPI(title="hone-rstitch", docs_url=None, redoc_url=None)
    default, pair, began = stitch or StitchConfig(), engine.pair, int(time.time())
    app.add_middleware(_Bounded, most=BYTES_PER_TOKEN * engine.config.max_tokens)
    for tokenizer in (pair.small_tokenizer, pair.tokenizer):
        tokenizer.encode("1")  # its first call may change it, which threads that share it must not meet

    def allowed(given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        if api_key and not (given and hmac.compare_digest(given.credentials.encode(), api_key.encode())):
            raise HTTPException(
                401, "a valid API key is needed: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
            )

    def refuse(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)

    @app.exception_handler(StarletteHTTPException)
    async def _http(request: Request, error: StarletteHTTPException) -> JSONResponse:
        reply = refuse(error.status_code, str(error.detail))
        reply.headers.update(error.headers or {})
        return reply

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if not request.headers.get("content-type", "").startswith("application/json"):
            return refuse(415, "the body must be JSON and say so: Content-Type: application/json")
        return refuse(400, said(error.errors()))

    @app.exception_handler(QueueFullError)
    async def _full(request: Request, error: QueueFullError) -> JSONResponse:
        reply = refuse(429, str(error), "overloaded")
        reply.headers["Retry-After"] = "1"
        return reply

    @app.exception_handler(ValueError)
    async def _value(request: Request, error: ValueError) -> JSONResponse:
        return refuse(400, str(error))

    @app.exception_handler(TimeoutError)
    async def _late(request: Request, error: TimeoutError) -> JSONResponse:
        return refuse(503, str(error), "timeout")

    @app.exception_handler(ConnectionError)
    async def _upstream(request: Request, error: ConnectionError) -> JSONResponse:
        return refuse(502, str(error), "upstream_error")

    @app.exception_handler(_FailedError)
    async def _failed(request: Request, error: _FailedError) -> JSONResponse:
        log.error("a request failed", exc_info=error.error)
        return refuse(500, str(error), "server_error")

    @app.exception_handler(Exception)
    async def _unknown(request: Request, error: Exception) -> JSONResponse:
        return refuse(500, f"{type(error).__name__}: {error}", "server_error")

    def gate(body: Body) -> StitchConfig:
        if body.model not in ("", model):
            raise HTTPException(404, f"there is no model {body.model!r}; this server has {model!r}")
        changes = body.rstitch.model_dump(exclude={"trace"}, exclude_none=True)
        if changes.get("gate", default.gate) != default.gate and "tau" not in changes:
            raise ValueError(f"rstitch: the gate {changes['gate']!r} has thresholds of its own; give tau too")
        if changes.get("policy", default.policy) != "random" and default.policy == "random":
            changes = {"share": None, "run_length": None, "discards": False} | changes
        return replace(default, **changes)

    async def answer(request: Request, body: Body, prompts: tuple[list[int], list[int]], most: int, shape: Any) -> Any:
        found = _Answer.of(engine, prompts, body, gate(body), most)
        pieces = found.pieces()
        watch = asyncio.create_task(gone(request, found.job))
        text, tokens = "", []
        try:
            if body.stream:
                # The first piece is waited for, so that what fails before it has a status of its own.
                first: tuple[str, list[StitchToken]] = await anext(pieces, ("", []))
            else:
                async for new, made in pieces:
                    text += new
                    tokens += made
        finally:
            watch.cancel()
        if body.stream:
            return StreamingResponse(stream(found, body, first, pieces, shape), media_type="text/event-stream")
        return shape.whole(text, tokens, found)

    async def gone(request: Request, job: Job) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.1)
        job.cancel()

    async def stream(
        found: _Answer, body: Body, first: tuple[str, list[StitchToken]], pieces: Any, shape: Any
    ) -> AsyncIterator[str]:
        def line(value: Any) -> str:
            return f"data: {json.dumps(value)}\n\n"

        try:
            yield line(shape.part(*first, None, opening=True))
            async for new, made in pieces:
                yield line(shape.part(new, made, None))
        except Exception as error:
            log.error("a stream broke off", exc_info=error)
            yield line({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
            return
        finally:
            await pieces.aclose()
        yield line(shape.part("", [], found.finish))
        if body.stream_options and body.stream_options.include_usage:
            yield line(shape.part("", [], None) | {"choices": [], "usage": found.usage()})
        yield "data: [DONE]\n\n"

    @app.post("/v1/completions", dependencies=[Depends(allowed)])
    async def completions(request: Request, body: Completion) -> Any:
        # A long prompt takes its time, in which others are answered.
        prompts = await asyncio.to_thread(pair.text_prompts, body.prompt)
        return await answer(request, body, prompts, body.max_tokens, _Shape(pair, body, model, chat=False))

    @app.post("/v1/chat/completions", dependencies=[Depends(allowed)])
    async def chat(request: Request, body: Chat) -> Any:
        most = body.max_completion_tokens or body.max_tokens or 1024
        limits = [
            getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in (pair.small, pair.large)
        ]
        prompts = await asyncio.to_thread(pair.chat_prompts, [message.model_dump() for message in body.messages])
        if body.max_completion_tokens is None and body.max_tokens is None:
            rooms = [limit - len(ids) for limit, ids in zip(limits, prompts, strict=True) if limit is not None]
            room = engine.config.max_tokens - max(map(len, prompts))
            most = max(1, min(most, room, *rooms))
        return await answer(request, body, prompts, most, _Shape(pair, body, model, chat=True))

    @app.get("/v1/models", dependencies=[Depends(allowed)])
    def models() -> Any:
        entry = {"id": model, "object": "model", "created": began, "owned_by": "hone"}
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    def health() -> Any:
        if not engine.running:
            return JSONResponse({"status": "stopped"}, 503)
        return {"status": "ok"}

    @app.get("/metrics", dependencies=[Depends(allowed)])
    def metrics() -> Any:
        return PlainTextResponse(prometheus(engine), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse)
    def page() -> Any:
        return (files("hone_rstitch") / "page.html").read_text(encoding="utf-8")

    return app


class _Bounded:
    """Reads no body that is longer than ``most`` bytes."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(
                    413,
                    f"the request has more than {self.most} bytes, {BYTES_PER_TOKEN} for each token "
                    "that this server holds (--max-tokens)",
                    headers={"Connection": "close"},
                )
            return message

        await self.app(scope, counted, send)


class _Shape:
    """Replies of one route in OpenAI's shape."""

    def __init__(self, pair: Pair, body: Any, model: str, *, chat: bool) -> None:
        self.tokenizer, self.body, self.chat = pair.tokenizer, body, chat
        kind = "chat.completion" if chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        self.head |= {"model": model, "object": kind}

    def _tokens(self, tokens: Sequence[StitchToken]) -> Any:
        if self.body.logprobs in (None, False):
            return None
        texts = [self.tokenizer.decode([token.token]) for token in tokens]
        if not self.chat:
            return {
                "tokens": texts,
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": None,
                "text_offset": None,
                "models": [NAMES[token.model] for token in tokens],
            }
        return {
            "content": [
                {"token": text, "logprob": token.logprob, "bytes": list(text.encode()), "top_logprobs": []}
                | {"model": NAMES[token.model]}
                for text, token in zip(texts, tokens, strict=True)
            ]
        }

    def _trace(self, tokens: Sequence[StitchToken]) -> dict[str, Any]:
        if not self.body.rstitch.trace:
            return {}
        names = ("token", "entropy", "confidence", "discarded_entropy")
        return {
            "rstitch": [
                {name: getattr(token, name) for name in names}
                | {"model": NAMES[token.model], "text": self.tokenizer.decode([token.token], skip_special_tokens=True)}
                for token in tokens
            ]
        }

    def whole(self, text: str, tokens: Sequence[StitchToken], found: _Answer) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": self._tokens(tokens), "finish_reason": found.finish}
        return self.head | {"choices": [choice | self._trace(tokens)], "usage": found.usage()}

    def part(
        self, text: str, tokens: Sequence[StitchToken], finish: str | None, *, opening: bool = False
    ) -> dict[str, Any]:
        """One event of a stream."""
        delta = {"role": "assistant"} if opening else {}
        delta |= {"content": text} if text or opening else {}
        said = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": self._tokens(tokens) if tokens else None, "finish_reason": finish}
        head = self.head | {"object": "chat.completion.chunk"} if self.chat else self.head
        return head | {"choices": [choice | self._trace(tokens)]}


def said(errors: Sequence[Any]) -> str:
    """What a body got wrong, in a line."""
    parts = []
    for error in errors:
        place = ".".join(str(part) for part in error["loc"] if part != "body")
        parts.append(f"{place or 'body'}: {error['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)


def prometheus(engine: Intake) -> str:
    """Counts of an engine as text."""
    stats = engine.snapshot()
    lines = [
        ("requests_total", "counter", [(f'{{finish="{name}"}}', n) for name, n in sorted(stats.requests.items())]),
        ("tokens_total", "counter", [(f'{{model="{NAMES[m]}"}}', n) for m, n in enumerate(stats.tokens)]),
        ("calls_total", "counter", [(f'{{model="{NAMES[m]}"}}', n) for m, n in enumerate(stats.calls)]),
        ("discarded_tokens_total", "counter", [("", stats.discarded)]),
        ("requests_running", "gauge", [("", stats.running)]),
        ("requests_waiting", "gauge", [("", stats.waiting)]),
    ]
    text = ""
    for name, kind, values in lines:
        text += f"# TYPE hone_rstitch_{name} {kind}\n"
        text += "".join(f"hone_rstitch_{name}{labels} {value}\n" for labels, value in values)
    return text


@dataclass(frozen=True, kw_only=True)
class ServeReport(Report):
    """What was served until the server was stopped."""

    def __str__(self) -> str:
        lines = [f"{row.metric:<10} {row.variant:<10} {row.value:10.0f}" for row in self.rows]
        return "\n".join([*lines, f"results    {self.path / 'results.json'}"])


def serve(cfg: ServeConfig, run: Run) -> ServeReport:
    """Answer requests until the process is interrupted.

    Raises:
        OSError: The address cannot be bound.
    """
    key = os.environ.get("HONE_RSTITCH_API_KEY", "")
    family = socket.AF_INET6 if ":" in cfg.address else socket.AF_INET
    # Bound before the weights are read: a port that is taken is said at once.
    with socket.create_server((cfg.address, cfg.port), family=family, backlog=2048) as bound:
        pair = load_models(cfg.models, device=resolve_device(run.device))
        name = cfg.models.large or "hone-rstitch"
        router = None if cfg.router is None else load_router(cfg.router)
        engine: Intake
        if isinstance(pair, RemotePair):
            engine = RemoteEngine(pair, cfg.engine)
        else:
            engine = Engine(pair, cfg.engine, router=router).prepare()
        with engine:
            app = app_of(engine, model=name, stitch=cfg.stitch, api_key=key)
            where = f"http://{cfg.address}:{bound.getsockname()[1]}"
            if not key and cfg.address not in ("127.0.0.1", "::1", "localhost"):
                log.warning("%s is open to whoever reaches it: set HONE_RSTITCH_API_KEY", where)
            log.info("%s answers at %s, OpenAI's routes at %s/v1", name, where, where)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down, and hands the signal on
                server.run(sockets=[bound])
        stats = engine.snapshot()
    for finish, count in sorted(stats.requests.items()):
        run.row("requests", count, better="none", variant=finish)
    for model, word in enumerate(NAMES):
        run.row("tokens", stats.tokens[model], better="none", variant=word)
    run.row("discarded", stats.discarded, better="lower")
    return ServeReport.of(run)
