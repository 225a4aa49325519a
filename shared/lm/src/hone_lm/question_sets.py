"""Videos with multiple-choice questions: the user's own, and files of Video-MME, MVBench, TVBench and EgoSchema."""

from __future__ import annotations

import ast
import csv
import io
import json
import logging
import os
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hone_core.errors import MissingExtraError
from hone_core.io import read_lines

from .video import PICTURES, Clip, check_video, read_video

__all__ = ["Format", "Item", "check_items", "load_items", "parquet_rows", "read_clip"]

log = logging.getLogger(__name__)

Format = Literal["jsonl", "videomme", "mvbench", "egoschema", "tvbench"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """A video with a multiple-choice question.

    Attributes:
        id: unique in its set.
        question: text.
        options: texts, without letters.
        answer: index of the right one.
        category: kind of question, for the breakdown; ``all`` is the total's name.
        video: path, or None where ``clip`` is given.
        clip: frames in memory.
        start: seconds from which the question is about the video; None is its beginning.
        end: seconds up to which; None is its end.
        fps: frames per second of a video that is a folder of pictures or an array; None is 1.
        error: why the line of a file could not be read. Such an item holds the place of its line, so that a sweep
            counts it as failed; the rest of it is empty.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: int
    category: str = ""
    video: Path | None = None
    clip: Clip | None = None
    start: float | None = None
    end: float | None = None
    fps: float | None = None
    error: str = ""

    def __post_init__(self) -> None:
        if self.error:
            return
        if not self.question.strip():
            raise ValueError(f"item {self.id}: the question is empty")
        if len(self.options) < 2 or not all(option.strip() for option in self.options):
            raise ValueError(f"item {self.id}: expected at least two options with text; got {list(self.options)}")
        if len({option.strip() for option in self.options}) < len(self.options):
            raise ValueError(f"item {self.id}: two options are the same; got {list(self.options)}")
        if not 0 <= self.answer < len(self.options):
            raise ValueError(
                f"item {self.id}: answer must be the index of one of {len(self.options)} options; got {self.answer}"
            )
        if self.category == "all":
            raise ValueError(f"item {self.id}: category 'all' is the name of the total; rename it")
        if (self.video is None) == (self.clip is None):
            raise ValueError(f"item {self.id}: expected a video or a clip, one of them")


def read_clip(item: Item, *, num_frames: int) -> Clip:
    """Frames of an item; see ``hone_lm.read_video`` for errors.

    Raises:
        ValueError: The item stands for a line that could not be read.
    """
    if item.error:
        raise ValueError(item.error)
    if item.clip is not None:
        return item.clip
    assert item.video is not None, "an item has one of the two"
    return read_video(item.video, num_frames=num_frames, start=item.start, end=item.end, fps=item.fps)


def load_items(path: str | Path, *, format: Format = "jsonl", videos: str | Path | None = None) -> list[Item]:
    """Read questions from a file.

    A line that cannot be read is skipped with a warning; an item with its ``error`` stands in its place.

    Args:
        path: The file. ``jsonl``: a line ``{"video", "question", "options", "answer", "category"?, "start"?, "end"?,
            "fps"?}`` per question, answer an index from 0, a letter or an option's text, ``fps`` of a video that is a
            folder of pictures. ``videomme``: the released parquet table, or its rows as JSON, JSON lines or CSV.
            ``mvbench``, ``tvbench``: a task's JSON list, the folder of them, or the release with ``json/`` and
            ``video/`` in it; a video whose name ends in the row's start and end is cut already. ``egoschema``:
            ``questions.json`` with the subset's answers beside it, rows with both, or the rows or parquet file on
            Hugging Face.
        format: Of the file.
        videos: Folder of the videos; the file's own (for a task also ``video/`` beside or in it) if None. Names are
            relative to it in ``jsonl`` and ``egoschema``; for the others they are looked for in its subfolders too, at
            the released places first.

    Raises:
        FileNotFoundError: There is no such file.
        MissingExtraError: A parquet file, and pyarrow is not installed.
        ValueError: No line can be read (with number and cause of the first), or the file is none of the format.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no question file {path}")
    if format not in _READERS:
        raise ValueError(f"format must be one of {', '.join(_READERS)}; got {format!r}")
    if format in ("mvbench", "tvbench") and path.is_dir() and (path / "json").is_dir():
        path = path / "json"
    folder = path if path.is_dir() else path.parent
    if videos is not None:
        folder = Path(videos)
    elif format in ("mvbench", "tvbench") and (folder.parent / "video").is_dir():
        folder = folder.parent / "video"
    library = _Library(folder)
    items, seen = [], set()
    for where, make in _READERS[format](path):
        try:
            row = make()
            if row is None:
                continue
            item = _item(row, where, library)
            if item.id in seen:
                raise ValueError(f"id {item.id} occurs twice")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            cause = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            log.warning("skipped %s: %s", where, cause)
            item = Item(id=Path(where).name, question="", options=(), answer=0, error=f"{where}: {cause}")
        seen.add(item.id)
        items.append(item)
    if not items:
        raise ValueError(f"{path} holds no question")
    if all(item.error for item in items):
        raise ValueError(items[0].error)
    return items


def check_items(items: Sequence[Item]) -> list[str]:
    """Problems of lines and videos that can be seen without decoding a video, one line each."""
    problems = []
    for item in items:
        if item.error:
            problems.append(item.error)
            continue
        if item.video is None:
            continue
        try:
            check_video(item.video)
        except (OSError, ValueError) as error:
            problems.append(f"{item.id}: {error}")
    return problems


Row = dict[str, Any]
_Make = Callable[[], Row | None]
"""Makes a question's row, in the columns of ``jsonl``; raises what is wrong with it. None: there is nothing to ask."""
_Reader = Callable[[Path], Iterator[tuple[str, _Make]]]


@dataclass(frozen=True)
class _Place:
    """Where the videos of a released set lie.

    Attributes:
        folders: subfolders to look in before all others.
        suffixes: that a file may have in place of the one it is named with.
        folder_fps: frames per second of videos that are folders of pictures.
    """

    folders: tuple[str, ...]
    suffixes: tuple[str, ...] = ()
    folder_fps: float | None = None


class _Library:
    """Videos of a folder by name, in its subfolders too; they are listed when a name is first looked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_stem: dict[str, list[Path]] | None = None

    def find(self, name: str, place: _Place) -> Path:
        """A file, or a folder of pictures; what does not exist is taken to lie in the root.

        Raises:
            ValueError: Several have the name.
        """
        for folder in (*place.folders, *(f"video/{folder}" for folder in place.folders), "."):
            if (self.root / folder / name).exists():
                return self.root / folder / name
        wanted = Path(name)
        if wanted.suffix.lower() in place.suffixes:
            # Converted since, and still where it was.
            for folder in (*place.folders, *(f"video/{folder}" for folder in place.folders)):
                there = [(self.root / folder / name).with_suffix(suffix) for suffix in place.suffixes]
                there = [path for path in there if path.is_file()]
                if len(there) == 1:
                    return there[0]
        found = []
        for path in self._listed().get(wanted.stem, ()):
            same = path.name == wanted.name or (path.suffix.lower() in place.suffixes and path.is_file())
            if same and path.parts[-len(wanted.parts) : -1] == wanted.parts[:-1]:
                found.append(path)
        if len(found) > 1:
            shown = ", ".join(str(path) for path in found[:3]) + (", ..." if len(found) > 3 else "")
            raise ValueError(
                f"{len(found)} videos in {self.root} are named {name}: {shown}. Name the folder of the right one as "
                "the folder of videos"
            )
        return found[0] if found else self.root / name

    def _listed(self) -> dict[str, list[Path]]:
        if self._by_stem is None:
            self._by_stem = {}
            seen = set()
            for folder, folders, files in os.walk(self.root, followlinks=True):
                real = os.path.realpath(folder)
                folders[:] = [] if real in seen else sorted(one for one in folders if not one.startswith("."))
                if real in seen:
                    continue
                seen.add(real)
                here = Path(folder)
                pictures = False
                for file in sorted(files):
                    if os.path.splitext(file)[1].lower() in PICTURES:
                        pictures = True
                    elif not file.startswith("."):
                        self._by_stem.setdefault(Path(file).stem, []).append(here / file)
                if pictures:
                    self._by_stem.setdefault(here.stem, []).append(here)
        return self._by_stem


def _item(row: Row, where: str, library: _Library) -> Item:
    options = row["options"]
    if not isinstance(options, Sequence) or isinstance(options, str):
        raise ValueError(f"options must be a list; got {options!r}")
    written = [str(option).strip() for option in options]
    options = _without_letters(written)
    name = str(row["video"])
    video, fps, place = library.root / name, row.get("fps"), row.get("place")
    if isinstance(place, _Place):
        video = library.find(name, place)
        fps = place.folder_fps if video.is_dir() else None
    start, end = (None if row.get(key) is None else float(row[key]) for key in ("start", "end"))
    if isinstance(place, _Place) and _is_cut(video, start, end):
        start = end = None
    return Item(
        id=str(row["id"] if row.get("id") is not None else f"{name}#{where.rpartition(':')[2]}"),
        question=str(row["question"]),
        options=options,
        answer=_answer_index(row["answer"], options, written),
        category="" if row.get("category") is None else str(row["category"]),
        video=video,
        start=start,
        end=end,
        fps=None if fps is None else float(fps),
    )


def _is_cut(video: Path, start: float | None, end: float | None) -> bool:
    """Whether a file is the stretch from ``start`` to ``end`` already, by its name: ``ZS9XR_1.3_4.8.mp4``."""
    named = re.search(r"_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)$", video.stem)
    return named is not None and (float(named[1]), float(named[2])) == (start, end)


_LETTERED = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s+(?=\S)")
"""``A. ``, ``(A) ``, ``A) `` or ``A: `` before a text."""


def _letter(text: str) -> tuple[int, str] | None:
    """Index of the letter before a text, and the text."""
    found = _LETTERED.match(text)
    return None if found is None else (ord(found[1] or found[2]) - ord("A"), text[found.end() :])


def _without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """Drop leading letters, if all options have their own: ``C. Elegans`` alone is a name."""
    found = [_letter(option) for option in options]
    own = [one for one in found if one is not None]
    if [index for index, _ in own] == list(range(len(options))):
        return tuple(text for _, text in own)
    return tuple(options)


def _answer_index(answer: Any, options: Sequence[str], written: Sequence[str]) -> int:
    """An index, a letter, or the text of the right option, with its letter or without.

    Args:
        answer: As the file has it.
        options: Texts without letters.
        written: Texts as the file has them.
    """
    if isinstance(answer, bool):
        raise ValueError(f"answer must be an index, a letter or an option's text; got {answer}")
    if isinstance(answer, int) or (isinstance(answer, float) and answer.is_integer()):
        return int(answer)
    text = str(answer).strip()
    by_text = next((list(texts).index(text) for texts in (written, options) if text in texts), None)
    alone = re.fullmatch(r"\(?([A-Za-z])[.):]?", text)
    by_letter = None if alone is None else ord(alone[1].upper()) - ord("A")
    if alone is not None and alone[1].islower() and ord(alone[1]) - ord("a") >= len(options):
        by_letter = None
    lettered = _letter(text)
    if by_text is None and lettered is not None and lettered[1] in options:
        by_text, by_letter = list(options).index(lettered[1]), lettered[0]
    if by_text is not None and by_letter is not None and by_letter < len(options) and by_text != by_letter:
        raise ValueError(
            f"answer {answer!r} is the text of option {by_text} and the letter of option {by_letter}, counted from 0; "
            "give the index"
        )
    if by_text is not None:
        return by_text
    if by_letter is not None:
        return by_letter
    number = re.fullmatch(r"(\d+)(?:\.0+)?", text)
    if number is not None:
        return int(number[1])
    raise ValueError(f"answer {answer!r} is no index, no letter, and none of {list(options)}")


def _listed_texts(text: str) -> list[str]:
    """Texts of a list that was written as text: JSON, Python, a numpy array, or quotes with apostrophes inside them."""
    body = text.strip()
    if not (body.startswith("[") and body.endswith("]")):
        raise ValueError(f"options must be a list; got {text!r}")
    try:
        found = json.loads(body)
    except json.JSONDecodeError:
        found = _quoted_texts(body)
    if not found or not all(isinstance(one, str) for one in found):
        raise ValueError(f"options must be a list of texts in quotes; got {text!r}")
    return found


def _quoted_texts(body: str) -> list[str]:
    strings, others = [], set()
    try:
        for token in tokenize.generate_tokens(io.StringIO(body).readline):
            if token.type == tokenize.STRING:
                strings.append(ast.literal_eval(token.string))
            elif token.string.strip():
                others.add(token.string)
    except (tokenize.TokenError, SyntaxError, ValueError):
        others.add("?")
    if others <= {"[", "]", ","}:
        return strings
    # An apostrophe inside a text ends it only where the next quote, or the end of the list, follows.
    inside = body[1:-1].strip()
    if _QUOTED.sub("", inside).strip(", \t\n"):
        return []
    return [found[2] for found in _QUOTED.finditer(inside)]


_QUOTED = re.compile(r"""(?:^|(?<=[\s,]))(['"])(.*?)\1(?=\s*,\s*['"]|\s*$)""", re.DOTALL)


def _json_lines(path: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield f"{path}:{number}", partial(_json_line, line)


def _json_line(line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    return _object(row)


def _object(row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object; got {type(row).__name__}")
    return row


def _json_list(path: Path) -> list[Row]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, list):
        raise ValueError(f"{path}: expected a list; got {type(data).__name__}")
    return data


_VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


def _video_mme(path: Path) -> Iterator[tuple[str, _Make]]:
    """Columns ``videoID question_id question options answer task_type duration``, and others that are not needed."""
    return ((where, partial(_video_mme_row, make)) for where, make in _table(path))


def _table(path: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Rows of a parquet file, as releases are, or of what people make of it: JSON, JSON lines, CSV."""
    if path.suffix == ".jsonl":
        yield from _json_lines(path)
        return
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: list[Row] = list(csv.DictReader(file))
    elif path.suffix == ".parquet":
        rows = parquet_rows(path)
    else:
        rows = _json_list(path)
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", partial(_object, row)


def parquet_rows(path: Path) -> list[Row]:
    """Rows of a parquet file.

    Raises:
        MissingExtraError: pyarrow is not installed.
        ValueError: It is no parquet file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        wanted = f"Reading {path}, a parquet file (one converted to JSON lines is read without),"
        raise MissingExtraError("parquet", "hone-lm", wanted) from error
    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error


def _video_mme_row(make: Callable[[], Row]) -> Row:
    row = make()
    options = row["options"]
    options = _listed_texts(options) if isinstance(options, str) else options
    answer = str(row["answer"]).strip()
    return {
        "id": row["question_id"],
        "video": f"{row.get('videoID', row.get('video_id'))}.mp4",
        "place": _Place(("data",), suffixes=_VIDEOS),
        "question": row["question"],
        "options": options,
        # The release has letters, which an option's text may be as well.
        "answer": ord(answer) - ord("A") if re.fullmatch("[A-Z]", answer) else row["answer"],
        "category": row.get("task_type", row.get("duration", "")),
    }


_PLACES = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
"""MVBench's task to the subfolder of its videos, as in evaluation scripts in public use; not checked on a download."""


def _mvbench(path: Path) -> Iterator[tuple[str, _Make]]:
    """Frames of ``episodic_reasoning`` lie in a folder per video, three for a second, as the scripts read them."""
    return _tasks(path, _PLACES, folder_fps=3.0)


def _tvbench(path: Path) -> Iterator[tuple[str, _Make]]:
    """Videos lie in a folder per task."""
    return _tasks(path, {})


def _tasks(path: Path, places: Mapping[str, str], folder_fps: float | None = None) -> Iterator[tuple[str, _Make]]:
    """A JSON list per task, with ``video question candidates answer`` and in some ``start end``, seconds."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no JSON file of a task")
    for file in files:
        task = file.stem
        folders = (*([places[task]] if task in places else []), task)
        place = _Place(folders, suffixes=_VIDEOS, folder_fps=folder_fps)
        for number, row in enumerate(_json_list(file), 1):
            yield f"{file}:{number}", partial(_task_row, row, task, number, place)


def _task_row(row: Any, task: str, number: int, place: _Place) -> Row:
    row = _object(row)
    options = [str(option) for option in row["candidates"]]
    answer = str(row["answer"])
    return {
        "id": f"{task}#{number}",
        "video": row["video"],
        "place": place,
        "question": row["question"],
        "options": options,
        # The release has texts, which may be a number or a letter.
        "answer": options.index(answer) if answer in options else row["answer"],
        "category": task,
        "start": row.get("start"),
        "end": row.get("end"),
    }


def _egoschema(path: Path) -> Iterator[tuple[str, _Make]]:
    """The release's ``q_uid question option 0 .. option 4``, or ``video_idx question option`` as on Hugging Face.

    Answers are in the row or in ``subset_answers.json`` beside it.
    """
    beside = path.parent / "subset_answers.json"
    try:
        answers = _json_line(beside.read_text(encoding="utf-8-sig")) if beside.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{beside}: {error}") from error
    return ((where, partial(_egoschema_row, make, answers)) for where, make in _table(path))


def _egoschema_row(make: Callable[[], Row], answers: Mapping[str, int]) -> Row | None:
    row = make()
    name = row["q_uid"] if "video_idx" not in row else row["video_idx"]
    given = (row.get("answer"), row.get("truth"), answers.get(name))
    answer = next((one for one in given if one is not None and one != ""), None)
    if answer is None:
        # Only 500 of the 5000 questions have public answers.
        return None
    options = row.get("option")
    if isinstance(options, str):
        options = _listed_texts(options)
    return {
        "id": name,
        "video": f"{name}.mp4",
        "question": row["question"],
        "options": options or [row[key] for key in sorted(row) if re.fullmatch(r"option ?\d", key)],
        "answer": answer,
        "category": "egoschema",
    }


_READERS: dict[str, _Reader] = {
    "jsonl": _json_lines,
    "videomme": _video_mme,
    "mvbench": _mvbench,
    "egoschema": _egoschema,
    "tvbench": _tvbench,
}
