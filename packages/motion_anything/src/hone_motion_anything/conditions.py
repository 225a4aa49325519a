"""What a masked transformer takes: the condition, and checks that tokens, time steps and weights belong together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Condition", "check_tokens", "check_weights"]


@dataclass(frozen=True)
class Condition:
    """What a motion is to follow; text, music, or both.

    Attributes:
        text: ``[B, D]`` one vector for each text; None without texts.
        music: ``[B, T, D']`` one vector for each time step; None without music.
        no_text: ``[B]`` rows whose text is left out for a learned vector.
        no_music: ``[B]`` rows whose music is left out.
    """

    text: Float[Tensor, "batch text_width"] | None = None
    music: Float[Tensor, "batch time music_width"] | None = None
    no_text: Bool[Tensor, " batch"] | None = None
    no_music: Bool[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.music is None:
            raise ValueError("a condition needs a text, music, or both")

    @property
    def batch(self) -> int:
        """Rows."""
        found = self.text if self.text is not None else self.music
        assert found is not None
        return len(found)

    def dropped(self, text: Tensor, music: Tensor) -> Condition:
        """The same with the marked rows ``[B]`` of each modality left out too."""
        return replace(
            self,
            no_text=text if self.no_text is None else self.no_text | text,
            no_music=music if self.no_music is None else self.no_music | music,
        )

    def check(self, batch: int, device: torch.device, text_width: int, music_width: int | None = None) -> None:
        """See that it fits a model and its tokens.

        Args:
            batch: Rows of the tokens.
            device: Of the tokens.
            text_width: Numbers of a text's vector.
            music_width: Numbers of a time step of the music; None where the model takes none.

        Raises:
            TypeError: A vector is not of floating-point numbers.
            ValueError: A shape or a device is another.
        """
        shapes: dict[str, tuple[int | None, ...]] = {
            "text": (batch, text_width),
            "music": (batch, None, music_width),
            "no_text": (batch,),
            "no_music": (batch,),
        }
        for name, wanted in shapes.items():
            value: Tensor | None = getattr(self, name)
            if value is None:
                continue
            if value.dim() != len(wanted) or any(
                size not in (None, found) for size, found in zip(wanted, value.shape, strict=True)
            ):
                shown = ", ".join("time" if size is None else str(size) for size in wanted)
                raise ValueError(
                    f"the condition's {name} must be [{shown}] for a batch of {batch}; got {list(value.shape)}"
                )
            if value.device != device:
                raise ValueError(
                    f"the condition's {name} is on {value.device} and the tokens are on {device}; move it there"
                )
            if name in ("text", "music") and not value.is_floating_point():
                raise TypeError(
                    f"the condition's {name} must be vectors of floating-point numbers, not ids; got {value.dtype}"
                )

    def rows(self, at: Tensor | slice) -> Condition:
        """Some of the rows."""
        parts = {name: getattr(self, name) for name in ("text", "music", "no_text", "no_music")}
        return Condition(**{name: None if value is None else value[at] for name, value in parts.items()})


def check_tokens(ids: Tensor, valid: Tensor) -> None:
    """See that tokens ``[B, T, P]`` and the time steps that are there belong together; without looking at values.

    Raises:
        TypeError: A dtype is another.
        ValueError: A shape or a device is another.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64, the numbers of codes; got {ids.dtype}. Tokenise the motion first")
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, true where a time step is there; got {valid.dtype}")
    if ids.dim() != 3 or valid.shape != ids.shape[:2]:
        raise ValueError(
            f"ids must be [batch, time, parts] and valid [batch, time]; got {list(ids.shape)} and {list(valid.shape)}"
        )
    if valid.device != ids.device:
        raise ValueError(f"ids are on {ids.device} and valid is on {valid.device}; move them to one device")


def check_weights(weight: Tensor, device: torch.device) -> None:
    """See that a weight is where the tokens are, before attention is read beside the model's forward.

    Raises:
        ValueError: It is elsewhere.
    """
    if weight.device != device:
        raise ValueError(
            f"the model's weights are on {weight.device} and the tokens on {device}. Move one of them; weights on meta "
            "are offloaded by accelerate, which brings them back for a forward alone, and what the condition attends "
            "to is read without one: call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        )
