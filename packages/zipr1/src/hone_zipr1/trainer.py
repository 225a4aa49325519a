"""The paper's objective in TRL, for those whose training is a ``GRPOTrainer`` already; needs the extra ``trl``.

    trainer = SparseGRPOTrainer(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        correct=right_answers,
        args=paper_args("run", per_device_train_batch_size=8),
        train_dataset=Dataset.from_list(dataset_rows(load_items(Path("train.jsonl")))),
    )
    trainer.train()

TRL samples, scores and updates; what is ours is that the policy is sparse, each rollout of a group at a threshold of
its own and the update over the tokens of the rollout, that the reference is dense, and the reward. ``hone-zipr1 train``
has the other objectives, videos, and the least spread of a group's rewards, which TRL has not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hone_core.errors import MissingExtraError
from torch import Tensor

from .config import GRID, SparseConfig, check_ps
from .models import attach, visual_ids
from .questions import Item, is_right

try:
    from trl import GRPOConfig, GRPOTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":  # something that TRL wants, which the message names
        raise
    raise MissingExtraError("trl", "hone-zipr1", "SparseGRPOTrainer") from error

__all__ = ["SparseGRPOTrainer", "dataset_rows", "paper_args", "right_answers"]


def paper_args(output_dir: str | Path, **changes: Any) -> GRPOConfig:
    """TRL's settings for the paper's loss: means per answer, no correction of the KL; what was not found is ours.

    Args:
        output_dir: Of the run.
        changes: Others of ``GRPOConfig``, or other values.
    """
    paper: dict[str, Any] = dict(
        loss_type="grpo",
        scale_rewards="group",
        use_bias_correction_kl=False,
        num_generations=len(GRID),
        epsilon=0.2,
        beta=0.04,
        temperature=1.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
    )
    return GRPOConfig(str(output_dir), **(paper | changes))


def dataset_rows(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Questions as rows of a ``datasets.Dataset``.

    Args:
        items: About pictures.

    Raises:
        ValueError: One is about a video, which TRL does not hand to the model.
    """
    from hone_lm.video import read_picture

    rows = []
    for item in items:
        if item.is_video:
            raise ValueError(f"TRL trains on pictures; got the video {item.media}. Use hone-zipr1 train")
        prompt = [{"role": "user", "content": item.question}]
        graded = {"answer": item.answer, "type": item.type, "tolerance": item.tolerance}
        rows.append({"prompt": prompt, "image": read_picture(item.media), **graded})
    return rows


def right_answers(
    completions: Sequence[Any], answer: Sequence[str], type: Sequence[Any], tolerance: Sequence[float], **_: Any
) -> list[float]:
    """r_per of rows as ``dataset_rows`` makes them: 1 for a right answer."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    items = [
        Item(Path(), False, "", gold, kind, within) for gold, kind, within in zip(answer, type, tolerance, strict=True)
    ]
    return [float(is_right(text, item)) for text, item in zip(texts, items, strict=True)]


class SparseGRPOTrainer(GRPOTrainer):
    """GRPO of a sparse policy beside a dense reference; the reward is r_per + C (1 - tau).

    The rollouts of a group take the thresholds in turn. ``args.reward_weights`` are those of the two terms.

    Args:
        model: As of ``GRPOTrainer``: a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or LLaVA-OneVision model, or its address.
        correct: Reward function of TRL's kind, r_per; positive is right.
        args: Settings; see ``paper_args``.
        sparse: Selection, but for its threshold.
        ps: Thresholds.
        gated: Whether 1 - tau counts only in groups with a right answer (C).
        options: Others of ``GRPOTrainer``.

    Attributes:
        handle: What is attached to the policy.

    Raises:
        ValueError: A setting cannot be met: rollouts by vLLM or by functions of one's own, or a group that the
            thresholds do not divide.
    """

    def __init__(
        self,
        model: Any,
        *,
        correct: Callable[..., list[float]],
        args: GRPOConfig,
        sparse: SparseConfig | None = None,
        ps: Sequence[float] = GRID,
        gated: bool = True,
        **options: Any,
    ) -> None:
        check_ps(tuple(ps))
        sparse = sparse or SparseConfig()
        if sparse.policy not in ("top-p", "random"):
            raise ValueError(f"rollouts differ by their threshold, which {sparse.policy} has not; use top-p")
        if args.use_vllm or args.use_transformers_continuous_batching:
            raise ValueError(
                "rollouts must come from generate: vLLM and continuous batching attend to whole prompts, so that their "
                "answers are another policy's and have no token ratio. Leave use_vllm and "
                "use_transformers_continuous_batching out"
            )
        own = [name for name in ("rollout_func", "tools", "environment_factory") if options.get(name)]
        if own:
            raise ValueError(f"an answer is one turn of the model itself here; leave {', '.join(own)} out")
        for name in ("num_generations", "num_generations_eval"):
            if (count := getattr(args, name)) and count % len(ps):
                raise ValueError(f"{name} must be a multiple of the {len(ps)} thresholds; got {count}")
        self.ps, self.gated = tuple(ps), gated
        self._p: Tensor | None = None
        self._ratio = torch.zeros(0)

        def efficiency(**_: Any) -> list[float]:
            return (1 - self._ratio).tolist()

        super().__init__(model=model, reward_funcs=[correct, efficiency], args=args, **options)
        policy = self.accelerator.unwrap_model(self.model)
        policy = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        # A drawn placeholder would want pixels in the next forward.
        self.generation_config.suppress_tokens = list(visual_ids(policy.config))
        self.handle = attach(policy, replace(sparse, p=max(ps)))

    @property
    def _group(self) -> int:
        count: Any = self.num_generations if self.model.training else self.num_generations_eval
        return count

    def _generate_single_turn(self, prompt_ids: list[Any], *given: Any, **named: Any) -> Any:
        first = self.accelerator.process_index * len(prompt_ids)
        place = torch.arange(first, first + len(prompt_ids)) % self._group % len(self.ps)
        self._p = torch.tensor(self.ps)[place].to(self.accelerator.device)
        with self.handle.using(p=self._p):
            found = super()._generate_single_turn(prompt_ids, *given, **named)
        assert self.handle.stats is not None, "prompts were read"
        self._ratio = self.handle.stats.ratio
        self._log_metric("tau", float(self._ratio.mean()))
        return found

    def _calculate_rewards(self, *given: Any, **named: Any) -> Tensor:
        found = super()._calculate_rewards(*given, **named)
        if self.gated:
            right = (found[:, 0].view(-1, self._group) > 0).any(-1)
            found[:, 1] *= right.repeat_interleave(self._group)
        return found

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        found = super()._generate_and_score_completions(inputs)
        # With the rows, which TRL shuffles and splits.
        return found | {"budget_p": self._p}

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        self._p = inputs["budget_p"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **named: Any,
    ) -> Any:
        given = (model, input_ids, attention_mask, logits_to_keep)
        if model is self.ref_model or _adapters_are_off(model):
            with self.handle.disabled():
                return super()._get_per_token_logps_and_entropies(*given, batch_size=batch_size, **named)
        # One forward, as the thresholds are those of all its rows.
        with self.handle.using(p=self._p, prompt_tokens=input_ids.shape[1] - logits_to_keep):
            return super()._get_per_token_logps_and_entropies(*given, **named)


def _adapters_are_off(model: Any) -> bool:
    """Whether a model has adapters, all off: then it is the reference."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return bool(layers) and all(layer.disable_adapters for layer in layers)
