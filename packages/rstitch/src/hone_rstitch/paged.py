"""One model of an engine on pages: each call is a bucket of fixed shape, and on a GPU one CUDA graph.

A call packs the gaps of its rows into tiles of tokens. Its inputs are one copy to the device, and what the gate asks
about (entropy, likeliest token, its probability) is computed in the same graph and copied back, so that the host waits
once per call and launches once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from hone_kernels.logits import read_logits
from torch import Tensor

from .config import LARGE
from .decoder import Decoder
from .vocabulary import Vocabulary

__all__ = ["Call", "Draw", "PagedModel", "Pages", "Reading", "draw"]

LONGEST_GAP = 64
"""Tokens of a gap that is packed with others; a longer one is read before, but for its last token."""
CHUNK = 1024
"""Tokens of a long gap that are read at once."""
MOST_CAPTURED = 256
"""Tokens of a call that is worth a graph: beyond them it takes long enough to launch it kernel by kernel."""
TILES = (16, 4)
"""Tokens of a tile, where gaps are long enough to fill them; else 1."""


class Pages:
    """Which rows of the table and which pages are free; a request has the same ones at both models.

    Args:
        rows: Requests at once.
        pages: In all.
        page: Tokens that one holds.
    """

    def __init__(self, rows: int, pages: int, page: int) -> None:
        self.page = page
        self.rows, self.pages = list(range(rows)), list(range(pages))

    def take(self, tokens: int) -> tuple[int, list[int]]:
        """A row, and pages for so many tokens."""
        count = -(-tokens // self.page)
        assert self.rows, "the batch has a row for each request that it admits"
        assert count <= len(self.pages), "the token budget has pages for each request that it admits"
        taken, self.pages = self.pages[:count], self.pages[count:]
        return self.rows.pop(0), taken

    def give(self, row: int, pages: Sequence[int]) -> None:
        """Free them."""
        self.rows.append(row)
        self.pages += pages


@dataclass(frozen=True)
class Reading:
    """What a call says of the next token of each row; lists follow the call's rows.

    Attributes:
        logits: ``[rows, vocabulary]`` over the large model's ids, masked; they hold until the model's next call.
        hidden: ``[rows, channels]``, normalised, which the logits are of; they hold as long.
        tokens: Likeliest ids, or drawn ones.
        entropy: Over ln V.
        confidence: Probability of the likeliest token.
        forced: Only one token was allowed.
        logprobs: Of ``tokens``, in nats.
    """

    logits: Tensor
    hidden: Tensor
    tokens: list[int]
    entropy: list[float]
    confidence: list[float]
    forced: list[bool]
    logprobs: list[float]


class Draw(NamedTuple):
    """How a row's token is drawn.

    Attributes:
        number: In [0, 1), see ``method.uniform``.
        temperature: 0 is greedy.
        top_p: 1 is off.
        top_k: 0 is off.
    """

    number: float
    temperature: float
    top_p: float
    top_k: int


def draw(logits: Tensor, likeliest: Tensor, draws: Tensor) -> Tensor:
    """Tokens of rows as ``engine.warp`` and ``method.choose`` would draw them, one after the other.

    Args:
        logits: ``[rows, vocabulary]``, after hard masks.
        likeliest: ``[rows]``, for those at temperature 0.
        draws: float64 ``[4, rows]``: number, temperature, top_p, top_k.
    """
    number, temperature, top_p, top_k = draws
    warm, size = temperature > 0, logits.shape[-1]
    x = logits / torch.where(warm, temperature, 1.0).to(logits.dtype)[:, None]
    ascending, order = x.sort(dim=-1, stable=True)
    first = torch.where(top_k > 0, size - top_k, 0.0).clamp(min=0).long()
    least = ascending.gather(-1, first[:, None])
    ascending = ascending.masked_fill(ascending < least, -torch.inf)
    beyond = ascending.softmax(-1).cumsum(-1) <= (1 - top_p).to(x.dtype)[:, None]
    beyond &= (top_p < 1)[:, None]
    beyond[:, -1] = False
    closed = torch.zeros_like(beyond).scatter(-1, order, beyond) | (x < least)
    mass = x.masked_fill(closed, -torch.inf).double().softmax(-1).cumsum(-1)
    # Logits that are no numbers have no such place, and an index beyond the row would end the device's work for all.
    found = torch.searchsorted(mass, (number * mass[:, -1])[:, None], right=True)[:, 0].clamp(max=size - 1)
    return torch.where(warm, found, likeliest)


class PagedModel:
    """One of the two models, its pages and its captured calls.

    Args:
        model: See ``decoder.unsupported``.
        which: ``SMALL`` or ``LARGE``.
        vocabulary: Of the pair.
        rows: Requests at once.
        pages: In all.
        page: Tokens of a page.
        positions: Of a request, at most.
        graphs: Capture calls; the device must be a GPU then.
    """

    def __init__(
        self,
        model: Any,
        which: int,
        vocabulary: Vocabulary,
        *,
        rows: int,
        pages: int,
        page: int,
        positions: int,
        graphs: bool,
    ) -> None:
        self.decoder = Decoder(model, pages=pages, page=page, positions=positions)
        self.device, self.rows, self.graphs = self.decoder.device, rows, graphs
        self.size = vocabulary.size
        vocabulary = vocabulary.to(self.device)
        self.closed = vocabulary.to_small < 0
        self.ids = None if which == LARGE else vocabulary.to_small.clamp(min=0)
        if which == LARGE:
            self.closed[list(vocabulary.eos)] = False
        self.table = torch.zeros(rows, -(-positions // page), dtype=torch.int32, device=self.device)
        self.pool = torch.cuda.graph_pool_handle() if graphs else None
        self._calls: dict[tuple[int, int, int, bool, bool], Call] = {}

    def admit(self, row: int, pages: Sequence[int]) -> None:
        """Give a row of the table its pages."""
        self.table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def read(self, gaps: Sequence[tuple[int, int, Sequence[int]]], draws: Sequence[Draw] | None = None) -> Reading:
        """Read gaps and what comes after each.

        Args:
            gaps: Row of the table, tokens that it has read, and the ids to read, at least one.
            draws: Of each row's token; None is the likeliest of all.
        """
        short: list[tuple[int, int, Sequence[int]]] = []
        for row, read, ids in gaps:
            if len(ids) > LONGEST_GAP:
                self.absorb(row, read, ids[:-1])
                short.append((row, read + len(ids) - 1, ids[-1:]))
            else:
                short.append((row, read, ids))
        tile, tiles = packing([len(ids) for _, _, ids in short])
        drawn = draws is not None
        if tiles == len(short) and tile == 1:
            return self.step(tiles, drawn=drawn).run(short, draws)
        return self._call(_bucket(tiles), tile, _bucket(self.rows), True, drawn).run(short, draws)

    def step(self, rows: int, *, fused: bool = True, drawn: bool = False) -> Call:
        """The call that reads a token for each of so many rows."""
        return self._call(_bucket(rows), 1, _bucket(rows), fused, drawn)

    def _call(self, *shape: Any) -> Call:
        if shape not in self._calls:
            self._calls[shape] = Call(self, *shape)
        return self._calls[shape]

    def absorb(self, row: int, read: int, ids: Sequence[int]) -> None:
        """Read tokens of one row and nothing after them."""
        tile = TILES[0]
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            tiles = -(-len(part) // tile)
            fed, positions = np.zeros((2, tiles * tile), dtype=np.int32)
            positions -= 1
            fed[: len(part)] = part
            positions[: len(part)] = np.arange(read + start, read + start + len(part))
            inputs = torch.from_numpy(np.stack([fed, positions])).to(self.device)
            rows = torch.full((tiles,), row, dtype=torch.int32, device=self.device)
            self.decoder(inputs[0], inputs[1].view(tiles, tile), rows, self.table, None)

    def prepare(self) -> None:
        """Capture the calls that most steps are: one token for each of so many rows."""
        count = 1
        while count < 2 * self.rows:
            self.step(count)
            count *= 2


def packing(gaps: Sequence[int]) -> tuple[int, int]:
    """Tokens of a tile and the number of tiles that these gaps are packed into.

    A tile reads its row's cache once, and its padding is work: the largest tile that is mostly tokens.
    """
    longest, tokens = max(gaps), sum(gaps)
    for tile in TILES:
        tiles = sum(-(-gap // tile) for gap in gaps)
        if tile < 2 * longest and tile * tiles <= max(16, 1.5 * tokens):
            return tile, tiles
    return 1, tokens


def _bucket(count: int) -> int:
    return 1 << (count - 1).bit_length()


class Call:
    """Calls of one shape: ``tiles`` tiles of ``tile`` tokens, logits after ``asked`` of them; see ``PagedModel``.

    Attributes:
        graph: What was captured, if anything.
        logits: ``[asked, vocabulary]``, of the last run.
    """

    def __init__(self, model: PagedModel, tiles: int, tile: int, asked: int, fused: bool, drawn: bool) -> None:
        self.model, self.tile, self.fused, self.drawn = model, tile, fused, drawn
        gpu = model.device.type == "cuda"
        tokens = tiles * tile
        self.host = torch.zeros(2 * tokens + tiles + asked, dtype=torch.int32, pin_memory=gpu)
        self.inputs = torch.zeros_like(self.host, device=model.device)
        cuts = [tokens, tokens, tiles, asked]
        self.ids, self.positions, self.rows, self.last = np.split(self.host.numpy(), np.cumsum(cuts)[:-1])
        self.positions[:] = -1
        self.parts = self.inputs.split(cuts)
        exact = torch.float64 if model.decoder.dtype == torch.float64 else torch.float32
        kinds = (exact, exact, torch.int64, torch.bool) + (exact,) * drawn
        self.found = [torch.zeros(asked, dtype=dtype, pin_memory=gpu) for dtype in kinds]
        if drawn:
            self.draws = torch.zeros(4, asked, dtype=torch.float64, pin_memory=gpu)
            self.draw_inputs = torch.zeros_like(self.draws, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if model.graphs and tokens <= MOST_CAPTURED:
            self._capture()

    def _work(self) -> None:
        model = self.model
        self.inputs.copy_(self.host, non_blocking=True)
        ids, positions, rows, last = self.parts
        logits, self.hidden = model.decoder(
            ids, positions.view(len(rows), -1), rows, model.table, last, fused=self.fused
        )
        if model.ids is not None:
            logits = logits.index_select(-1, model.ids)
        self.logits = logits.masked_fill_(model.closed, -torch.inf)
        entropy, confidence, token, forced, _ = read_logits(self.logits, size=model.size)
        out = [entropy, confidence, token, forced]
        if self.drawn:
            self.draw_inputs.copy_(self.draws, non_blocking=True)
            wide = self.logits.float() if self.logits.dtype in (torch.float16, torch.bfloat16) else self.logits
            out[2] = draw(wide, token, self.draw_inputs)
            out.append(wide.gather(-1, out[2][:, None])[:, 0] - wide.logsumexp(-1))
        for mine, theirs in zip(self.found, out, strict=True):
            mine.copy_(theirs, non_blocking=True)

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream):
            # Kernels compile and libraries take their workspaces here; every token is padding, which is not written.
            for _ in range(2):
                self._work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (a server's) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self.model.pool, stream=stream, capture_error_mode="thread_local"):
            self._work()
        self.graph = graph

    def again(self) -> None:
        """Launch it with what it was last given, and wait for nothing."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._work()

    def run(self, gaps: Sequence[tuple[int, int, Sequence[int]]], draws: Sequence[Draw] | None = None) -> Reading:
        """See ``PagedModel.read``."""
        if draws is not None:
            self.draws[1] = 0.0  # rows that pad the call are greedy
            self.draws[:, : len(draws)] = torch.tensor(draws, dtype=torch.float64).T
        self.positions[:] = -1
        tile, start = self.tile, 0
        for at, (row, read, ids) in enumerate(gaps):
            end = start + len(ids)
            self.ids[start:end] = ids
            self.positions[start:end] = range(read, read + len(ids))
            after = -(-end // tile) * tile
            self.rows[start // tile : after // tile] = row
            self.last[at] = end - 1
            start = after
        self.again()
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()
        count = len(gaps)
        entropy, confidence, tokens, forced, *rest = (x[:count].tolist() for x in self.found)
        logprobs = rest[0] if rest else [math.log(value) if value > 0 else math.nan for value in confidence]
        return Reading(self.logits[:count], self.hidden[:count], tokens, entropy, confidence, forced, logprobs)
