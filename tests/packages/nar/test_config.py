import pytest
from hone_nar.config import (
    BenchConfig,
    DemoConfig,
    EvalConfig,
    ExtractConfig,
    GenerateConfig,
    HostConfig,
    NARConfig,
    ReproduceConfig,
    TrainConfig,
    TrainHostConfig,
)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (NARConfig, {"mix": "left"}, "mix must be one of average, right, below, back; got 'left'"),
        (HostConfig, {"dim": 60, "heads": 4}, "dim must be a multiple of 4 heads; got 60 and 4"),
        (TrainHostConfig, {"steps": None, "minutes": 0.0}, "minutes must be positive"),
        (TrainHostConfig, {"steps": 1}, "steps are of two models"),
        (TrainHostConfig, {"drop": 1.0}, r"shares in \[0, 1\)"),
        (TrainHostConfig, {"eval_images": 3}, "eval_images must be at least 20"),
        (DemoConfig, {"limit": 0}, "limit must be at least 1"),
        (EvalConfig, {"limit": 3}, "limit must be at least 20"),
        (EvalConfig, {"model": "x", "data": "y"}, "need --model, --data and --nll together"),
        (ExtractConfig, {"images": "x", "vae": "y", "crops": "two"}, "crops must be ten or center"),
        (TrainConfig, {"data": "x", "loss": "both"}, "loss must be one of mixture, separate, flashar"),
        (TrainConfig, {"data": "x", "schedule": "line"}, "schedule must be one of steps, cosine"),
        (TrainConfig, {"data": "x", "decayed": "all"}, "decayed must be one of matrices, linear"),
        (TrainConfig, {"data": "x", "first_stage": 1.0}, "first_stage and least are shares"),
        (EvalConfig, {"text_encoder": "x"}, "--text-encoder belongs to --model"),
        (EvalConfig, {"protocol": "coco"}, "protocol must be host, imagenet, ucf or geneval"),
        (EvalConfig, {"reference": "x"}, "--reference belongs to another protocol"),
        (EvalConfig, {"protocol": "ucf"}, "takes a saved pipeline, --model FOLDER"),
        (EvalConfig, {"protocol": "ucf", "model": "x", "reference": "y"}, "protocol ucf needs --detector"),
        (
            EvalConfig,
            {"protocol": "imagenet", "model": "x", "detector": "y"},
            "takes --reference, --scorer; got",
        ),
        (
            EvalConfig,
            {"protocol": "geneval", "model": "x", "prompts": "y", "scorer": "z"},
            "--scorer and --weights together",
        ),
        (ExtractConfig, {"images": "x", "vae": "y", "kind": "sounds"}, "kind must be classes, texts or clips"),
        (EvalConfig, {"graphs": True}, "--graphs belongs to another protocol"),
        (HostConfig, {"data": "faces"}, "data must be digits or shapes"),
        (DemoConfig, {"host": "x", "data": "shapes"}, "leave it out with --host"),
        (TrainHostConfig, {"data": "faces"}, "data must be digits or shapes"),
        (ReproduceConfig, {"data": "faces"}, "data must be digits or shapes"),
        (TrainConfig, {"data": "x", "start": "a", "raster": "b"}, "give start or raster"),
        (TrainConfig, {"data": "x", "drop": 1.0}, "shares in"),
        (TrainConfig, {"data": "x", "milestones": (1.0,)}, "milestones are shares"),
        (TrainConfig, {"data": "x", "dtype": "float16"}, "dtype must be auto"),
        (GenerateConfig, {"model": "x"}, "give classes or prompts, and not both"),
        (GenerateConfig, {"model": "x", "classes": (1,), "prompts": ("a",)}, "and not both"),
        (BenchConfig, {"models": ()}, "expected models and batches"),
        (BenchConfig, {"batches": (0,)}, "batches of at least 1"),
        (BenchConfig, {"bandwidth": 0.0}, "bandwidth must be positive"),
        (BenchConfig, {"modes": ("fast",)}, "modes must be of eager, graphs, compiled, fused and few; got"),
        (ReproduceConfig, {"seeds": (1, 1)}, "seeds must be different"),
    ],
)
def test_bad_values(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)
