import numpy as np
import pytest
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_sparsevar.config import GenerateConfig, ImageConfig, SparseVARConfig
from hone_sparsevar.sample import check_inputs, generate
from hone_visual_ar import InfinityPipeline
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
    assert max(abs(a - b).max() for a, b in zip(one, two, strict=True)) <= 1
    dense = draw(folder, tmp_path / "3", variant="dense")
    assert max(abs(a - b).max() for a, b in zip(one, dense, strict=True)) > 10


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
