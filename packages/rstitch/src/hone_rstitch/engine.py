"""Many requests at once on one pair: rows join and leave a running batch, each at its own model.

A request waits in a bounded queue until the batch and the token budget have room, becomes a row, and is written token
by token: each round, the rows at the small model share a call, then those at the large one. A row keeps its keys and
values at the model that it is not at, so that a hand-over reads the gap and nothing else. Models of the kinds that
``decoder`` knows run on pages, on a GPU as CUDA graphs; others on transformers' own forward and caches.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from .config import LARGE, SMALL, EngineConfig, SamplingConfig, StitchConfig
from .decoder import unsupported
from .generation import StitchToken, Usage, _allows_holes, _Loop, _Row, _Seen, _Side
from .method import Gate, choose, uniform
from .models import Pair
from .paged import Draw, PagedModel, Pages, Reading
from .router import Router, Routing

__all__ = ["Engine", "Finish", "Intake", "Job", "QueueFullError", "Stats", "check_room"]

Finish = Literal["stop", "length", "cancelled", "timeout", "error"]


class QueueFullError(RuntimeError):
    """As many requests wait as may."""


@dataclass(eq=False)
class Job:
    """One request, from ``Engine.submit`` on.

    Attributes:
        prompts: Ids that the small and the large model are asked.
        stitch: Policy and gate.
        sampling: How tokens are drawn.
        seed: Of the draws.
        usage: What it cost so far.
        finish: Why it ended; None while it has not. ``stop`` is an end-of-text token.
        error: What went wrong, with ``finish`` "error".
        done: Set when it ended.
    """

    prompts: tuple[list[int], list[int]]
    stitch: StitchConfig
    sampling: SamplingConfig
    seed: int
    on_token: Callable[[StitchToken], None] | None
    on_end: Callable[[], None] | None
    deadline: float
    usage: Usage = field(default_factory=Usage)
    tokens: list[StitchToken] = field(default_factory=list)
    finish: Finish | None = None
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)
    _cancelled: bool = False

    @property
    def size(self) -> int:
        """Slots that it may come to need in each model's cache."""
        return max(map(len, self.prompts)) + self.sampling.max_new_tokens

    def cancel(self) -> None:
        """End it at the next step; harmless when it ended."""
        self._cancelled = True

    def overdue(self) -> Literal["cancelled", "timeout"] | None:
        """Why it should end now, if it should."""
        if self._cancelled:
            return "cancelled"
        return "timeout" if time.monotonic() > self.deadline else None

    def wait(self, timeout: float | None = None) -> Job:
        """Block until it ended.

        Raises:
            TimeoutError: It has not within ``timeout`` seconds.
            Exception: What went wrong in the engine.
        """
        if not self.done.wait(timeout):
            raise TimeoutError(f"the request has not ended within {timeout} s")
        if self.error is not None:
            raise self.error
        return self


@dataclass
class Stats:
    """Counts since the engine was made.

    Attributes:
        requests: Ended, by why.
        tokens: Emitted, by the small and the large model.
        discarded: Small tokens thrown away.
        calls: Of each model.
        waiting: Requests in the queue.
        running: Rows in the batch.
    """

    requests: dict[str, int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    discarded: int = 0
    calls: list[int] = field(default_factory=lambda: [0, 0])
    waiting: int = 0
    running: int = 0

    def book(self, job: Job) -> None:
        """Count a request that ended."""
        assert job.finish is not None, "it ended"
        self.requests[job.finish] = self.requests.get(job.finish, 0) + 1
        self.discarded += job.usage.discarded
        for model in (SMALL, LARGE):
            self.tokens[model] += job.usage.tokens[model]


def check_room(pair: Pair, job: Job, config: EngineConfig) -> None:
    """Whether both models, and the budget, have room for a request.

    Raises:
        ValueError: A prompt is empty, or longer with its answer than a model or the budget holds.
    """
    if not all(job.prompts):
        raise ValueError("each model needs a prompt of a token at least")
    most = job.sampling.max_new_tokens
    for name, model, prompt in zip(("small", "large"), (pair.small, pair.large), job.prompts, strict=True):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(prompt) + most > limit:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {most} new ones exceed the {limit} positions of the {name} model"
            )
    if job.size > config.max_tokens:
        raise ValueError(f"the request may come to {job.size} tokens, and the engine holds {config.max_tokens} in all")


class Intake:
    """The way into an engine: a bounded queue of requests, from any thread, each of which ends once.

    Args:
        pair: Whom they ask.
        config: Sizes of queue and batch.

    Attributes:
        jobs: Requests that are being written.
        stats: Counts, of which ``snapshot`` gives a copy.
    """

    def __init__(self, pair: Pair, config: EngineConfig | None) -> None:
        self.pair, self.config = pair, config or EngineConfig()
        self.jobs: dict[int, Job] = {}
        self.stats = Stats()
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False

    def submit(
        self,
        prompts: tuple[Sequence[int], Sequence[int]],
        stitch: StitchConfig,
        sampling: SamplingConfig,
        *,
        seed: int = 0,
        on_token: Callable[[StitchToken], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> Job:
        """Queue a request; callable from any thread.

        Args:
            prompts: Ids of the small and of the large model's prompt.
            stitch: Policy and gate.
            sampling: How tokens are drawn.
            seed: Of the draws: what is drawn depends on it and on positions, not on who else is in the batch.
            on_token: Called in a thread of the engine with each token that the gate let through. What it raises ends
                its own request.
            on_end: Called there once it ended.

        Raises:
            ValueError: A prompt is empty, or longer with its answer than a model or the budget holds; or this engine
                cannot do what ``stitch`` asks.
            QueueFullError: Too many wait already.
            RuntimeError: The engine is closed.
        """
        job = Job(
            (list(prompts[0]), list(prompts[1])), stitch, sampling, seed, on_token, on_end,
            time.monotonic() + self.config.timeout,
        )  # fmt: skip
        self._check(stitch)
        check_room(self.pair, job, self.config)
        with self._changed:
            if self._closing:
                raise RuntimeError("the engine is closed")
            if len(self._queue) >= self.config.max_queue:
                self._end_late()  # who has left waits no more
            if len(self._queue) >= self.config.max_queue:
                raise QueueFullError(f"{len(self._queue)} requests wait already; try again later")
            self._queue.append(job)
            self._changed.notify()
        return job

    def snapshot(self) -> Stats:
        """Counts as they are now."""
        with self._changed:
            self.stats.waiting, self.stats.running = len(self._queue), len(self.jobs)
            return copy.deepcopy(self.stats)

    def _check(self, stitch: StitchConfig) -> None:
        """Raise ``ValueError`` where the engine cannot do what is asked."""
        raise NotImplementedError

    def _end_late(self) -> None:
        """End what was cancelled, or is late, while it waits."""
        with self._changed:
            late = [(job, why) for job in self._queue if (why := job.overdue())]
            for job, _ in late:
                self._queue.remove(job)
        for job, why in late:
            self._end(job, why)

    def _end(self, job: Job, finish: Finish, error: Exception | None = None) -> None:
        with self._changed:
            if job.finish is not None:
                return
            job.finish, job.error = finish, error
            self.stats.book(job)
        job.done.set()
        if job.on_end is not None:
            with contextlib.suppress(Exception):  # of a caller who has gone
                job.on_end()


class Engine(Intake, _Loop):
    """Runs the requests of a pair. ``start`` and ``close``, or ``with``, run it in a thread; ``step`` runs one round.

    Args:
        pair: The models, whose caches must hold plain keys and values in every layer.
        config: Sizes of queue and batch.
        router: Of R-Stitch+, for requests with policy ``router``.

    Attributes:
        paged: Whether the models run on pages; else on transformers' caches.

    Raises:
        ValueError: Pages are asked for, and a model is of no kind that runs on them; or a model's cache has windows or
            states, of which rows of different lengths cannot share one.
    """

    def __init__(self, pair: Pair, config: EngineConfig | None = None, *, router: Router | None = None) -> None:
        Intake.__init__(self, pair, config)
        _Loop.__init__(
            self,
            models=(pair.small, pair.large),
            stitch=StitchConfig(),
            vocabulary=pair.vocabulary,
            prompts=([], []),
            shown=torch.empty(0, 0, dtype=torch.long, device=pair.device),
            processors=LogitsProcessorList(),
            criteria=StoppingCriteriaList(),
            sample=False,
            seeds=[],
            on_token=None,
            routing=None if router is None else Routing(router.to(pair.small.device)),
        )
        self.ends = set(pair.vocabulary.eos)
        self._next = 0
        self._thread: threading.Thread | None = None
        reasons = [reason for model in self.models if (reason := unsupported(model)) is not None]
        if self.config.cache == "paged" and reasons:
            raise ValueError(f"paged caches are for dense decoders, and {reasons[0]}; leave cache at auto")
        self.paged = self.config.cache != "dynamic" and not reasons
        self._sides: list[Any] = []
        self._sides += self._on_pages() if self.paged else self._fresh()
        for side in self._sides:
            if not self.paged and not _allows_holes(side.cache):
                raise ValueError(
                    f"the cache of {type(side.model).__name__} has sliding windows or states, and rows of different "
                    "lengths cannot share it; stitch_generate writes its rows one after the other"
                )

    def _on_pages(self) -> list[_PagedSide]:
        config, page = self.config, self.config.page
        limits = [getattr(model.config, "max_position_embeddings", config.max_tokens) for model in self.models]
        # A request's last page may have room left.
        pages = -(-config.max_tokens // page) + config.max_batch
        free = Pages(config.max_batch, pages, page)
        return [
            _PagedSide(
                PagedModel(
                    model, which, self.vocabulary, rows=config.max_batch, pages=pages, page=page,
                    positions=min(config.max_tokens, max(limits)), graphs=config.graphs and model.device.type == "cuda",
                ),
                model,
                free,
            )
            for which, model in enumerate(self.models)
        ]  # fmt: skip

    def prepare(self) -> Engine:
        """Capture the graphs of common calls, which else happens as they come; nothing to do on a CPU."""
        for side in self._sides:
            if self.paged and side.paged.graphs:
                side.paged.prepare()
        return self

    def _fresh(self) -> list[_Side]:
        sides = [_Side(model, DynamicCache(config=model.config.get_text_config()), self.rows) for model in self.models]
        sides[SMALL].wants_hidden = self.routing is not None
        return sides

    def _check(self, stitch: StitchConfig) -> None:
        if stitch.policy == "router" and self.routing is None:
            raise ValueError("policy 'router' needs a router, which this engine has not")

    # What callers do

    def start(self) -> Engine:
        """Run in a thread of its own until ``close``."""
        self._thread = threading.Thread(target=self._serve, name="hone-rstitch engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """End the thread; what has not ended is cancelled."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        for job in [*self.jobs.values(), *self._queue]:
            self._end(job, "cancelled")
        self._queue.clear()
        self.jobs.clear()
        self._reset()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether the thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    # What the thread does

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._queue or self.rows):
                    self._changed.wait()
                if self._closing:
                    return
            self.step()

    @torch.no_grad()
    def step(self) -> bool:
        """One round: admit, then a token for the rows at each model. False if there was nothing to do."""
        try:
            return self._round()
        except Exception as error:
            for job in self.jobs.values():
                self._end(job, "error", error)
            self.jobs.clear()
            self._reset()
            return True

    def _round(self) -> bool:
        self._sweep()
        self._admit()
        if not self.rows:
            return False
        for model in (SMALL, LARGE):
            asked = [row for row in self.rows if row.gate.active == model]
            if model == LARGE and len(asked) < min(self.config.large_batch, len(self.rows)) and self._others():
                continue
            if asked:
                self._step(model, asked, self._sides[model])
                self.stats.calls[model] += 1
                self._leave()
        if not self.paged:
            for side in self._sides:
                side.shrink(self.rows)
            if not self.rows:
                self._reset()
        return True

    def _others(self) -> bool:
        """Whether a row is at the small model: waiting for company at the large one would otherwise be for ever."""
        return any(row.gate.active == SMALL for row in self.rows)

    def _reset(self) -> None:
        self.rows = []
        if not self.paged:
            self._sides = self._fresh()
            return
        for index in [*self._sides[SMALL].place]:
            self._free(index)

    def _free(self, index: int) -> None:
        """Give back what a row holds; one whose admission failed holds a part of it."""
        if self.paged:
            self._sides[SMALL].free.give(*self._sides[SMALL].place[index])
            for side in self._sides:
                side.place.pop(index, None)
                side.read.pop(index, None)

    def _sweep(self) -> None:
        """End what was cancelled or is late."""
        self._end_late()
        for row in list(self.rows):
            if why := self.jobs[row.index].overdue():
                self._drop(row, why)
        if not self.rows and not self.paged and self._sides[SMALL].order:
            self._reset()

    def _admit(self) -> None:
        """Take requests into the batch, first come, first served, while rows and tokens allow."""
        while len(self.rows) < self.config.max_batch:
            with self._changed:
                held = sum(self.jobs[row.index].size for row in self.rows)
                if not self._queue or held + self._queue[0].size > self.config.max_tokens:
                    return
                job = self._queue.popleft()
                self.jobs[self._next] = job
            row = _Row(self._next, job.seed, Gate(job.stitch, job.seed), job.prompts, usage=job.usage)
            self._next += 1
            if self.paged:
                place = self._sides[SMALL].free.take(job.size)
                for side in self._sides:
                    side.admit(row, place)
            else:
                for side in self._sides:
                    side.admit(row)
            self.rows.append(row)
            if job.stitch.prefill == "both" and len(row.prompts[LARGE]) > 1:
                wanted = [(row, row.prompts[LARGE][:-1])]
                side = self._sides[LARGE]
                started = side.absorb(*wanted[0]) if self.paged else side.extend(wanted)[2]
                self._count(LARGE, wanted, side, started, step=False)

    def _leave(self) -> None:
        for row in list(self.rows):
            error = self.jobs[row.index].error
            if error is not None:
                self._drop(row, "error", error)
            elif row.done and row.done[-1].last:
                self._drop(row, "stop" if row.tokens[-1] in self.ends else "length")

    def _drop(self, row: _Row, finish: Finish, error: Exception | None = None) -> None:
        self.rows.remove(row)
        self._free(row.index)
        self._end(self.jobs.pop(row.index), finish, error)

    # What a row decides where a call of ``generate`` decides for all

    def _look(self, model: int, wanted: list[tuple[_Row, list[int]]], side: Any) -> tuple[_Seen, float]:
        if not self.paged:
            return super()._look(model, wanted, side)
        rows = [row for row, _ in wanted]
        jobs = [self.jobs[row.index] for row in rows]
        warm = [job for job in jobs if job.sampling.temperature > 0]
        if any(job.stitch.entropy_on == "processed" for job in warm):
            found, started = side.extend(wanted)
            return self._judge(rows, found.logits.float().to(self.device), found.hidden), started
        draws = None
        if warm:
            draws = [
                Draw(uniform(row.seed, len(row.tokens)), ask.temperature, ask.top_p, ask.top_k)
                for row, ask in zip(rows, (job.sampling for job in jobs), strict=True)
            ]
        found, started = side.extend(wanted, draws)
        stuck = [False] * len(rows)
        seen = _Seen(
            found.tokens, found.entropy, found.confidence, found.logprobs, found.forced, stuck, None, found.logits,
            found.hidden,
        )  # fmt: skip
        return seen, started

    def _constrain(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        return logits

    def _warp(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        warped = logits.clone()
        for at, row in enumerate(rows):
            warped[at] = warp(logits[at], self.jobs[row.index].sampling)
        return warped

    def _choose(self, rows: Sequence[_Row], warped: Tensor) -> list[int]:
        tokens = choose(warped, None)
        drawn = [at for at, row in enumerate(rows) if self.jobs[row.index].sampling.temperature > 0]
        if drawn:
            numbers = [uniform(rows[at].seed, len(rows[at].tokens)) for at in drawn]
            for at, token in zip(drawn, choose(warped[drawn], numbers), strict=True):
                tokens[at] = token
        return tokens

    def _ended(self, row: _Row, token: int, scores: Tensor | None) -> bool:
        return token in self.ends or len(row.tokens) >= self.jobs[row.index].sampling.max_new_tokens

    def _told(self, found: StitchToken) -> None:
        job = self.jobs[found.row]
        job.tokens.append(found)
        if job.on_token is not None:
            try:
                job.on_token(found)
            except Exception as error:
                job.error = error

    def _broken(self, row: _Row, error: ValueError) -> None:
        self.jobs[row.index].error = error


class _PagedSide:
    """One model on pages: where each request is, and how far it was read there."""

    def __init__(self, paged: PagedModel, model: PreTrainedModel, free: Pages) -> None:
        self.paged, self.model, self.free = paged, model, free
        self.place: dict[int, tuple[int, list[int]]] = {}
        self.read: dict[int, int] = {}

    def admit(self, row: _Row, place: tuple[int, list[int]]) -> None:
        """Take a row in, with its row of the table and its pages."""
        self.place[row.index], self.read[row.index] = place, 0
        self.paged.admit(*place)

    def extend(
        self, wanted: Sequence[tuple[_Row, list[int]]], draws: Sequence[Draw] | None = None
    ) -> tuple[Reading, float]:
        """Read a gap for each of some rows; what comes after each, and when the call began."""
        started = time.perf_counter()
        gaps = [(self.place[row.index][0], self.read[row.index], gap) for row, gap in wanted]
        found = self.paged.read(gaps, draws)
        for row, gap in wanted:
            self.read[row.index] += len(gap)
        return found, started

    def absorb(self, row: _Row, ids: Sequence[int]) -> float:
        """Read tokens and nothing after them; when that began."""
        started = time.perf_counter()
        self.paged.absorb(self.place[row.index][0], self.read[row.index], ids)
        self.read[row.index] += len(ids)
        return started


def warp(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Temperature, top-k and top-p of one row ``[vocabulary]``, in this order, as transformers has them."""
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ascending = logits.sort(stable=True)
        cut = ascending.values.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        cut[-1] = False
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(0, ascending.indices, cut), -math.inf)
    return logits
