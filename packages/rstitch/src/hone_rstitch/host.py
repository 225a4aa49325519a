"""The tiny pair: two Qwen2 decoders over single characters that multiply, trained on generated products.

Their vocabularies are of one family, as those of published pairs are: the same characters, other special tokens, and
padding on the large model's side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from .config import DecoderConfig, ModelsConfig
from .data import CHARACTERS
from .models import Pair, read_pair
from .pairs import PACKAGE, open_pair, packaged_pair
from .router import load_router
from .vocabulary import check_text

__all__ = [
    "PACKAGE",
    "build_model",
    "build_tokenizer",
    "check_pair",
    "load_host",
    "load_models",
    "open_pair",
    "packaged_pair",
]

UNKNOWN = "<unk>"
SPECIAL = {"small": ("<eos>", "<pad>"), "large": ("<pad>", "<bos>", "<eos>")}
ROWS = {"small": len(CHARACTERS) + 3, "large": 24}
"""Logits of each model; the large one's last four are no tokens."""

Role = Literal["small", "large"]


def build_tokenizer(role: Role) -> Any:
    """Tokenizer of one of the models: characters, then its special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: id for id, word in enumerate([*CHARACTERS, UNKNOWN])}
    core = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL[role]])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def build_model(cfg: DecoderConfig, role: Role, *, seed: int = 0) -> Any:
    """An untrained model; the global generator is left as it was."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    special = {token: len(CHARACTERS) + 1 + at for at, token in enumerate(SPECIAL[role])}
    config = Qwen2Config(
        vocab_size=ROWS[role],
        hidden_size=cfg.width,
        intermediate_size=cfg.intermediate,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads_k,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=special["<pad>"],
        bos_token_id=special.get("<bos>"),
        eos_token_id=special["<eos>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).eval()


def load_host(
    seed: int = 0, *, path: Path | None = None, verbose: bool = False, device: torch.device | str = "cpu"
) -> Pair:
    """Load a pair; weights are float32.

    Args:
        seed: Of a packaged pair.
        path: A ``host.safetensors`` made by train-host, in its place.
        verbose: The large model is the one that checks itself before it answers.
        device: Where both models go.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    stored = open_pair(seed, path=path)
    models = {
        "small.": build_model(stored.config.small, "small"),
        "large.": build_model(stored.config.large, "large"),
        "verbose.": build_model(stored.config.large, "large"),
    }
    stored.load(models)
    large = models["verbose." if verbose else "large."]
    return pair_of(models["small."].to(device), large.to(device))


def load_models(cfg: ModelsConfig, *, device: torch.device | str = "cpu") -> Pair:
    """The two models that a config names, or the packaged pair; on servers if it names those.

    Raises:
        ValueError: They are not of one family.
        OSError: There is no such checkpoint.
        CheckpointError: There is no packaged pair of that seed.
    """
    if cfg.servers:
        from .remote import remote_pair

        return remote_pair(cfg, load_host(cfg.pair) if cfg.small is None else Pair.load(cfg, weights=False))
    return load_host(cfg.pair, device=device) if cfg.small is None else Pair.load(cfg, device=device)


def check_pair(cfg: ModelsConfig, router: Path | None, *, ask: str | None = None) -> None:
    """Look whether the models that a config names can write one text, before any weights are read.

    Args:
        cfg: Which.
        router: Of R-Stitch+, if there is one.
        ask: A question for them, if it is known.

    Raises:
        ValueError: They are not of one family, cannot read the question, or the router is for another small model.
        OSError: There is no such checkpoint, or no such router.
    """
    if cfg.small is None or cfg.large is None:
        tokenizers: tuple[Any, Any] = (build_tokenizer("small"), build_tokenizer("large"))
    else:
        tokenizers, _ = read_pair(cfg.small, cfg.large)
    if ask is not None:
        for tokenizer in tokenizers:
            check_text(tokenizer, ask)
    if router is not None:
        load_router(router, hidden=_small_channels(cfg))


def _small_channels(cfg: ModelsConfig) -> int:
    if cfg.small is None:
        return open_pair(cfg.pair).config.small.width
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(cfg.small).get_text_config().hidden_size


def pair_of(small: Any, large: Any) -> Pair:
    """Pair two models of ``build_model``; a question is a product, such as 123*45."""
    prompt = "{question}="
    return Pair.of(
        small,
        large,
        build_tokenizer("small"),
        build_tokenizer("large"),
        small_prompt=prompt,
        large_prompt=prompt,
    )
