import numpy as np
import pytest
import torch
from hone_core.errors import CheckpointError
from hone_nar.codes import open_codes
from hone_nar.config import ExtractConfig
from hone_nar.extract import check, extract, views_of
from hone_nar.models import tiny_tokenizer
from PIL import Image


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    for name, count in (("cat", 2), ("dog", 1)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for at in range(count):
            pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{at}.png")
    tiny_tokenizer().save_pretrained(tmp_path / "vae")
    return tmp_path


def test_codes_of_every_view_are_the_tokenizers(images, start):
    cfg = ExtractConfig(images=images / "images", vae=images / "vae", size=32)
    with start(cfg, "extract", images / "run") as run:
        report = extract(cfg, run)
    codes = open_codes(report.codes)
    assert (len(codes), codes.grid, codes.choices, codes.classes) == (3, (8, 8), 32, 2)
    views, label = codes.item(2)
    assert label == 1
    pixels = views_of(images / "images" / "dog" / "0.png", 32, "ten")
    with torch.no_grad():
        assert torch.equal(views, tiny_tokenizer().encode(pixels).flatten(1))
    assert "3 images of 2 classes" in str(report)


def test_ten_views_are_corners_centre_and_mirrors(images):
    file = images / "images" / "cat" / "0.png"
    views = views_of(file, 30, "ten")
    assert views.shape == (10, 3, 30, 30)
    assert torch.equal(views[5:], views[:5].flip(-1))
    # 33 px: corners lie 3 px apart, the centre 1 px in.
    assert torch.equal(views[0][:, 3:, 3:], views[3][:, :27, :27])
    assert torch.equal(views[0][:, 1:, 1:], views[4][:, :29, :29])
    assert views_of(file, 30, "center").shape == (1, 3, 30, 30)
    assert -1 <= views.min() < views.max() <= 1


def test_bad_input_is_named_before_work(images, start):
    (images / "empty" / "bird").mkdir(parents=True)
    for folder, message in (
        ("none", "there is no folder of images"),
        ("vae", "no folder of a class"),
        ("empty", "no image of class bird"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check(ExtractConfig(images=images / folder, vae=images / "vae"))
    with pytest.raises(CheckpointError, match="there is no tokenizer"):
        check(ExtractConfig(images=images / "images", vae=images / "vq.pt"))
    cfg = ExtractConfig(images=images / "images", vae=images / "vae", size=30)
    with start(cfg, "extract", images / "run") as run, pytest.raises(ValueError, match="multiple of 4; got 30"):
        extract(cfg, run)
    (images / "images" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(CheckpointError, match="no image that can be read"):
        views_of(images / "images" / "cat" / "0.png", 30, "ten")
