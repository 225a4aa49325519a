"""Pairs of models: published ones from their folders, the packaged tiny one, and random ones of the real classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .config import ModelsConfig, SamplingConfig, StitchConfig
from .generation import StitchOutput, StitchToken, stitch_generate
from .vocabulary import Vocabulary

__all__ = ["Pair", "tiny"]

Family = Literal["qwen2", "qwen3", "llama", "qwen3_moe"]


@dataclass(eq=False)
class Pair:
    """Two models that can write one text.

    Attributes:
        small: the model that writes where it is certain.
        large: the model whose ids answers are in.
        small_tokenizer: of the small model.
        tokenizer: of the large model.
        vocabulary: what the large model's ids are to the small model.
        small_prompt: what the small model is asked, with ``{question}`` in it.
        large_prompt: what the large model is asked.
        chat: put prompts through each tokenizer's chat template, where it has one.
    """

    small: PreTrainedModel
    large: PreTrainedModel
    small_tokenizer: Any
    tokenizer: Any
    vocabulary: Vocabulary
    small_prompt: str = "{question}"
    large_prompt: str = "{question}"
    chat: bool = True

    @classmethod
    def of(
        cls, small: PreTrainedModel, large: PreTrainedModel, small_tokenizer: Any, tokenizer: Any, **prompts: Any
    ) -> Pair:
        """Pair two loaded models.

        Args:
            small: The small model.
            large: The large one.
            small_tokenizer: Of the small model.
            tokenizer: Of the large one.
            prompts: ``small_prompt``, ``large_prompt``, ``chat``.

        Raises:
            ValueError: They are not of one family; see ``Vocabulary.of``.
        """
        vocabulary = Vocabulary.of(
            small_tokenizer,
            tokenizer,
            rows_small=small.get_output_embeddings().weight.shape[0],
            rows_large=large.get_output_embeddings().weight.shape[0],
            eos_small=_ends(small),
            eos_large=_ends(large),
        )
        return cls(small.eval(), large.eval(), small_tokenizer, tokenizer, vocabulary, **prompts)

    @classmethod
    def load(cls, cfg: ModelsConfig, *, device: torch.device | str = "cpu") -> Pair:
        """Load two models from folders or the hub, or the packaged pair.

        Args:
            cfg: Which, and what they are asked.
            device: Where both go.

        Raises:
            ValueError: They are not of one family.
            CheckpointError: There is no packaged pair of that seed.
        """
        if cfg.small is None or cfg.large is None:
            from .host import load_pair

            return load_pair(cfg.host, device=device)
        from hone_core.devices import resolve_dtype
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizers = [AutoTokenizer.from_pretrained(name) for name in (cfg.small, cfg.large)]
        dtype = resolve_dtype(cfg.dtype, device)
        models = [AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device) for name in (cfg.small, cfg.large)]
        return cls.of(*models, *tokenizers, small_prompt=cfg.small_prompt, large_prompt=cfg.large_prompt, chat=cfg.chat)

    @property
    def device(self) -> torch.device:
        """Where the large model is."""
        return self.large.device

    def prompts(self, questions: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of what the small and the large model are asked, each in its own words, template and ids."""
        return tuple(
            [_prompt_ids(tokenizer, template.replace("{question}", question), self.chat) for question in questions]
            for tokenizer, template in (
                (self.small_tokenizer, self.small_prompt),
                (self.tokenizer, self.large_prompt),
            )
        )

    def answer(
        self,
        questions: Sequence[str],
        stitch: StitchConfig,
        sampling: SamplingConfig,
        *,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        on_token: Callable[[StitchToken], None] | None = None,
    ) -> tuple[list[str], StitchOutput]:
        """Answer a batch of questions.

        Args:
            questions: One per row.
            stitch: Policy and gate.
            sampling: How tokens are drawn.
            seed: Of the draws, see ``stitch_decoding``.
            stop: Strings that end an answer.
            on_token: Called with each ``StitchToken``.

        Returns:
            The texts, special tokens left out, and the records of every token.
        """
        small, large = self.prompts(questions)
        ids, mask = _pad(large)
        small_ids, small_mask = _pad(small)
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            # transformers counts 0 as off for top_k, as we do.
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            options["top_k"] = sampling.top_k
        output = stitch_generate(
            self.large,
            self.small,
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            small_input_ids=small_ids,
            small_attention_mask=small_mask,
            vocabulary=self.vocabulary,
            stitch=stitch,
            seed=seed,
            stop_strings=list(stop) or None,
            tokenizer=self.tokenizer,
            on_token=on_token,
            max_new_tokens=sampling.max_new_tokens,
            return_dict_in_generate=True,
            pad_token_id=self.large.generation_config.pad_token_id or 0,
            **options,
        )
        new = output.sequences[:, ids.shape[1] :]
        texts = [
            self.tokenizer.decode(row[: sum(usage.tokens)], skip_special_tokens=True)
            for row, usage in zip(new, output.usage, strict=True)
        ]
        return texts, output


def tiny(family: Family = "qwen2", *, seed: int = 0, rows: tuple[int, int] = (96, 112)) -> tuple[Any, Any]:
    """A small and a large model of a real class with random weights.

    Args:
        family: Class of both.
        seed: Of the weights.
        rows: Logits of the small and the large model; ids below 96 are meant to be tokens.

    Raises:
        ValueError: ``family`` is none of these.
    """
    import transformers as tf

    classes = {
        "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {}),
        "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {"head_dim": 16}),
        "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {}),
        "qwen3_moe": (
            tf.Qwen3MoeConfig,
            tf.Qwen3MoeForCausalLM,
            {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        ),
    }
    if family not in classes:
        raise ValueError(f"family must be one of {', '.join(classes)}; got {family!r}")
    config_class, model_class, extra = classes[family]
    models = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for width, layers, size in ((32, 1, rows[0]), (48, 2, rows[1])):
            config = config_class(
                vocab_size=size,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 16,
                num_key_value_heads=1,
                max_position_embeddings=512,
                initializer_range=0.4,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                **extra,
            )
            models.append(model_class(config).eval())
    return tuple(models)


def _ends(model: PreTrainedModel) -> list[int]:
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _prompt_ids(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if chat and getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return tokenizer.encode(text)


def _pad(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, width - len(row) :] = torch.tensor(row)
        mask[at, width - len(row) :] = 1
    return ids, mask
