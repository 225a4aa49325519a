from pathlib import Path

import pytest
from hone_sparsevar.config import (
    BenchConfig,
    BenchmarkConfig,
    DemoConfig,
    EvalConfig,
    GenerateConfig,
    ImageConfig,
    ReproduceConfig,
    SparseVARConfig,
    TrainHostConfig,
)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (SparseVARConfig, {"ratio": 1.2}, r"share of tokens and must lie in \[0, 1\]; got 1.2"),
        (SparseVARConfig, {"ratio": -0.1}, "must lie in"),
        (SparseVARConfig, {"window": 0}, "window must be at least 1; got 0"),
        (SparseVARConfig, {"window": None}, "without anchors fill must be zero or prev and kv drop; got fill='anchor'"),
        (SparseVARConfig, {"window": None, "fill": "zero", "kv": "fill"}, "kv='fill'"),
        (SparseVARConfig, {"window": None, "fill": "zero", "ratio": 1.0}, "leaves nothing to run"),
        (SparseVARConfig, {"detector": -1}, "number of a block, from 0; got -1"),
        (SparseVARConfig, {"fill": "mean"}, "fill must be one of anchor, .*; got 'mean'"),
        (SparseVARConfig, {"score": "best"}, "score must be one of map"),
        (SparseVARConfig, {"select": "all"}, "select must be topk or threshold"),
        (SparseVARConfig, {"bucket": 0}, "bucket at least 1"),
        (SparseVARConfig, {"backend": "cuda"}, "backend must be torch, auto, triton or reference; got 'cuda'"),
        (DemoConfig, {"limit": 0}, "limit must be at least 1"),
        (EvalConfig, {"variants": ("dense", "magic")}, "no variant magic; expected of dense, sparse"),
        (EvalConfig, {"limit": 1}, "limit must be at least 2"),
        (ReproduceConfig, {"seeds": (1, 1)}, "seeds must be different"),
        (ReproduceConfig, {"ratios": (0.7,)}, "other than that of the settings, 0.7"),
        (ReproduceConfig, {"ratios": (1.5,)}, r"shares in \[0, 1\]"),
        (BenchConfig, {"modes": ("fast",)}, "modes must be of eager, graphs, compiled; got fast"),
        (BenchConfig, {"batch": 0}, "batch, text_tokens and rounds must be at least 1"),
        (BenchConfig, {"pixels": "0.25M"}, "tiny has its own: leave them out"),
        (BenchConfig, {"dtype": "bfloat16"}, "tiny has its own: leave them out"),
        (ImageConfig, {"temperature": 0.0}, "temperature must be positive and finite; got 0"),
        (ImageConfig, {"temperature": float("nan")}, "temperature must be positive and finite; got nan"),
        (ImageConfig, {"guidance": float("inf")}, "guidance must be finite; got inf"),
        (SparseVARConfig, {"threshold": float("nan")}, "threshold must be finite and not negative"),
        (
            EvalConfig,
            {
                "protocol": "dpg",
                "preset": "infinity-0.6",
                "benchmark": BenchmarkConfig(
                    model=Path("a"), prompts=Path("b"), scorer=Path("c"), image=ImageConfig(aspect=1.5)
                ),
            },
            "DPG-Bench cuts squares; got aspect 1.5",
        ),
        (GenerateConfig, {"variant": "dense", "settings": SparseVARConfig(ratio=0.5)}, "variant dense has no settings"),
        (TrainHostConfig, {"eval_images": 0}, "eval_images must be positive; got 0"),
        (TrainHostConfig, {"ema": 1.0}, r"decay in \[0, 1\)"),
        (TrainHostConfig, {"minutes": 0.0}, "minutes must be positive"),
        (TrainHostConfig, {"tokenizer_share": 0.97}, "leave the transformer some"),
        (TrainHostConfig, {"flip": 1.5}, "flip and drop are shares"),
    ],
)
def test_bad_values(cls, options, message):
    if cls is GenerateConfig:
        options = options | {"model": Path("unused"), "prompts": ("a",)}
    with pytest.raises(ValueError, match=message):
        cls(**options)
