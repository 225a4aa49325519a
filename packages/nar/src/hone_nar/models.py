"""How NAR enters a model: ``attach`` says how its heads are mixed, ``warm_start`` makes a NAR of a raster LlamaGen."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from hone_core.handles import CallState, Handle, resolve

from .config import PRESETS, NARConfig
from .flashar import FlashARForImageGeneration
from .method import plan_of
from .tokenizer import LlamaGenVQModel
from .transformer import Attached, LlamaGenForImageGeneration, NARForImageGeneration, NARForVideoGeneration

__all__ = ["NARHandle", "attach", "tiny", "warm_start"]


class NARHandle(Handle[NARConfig]):
    """What ``attach`` gives back."""

    def __init__(self, config: NARConfig, model: Any) -> None:
        super().__init__(config, (model,))
        self._model, self._on = model, Attached(config.mix, CallState())
        model.attached = self._on

    @property
    def attached(self) -> bool:
        """Whether the model mixes as this handle says."""
        return self._model.attached is self._on

    def detach(self) -> None:
        """See the base class."""
        if self.attached:
            self._model.attached = None

    def _states(self) -> Iterable[CallState[Any]]:
        return (self._on.state,)


def attach(model: Any, config: str | NARConfig = "nar") -> NARHandle:
    """Say how a model mixes its heads, in teacher-forced forwards and in drawing, until ``detach``.

    Args:
        model: A NAR; or something that holds one as ``transformer``, such as a pipeline.
        config: Name of a preset, or settings.

    Raises:
        TypeError: ``model`` is no NAR.
        ValueError: There is no such preset or head.
        RuntimeError: Something is attached already.
    """
    settings = resolve(config, PRESETS, NARConfig)
    found = getattr(model, "transformer", model)
    if not isinstance(found, NARForImageGeneration | NARForVideoGeneration | FlashARForImageGeneration):
        raise TypeError(
            f"expected a NAR, or a pipeline of one; got {type(found).__name__}. A raster LlamaGen has no head to mix; "
            "make a NAR of it with warm_start"
        )
    plan_of(found.order, found.cls_token_num, found.heads, settings.mix)
    if found.attached is not None:
        raise RuntimeError("something is attached to this model already; call its handle's detach() first")
    return NARHandle(settings, found)


def warm_start(raster: LlamaGenForImageGeneration) -> NARForImageGeneration:
    """A NAR to train, of a raster model's weights: the below head begins as a clone of the last block and the head.

    Differs: the paper trains from random weights. Its authors' FlashAR (``flashar.post_train_start``) clones the top of
        a raster model too, but runs the clone beside the original and mixes by a gate; here it runs after the last
        block, where NAR has it.

    Args:
        raster: LlamaGen in raster order.

    Raises:
        TypeError: It is no raster LlamaGen.
    """
    if not isinstance(raster, LlamaGenForImageGeneration) or not raster.order.raster:
        raise TypeError(f"expected a LlamaGenForImageGeneration in raster order; got {type(raster).__name__}")
    options = {name: value for name, value in raster.config.items() if not name.startswith("_") and name != "diagonal"}
    with torch.device("meta"):
        model = NARForImageGeneration(**options)
    state = {name: value.clone() for name, value in raster.state_dict().items()}
    last, new = f"layers.{raster.n_layer - 1}.", f"layers.{raster.n_layer}."
    state |= {new + name.removeprefix(last): value.clone() for name, value in state.items() if name.startswith(last)}
    state |= {f"medusa_{name}": state[name].clone() for name in ("norm.weight", "output.weight")}
    model.load_state_dict(state, assign=True)
    return model


def tiny(
    kind: str = "nar", *, seed: int = 0, **options: Any
) -> NARForImageGeneration | LlamaGenForImageGeneration | NARForVideoGeneration | FlashARForImageGeneration:
    """A small model with random weights; the global generator stays.

    Args:
        kind: ``nar``, ``llamagen``, ``flashar`` or ``video``.
        seed: Of the weights.
        options: Of the class, over ours.

    Raises:
        ValueError: There is no such kind.
    """
    kinds: dict[str, tuple[Any, tuple[int, ...]]] = {
        "nar": (NARForImageGeneration, (6, 6)),
        "llamagen": (LlamaGenForImageGeneration, (6, 6)),
        "flashar": (FlashARForImageGeneration, (6, 6)),
        "video": (NARForVideoGeneration, (2, 3, 4)),
    }
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}; got {kind!r}")
    cls, grid = kinds[kind]
    settings: dict[str, Any] = {
        "dim": 64, "n_layer": 2, "n_head": 4, "vocab_size": 32, "num_classes": 10, "multiple_of": 64, "grid": grid,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(**(settings | options))
        for parameter in model.parameters():
            # Large enough that every part matters.
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return copy.deepcopy(model).eval()


def tiny_tokenizer(seed: int = 0) -> LlamaGenVQModel:
    """A small tokenizer with random weights, of 4 px per code and 32 entries; the global generator stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaGenVQModel(32, 4, 32, 32, (1, 1, 2), 1).eval()
