"""A model for lmms-eval, found by its entry point: ``lmms-eval --model hone_zipr1 --model_args pretrained=M,p=0.9``."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import MissingProgramError
from hone_core.progress import progress_bar

from .config import PRESETS
from .models import attach, check_config
from .questions import Item, model_inputs, picture_inputs

__all__ = ["SparseModel", "manifest"]

# lmms-eval loads this module. It cannot be an extra: its latex2sympy2 wants another antlr4 than the math-verify of
# hone-rstitch, and one resolution holds the extras of all members.
if importlib.util.find_spec("lmms_eval") is None:
    raise MissingProgramError("lmms-eval", "hone-zipr1")
_Base: Any = importlib.import_module("lmms_eval.api.model").lmms
_registry: Any = importlib.import_module("lmms_eval.models.registry_v2")
_log = logging.getLogger(__name__)


def manifest() -> Any:
    """What the entry point gives to lmms-eval."""
    return _registry.ModelManifest(model_id="hone_zipr1", simple_class_path=f"{__name__}.SparseModel")


class SparseModel(_Base):
    """A vision-language model with selected tokens, one question at a time.

    Args:
        pretrained: Folder or hub address.
        p: Share of the attention mass; None is the dense model.
        preset: Selection by name, but for its threshold.
        frames: Of a video.
        device: Where the model goes, such as ``cuda``.
        dtype: Of the weights; auto is bfloat16 on a GPU, float32 on a CPU.
        batch_size: 1, as lmms-eval passes it.

    Attributes:
        ratios: tau of each answer so far.

    Raises:
        ValueError: The batch is not 1, the preset is not known, or the model cannot take the selection.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        p: float | None = 0.975,
        preset: str = "paper",
        frames: int = 32,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
    ) -> None:
        from hone_lm.checkpoints import load_model, read_config

        super().__init__()
        if int(batch_size) != 1:
            raise ValueError(f"questions are asked one at a time: batch_size must be 1; got {batch_size}")
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        self._selection = None if p is None else replace(PRESETS[preset].config, p=float(p))
        if self._selection is not None:
            check_config(read_config(pretrained), self._selection)
        place = resolve_device(device or "auto")
        self._model, self._processor = load_model(pretrained, device=place, dtype=resolve_dtype(dtype, place))
        self._frames = frames
        self.ratios: list[float] = []

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer; greedy whatever a task asks for, and cut at the first of a request's stops.

        Args:
            requests: Of lmms-eval; of their options ``max_new_tokens`` (128) and ``until`` are looked at, no others.
        """
        answers = []
        with progress_bar(len(requests), desc="questions") as bar:
            for request in requests:
                text, options, visuals_of, doc, task, split = request.args
                visuals = visuals_of(self.task_dict[task][split][doc]) or []
                answer = self._answer(text, visuals, int(options.get("max_new_tokens", 128)))
                stops = options.get("until") or []
                for stop in [stops] if isinstance(stops, str) else stops:
                    answer = answer.split(stop)[0] if stop else answer
                answers.append(answer.strip())
                bar.update()
        if self.ratios:
            _log.info("mean token ratio %.4f over %d answers", sum(self.ratios) / len(self.ratios), len(self.ratios))
        return answers

    @torch.no_grad()
    def _answer(self, text: str, visuals: Sequence[Any], length: int) -> str:
        from hone_lm.choices import to_model

        inputs = to_model(self._inputs(text, visuals), self._model)
        with nullcontext() if self._selection is None else attach(self._model, self._selection) as handle:
            out = self._model.generate(**inputs, max_new_tokens=length, do_sample=False)
            if handle is not None and handle.stats is not None:
                self.ratios.append(float(handle.stats.ratio[0]))
        return self._processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _inputs(self, text: str, visuals: Sequence[Any]) -> dict[str, torch.Tensor]:
        """What the processor makes of a question with pictures, or with one video by its path."""
        if len(visuals) == 1 and isinstance(visuals[0], (str, Path)):
            return model_inputs(self._processor, [Item(Path(visuals[0]), True, text, "", "string")], self._frames)
        if any(isinstance(visual, (str, Path)) for visual in visuals):
            raise ValueError(f"a question has one video or any number of pictures; got {len(visuals)} visuals")
        return picture_inputs(self._processor, [text], [[picture.convert("RGB") for picture in visuals]])

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: a likelihood of given text is no answer of a model that evicts its prompt."""
        raise NotImplementedError("hone_zipr1 answers tasks of output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: see ``cache="retrieve"`` of ``SparseConfig`` for later turns."""
        raise NotImplementedError("hone_zipr1 answers tasks of output_type generate_until")
