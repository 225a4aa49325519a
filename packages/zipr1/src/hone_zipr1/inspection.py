"""What a prompt is and what selection could save of it, without weights; and what each layer kept, with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone_core.runs import Report, Run

from .config import GRID, AskConfig, ProfileConfig
from .inputs import find_asked

__all__ = ["InspectReport", "ProfileReport", "inspect", "profile"]


@dataclass(frozen=True)
class InspectReport:
    """What a prompt is, and what arithmetic allows.

    Attributes:
        layout: of the prompt, as text.
        tokens: of the prompt.
        visual: of these.
        probe_rows: rows of the attention map that the selection looks at; None: all.
        uniform: threshold to the ratio of attention without any structure, on these rows.
        kv_bytes: keys and values of a token, over all layers, in bfloat16.
        prefill_bound: most that prefill can gain where a quarter is kept.
        decode_bound: the same of a decoding step, by batch.
    """

    layout: str
    tokens: int
    visual: int
    probe_rows: int | None
    uniform: dict[float, float]
    kv_bytes: int
    prefill_bound: float
    decode_bound: dict[int, float]

    def __str__(self) -> str:
        rows = "all rows" if self.probe_rows is None else f"{self.probe_rows} probe rows"
        lines = [self.layout, "", f"{self.tokens} tokens, {self.visual} visual; the selection looks at {rows}"]
        ratios = ", ".join(f"{100 * ratio:.1f} % at p = {p:g}" for p, ratio in self.uniform.items())
        lines.append(f"uniform attention would keep {ratios}")
        lines.append(f"cache, dense: {self.tokens * self.kv_bytes / 2**20:.1f} MiB, {self.kv_bytes} bytes a token")
        decode = ", ".join(f"{bound:.2f}x at batch {batch}" for batch, bound in self.decode_bound.items())
        lines.append(f"with a quarter kept, prefill gains at most {self.prefill_bound:.2f}x, decoding {decode}")
        return "\n".join(lines)


def inspect(
    *,
    ask: str,
    model: str | None = None,
    image: Path | None = None,
    video: Path | None = None,
    frames: int = 32,
    preset: str = "paper",
) -> InspectReport:
    """Print what a prompt is and what selection could save of it; weights are not read.

    Args:
        ask: Question; of the tiny host such as "digit B3".
        model: Folder or hub address of a model (default: the tiny host and a generated mosaic).
        image: Picture.
        video: File, folder of pictures or .npy array, in place of a picture.
        frames: Frames to sample of a video.
        preset: Selection by name; of the tiny host the preset is tiny unless another is named.

    Raises:
        FileNotFoundError: There is no such picture or video.
        ValueError: Flags do not go together, or the model cannot take the selection.
        CheckpointError: No tiny host is packaged.
    """
    cfg = find_asked(AskConfig(ask=ask, model=model, image=image, video=video, frames=frames, preset=preset))
    import torch
    from hone_lm.layouts import find_layouts

    from . import method
    from .bench import decode_bound, prefill_bound
    from .sample import processed, selection_of

    config, inputs = processed(cfg)
    chosen = selection_of(cfg)
    (layout,) = find_layouts(config, inputs)
    tokens, protected = len(layout.frame), layout.num_text if chosen.protect == "text" else 1
    rows = None if chosen.rows == "all" else method.probe_rows(tokens, chosen.recent, chosen.random, chosen.seed)
    text = config.get_text_config()
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return InspectReport(
        layout=str(layout),
        tokens=tokens,
        visual=layout.num_visual,
        probe_rows=None if rows is None else len(rows),
        uniform={p: method.uniform_ratio(p, tokens, rows, protected) for p in (0.8, GRID[0], GRID[-1])},
        kv_bytes=4 * text.num_key_value_heads * dim * text.num_hidden_layers,
        prefill_bound=prefill_bound(text, tokens, 0.25),
        decode_bound={batch: decode_bound(text, tokens, batch, 0.25, torch.bfloat16.itemsize) for batch in (1, 8, 64)},
    )


@dataclass(frozen=True, kw_only=True)
class ProfileReport(Report):
    """What each layer kept of a prompt; as text, a table."""

    def __str__(self) -> str:
        names = ("token_ratio", "visual_ratio", "kept_mass", "sink")
        values = {(row.metric, row.labels.get("layer")): 100 * row.value for row in self.rows}
        lines = ["layer  tokens kept, %  visual ones, %  mass kept, %  mass of the first token, %"]
        for layer in sorted(at for metric, at in values if metric == "token_ratio" and at is not None):
            cells = [values.get((name, layer)) for name in names]
            shown = ["-" if cell is None else f"{cell:.1f}" for cell in cells]
            lines.append(f"{layer:>5}{shown[0]:>16}{shown[1]:>16}{shown[2]:>14}{shown[3]:>28}")
        mean = f"all layers {values['token_ratio', None]:.1f} %, without the first token "
        mean += f"{values['ratio_without_sink', None]:.1f} %"
        mean += f"; uniform attention would keep {values['uniform_ratio', None]:.1f} %"
        lines += [mean, f"maps     {self.path / 'figures' / 'kept.png'}", f"results  {self.path / 'results.json'}"]
        return "\n".join(lines)


def profile(cfg: ProfileConfig, run: Run) -> ProfileReport:
    """Run one prompt, and write down and draw what each layer kept."""
    import torch
    from hone_core.devices import resolve_device
    from hone_lm.layouts import find_layouts

    from . import plots
    from .models import attach
    from .sample import load_asked, selection_of

    model, _, inputs = load_asked(cfg, resolve_device(run.device))
    selection = selection_of(cfg)
    with torch.no_grad(), attach(model, selection) as handle:
        model(**inputs, use_cache=False, logits_to_keep=1)
        stats = handle.stats
    assert stats is not None, "a prefill leaves them"
    (layout,) = find_layouts(model.config, {name: value.cpu() for name, value in inputs.items()})
    visual = layout.frame >= 0
    for layer, keep in sorted(stats.keep.items()):
        found = {"token_ratio": stats.layer_ratio[layer, 0], "visual_ratio": keep[0].cpu()[visual].float().mean()}
        found |= {
            name: part[layer][0] for name, part in (("kept_mass", stats.mass), ("sink", stats.sink)) if layer in part
        }
        for metric, value in found.items():
            run.row(metric, float(value), better="none", variant=selection.label, labels={"layer": layer})
    run.row("token_ratio", float(stats.ratio[0]), better="lower", variant=selection.label)
    run.row("ratio_without_sink", float(stats.ratio_without_sink[0]), better="lower", variant=selection.label)
    run.row("uniform_ratio", float(stats.uniform(selection.p)[0]), better="none", variant=selection.label)
    layers = _spread(len(stats.keep), cfg.shown)
    frames = _spread(layout.num_frames, cfg.shown)
    sides = dict(enumerate(_sides(model.config, inputs)))
    maps = []
    for frame in frames:
        at = layout.frame == frame
        height = sides.get(frame, (1, 0))[0]
        # A class without a grid of its own has its tokens in one row.
        height = height if int(at.sum()) % height == 0 else 1
        maps.append([stats.keep[layer][0].cpu()[at].view(height, -1).int().tolist() for layer in layers])
    plots.kept_maps(maps, frames, layers, run.figures / "kept.png", title=f"{selection.label}, kept is dark")
    return ProfileReport.of(run)


def _spread(count: int, shown: int) -> list[int]:
    """So many of ``count``, the first and the last among them."""
    if count <= shown:
        return list(range(count))
    return sorted({round(at * (count - 1) / max(1, shown - 1)) for at in range(shown)})


def _sides(config: Any, inputs: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Rows and columns of visual tokens of each frame, where the processor says them (the Qwen classes)."""
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    for name in ("image_grid_thw", "video_grid_thw"):
        for frames, height, width in inputs.get(name, ()):
            for _ in range(int(frames)):
                yield int(height) // merge, int(width) // merge
