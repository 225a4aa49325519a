"""What a verb needs, looked for before its run folder is made.

Files are looked for before torch is imported, and everything else that can be wrong before weights are read.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from hone_core.hosts import open_host, packaged_host, read_facts
from hone_lm.addresses import find_checkpoint

from .adapters import base_of
from .config import AskConfig, DemoConfig, EvalConfig, GenerateConfig, HostConfig, ReproduceConfig, TrainConfig

__all__ = ["find_asked", "find_evaluated", "find_host", "find_hosts", "find_trained"]

PACKAGE = "hone-zipr1"
Ask = TypeVar("Ask", bound=AskConfig)


def find_host(cfg: DemoConfig) -> DemoConfig:
    """Look for the host.

    Raises:
        CheckpointError: There is none.
    """
    path = open_host(HostConfig, PACKAGE, cfg.host).path
    return cfg if cfg.host is None else replace(cfg, host=Path(os.path.abspath(path)))


def find_hosts(cfg: ReproduceConfig) -> ReproduceConfig:
    """Look whether every host is there and has passed its gates.

    Raises:
        CheckpointError: One is missing.
        ValueError: One has not, two are of the same seed, or an arm is unknown.
    """
    cfg = replace(cfg, hosts=tuple(path.resolve() for path in cfg.hosts))
    facts = []
    for path in cfg.hosts or (packaged_host(PACKAGE),):
        open_host(HostConfig, PACKAGE, path)
        found = read_facts(path, PACKAGE)
        if not found.passed:
            raise ValueError(f"{path} misses its gates ({found.result}); train it longer")
        facts.append(found)
    if len({found.seed for found in facts}) < len(facts):
        raise ValueError("two hosts are of the same seed; train-host --seed makes others")
    from .reproduce import ARMS

    unknown = sorted(set(cfg.arms) - set(ARMS))
    if unknown:
        raise ValueError(f"arms are {', '.join(ARMS)}; got {', '.join(unknown)}")
    return cfg


def find_asked(cfg: Ask) -> Ask:
    """Look for everything that can be wrong with a question.

    Raises:
        FileNotFoundError: There is no such picture or video.
        OSError: There is no such model.
        ValueError: The question or the picture does not fit the model, or the model cannot take the selection.
        CheckpointError: No tiny host is packaged.
    """
    for path in (cfg.image, cfg.video):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"there is no {path}")
    if cfg.model is None:
        from .data import parse_question

        parse_question(cfg.ask, open_host(HostConfig, PACKAGE).config.cells)
        return replace(cfg, preset="tiny" if cfg.preset == "paper" else cfg.preset)
    base = base_of(cfg.model)
    find_checkpoint(base)
    from hone_lm.checkpoints import read_config

    from .models import check_config
    from .questions import check_context
    from .sample import item_of, processed, selection_of

    check_config(read_config(base), selection_of(cfg))
    found, inputs = processed(cfg)
    check_context(inputs, found, cfg.max_new_tokens if isinstance(cfg, GenerateConfig) else 0, [item_of(cfg)])
    image, video = (None if path is None else Path(os.path.abspath(path)) for path in (cfg.image, cfg.video))
    return replace(cfg, image=image, video=video, model=_absolute(cfg.model))


def find_trained(cfg: TrainConfig) -> TrainConfig:
    """Look at the questions and at the model's config.

    Raises:
        ValueError: A question is none or too long, videos do not go into one batch, or the model cannot take the
            selection.
        FileNotFoundError: The file, or what a question is about, is missing.
        OSError: There is no such model.
        CheckpointError: No tiny host is packaged.
    """
    if cfg.model is None or cfg.data is None:
        open_host(HostConfig, PACKAGE)
        return cfg
    base = base_of(cfg.model)
    if base != cfg.model:
        raise ValueError(
            f"{cfg.model} holds adapters of {base}; expected a whole model. Save the two merged (merge_and_unload of "
            "peft), or train anew from that model"
        )
    if not cfg.data.is_file():
        raise FileNotFoundError(f"there is no {cfg.data}")
    find_checkpoint(cfg.model)
    from hone_lm.checkpoints import read_config

    from .models import check_config
    from .questions import check_batch, check_longest, load_items

    items = load_items(cfg.data)
    check_config(read_config(cfg.model), cfg.sparse)
    check_longest(cfg.model, items, cfg.frames, cfg.max_new_tokens)
    if cfg.reinforce.prompts > 1:
        check_batch(cfg.model, items, cfg.frames)
    return replace(cfg, data=cfg.data.resolve(), model=_absolute(cfg.model))


def find_evaluated(cfg: EvalConfig) -> EvalConfig:
    """Look at the questions and at the model's config.

    Raises:
        ValueError: A question is none or too long, or the model cannot take the selection or the budget.
        FileNotFoundError: A file, or what a question is about, is missing.
        OSError: There is no such model.
        CheckpointError: The budget is none.
    """
    if not cfg.data.is_file():
        raise FileNotFoundError(f"there is no {cfg.data}")
    if cfg.budget is not None and not cfg.budget.is_file():
        raise FileNotFoundError(f"there is no {cfg.budget}; expected the budget.safetensors of a training")
    base = base_of(cfg.model)
    find_checkpoint(base)
    from hone_lm.checkpoints import read_config

    from .models import check_config
    from .objectives import BudgetPolicy
    from .questions import check_longest, load_items

    items = load_items(cfg.data)[: cfg.limit]
    found = read_config(base)
    for config in cfg.selections:
        check_config(found, config)
    if cfg.budget is not None:
        takes, width = BudgetPolicy.load(cfg.budget).out.in_features, found.get_text_config().hidden_size
        if takes != width:
            raise ValueError(f"{cfg.budget} was learned for a model of width {takes}; {cfg.model} has {width}")
    check_longest(base, items, cfg.frames, cfg.max_new_tokens)
    budget = None if cfg.budget is None else cfg.budget.resolve()
    return replace(cfg, data=cfg.data.resolve(), model=_absolute(cfg.model), budget=budget)


def _absolute(model: str) -> str:
    """A model that is no folder here is an address on the hub."""
    return os.path.abspath(model) if os.path.exists(model) else model
