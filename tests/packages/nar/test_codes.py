import numpy as np
import pytest
import torch
from hone_core.errors import CheckpointError
from hone_nar.codes import open_codes, write_class, write_index, write_texts
from hone_nar.places import INDEX


def folder_of(path, counts=(2, 3), views=2, tokens=6):
    path.mkdir(parents=True, exist_ok=True)
    codes = []
    for number, count in enumerate(counts):
        codes.append(torch.arange(count * views * tokens).view(count, views, tokens) + 100 * number)
        write_class(path, number, codes[-1])
    write_index(path, grid=(2, 3), choices=512, classes=["cat", "dog"][: len(counts)])
    return codes


def test_images_come_back_with_their_class(tmp_path):
    written = folder_of(tmp_path)
    codes = open_codes(tmp_path)
    assert (len(codes), codes.grid, codes.choices, codes.classes) == (5, (2, 3), 512, 2)
    for index, (label, at) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]):
        views, found = codes.item(index)
        assert found == label
        assert torch.equal(views, written[label][at])


def test_texts_lie_beside_their_codes(tmp_path):
    codes = torch.arange(30).view(5, 1, 6)
    write_texts(tmp_path, 0, codes[:3], ["a", "b", "c"])
    write_texts(tmp_path, 1, codes[3:], ["d", "e"])
    write_index(tmp_path, grid=(2, 3), choices=30, shards=2)
    found = open_codes(tmp_path)
    assert (len(found), found.texts, found.classes) == (5, True, None)
    for index, text in enumerate("abcde"):
        views, label = found.item(index)
        assert label == text
        assert torch.equal(views, codes[index])
    (tmp_path / "00001.json").write_text('["d"]')
    with pytest.raises(CheckpointError, match=r"00001.json does not hold 2 texts"):
        open_codes(tmp_path)
    (tmp_path / "00001.json").unlink()
    with pytest.raises(CheckpointError, match=r"00001.json does not hold 2 texts"):
        open_codes(tmp_path)


def test_codes_out_of_range_are_named_with_their_file(tmp_path):
    folder_of(tmp_path)
    codes = open_codes(tmp_path)
    codes.check(tokens=6, choices=136, classes=2)
    # The last of the second class is 135.
    with pytest.raises(CheckpointError, match=r"00001.safetensors, image 2: codes must lie in 0 to 134; got 135"):
        codes.check(tokens=6, choices=135, classes=2)
    codes.check(tokens=6, choices=124, classes=2, limit=4)
    with pytest.raises(CheckpointError, match=r"00001.safetensors, image 0: classes are 0 to 0; got 1"):
        codes.check(tokens=6, choices=136, classes=1)
    with pytest.raises(CheckpointError, match=r"00000.safetensors, image 0: expected views of 9 tokens; got \[2, 6\]"):
        codes.check(tokens=9, choices=136, classes=2)
    write_class(tmp_path, 0, torch.full((1, 1, 6), -1))
    with pytest.raises(CheckpointError, match=r"00000.safetensors, image 0: codes must lie in 0 to 135; got -1"):
        open_codes(tmp_path).check(tokens=6, choices=136, classes=2)


def test_the_releases_folders_are_read(tmp_path):
    (tmp_path / "imagenet256_codes").mkdir()
    (tmp_path / "imagenet256_labels").mkdir()
    for at in range(11):
        np.save(tmp_path / "imagenet256_codes" / f"{at}.npy", np.full((1, 10, 4), at, dtype=np.uint16))
        np.save(tmp_path / "imagenet256_labels" / f"{at}.npy", np.array([at % 3]))
    codes = open_codes(tmp_path)
    assert len(codes) == 11
    views, label = codes.item(10)  # by number, not by name
    assert views.shape == (10, 4)
    assert (int(views[0, 0]), label) == (10, 1)
    (tmp_path / "imagenet256_labels" / "3.npy").unlink()
    with pytest.raises(CheckpointError, match=r"imagenet256_labels lacks the label 3\.npy, and 0 more"):
        open_codes(tmp_path)


def test_what_is_no_folder_of_codes_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder of codes"):
        open_codes(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"holds no codes: neither codes\.json"):
        open_codes(tmp_path)
    folder_of(tmp_path / "a")
    (tmp_path / "a" / "00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 00001.safetensors, class dog; run hone-nar extract"):
        open_codes(tmp_path / "a")
    (tmp_path / "a" / "00001.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"00001.safetensors holds no codes .*; remove it"):
        open_codes(tmp_path / "a")
    folder_of(tmp_path / "b", counts=(0,))
    with pytest.raises(CheckpointError, match="holds no image"):
        open_codes(tmp_path / "b")
    (tmp_path / "b" / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="does not say what is there"):
        open_codes(tmp_path / "b")
