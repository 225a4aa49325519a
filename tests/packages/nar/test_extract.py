import json
import shutil

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hone_core.errors import CheckpointError
from hone_nar.codes import open_codes
from hone_nar.config import ExtractConfig
from hone_nar.extract import clips_of, extract, views_of
from hone_nar.inputs import find_extracted
from hone_nar.larp import LARPTokenizer
from hone_nar.models import tiny_tokenizer
from hone_nar.places import find_texts
from PIL import Image
from safetensors.torch import save_file


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
    assert cfg.dtype == "float32"  # on a GPU too: in 16 bits some codes come out otherwise


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
            find_extracted(ExtractConfig(images=images / folder, vae=images / "vae"))
    with pytest.raises(CheckpointError, match="there is no tokenizer"):
        find_extracted(ExtractConfig(images=images / "images", vae=images / "vq.pt"))
    cfg = ExtractConfig(images=images / "images", vae=images / "vae", size=30)
    with start(cfg, "extract", images / "run") as run, pytest.raises(ValueError, match="multiple of 4; got 30"):
        extract(cfg, run)
    (images / "images" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(CheckpointError, match="no image that can be read"):
        views_of(images / "images" / "cat" / "0.png", 30, "ten")


def test_a_stopped_run_goes_on_with_the_same_files_alone(images, start, monkeypatch):
    cfg = ExtractConfig(images=images / "images", vae=images / "vae", size=32, crops="center")
    broken = images / "images" / "dog" / "0.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    with pytest.raises(CheckpointError, match="no image"), start(cfg, "extract", images / "run") as run:
        extract(cfg, run)
    broken.write_bytes(whole)
    # A class that sorts before the others would take the number of one that is done.
    (images / "images" / "bird").mkdir()
    (images / "images" / "bird" / "0.png").write_bytes(whole)
    with (
        pytest.raises(CheckpointError, match="added, removed or changed"),
        start(cfg, "extract", images / "run") as run,
    ):
        extract(cfg, run)
    shutil.rmtree(images / "images" / "bird")
    with start(cfg, "extract", images / "run") as run:
        assert open_codes(extract(cfg, run).codes).classes == 2


def test_the_releases_folder_of_a_tokenizer_is_read_by_names_and_shapes(images, start):
    """Its config names no class, as that of LARP's repository."""
    folder = images / "larp"
    folder.mkdir()
    (folder / "config.json").write_text('{"bottleneck": {}}')
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    cfg = ExtractConfig(images=images / "images", vae=folder, size=32)
    with (
        start(cfg, "extract", images / "run") as run,
        pytest.raises(CheckpointError, match="not the file of this Llam"),
    ):
        extract(cfg, run)


def test_images_with_texts(images, start):
    lines = [{"file_name": f"cat/{at}.png", "text": f" cat {at}"} for at in range(2)]
    lines.append({"file_name": "dog/0.png", "text": "dog"})
    listing = images / "images" / "metadata.jsonl"
    listing.write_text("\n".join(map(json.dumps, lines)))
    cfg = ExtractConfig(images=images / "images", vae=images / "vae", size=32, kind="texts", crops="center", shard=2)
    with start(cfg, "extract", images / "run") as run:
        report = extract(cfg, run)
    codes = open_codes(report.codes)
    assert (len(codes), codes.grid, codes.texts, len(codes.shards)) == (3, (8, 8), True, 2)
    views, text = codes.item(1)
    assert text == "cat 1"
    pixels = views_of(images / "images" / "cat" / "1.png", 32, "center")
    with torch.no_grad():
        assert torch.equal(views, tiny_tokenizer().encode(pixels).flatten(1))
    assert "3 images with texts" in str(report)
    for text, message in (
        ("{}", "line 1: expected file_name and text"),
        ('{"file_name": "cat/9.png", "text": "a"}', "line 1: there is no"),
        ('{"file_name": "cat/0.png", "text": " "}', "line 1: the text holds no word"),
        ("", "lists no image"),
    ):
        listing.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            find_texts(images / "images")
    odd = json.dumps({"file_name": "cat/0.png", "text": "a\u2028b"}, ensure_ascii=False)
    listing.write_text("\ufeff" + odd, encoding="utf-8")
    assert find_texts(images / "images") == [(images / "images" / "cat" / "0.png", "a\u2028b")]
    listing.unlink()
    with pytest.raises(CheckpointError, match=r"there is no .*metadata.jsonl"):
        find_texts(images / "images")


# imageio-ffmpeg leaves the pipes of its process to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_clips_are_windows_of_videos(tmp_path, start):
    (tmp_path / "videos" / "jump").mkdir(parents=True)
    file = tmp_path / "videos" / "jump" / "a.mp4"
    frames = np.zeros((10, 32, 48, 3), dtype=np.uint8)
    frames[:, :, 8:24] = 250  # the left half of the middle
    for at in range(10):
        frames[at, :, 24:40] = 20 * at
    writer = imageio_ffmpeg.write_frames(str(file), (48, 32), fps=8, quality=10, macro_block_size=1)
    writer.send(None)
    for frame in frames:
        writer.send(frame)
    writer.close()
    windows = clips_of(file, 4, 16, "ten")
    assert windows.shape == (2, 2, 3, 4, 16, 16)  # two frames are left over
    assert torch.equal(windows[:, 1], windows[:, 0].flip(-1))
    found = windows[:, 0, :, :, 4:12, 10:14].mean((1, 3, 4)).flatten()
    torch.testing.assert_close(found, torch.arange(8) * 20 / 255, atol=0.03, rtol=0)
    assert float(windows[0, 0, :, :, :, 2:6].mean()) == pytest.approx(250 / 255, abs=0.03)
    with pytest.raises(CheckpointError, match="has 10 frames; a clip has 11"):
        clips_of(file, 11, 16, "ten")
    vae = LARPTokenizer(frames=4, size=16, tokens=6, dim=16, depth=1, heads=2, codebook_size=16).eval()
    vae.save_pretrained(tmp_path / "larp")
    cfg = ExtractConfig(images=tmp_path / "videos", vae=tmp_path / "larp", kind="clips", grid=(1, 2, 3))
    with start(cfg, "extract", tmp_path / "run") as run:
        codes = open_codes(extract(cfg, run).codes)
    assert (len(codes), codes.grid, codes.choices, codes.classes) == (2, (1, 2, 3), 16, 1)
    with torch.no_grad():
        assert torch.equal(codes.item(1)[0], vae.encode(windows[1]))
    wrong = ExtractConfig(images=tmp_path / "videos", vae=tmp_path / "larp", kind="clips", grid=(2, 2, 3))
    with (
        start(wrong, "extract", tmp_path / "b") as run,
        pytest.raises(ValueError, match="gives 6 tokens; got --grid of 12"),
    ):
        extract(wrong, run)
    tiny_tokenizer().save_pretrained(tmp_path / "vq")
    wrong = ExtractConfig(images=tmp_path / "videos", vae=tmp_path / "vq", kind="clips")
    with start(wrong, "extract", tmp_path / "c") as run, pytest.raises(CheckpointError, match="clips need a LARPTok"):
        extract(wrong, run)
    file.write_bytes(b"no video")
    with pytest.raises(CheckpointError, match="cannot be read as a video"):
        clips_of(file, 4, 16, "ten")
