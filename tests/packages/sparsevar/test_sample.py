import json

import numpy as np
import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_sparsevar import inputs
from hone_sparsevar.config import GenerateConfig, ImageConfig, SparseVARConfig
from hone_sparsevar.sample import check_classes, check_inputs, generate
from hone_visual_ar import VAR, VQVAE, InfinityPipeline, VARPipeline
from PIL import Image


def draw(folder, path, variant="sparse", **options):
    image = ImageConfig(pixels="0.06M")
    cfg = GenerateConfig(model=folder, prompts=("a cat", "a", "cat"), variant=variant, image=image, **options)
    with Run.start(package="hone-sparsevar", verb="generate", config=cfg, out=path, device="cpu", quiet=True) as run:
        report = generate(cfg, run)
    return [np.asarray(Image.open(file)).astype(int) for file in report.images]


def test_every_prompt_has_its_image_whatever_the_batch(folder, tmp_path):
    one, two = draw(folder, tmp_path / "1"), draw(folder, tmp_path / "2", batch=2)
    assert len(one) == 3
    alike = GenerateConfig(model=folder, prompts=("a", "a"), image=ImageConfig(pixels="0.06M"))
    with Run.start(
        package="hone-sparsevar", verb="generate", config=alike, out=tmp_path / "alike", device="cpu", quiet=True
    ) as run:
        first, second = (np.asarray(Image.open(file)).astype(int) for file in generate(alike, run).images)
    assert abs(first - second).max() > 10
    assert max(abs(a - b).max() for a, b in zip(one, two, strict=True)) <= 1
    dense = draw(folder, tmp_path / "3", variant="dense")
    assert max(abs(a - b).max() for a, b in zip(one, dense, strict=True)) > 10


def test_a_stopped_run_draws_what_a_whole_one_does(folder, tmp_path, monkeypatch):
    """By threshold an image depends on its batch, which is drawn again."""
    options = {"settings": SparseVARConfig(select="threshold", bucket=1, start_scale=-1), "batch": 3}
    whole = draw(folder, tmp_path / "whole", **options)
    run = tmp_path / "run"
    cfg = GenerateConfig(model=folder, prompts=("a cat", "a", "cat"), image=ImageConfig(pixels="0.06M"), **options)
    with Run.start(package="hone-sparsevar", verb="generate", config=cfg, out=run, device="cpu", quiet=True) as stopped:
        generate(cfg, stopped)
    (stopped.artifacts / "00001.png").unlink()
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"status": "running"}))
    for one, other in zip(whole, draw(folder, run, **options), strict=True):
        assert (one == other).all()
    # What is there is not drawn again.
    (run / "results.json").write_text(json.dumps(results | {"status": "running"}))
    monkeypatch.setattr(InfinityPipeline, "from_pretrained", None)
    assert len(draw(folder, run, **options)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": ImageConfig(aspect=1.1)}, "no schedule of height / width 1.1; it has"),
        ({"prompts": ("a cat a cat a cat a cat a cat",)}, "10 tokens, and this model reads at most 8"),
        ({"settings": SparseVARConfig(start_scale=8)}, "has 7 scales, 0 to 6; got scale 8"),
        ({"settings": SparseVARConfig(start_scale=0)}, "must leave a scale before it to be measured; got 0"),
        ({"settings": SparseVARConfig(detector=3)}, "has 3 blocks, 0 to 2; got detector 3"),
    ],
)
def test_bad_input_is_named_before_weights_are_read(folder, options, message, monkeypatch):
    monkeypatch.setattr(InfinityPipeline, "from_pretrained", None)
    given = {"prompts": ("a",), "image": ImageConfig(pixels="0.06M"), "settings": SparseVARConfig()} | options
    with pytest.raises(ValueError, match=message):
        check_inputs(folder, **given)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no saved pipeline"):
        check_inputs(tmp_path, ("a",), ImageConfig(), SparseVARConfig())


@pytest.fixture(scope="module")
def var_folder(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = VAR(depth=2, head_dim=16, patch_nums=(1, 2, 4, 7), vocabulary=32, code_dim=8, num_classes=4)
        image = VQVAE(vocabulary=32, latent_dim=8, channels=32, multipliers=(1, 1), scales=4)
        for parameter in (*body.parameters(), *image.parameters()):
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    path = tmp_path_factory.mktemp("var")
    VARPipeline(body.eval(), image.eval()).save_pretrained(path)
    return path


def test_classes_are_drawn_by_a_var(var_folder, tmp_path):
    found = {}
    for name, options in {
        "sparse": {"settings": SparseVARConfig(start_scale=-1)},
        "again": {"settings": SparseVARConfig(start_scale=-1), "batch": 2},
        "dense": {"variant": "dense"},
        "unguided": {"variant": "dense", "image": ImageConfig(guidance=0.0)},
    }.items():
        cfg = GenerateConfig(model=var_folder, classes=(1, 3), **options)
        with Run.start(
            package="hone-sparsevar", verb="generate", config=cfg, out=tmp_path / name, device="cpu", quiet=True
        ) as run:
            found[name] = [np.asarray(Image.open(file)).astype(int) for file in generate(cfg, run).images]
    assert [image.shape for image in found["sparse"]] == 2 * [(14, 14, 3)]
    assert max(abs(a - b).max() for a, b in zip(found["sparse"], found["again"], strict=True)) <= 1
    for other in ("dense", "unguided"):
        assert max(abs(a - b).max() for a, b in zip(found["sparse"], found[other], strict=True)) > 10
    assert max(abs(a - b).max() for a, b in zip(found["dense"], found["unguided"], strict=True)) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": (1, 4)}, "draws classes 0 to 3; got 4"),
        ({"image": ImageConfig(aspect=1.5)}, "leave pixels and aspect out"),
        ({"settings": SparseVARConfig(start_scale=5)}, "has 4 scales, 0 to 3; got scale 5"),
        ({"settings": SparseVARConfig(detector=2)}, "has 2 blocks, 0 to 1; got detector 2"),
        ({"settings": SparseVARConfig(backend="auto")}, "fused kernels are for Infinity"),
    ],
)
def test_bad_classes_are_named_before_weights_are_read(var_folder, options, message, monkeypatch):
    monkeypatch.setattr(VARPipeline, "from_pretrained", None)
    given = {"classes": (1,), "image": ImageConfig(), "settings": SparseVARConfig()} | options
    with pytest.raises(ValueError, match=message):
        check_classes(var_folder, **given)


def test_a_variant_that_does_not_fit_is_named_before_weights_are_read(var_folder, folder, monkeypatch):
    for kind in (InfinityPipeline, VARPipeline):
        monkeypatch.setattr(kind, "from_pretrained", None)
    with pytest.raises(ValueError, match="fastvar is for Infinity, which draws prompts"):
        inputs.generate(GenerateConfig(model=var_folder, classes=(1,), variant="fastvar"))
    whole = SparseVARConfig(ratio=1.0)
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\)"):
        inputs.generate(GenerateConfig(model=folder, prompts=("a",), variant="fastvar", settings=whole))


def test_a_folder_of_other_json_holds_no_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no saved pipeline"):
        inputs.generate(GenerateConfig(model=tmp_path, prompts=("a",)))


def test_each_pipeline_takes_its_own(var_folder, folder):
    with pytest.raises(CheckpointError, match="holds a VARPipeline; expected a saved InfinityPipeline"):
        check_inputs(var_folder, ("a",), ImageConfig(), SparseVARConfig())
    with pytest.raises(CheckpointError, match="holds a InfinityPipeline; expected a saved VARPipeline"):
        check_classes(folder, (1,), ImageConfig(), SparseVARConfig())
    for given in ({}, {"prompts": ("a",), "classes": (1,)}):
        with pytest.raises(ValueError, match=r"expected prompts \(Infinity\) or classes \(VAR\)"):
            GenerateConfig(model=folder, **given)
