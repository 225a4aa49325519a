"""What each position of a prompt is, printed. Light to import: its arguments are the flags of ``inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["inspect"]


def inspect(
    *,
    model: str | None = None,
    video: Path | None = None,
    ask: str | None = None,
    frames: int | None = None,
    tokens_per_frame: int | None = None,
    save: Path | None = None,
    host: Path | None = None,
) -> Any:
    """Print what each position of a prompt is: frames, text between and around them, separators.

    Args:
        model: Folder or hub address of a Video-LLM (default: the tiny host and a generated clip).
        video: File, folder of pictures or .npy array.
        ask: Question.
        frames: Frames to sample, before a model fuses any: at 32, Qwen's layout has 16 (default: 32).
        tokens_per_frame: Cut the video into frames of so many tokens, in place of the rule of the model's class; needed
            for a class without one whose frames follow each other without text.
        save: JSON file to write the layout to.
        host: A host.safetensors made by train-host (default: the packaged one).

    Raises:
        FileNotFoundError: There is no such video.
        ValueError: Flags do not go together.
    """
    from .config import GenerateConfig

    if model is None:
        if (video, ask, frames, tokens_per_frame) != (None, None, None, None):
            raise ValueError(
                "video, ask, frames and tokens-per-frame belong to --model; "
                "the tiny host is asked about a generated clip"
            )
        from .data import generated_items
        from .host import load_host
        from .sample import look

        loaded = load_host(path=host)
        item = generated_items(1, loaded.config.clip)[0]
        cfg = GenerateConfig(
            model="host", video=Path("generated"), ask=item.question, options=item.options, style="text"
        )
        layout = look(loaded.model, loaded.processor, cfg, item.clip)
    else:
        if host is not None:
            raise ValueError("give model, a Video-LLM, or host, a tiny host; not both")
        if video is None or ask is None:
            raise ValueError("a model needs a video and a question; give --video and --ask")
        if not video.exists():
            raise FileNotFoundError(f"there is no video {video}")
        from hone_lm.video import check_video
        from transformers import AutoConfig, AutoProcessor

        from .models import check_model
        from .sample import look

        check_video(video)
        cfg = GenerateConfig(model=model, video=video, ask=ask, frames=frames or 32, tokens_per_frame=tokens_per_frame)
        check_model(model)
        layout = look(AutoConfig.from_pretrained(model), AutoProcessor.from_pretrained(model), cfg)
    if save is not None:
        layout.save(save)
    return layout
