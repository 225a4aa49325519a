"""Where the video is in a token sequence: visual positions, the frame of each, and the spans of text around them.

A processor expands one video placeholder into hundreds of ids. What a run of them means differs per model class: all
frames in one block (LLaVA, Qwen2-VL), or a block per frame with text such as timestamps between (Qwen3-VL, InternVL,
SmolVLM, VideoLLaMA3). "Frame" of a layout is what the decoder sees as one. Where a class fuses several sampled frames
into one before the decoder (Qwen: two), a layout has that many times fewer frames than were sampled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from hone_core.io import atomic_write_json
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["RULES", "TEXT", "TokenLayout", "find_layouts", "locate_spans"]

TEXT = -1
"""Frame of a position that shows no frame."""

Span = tuple[int, int]
"""Positions [start, stop)."""


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """What each position of one prompt is.

    Attributes:
        model_type: of the config, such as "qwen2_5_vl".
        frame: ``[tokens]``, the frame that a visual position shows, counted from 0; -1 is text or padding.
        real: ``[tokens]``, False where the batch is padded.
        separators: positions that carry a placeholder id and show no frame (LLaVA-OneVision's newline embedding), or
            that end a row of an image (Mistral 3).
        source_frames: sampled frames that the class fuses into one frame of the layout.
        sampled: frames that were sampled from the video and given to the processor; None where that is not known.
        spans: name to [start, stop): ``prefix``, ``video``, ``suffix``, ``last``, and what ``locate_spans`` adds.
        positions: name to any positions, such as the visual tokens that a pruning method keeps.
        images: frames that are an image and no frame of a video; None where a class has one id for both.
    """

    model_type: str
    frame: Int[Tensor, " tokens"]
    real: Bool[Tensor, " tokens"]
    separators: tuple[int, ...] = ()
    source_frames: int = 1
    sampled: int | None = None
    spans: dict[str, Span] = field(default_factory=dict)
    positions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    images: tuple[int, ...] | None = None

    @property
    def num_frames(self) -> int:
        """Frames that the decoder tells apart: those after fusing, not those sampled."""
        return int(self.frame.max()) + 1

    @property
    def num_visual(self) -> int:
        """Visual positions."""
        return int((self.frame >= 0).sum())

    @property
    def num_text(self) -> int:
        """Positions of text, padding excluded."""
        return int((self.real & (self.frame < 0)).sum())

    @property
    def tokens_per_frame(self) -> tuple[int, ...]:
        """Visual positions of each frame."""
        return tuple(torch.bincount(self.frame[self.frame >= 0], minlength=self.num_frames).tolist())

    @property
    def between(self) -> tuple[int, ...]:
        """Positions of text between frames, such as timestamps."""
        start, stop = self.spans["video"]
        inside = torch.arange(start, stop)[self.frame[start:stop] < 0]
        return tuple(position for position in inside.tolist() if position not in self.separators)

    def mask(self, name: str) -> Bool[Tensor, " tokens"]:
        """Positions of a span or a name, or of ``visual``, ``text`` (after the first visual token) or ``between``.

        Raises:
            ValueError: There is no such span.
        """
        positions = torch.zeros(len(self.frame), dtype=torch.bool)
        if name == "visual":
            return self.frame >= 0
        if name == "text":
            positions[self.spans["video"][0] :] = True
            return positions & (self.frame < 0) & self.real
        if name == "between":
            positions[list(self.between)] = True
            return positions
        if name in self.positions:
            positions[list(self.positions[name])] = True
            return positions
        if name not in self.spans:
            known = ["visual", "text", "between", *self.spans, *self.positions]
            raise ValueError(
                f"span {name!r} is not known here; expected one of {', '.join(known)}. "
                "Spans such as question and options are found by locate_spans."
            )
        start, stop = self.spans[name]
        positions[start:stop] = True
        return positions

    def with_spans(self, spans: Mapping[str, Span]) -> TokenLayout:
        """The layout with further named spans.

        Raises:
            ValueError: A span lies outside the sequence.
        """
        for name, (start, stop) in spans.items():
            if not 0 <= start < stop <= len(self.frame):
                raise ValueError(f"span {name} must lie in [0, {len(self.frame)}); got [{start}, {stop})")
        return replace(self, spans=self.spans | dict(spans))

    def with_positions(self, positions: Mapping[str, Sequence[int] | Tensor]) -> TokenLayout:
        """The layout with further named positions: indices, or a boolean mask over the sequence.

        Raises:
            ValueError: There are none under a name, or one lies outside the sequence.
        """
        found: dict[str, tuple[int, ...]] = {}
        for name, given in positions.items():
            at = torch.as_tensor(given)
            if at.dtype == torch.bool and len(at) != len(self.frame):
                raise ValueError(f"a mask of positions {name} must have length {len(self.frame)}; got {len(at)}")
            indices = (at.nonzero().flatten() if at.dtype == torch.bool else at).tolist()
            if not indices or not all(0 <= index < len(self.frame) for index in indices):
                raise ValueError(f"positions {name} must lie in [0, {len(self.frame)}), at least one; got {indices}")
            found[name] = tuple(sorted(set(indices)))
        return replace(self, positions=self.positions | found)

    def cut(self, tokens: int) -> TokenLayout:
        """The layout of the first so many positions, without what comes after.

        Raises:
            ValueError: The video would be cut.
        """
        stop = max([self.spans["video"][1], *(position + 1 for position in self.separators)])
        if tokens < stop:
            raise ValueError(f"the video ends at position {stop}; it cannot be cut at {tokens}")
        if tokens >= len(self.frame):
            return self
        real = self.real[:tokens]
        spans = {name: (a, min(b, tokens)) for name, (a, b) in self.spans.items() if a < tokens}
        end = int(real.nonzero()[-1]) + 1
        spans["last"] = (end - 1, end)
        positions = {name: tuple(index for index in at if index < tokens) for name, at in self.positions.items()}
        return replace(self, frame=self.frame[:tokens], real=real, spans=spans, positions=positions)

    def _sampling(self) -> str:
        """How the frames that were sampled became those of the layout."""
        fused, sampled = self.source_frames, self.sampled
        if sampled is None:
            return f"each frame is {fused} sampled ones, fused before the decoder"
        line = f"{sampled} frames sampled"
        if fused > 1:
            line += f", {fused} fused into each of the {self.num_frames} that the decoder sees"
        # A last group that is not full is filled up by the processor.
        if math.ceil(sampled / fused) != self.num_frames:
            line += f"; expected {math.ceil(sampled / fused)} in the layout, the processor made {self.num_frames}"
        return line

    def to_dict(self) -> dict[str, Any]:
        """JSON types; frames are run-length encoded as [frame, count]."""
        return {
            "model_type": self.model_type,
            "tokens": len(self.frame),
            "sampled": self.sampled,
            "source_frames": self.source_frames,
            "frames": self.num_frames,
            "tokens_per_frame": list(self.tokens_per_frame),
            "padding": int((~self.real).sum()),
            "separators": list(self.separators),
            "spans": {name: list(span) for name, span in self.spans.items()},
            "positions": {name: list(at) for name, at in self.positions.items()},
            "images": None if self.images is None else list(self.images),
            "runs": [[value, stop - start] for value, start, stop in _runs(self.frame.tolist())],
            "real_runs": [[int(value), stop - start] for value, start, stop in _runs(self.real.tolist())],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenLayout:
        """Read what ``to_dict`` wrote."""
        frame = [value for value, count in data["runs"] for _ in range(count)]
        real = [bool(value) for value, count in data["real_runs"] for _ in range(count)]
        return cls(
            model_type=data["model_type"],
            frame=torch.tensor(frame),
            real=torch.tensor(real),
            separators=tuple(data["separators"]),
            source_frames=data["source_frames"],
            sampled=data.get("sampled"),
            spans={name: (int(a), int(b)) for name, (a, b) in data["spans"].items()},
            positions={name: tuple(at) for name, at in data.get("positions", {}).items()},
            images=None if data.get("images") is None else tuple(data["images"]),
        )

    def save(self, path: str | Path) -> Path:
        """Write the layout as JSON."""
        return atomic_write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> TokenLayout:
        """Read a file written by ``save``."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def __str__(self) -> str:
        counts = self.tokens_per_frame
        each = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        lines = [
            f"{self.model_type}: {len(self.frame)} positions, {self.num_frames} frames of {each} tokens, "
            f"{self.num_text} text" + (f", {int((~self.real).sum())} padding" if not self.real.all() else "")
        ]
        if self.sampled is not None or self.source_frames > 1:
            lines.append(self._sampling())
        if self.images:
            lines.append(f"images, no frames of a video: {', '.join(map(str, self.images))}")
        if self.separators:
            lines.append(f"separators (placeholder id, no frame) at {', '.join(map(str, self.separators))}")
        if self.between:
            lines.append(f"{len(self.between)} text positions between frames, by which one can reach another")
        lines += [f"  {name:<10} [{start}, {stop})" for name, (start, stop) in self.spans.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Row:
    """One prompt as a rule sees it: ``grids`` hands out a (T, H, W) per video run and per image run."""

    config: Any
    grids: dict[str, Iterator[Any]]
    gridded: bool  # whether the grids can cut a run
    tokens_per_frame: int | None
    sizes: Iterator[Any]  # (height, width) in pixels of each image, where the processor gives them
    image_tokens: int | None  # of each image, where a template puts several into a run


Rule = Callable[[_Row, str, int], tuple[list[int], int]]
"""(row, "image" or "video", run length) to the token count of each frame in the run, and trailing separators."""


def _one_frame(row: _Row, kind: str, length: int) -> tuple[list[int], int]:
    """A run is a frame (text stands between frames), or an image."""
    return [length], 0


def _grid(row: _Row, kind: str, length: int) -> tuple[list[int], int]:
    """Qwen2-VL, Qwen2.5-VL: (T', H, W) in patches, merged 2 x 2, T' temporal patches in one run."""
    grid = next(row.grids[kind], None)
    if grid is None:
        raise ValueError(f"{kind}_grid_thw has fewer rows than the prompt has {kind}s; pass what the processor made")
    time, height, width = (int(value) for value in grid)
    each = height * width // row.config.vision_config.spatial_merge_size**2
    if time * each != length:
        raise ValueError(
            f"a {kind} of grid {time} x {height} x {width} takes {time * each} tokens; the prompt has a run of {length}"
        )
    return [each] * time, 0


def _side(value: Any) -> int:
    """Pixels of a square side that a config gives as a number or a pair."""
    return int(value if isinstance(value, int) else value[0])


def _patches(vision: Any) -> int:
    return _side(vision.image_size) // _side(vision.patch_size)


_TRAILING = {"llava_onevision": 1}
"""``model_type`` to the separators that end a video's run."""


def _llava_onevision(row: _Row, kind: str, length: int) -> tuple[list[int], int]:
    """Frames pooled to ceil(side / 2) squared tokens, and one newline at the end of a video."""
    if kind == "image":
        return [length], 0
    return _split(length - 1, math.ceil(_patches(row.config.vision_config) / 2) ** 2, "LLaVA-OneVision"), 1


def _llava_next_video(row: _Row, kind: str, length: int) -> tuple[list[int], int]:
    """Frames pooled by ``spatial_pool_stride``, nothing between or after."""
    if kind == "image":
        return [length], 0
    side = _patches(row.config.vision_config) // row.config.spatial_pool_stride
    return _split(length, side**2, "LLaVA-NeXT-Video"), 0


def _video_llava(row: _Row, kind: str, length: int) -> tuple[list[int], int]:
    """All patches and the class token of each frame."""
    if kind == "image":
        return [length], 0
    return _split(length, _patches(row.config.vision_config) ** 2 + 1, "Video-LLaVA"), 0


def _generic(row: _Row, kind: str, length: int) -> tuple[list[int], int]:
    """A grid says whether a run is all frames of a video or one of them; without one it is a frame.

    ``tokens_per_frame`` comes before this rule, as before every other.
    """
    grid = next(row.grids[kind], None) if row.gridded else None
    if grid is None:
        return [length], 0
    time, height, width = (int(value) for value in grid)
    each = height * width // row.config.vision_config.spatial_merge_size**2
    if length == time * each:
        return [each] * time, 0
    if length == each:
        # A run per frame, with text between, as in Qwen3-VL: the next runs are the other frames of this video.
        row.grids[kind] = chain(repeat((1, height, width), time - 1), row.grids[kind])
        return [each], 0
    raise ValueError(
        f"a {kind} of grid {time} x {height} x {width} takes {time * each} tokens, {each} per frame; the prompt has a "
        f"run of {length}. Pass tokens_per_frame if the class has other frames"
    )


def _split(length: int, each: int, name: str) -> list[int]:
    if length < each or length % each:
        raise ValueError(
            f"{name} takes {each} tokens per frame; a run of {length} is no multiple. Put text between videos, or pass "
            "tokens_per_frame"
        )
    return [each] * (length // each)


def _cut(row: _Row, kind: str, length: int) -> tuple[list[int], int]:
    """Frames of ``row.tokens_per_frame``, and the separators that the class puts after them."""
    trailing = _TRAILING.get(getattr(row.config, "model_type", ""), 0) if kind == "video" else 0
    each, body = row.tokens_per_frame, length - trailing
    assert each is not None
    if body < each or body % each:
        after = f" and {trailing} separator" if trailing else ""
        raise ValueError(
            f"tokens_per_frame={each} does not divide a run of {body} {kind} tokens{after}; give a divisor of {body}"
        )
    return [each] * (body // each), trailing


RULES: dict[str, Rule] = {
    "qwen2_vl": _grid,
    "qwen2_5_vl": _grid,
    "qwen3_vl": _one_frame,
    "qwen3_vl_moe": _one_frame,
    "llava_onevision": _llava_onevision,
    "llava_next_video": _llava_next_video,
    "internvl": _one_frame,
    "smolvlm": _one_frame,
    "video_llama_3": _one_frame,
    "video_llava": _video_llava,
}
"""``model_type`` to the rule that cuts a run of placeholder ids into frames; any other model gets the generic one."""


def find_layouts(model: Any, inputs: Mapping[str, Any], *, tokens_per_frame: int | None = None) -> list[TokenLayout]:
    """Find the layout of each prompt in a batch.

    Args:
        model: The model, or its config.
        inputs: What the processor made: ``input_ids`` ``[batch, tokens]``, and where the class has them
            ``attention_mask`` and ``video_grid_thw``; without a grid, ``position_ids`` of rows and columns, which
            newer ``generate`` hands to the model in its place.
        tokens_per_frame: Cut runs of video placeholders into frames of so many tokens, in place of the class's own
            rule; in a prompt without any, those of image placeholders, which some classes use for video. Needed for a
            class without a rule whose frames follow each other without text between.

    Raises:
        ValueError: The inputs hold no ``input_ids``, or lack grids or image sizes that the class needs; a prompt has no
            visual token, a run of them is no whole number of frames, or ``tokens_per_frame`` is not positive or does
            not divide a run.
    """
    if tokens_per_frame is not None and tokens_per_frame < 1:
        raise ValueError(f"tokens_per_frame must be positive; got {tokens_per_frame}")
    config = getattr(model, "config", model)
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError("inputs must hold input_ids: the layout is read off the placeholder ids")
    ids = ids.detach().to("cpu")
    placeholders = _placeholders(config)
    padding = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(padding, Tensor) and padding.dim() == 2:
        real = padding.detach().to("cpu").bool()
    grids = {kind: _rows(inputs.get(f"{kind}_grid_thw")) for kind in ("image", "video")}
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    positions = inputs.get("position_ids")
    if isinstance(merge, int) and not any(grids.values()) and isinstance(positions, Tensor) and positions.dim() == 3:
        grids = _grids_of_positions(positions[-2:].to("cpu"), ids, real, placeholders, merge)
    gridded = isinstance(merge, int) and any(grids.values())
    sizes = _rows(inputs.get("image_sizes"))
    each = None
    if tokens_per_frame is None and getattr(config, "model_type", "") not in _BY_ROWS:
        runs = [run for index in range(len(ids)) for run in _visual_runs(ids[index], real[index], placeholders)]
        each = _tokens_of_images([stop - start for kind, start, stop in runs if kind == "image"], sizes)
    grids_left = {kind: iter(rows) for kind, rows in grids.items()}
    row = _Row(config, grids_left, gridded, tokens_per_frame, iter(sizes), each)
    return [_layout(row, ids[index], real[index], placeholders) for index in range(len(ids))]


def locate_spans(
    tokenizer: Any, ids: Sequence[int] | Tensor, texts: Mapping[str, str], *, start: int = 0
) -> dict[str, Span]:
    """Find the positions of pieces of text in a tokenised prompt.

    Args:
        tokenizer: Of the model.
        ids: ``[tokens]``.
        texts: Name to a piece of text that occurs in the prompt at or after ``start``; the last occurrence counts.
        start: Position to search from, such as the end of the video.

    Returns:
        Name to [start, stop): every token that holds a character of the piece.

    Raises:
        ValueError: A piece does not occur.
    """
    ids = [int(value) for value in ids]
    # Lengths of growing prefixes place every character, whatever the tokenizer does with bytes. Spaces do not count:
    # many tokenizers drop them between special tokens, or at the start.
    ends, text = [], ""
    for stop in range(start + 1, len(ids) + 1):
        text = "".join(tokenizer.decode(ids[start:stop]).split())
        ends.append(len(text))
    found = {}
    for name, piece in texts.items():
        wanted = "".join(piece.split())
        at = text.rfind(wanted)
        if at < 0 or not wanted:
            raise ValueError(f"{name} {piece!r} does not occur in the prompt after position {start}")
        first = next(i for i, end in enumerate(ends) if end > at)
        last = next(i for i, end in enumerate(ends) if end >= at + len(wanted))
        found[name] = (start + first, start + last + 1)
    return found


def _rows(grid: Any) -> list[Tensor]:
    return [] if grid is None else list(torch.as_tensor(grid).detach().to("cpu"))


def _placeholders(config: Any) -> dict[int, str]:
    """Placeholder id to "image" or "video".

    Raises:
        ValueError: The config names none: not a vision-language model.
    """
    found: dict[int, str] = {}
    for kind in ("image", "video"):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            value = getattr(config, name, None)
            if isinstance(value, int):
                found.setdefault(value, kind)
    if not found:
        raise ValueError(
            f"the config of {getattr(config, 'model_type', type(config).__name__)} names no image or video token; "
            "expected a video language model, whose config has video_token_id or image_token_id"
        )
    return found


def _visual_runs(ids: Tensor, real: Tensor, placeholders: dict[int, str]) -> list[tuple[str, int, int]]:
    """Runs of placeholders in a prompt, as (kind, start, stop)."""
    kinds = [placeholders.get(value) if keep else None for value, keep in zip(ids.tolist(), real.tolist(), strict=True)]
    return [(kind, start, stop) for kind, start, stop in _runs(kinds) if kind]


def _grids_of_positions(
    positions: Tensor, ids: Tensor, real: Tensor, placeholders: dict[int, str], merge: int
) -> dict[str, list[Any]]:
    """The (T, H, W) in patches of each run, from its rotary positions; none at all where a run is no such grid.

    Args:
        positions: ``[2, batch, tokens]``, row and column of each visual token.
        ids: ``[batch, tokens]``.
        real: ``[batch, tokens]``.
        placeholders: Id to kind.
        merge: Patches on a side of a token.
    """
    grids: dict[str, list[Any]] = {"image": [], "video": []}
    for index in range(len(ids)):
        for kind, start, stop in _visual_runs(ids[index], real[index], placeholders):
            rows, columns = positions[:, index, start:stop]
            height, width = len(rows.unique()), len(columns.unique())
            time = (stop - start) // (height * width)
            one = torch.stack([rows - rows.min(), columns - columns.min()], 1)
            if not torch.equal(one, torch.cartesian_prod(torch.arange(height), torch.arange(width)).repeat(time, 1)):
                return {"image": [], "video": []}
            grids[kind].append((time, height * merge, width * merge))
    return grids


_BY_ROWS = ("mistral3",)
"""``model_type`` whose images are a run per row of patches, each ended by a token of its own."""


def _tokens_of_images(lengths: Sequence[int], sizes: Sequence[Any]) -> int | None:
    """Tokens of each image where runs hold several, which a template put side by side; None where each has its own.

    Raises:
        ValueError: They do, and the images differ in size.
    """
    if not lengths or len(sizes) <= len(lengths):
        return None
    total = sum(lengths)
    alike = all(torch.equal(size, sizes[0]) for size in sizes) and total % len(sizes) == 0
    each = total // len(sizes)
    if not alike or any(length % each for length in lengths):
        raise ValueError(
            f"{len(sizes)} images of different sizes stand in {len(lengths)} runs of tokens: which token is of which "
            "image cannot be told. Put text between the images"
        )
    return each


def _parts(row: _Row, runs: Sequence[tuple[str, int, int]]) -> Iterator[list[tuple[str, int, int]]]:
    """Runs that belong together: one each, except where an image is a run per row of patches.

    Raises:
        ValueError: The processor's image sizes are missing, or are not those of the prompt.
    """
    if getattr(row.config, "model_type", "") not in _BY_ROWS or row.tokens_per_frame is not None:
        yield from ([run] for run in runs)
        return
    side = _side(row.config.vision_config.patch_size) * row.config.spatial_merge_size
    left = list(runs)
    while left:
        size = next(row.sizes, None)
        if size is None:
            raise ValueError("inputs must hold image_sizes, as the processor made them: an image is a run per row")
        rows, columns = int(size[0]) // side, int(size[1]) // side
        image, left = left[:rows], left[rows:]
        if len(image) < rows or any(stop - start != columns for _, start, stop in image):
            raise ValueError(
                f"an image of {int(size[0])} x {int(size[1])} pixels takes {rows} rows of {columns} tokens; the prompt "
                f"has runs of {[stop - start for _, start, stop in image]}"
            )
        yield image


def _layout(row: _Row, ids: Tensor, real: Tensor, placeholders: dict[int, str]) -> TokenLayout:
    frame = torch.full((len(ids),), TEXT, dtype=torch.long)
    separators: list[int] = []
    runs = _visual_runs(ids, real, placeholders)
    if not runs:
        names = ", ".join(f"{kind} id {value}" for value, kind in placeholders.items())
        raise ValueError(
            f"no visual token in a prompt of {len(ids)} tokens (looked for {names}). Give the processor a video and "
            "its placeholder in the text; what is done to no token would look like a result"
        )
    model_type = getattr(row.config, "model_type", "")
    rule = RULES.get(model_type, _generic)
    frames_of = "video" if any(kind == "video" for kind, _, _ in runs) else "image"
    count, images = 0, []
    for part in _parts(row, runs):
        kind, start, stop = part[0]
        if len(part) > 1:
            for _, start, stop in part:
                frame[start:stop] = count
            separators += (stop for _, _, stop in part[:-1])
            images.append(count)
            count += 1
            continue
        cut = row.tokens_per_frame is not None and kind == frames_of
        if kind == "image" and row.image_tokens is not None:
            sizes, trailing = [row.image_tokens] * ((stop - start) // row.image_tokens), 0
        else:
            sizes, trailing = (_cut if cut else rule)(row, kind, stop - start)
        if kind == "image":
            images += range(count, count + len(sizes))
        at = start
        for size in sizes:
            frame[at : at + size] = count
            at, count = at + size, count + 1
        separators += range(stop - trailing, stop)
    # An image id stands for frames too where a class has no other.
    video_like = "video" if "video" in placeholders.values() else "image"
    unknown = rule is _generic and row.tokens_per_frame is None and not row.gridded
    if unknown and len(runs) == 1 and runs[0][0] == video_like:
        length = runs[0][2] - runs[0][1]
        raise ValueError(
            f"{model_type or 'this class'} has no layout rule, and its {length} {video_like} tokens follow each other "
            f"without text: pass tokens_per_frame (--tokens-per-frame), {length} for a single frame"
        )
    visual = (frame >= 0).nonzero().flatten()
    first, last = int(visual[0]), int(visual[-1])
    ends = real.nonzero().flatten()
    begin, end = int(ends[0]), int(ends[-1]) + 1
    after = max([last, *separators]) + 1
    spans = {"prefix": (begin, first), "video": (first, last + 1), "suffix": (after, end), "last": (end - 1, end)}
    # The patch embedding of Qwen's classes fuses two sampled frames.
    fused = getattr(getattr(row.config, "vision_config", None), "temporal_patch_size", 1)
    if isinstance(fused, (list, tuple)):
        fused = fused[0]
    return TokenLayout(
        model_type=model_type,
        frame=frame,
        real=real,
        separators=tuple(separators),
        images=tuple(images) if "video" in placeholders.values() else None,
        source_frames=fused if isinstance(fused, int) else 1,
        spans={name: span for name, span in spans.items() if span[0] < span[1]},
    )


def _runs(values: Sequence[Any]) -> list[tuple[Any, int, int]]:
    """Maximal runs of equal values as (value, start, stop)."""
    found: list[tuple[Any, int, int]] = []
    for index, value in enumerate(values):
        if found and found[-1][0] == value:
            found[-1] = (value, found[-1][1], index + 1)
        else:
            found.append((value, index, index + 1))
    return found
