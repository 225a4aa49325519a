"""Estimated latency of a text: what each call takes by the tokens that it reads and the tokens that are cached.

Source: arXiv 2507.17307, the latency estimator of R-Stitch+.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .config import LARGE, NAMES, SMALL

__all__ = ["Call", "Latency", "Written", "calls", "read_latency", "text_latency", "write_latency"]


class Written(Protocol):
    """What the estimate needs of an emitted token; a ``StitchToken`` has it."""

    @property
    def model(self) -> int:
        """Who wrote it."""

    @property
    def discarded_entropy(self) -> float | None:
        """Not None: the small model was asked first."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a model.

    Attributes:
        model: ``SMALL`` or ``LARGE``.
        tokens: Read by it, at least 1.
        cached: Tokens whose keys and values it found.
    """

    model: int
    tokens: int
    cached: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of a model's calls: a n_inf n_kv + b n_inf^2 + c n_inf + d of a prefill, c n_kv + d of a decoding step.

    Attributes:
        prefill: a, b, c and d, of calls that read several tokens.
        decode: c and d, of calls that read one.
    """

    prefill: tuple[float, float, float, float]
    decode: tuple[float, float]

    @classmethod
    def fit(cls, points: Iterable[tuple[int, int, float]]) -> Latency:
        """Least squares over measured calls.

        Args:
            points: Tokens read, tokens cached, time.

        Raises:
            ValueError: There are too few kinds of calls to tell the coefficients apart.
        """
        kept = list(points)
        several = np.array([point for point in kept if point[0] > 1], dtype=float).reshape(-1, 3)
        single = np.array([point for point in kept if point[0] == 1], dtype=float).reshape(-1, 3)
        n, kv = several[:, 0], several[:, 1]
        parts = (np.stack([n * kv, n * n, n, np.ones_like(n)], 1), np.stack([single[:, 1], np.ones(len(single))], 1))
        for matrix, what in zip(parts, ("several tokens", "one token"), strict=True):
            if not len(matrix) or np.linalg.matrix_rank(matrix) < matrix.shape[1]:
                raise ValueError(f"too few kinds of calls that read {what} to fit {matrix.shape[1]} coefficients")
        found = [np.linalg.lstsq(m, p[:, 2], rcond=None)[0] for m, p in zip(parts, (several, single), strict=True)]
        a, b, c, d = (float(value) for value in found[0])
        return cls((a, b, c, d), (float(found[1][0]), float(found[1][1])))

    def of(self, tokens: int, cached: int) -> float:
        """Time of one call."""
        if tokens == 1:
            return self.decode[0] * cached + self.decode[1]
        a, b, c, d = self.prefill
        return a * tokens * cached + b * tokens * tokens + c * tokens + d


def calls(tokens: Sequence[Written], prompts: tuple[int, int]) -> list[Call]:
    """The calls that wrote a text, in their order.

    Args:
        tokens: Of the text.
        prompts: Lengths of what the small and the large model were asked.
    """
    found: list[Call] = []
    read = [0, 0]
    for position, token in enumerate(tokens):
        for model in (SMALL, LARGE) if token.discarded_entropy is not None else (token.model,):
            seen = prompts[model] + position
            found.append(Call(model, seen - read[model], read[model]))
            read[model] = seen
    return found


def text_latency(latencies: tuple[Latency, Latency], found: Iterable[Call]) -> float:
    """Sum over the calls, in the unit that the latencies have."""
    return sum(latencies[call.model].of(call.tokens, call.cached) for call in found)


def write_latency(path: Path, latencies: tuple[Latency, Latency]) -> None:
    """Write both models' coefficients, in milliseconds."""
    path.write_text(json.dumps({name: asdict(one) for name, one in zip(NAMES, latencies, strict=True)}, indent=2))


def read_latency(path: Path) -> tuple[Latency, Latency]:
    """Read what ``write_latency`` wrote.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: It is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected the latency.json of hone-rstitch profile")
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for name in NAMES:
            (a, b, c, d), (e, f) = (map(float, values[name][part]) for part in ("prefill", "decode"))
            assert np.isfinite([a, b, c, d, e, f]).all()
            found.append(Latency((a, b, c, d), (e, f)))
        small, large = found
    except (KeyError, TypeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold the latencies of two models; make it with hone-rstitch profile"
        ) from error
    return small, large
