"""Problems: generated products with their working, and real sets from files or the hub, each with a grader."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hone_core.errors import MissingExtraError
from hone_core.io import read_lines

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CHARACTERS",
    "CHECKS",
    "SETS",
    "Problem",
    "check_answers",
    "grade",
    "practice",
    "product_batch",
    "products",
    "read_problems",
    "working",
]

CHARACTERS = "0123456789*+=#?."
"""All that a worked product is written with."""
CHECKS = 2
"""Times that the verbose model works a product out before it answers."""
SETS = {
    "aime24": "hf://datasets/HuggingFaceH4/aime_2024/data/train-00000-of-00001.parquet",
    "amc": "hf://datasets/AI-MO/aimo-validation-amc/data/train-00000-of-00001.parquet",
    "math500": "hf://datasets/HuggingFaceH4/MATH-500/test.jsonl",
}
"""Sets of the paper: AIME 2024 (30), AMC 12 of 2022 and 2023 (83), MATH-500 (500). Licences are their own."""
HUB = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")
FIELDS = {"question": ("question", "problem", "prompt"), "answer": ("answer", "solution", "target")}
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
SECONDS = 5
"""That math-verify may take to read an answer, and to compare two."""
MARKED = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")
"""What mathematics within a text begins with."""
WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,} +[A-Za-z]{2,}")
"""Two words in a row, names of LaTeX left out."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its right answer.

    Attributes:
        id: names it within its set.
        question: what is asked.
        answer: as the set gives it.
    """

    id: str
    question: str
    answer: str


def working(a: int, b: int, *, checks: int = 0) -> str:
    """What is written after ``a*b=``: partial products, and the sum after a hash mark.

    Args:
        a: Three digits.
        b: Two digits.
        checks: Times that everything up to the sum is written before, each with a question mark.
    """
    parts = f"{a * (b % 10)}+{a * (b - b % 10)}="
    return f"{parts}{a * b}?" * checks + f"{parts}#{a * b}."


def is_held_out(a: int, b: int) -> bool:
    """A tenth of all products, by a hash; none of them is trained on."""
    return (a * 7919 + b * 104729) * 2654435761 % 2**32 < 2**32 // 10


def products(count: int, *, seed: int = 0) -> list[Problem]:
    """Held-out products, three digits by two, no two alike.

    Args:
        count: How many, at most 8000.
        seed: Of the draw.

    Raises:
        ValueError: There are fewer.
    """
    held = [(a, b) for a in range(100, 1000) for b in range(10, 100) if is_held_out(a, b)]
    if not 1 <= count <= len(held):
        raise ValueError(f"there are {len(held)} held-out products; got {count}")
    return [Problem(f"{a}*{b}", f"{a}*{b}", str(a * b)) for a, b in random.Random(seed).sample(held, count)]


def practice(count: int, key: Sequence[int]) -> list[Problem]:
    """Products that models are trained on, none of them held out; a function of ``key`` alone.

    Args:
        count: How many.
        key: Numbers that name the batch.
    """
    rng = random.Random(",".join(map(str, key)))
    found: list[Problem] = []
    while len(found) < count:
        a, b = rng.randrange(100, 1000), rng.randrange(10, 100)
        if not is_held_out(a, b):
            found.append(Problem(f"{a}*{b}", f"{a}*{b}", str(a * b)))
    return found


def product_batch(count: int, key: Sequence[int], *, eos: int, pad: int, verbose: float = 0.0) -> tuple[Tensor, Tensor]:
    """Training products as ids, a function of ``key`` alone, so that a resumed run sees what it would have seen.

    Args:
        count: Rows.
        key: Numbers that name the batch, such as seed, stage and step.
        eos: Id that ends a text.
        pad: Id that fills a row.
        verbose: Share of rows that check themselves first.

    Returns:
        Ids ``[count, tokens]``, and the same with -100 over questions and padding.
    """
    rng = random.Random(",".join(map(str, key)))
    rows: list[tuple[int, str]] = []
    while len(rows) < count:
        a, b = rng.randrange(100, 1000), rng.randrange(10, 100)
        if not is_held_out(a, b):
            question = f"{a}*{b}="
            rows.append((len(question), question + working(a, b, checks=CHECKS * (rng.random() < verbose))))
    import torch

    width = max(len(text) for _, text in rows) + 1
    ids = torch.full((count, width), pad)
    targets = torch.full((count, width), -100)
    for at, (asked, text) in enumerate(rows):
        ids[at, : len(text) + 1] = torch.tensor([*map(CHARACTERS.index, text), eos])
        targets[at, asked : len(text) + 1] = ids[at, asked : len(text) + 1]
    return ids, targets


def read_problems(address: str | Path, *, limit: int | None = None) -> list[Problem]:
    """Read problems: a file, one on the hub, or a set by its name.

    The question of a row is ``question``, ``problem`` or ``prompt``, the answer ``answer``, ``solution`` or ``target``,
    and the name ``id`` where there is one.

    Args:
        address: JSON lines or a parquet file; ``hf://datasets/OWNER/NAME/FILE``, with ``@REVISION`` after the name if
            wanted, which is fetched once; or one of ``SETS``.
        limit: Problems at most.

    Raises:
        ValueError: A row is no such object, two problems have one id, or the address names no file.
        FileNotFoundError: There is no such file, here or on the hub.
        ConnectionError: The hub cannot be reached, and the file was not fetched before.
        MissingExtraError: A parquet file, and pyarrow is not installed.
    """
    name = SETS.get(str(address), str(address))
    path = _fetched(name) if name.startswith("hf:") else Path(address)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; expected problems as JSON lines or parquet, hf://datasets/OWNER/NAME/FILE, or "
            f"one of {', '.join(SETS)}"
        )
    rows: list[Any]
    if path.suffix == ".parquet":
        from hone_lm.question_sets import parquet_rows

        rows = parquet_rows(path)
    else:
        rows = _json_rows(path)
    problems: list[Problem] = []
    for number, row in enumerate(rows, 1):
        values = {}
        for field, names in FIELDS.items():
            found = [row[name] for name in names if isinstance(row, dict) and row.get(name) not in (None, "")]
            if not found:
                raise ValueError(f"{address}:{number}: expected one of {', '.join(names)}")
            values[field] = _text(found[0])
        name = row.get("id")
        problems.append(Problem(str(number if name is None else name), **values))
    if len({problem.id for problem in problems}) < len(problems):
        raise ValueError(f"{address}: two problems have one id")
    if not problems:
        raise ValueError(f"{address} holds no problem")
    return problems[:limit]


def _text(value: Any) -> str:
    # Answers of contests are whole numbers, which some sets keep as floating-point ones.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _json_rows(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from error
    return rows


def _fetched(address: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    found = HUB.fullmatch(address)
    if found is None:
        raise ValueError(f"expected hf://datasets/OWNER/NAME/FILE; got {address}")
    try:
        return Path(hf_hub_download(found["name"], found["file"], repo_type="dataset", revision=found["revision"]))
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"the hub cannot be reached, and {address} was not fetched before") from error
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"the hub has no {address}") from error


def check_answers(problems: Sequence[Problem], format: Literal["number", "math"]) -> None:
    """Refuse answers that a format cannot grade: each would count as wrong, or by its last digits.

    Raises:
        ValueError: ``number``, and an answer has none, or is LaTeX.
    """
    for problem in problems if format == "number" else ():
        latex = _is_bare(problem.answer) and "\\" in problem.answer
        if latex or not NUMBER.search(problem.answer):
            raise ValueError(
                f"the answer of problem {problem.id}, {problem.answer!r}, is no number; grade these by --format math"
            )


def _is_bare(answer: str) -> bool:
    """Whether an answer is mathematics without marks around it, such as x^2 alone; no text that holds some."""
    spoken = re.sub(r"\\[a-z]+\{[^{}]*\}", "", answer)
    return "\n" not in answer and not MARKED.search(answer) and not WORDS.search(spoken)


def grade(text: str, answer: str, format: Literal["number", "math"] = "number") -> bool:
    """Whether a written answer is right.

    Args:
        text: What was written.
        answer: The right answer.
        format: ``number``: the last number of both is the same. ``math``: math-verify finds them equal within five
            seconds, which it counts in a process's main thread. It reads mathematics between its marks only, so that an
            answer without any, such as MATH-500's, is put between them.

    Raises:
        MissingExtraError: ``math`` without the extra.
    """
    if format == "math":
        try:
            from math_verify import parse, verify
        except ImportError as error:
            raise MissingExtraError("math", "hone-rstitch", "Grading by math-verify") from error
        # Its timeouts are signals, which only a process's main thread may set. Without one an answer such as
        # 9^{9^{9^9}} would be worked out for ever.
        seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
        options: dict[str, Any] = {"parsing_timeout": seconds}
        right = parse(f"${answer}$" if _is_bare(answer) else answer, **options)
        return bool(verify(right, parse(text, **options), timeout_seconds=seconds))
    found = [NUMBER.findall(words) for words in (text, answer)]
    return all(found) and float(found[0][-1].replace(",", "")) == float(found[1][-1].replace(",", ""))
