"""A model for lmms-eval, found by its entry point: ``lmms-eval --model hone_zipr1 --model_args pretrained=M,p=0.9``."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
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

__all__ = ["SparseModel", "generation_settings", "manifest"]

# lmms-eval loads this module. It cannot be an extra: its latex2sympy2 wants another antlr4 than the math-verify of
# hone-rstitch, and one resolution holds the extras of all members.
if importlib.util.find_spec("lmms_eval") is None:
    raise MissingProgramError("lmms-eval", "hone-zipr1")
_Base: Any = importlib.import_module("lmms_eval.api.model").lmms
_registry: Any = importlib.import_module("lmms_eval.models.registry_v2")
_log = logging.getLogger(__name__)


_DRAWING = ("temperature", "top_p", "top_k")
_KNOWN = ("max_new_tokens", "until", "do_sample", "num_beams", *_DRAWING)
_ELSEWHERE = ("image_aspect_ratio",)
"""Options of tasks that are of other models' picture processors, and name nothing that this one has."""


def generation_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """What ``generate`` is given for a request: 128 tokens, greedily, but for what it says.

    A temperature above 0 draws, unless ``do_sample`` is false; ``top_p`` and ``top_k`` count where answers are drawn.

    Args:
        options: Generation options of a request of lmms-eval.

    Raises:
        ValueError: An option is of no kind that is known.
    """
    unknown = sorted(set(options) - {*_KNOWN, *_ELSEWHERE})
    if unknown:
        raise ValueError(
            f"a request may say {', '.join(_KNOWN)}; got {', '.join(unknown)}. Leave it out of the task's "
            "generation_kwargs"
        )
    given = {name: value for name, value in options.items() if value is not None}
    warm = given.get("temperature", 0) > 0
    drawn = warm if "do_sample" not in given else bool(given["do_sample"]) and given.get("temperature", 1) > 0
    settings = {"max_new_tokens": int(given.get("max_new_tokens", 128)), "do_sample": drawn}
    settings["num_beams"] = int(given.get("num_beams", 1))
    return settings | ({name: given[name] for name in _DRAWING if name in given} if drawn else {})


def manifest() -> Any:
    """What the entry point gives to lmms-eval."""
    return _registry.ModelManifest(model_id="hone_zipr1", simple_class_path=f"{__name__}.SparseModel")


class SparseModel(_Base):
    """A vision-language model with selected tokens, one question at a time.

    Args:
        pretrained: Folder or hub address, or a folder of adapters that ``train`` wrote.
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
        from hone_lm.checkpoints import read_config

        from .adapters import base_of, load_model

        super().__init__()
        if int(batch_size) != 1:
            raise ValueError(f"questions are asked one at a time: batch_size must be 1; got {batch_size}")
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        self._selection = None if p is None else replace(PRESETS[preset].config, p=float(p))
        if self._selection is not None:
            check_config(read_config(base_of(pretrained)), self._selection)
        place = resolve_device(device or "auto")
        self._model, self._processor = load_model(pretrained, device=place, dtype=resolve_dtype(dtype, place))
        self._frames = frames
        self.ratios: list[float] = []

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer as the requests ask for it, and cut at the first of a request's stops.

        Args:
            requests: Of lmms-eval; of their options see ``generation_settings``, and ``until``.

        Raises:
            ValueError: An option is of no kind that is known; before the first answer.
        """
        answers = []
        settings = [generation_settings(request.args[1]) for request in requests]
        with progress_bar(len(requests), desc="questions") as bar:
            for request, given in zip(requests, settings, strict=True):
                text, options, visuals_of, doc, task, split = request.args
                visuals = visuals_of(self.task_dict[task][split][doc]) or []
                answer = self._answer(text, visuals, given)
                stops = options.get("until") or []
                for stop in [stops] if isinstance(stops, str) else stops:
                    answer = answer.split(stop)[0] if stop else answer
                answers.append(answer.strip())
                bar.update()
        if self.ratios:
            _log.info("mean token ratio %.4f over %d answers", sum(self.ratios) / len(self.ratios), len(self.ratios))
        return answers

    @torch.no_grad()
    def _answer(self, text: str, visuals: Sequence[Any], settings: Mapping[str, Any]) -> str:
        from hone_lm.choices import to_model

        inputs = to_model(self._inputs(text, visuals), self._model)
        with nullcontext() if self._selection is None else attach(self._model, self._selection) as handle:
            out = self._model.generate(**inputs, **settings)
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
