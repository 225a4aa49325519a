import pytest
from hone_motion_anything.config import (
    BenchConfig,
    ConvertConfig,
    DemoConfig,
    GenerateConfig,
    HostConfig,
    MotionAnythingConfig,
    ReproduceConfig,
    TokenizerConfig,
    TrainHostConfig,
    TransformerConfig,
    UnmaskConfig,
)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (MotionAnythingConfig, {"masking": "kmeans"}, "masking must be one of attention, random, events, cosine"),
        (MotionAnythingConfig, {"score_rows": "some"}, "score_rows must be one of"),
        (MotionAnythingConfig, {"alpha_time": 30}, r"alpha_time is a share and must lie in \[0, 1\]; got 30"),
        (MotionAnythingConfig, {"p_attention": -0.1}, "p_attention is a share"),
        (TransformerConfig, {"layers": 3}, "an even number from 2; got 3"),
        (TransformerConfig, {"heads": 3}, "heads must divide width; got 3 and 512"),
        (TransformerConfig, {"gate": "sum"}, "gate must be one of product, residual, none; got 'sum'"),
        (TransformerConfig, {"sat_condition": "x"}, "sat_condition must be one of"),
        (TransformerConfig, {"music_keys": "x"}, "music_keys must be one of"),
        (TransformerConfig, {"parts": 0}, "must be at least 1"),
        (TransformerConfig, {"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        (UnmaskConfig, {"steps": 0}, "steps must be at least 1"),
        (UnmaskConfig, {"remask": "x"}, "remask must be one of"),
        (UnmaskConfig, {"temperature": float("nan")}, "temperature finite and not negative"),
        (UnmaskConfig, {"temperature": float("inf")}, "temperature finite and not negative"),
        (UnmaskConfig, {"text_guidance": float("nan")}, "must be finite; got nan and 2"),
        (UnmaskConfig, {"music_guidance": float("inf")}, "must be finite; got 4.0 and inf"),
        (BenchConfig, {"guidance": float("nan")}, "guidance must be finite; got nan"),
        (GenerateConfig, {"texts": ("a",), "music_start": float("nan")}, "music_start must be finite"),
        (MotionAnythingConfig, {"alpha_time": 0.0, "alpha_parts": 0.0}, "the method hides nothing"),
        (TokenizerConfig, {"codes": 0}, "must be at least 1"),
        (HostConfig, {"tokenizer": TokenizerConfig(codes=8)}, "as many codes; got 8 and 256"),
        (TrainHostConfig, {"minutes": 0.0}, "minutes must be positive"),
        (TrainHostConfig, {"tokenizer_share": 0.95}, "leave the transformer some"),
        (TrainHostConfig, {"drop": 2.0}, "drop is a share"),
        (TrainHostConfig, {"clips": 4}, "clips at least batch"),
        (ConvertConfig, {"source": "a", "bones": "loose"}, "bones must be one of fixed, stretched; got 'loose'"),
        (ConvertConfig, {"source": "a", "to": "npz", "bones": "stretched"}, "stretched in bvh and gltf; got npz"),
        (GenerateConfig, {"texts": ("a",), "formats": ("mp4",), "bones": "stretched"}, "in bvh and gltf; got mp4"),
        (DemoConfig, {"limit": 1}, "a limit of 2 at least"),
        (DemoConfig, {"tempo": 10.0}, "from 60 to 180; got 10"),
        (ReproduceConfig, {"arms": ("attention",)}, "arms must be two or more of"),
        (ReproduceConfig, {"arms": ("attention", "magic")}, "got attention, magic"),
        (ReproduceConfig, {"seeds": (1, 1)}, "seeds must be different"),
        (ReproduceConfig, {"settings": MotionAnythingConfig(masking="cosine")}, "leave --masking out"),
    ],
)
def test_bad_values(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)
