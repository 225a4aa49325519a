"""Pairs of models: published ones from their folders, the packaged tiny one, and random ones of the real classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hone_core.handles import CallState, Handle, resolve
from hone_lm.addresses import find_checkpoint
from torch import Tensor
from transformers import PreTrainedModel

from .config import PRESETS, ModelsConfig, SamplingConfig, StitchConfig
from .generation import StitchOutput, StitchToken, end_ids, stitch_generate
from .router import Routing
from .vocabulary import Vocabulary, check_text

__all__ = ["Pair", "StitchHandle", "attach", "check_models", "pad_left", "read_pair", "tiny"]

log = logging.getLogger(__name__)

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
            eos_small=end_ids(small),
            eos_large=end_ids(large),
        )
        return cls(small.eval(), large.eval(), small_tokenizer, tokenizer, vocabulary, **prompts)

    @classmethod
    def load(cls, cfg: ModelsConfig, *, device: torch.device | str = "cpu", weights: bool = True) -> Pair:
        """Load two models from folders or the hub.

        Args:
            cfg: Which, and what they are asked.
            device: Where both go.
            weights: Without them the models are shapes alone, on the meta device.

        Raises:
            ValueError: They are not of one family, or are not named.
            OSError: There is no such checkpoint.
        """
        if cfg.small is None or cfg.large is None:
            raise ValueError("which models? Name small and large; the packaged pair is hone_rstitch.host.load_host()")
        from hone_core.devices import resolve_dtype
        from hone_lm.checkpoints import find_licence
        from transformers import AutoConfig, AutoModelForCausalLM

        names = (cfg.small, cfg.large)
        tokenizers, vocabulary = read_pair(*names)
        for name in names:
            log.info("licence of %s: %s", name, find_licence(name) or "unknown; read its page before you use it")
        if weights:
            dtype = resolve_dtype(cfg.dtype, device)
            small, large = (AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval() for name in names)
        else:
            with torch.device("meta"):
                small, large = (AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name)) for name in names)
        return cls(
            small,
            large,
            *tokenizers,
            vocabulary,
            small_prompt=cfg.small_prompt,
            large_prompt=cfg.large_prompt,
            chat=cfg.chat,
        )

    @property
    def device(self) -> torch.device:
        """Where the large model is."""
        return self.large.device

    def prompts(self, questions: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of what the small and the large model are asked, each in its own words, template and ids.

        Raises:
            ValueError: A tokenizer cannot read a question.
        """
        small, large = (
            [_prompt_ids(tokenizer, template.replace("{question}", question), self.chat) for question in questions]
            for tokenizer, template in (
                (self.small_tokenizer, self.small_prompt),
                (self.tokenizer, self.large_prompt),
            )
        )
        return small, large

    def chat_prompts(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Ids of a conversation for the small and the large model, by each tokenizer's chat template.

        Where there is none (or ``chat`` is False) a single message of the user is a question like any other.

        Raises:
            ValueError: There is no template, and more than a question; or the template refuses the messages; or a
                tokenizer cannot read them.
        """
        found = []
        for tokenizer, template in (
            (self.small_tokenizer, self.small_prompt),
            (self.tokenizer, self.large_prompt),
        ):
            *before, last = messages
            asked = template.replace("{question}", last["content"]) if last["role"] == "user" else last["content"]
            if self.chat and getattr(tokenizer, "chat_template", None):
                from jinja2 import TemplateError

                turns = [*before, {**last, "content": asked}]
                for turn in turns:
                    check_text(tokenizer, turn["content"])
                try:
                    ids = tokenizer.apply_chat_template(
                        turns, add_generation_prompt=True, tokenize=True, return_dict=False
                    )
                except TemplateError as error:
                    raise ValueError(f"the chat template refuses these messages: {error}") from error
                found.append(ids)
            elif before or last["role"] != "user":
                raise ValueError("this model has no chat template: send one message of the user, or use completions")
            else:
                found.append(_prompt_ids(tokenizer, asked, False))
        small, large = found
        return small, large

    def text_prompts(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text for the small and the large model, without template or words of theirs.

        Raises:
            ValueError: A tokenizer cannot read it.
        """
        small, large = (_prompt_ids(tokenizer, text, False) for tokenizer in (self.small_tokenizer, self.tokenizer))
        return small, large

    def answer(
        self,
        questions: Sequence[str],
        stitch: StitchConfig,
        sampling: SamplingConfig,
        *,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        on_token: Callable[[StitchToken], None] | None = None,
        routing: Routing | None = None,
    ) -> tuple[list[str], StitchOutput]:
        """Answer a batch of questions.

        Args:
            questions: One per row.
            stitch: Policy and gate.
            sampling: How tokens are drawn.
            seed: Seed of the draws, see ``stitch_decoding``.
            stop: Strings that end an answer.
            on_token: Called with each ``StitchToken``.
            routing: The router of R-Stitch+, with policy ``router``.

        Returns:
            The texts, special tokens left out, and the records of every token.
        """
        small, large = self.prompts(questions)
        ids, mask = pad_left(large)
        small_ids, small_mask = pad_left(small)
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
            routing=routing,
            max_new_tokens=sampling.max_new_tokens,
            return_dict_in_generate=True,
            pad_token_id=self.large.generation_config.pad_token_id or 0,
            **options,
        )
        assert isinstance(output, StitchOutput), "a dict was asked for"
        new = output.sequences[:, ids.shape[1] :]
        texts = [
            self.tokenizer.decode(row[: sum(usage.tokens)], skip_special_tokens=True)
            for row, usage in zip(new, output.usage, strict=True)
        ]
        return texts, output


class StitchHandle(Handle[StitchConfig]):
    """R-Stitch in place of a model's ``generate``; see ``attach``.

    Attributes:
        small: the model that writes where it is certain.
        vocabulary: what ids are to it; None if they are the same.
    """

    def __init__(
        self, config: StitchConfig, large: PreTrainedModel, small: PreTrainedModel, vocabulary: Vocabulary | None
    ) -> None:
        super().__init__(config, [large])
        self.large, self.small, self.vocabulary = large, small, vocabulary
        self._state: CallState[None] = CallState()
        if "generate" in vars(large):
            raise ValueError("generate of this model is replaced already; detach that first")
        large.generate = self._generate
        self._placed = large.generate

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        plain = type(self.large).generate
        if self._state.disabled or kwargs.get("custom_generate") is not None:
            return plain(self.large, *args, **kwargs)
        # generate() takes its ids as "inputs", and tokenizers give them as "input_ids".
        inputs = args[0] if args else kwargs.pop("inputs", None)
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if len(args) > 1 or ids is None:
            raise ValueError("give generate the ids of the prompt, and everything else by name")
        options = {"stitch": self.config, "vocabulary": self.vocabulary} | kwargs
        return stitch_generate(self.large, self.small, ids, **options)

    @property
    def attached(self) -> bool:
        """Whether the model's ``generate`` is this one."""
        return vars(self.large).get("generate") is self._placed

    def detach(self) -> None:
        """Give the model its own ``generate`` back; harmless when repeated."""
        if self.attached:
            del self.large.generate

    def _states(self) -> list[CallState[Any]]:
        return [self._state]


def attach(
    large: PreTrainedModel,
    config: str | StitchConfig,
    *,
    small: PreTrainedModel,
    vocabulary: Vocabulary | None = None,
) -> StitchHandle:
    """Let ``large.generate`` write with two models, for programs that call it themselves (pipelines, harnesses).

    Args:
        large: The model whose ``generate`` is called.
        config: A preset's name, or settings. Arguments of a call (``stitch``, ``seed``, ``on_token`` ...) override.
        small: Its partner.
        vocabulary: What ids are to it; the same, padding apart, if None.

    Raises:
        ValueError: There is no such preset, or ``generate`` is replaced already.
    """
    return StitchHandle(resolve(config, PRESETS, StitchConfig), large, small, vocabulary)


def read_pair(small: str, large: str) -> tuple[tuple[Any, Any], Vocabulary]:
    """Tokenizers of two checkpoints and what ids of one are to the other, before any weights are read.

    Args:
        small: What ``from_pretrained`` takes.
        large: Likewise.

    Raises:
        ValueError: They are not of one family.
        OSError: There is no such checkpoint.
    """
    for path, flag in ((small, "--small"), (large, "--large")):
        find_checkpoint(path, flag)
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    configs = [AutoConfig.from_pretrained(path).get_text_config() for path in (small, large)]
    ends = []
    for name, config in zip((small, large), configs, strict=True):
        try:
            ids = GenerationConfig.from_pretrained(name).eos_token_id
        except OSError:  # a checkpoint without one generates by its config
            ids = config.eos_token_id
        ends.append([] if ids is None else [ids] if isinstance(ids, int) else list(ids))
    tokenizers = (AutoTokenizer.from_pretrained(small), AutoTokenizer.from_pretrained(large))
    rows = [config.vocab_size for config in configs]
    vocabulary = Vocabulary.of(
        *tokenizers, rows_small=rows[0], rows_large=rows[1], eos_small=ends[0], eos_large=ends[1]
    )
    return tokenizers, vocabulary


def check_models(cfg: ModelsConfig) -> None:
    """Look whether two named checkpoints can write one text; the packaged pair can.

    Raises:
        ValueError: They are not of one family.
        OSError: There is no such checkpoint.
    """
    if cfg.small is not None and cfg.large is not None:
        read_pair(cfg.small, cfg.large)


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


def _prompt_ids(tokenizer: Any, text: str, chat: bool) -> list[int]:
    check_text(tokenizer, text)
    if chat and getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return tokenizer.encode(text)


def pad_left(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows as ids ``[rows, tokens]``, zeros before the shorter ones, and a mask of their shape."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, width - len(row) :] = torch.tensor(row)
        mask[at, width - len(row) :] = 1
    return ids, mask
