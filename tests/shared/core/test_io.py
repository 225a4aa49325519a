import errno
import json
import os
import stat

import numpy as np
import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.io import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    in_order,
    read_prompts,
    read_published,
    save_safetensors,
    save_state,
    tensor_names,
)
from hone_core.testing import full_disk
from safetensors import safe_open


def test_writes_and_replaces(tmp_path):
    file = tmp_path / "sub" / "a.txt"
    assert atomic_write_text(file, "één\n") == file
    assert file.read_bytes() == "één\n".encode()
    atomic_write_bytes(file, b"two")
    assert file.read_bytes() == b"two"
    assert [p.name for p in file.parent.iterdir()] == ["a.txt"]


def test_failure_keeps_the_old_file_and_no_scratch(tmp_path):
    file = tmp_path / "a.json"
    atomic_write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_write_json(file, {"a": float("nan")})

    def write_half():
        with atomic_path(file) as scratch:
            scratch.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_scratch_keeps_the_suffix_and_result_is_readable(tmp_path):
    with atomic_path(tmp_path / "clip.mp4") as scratch:
        assert scratch.suffix == ".mp4"
        scratch.write_bytes(b"x")
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "clip.mp4").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_writing_changes_no_umask_that_other_threads_make_files_by(tmp_path, monkeypatch):
    changed = []
    monkeypatch.setattr(os, "umask", lambda mask: changed.append(mask) or 0o022)
    before = stat.S_IMODE(atomic_write_text(tmp_path / "a.txt", "a").stat().st_mode)
    saved = stat.S_IMODE(save_safetensors({"x": torch.ones(3)}, tmp_path / "b.safetensors").stat().st_mode)
    (tmp_path / "plain").write_bytes(b"")
    assert not changed
    assert before == saved == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_what_is_renamed_into_place_is_on_the_disk(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda one, other: (order.append("replace"), replace(one, other)))
    save_safetensors({"x": torch.ones(3)}, tmp_path / "state.safetensors")
    save_state({"x": torch.ones(3)}, tmp_path / "state.pt")
    atomic_write_json(tmp_path / "state.json", {})
    assert order == ["sync", "replace"] * 3


def test_a_full_disk_is_named_whatever_writes(tmp_path):
    file = atomic_write_text(tmp_path / "results.json", "before")
    with full_disk(100), pytest.raises(OSError, match=r"results\.json could not be written: File too large") as caught:
        atomic_write_json(file, ["x" * 1000])
    assert caught.value.errno == errno.EFBIG

    def picture():
        with atomic_path(tmp_path / "a.npy") as scratch:
            np.save(scratch, np.zeros(1000))

    with full_disk(100), pytest.raises(OSError, match=r"a\.npy could not be written"):
        picture()
    assert file.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(("save", "size"), [(save_state, 100), (save_state, 300_000), (save_safetensors, 300_000)])
def test_a_full_disk_is_named_and_keeps_the_old_file(tmp_path, save, size):
    file = save({"x": torch.ones(3)}, tmp_path / "state.safetensors")
    before = file.read_bytes()
    with full_disk(size), pytest.raises(OSError, match=r"state\.safetensors could not be written: .*File too large"):
        save({"x": torch.ones(100_000)}, file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    save({"x": torch.ones(100_000)}, file)


def test_what_torch_cannot_save_is_its_own_error(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        save_state(lambda: None, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_safetensors_of_shared_and_strided_tensors(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    file = save_safetensors(
        {"t": base.T, "row": base[1], "base": base}, tmp_path / "w.safetensors", metadata={"k": "v"}
    )
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == {"k": "v"}
        assert stored.get_tensor("t").tolist() == [[0, 3], [1, 4], [2, 5]]
        assert stored.get_tensor("row").tolist() == [3, 4, 5]


def test_names_of_tensors_are_read_alone(tmp_path):
    file = save_safetensors({"b": torch.ones(3), "a": torch.ones(2)}, tmp_path / "state.safetensors")
    assert sorted(tensor_names(file)) == ["a", "b"]
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is no safetensors file, or is cut short"):
        tensor_names(file)


def test_prompts_are_lines_that_are_not_empty(tmp_path):
    file = tmp_path / "prompts.txt"
    with pytest.raises(FileNotFoundError, match=r"prompts\.txt does not exist; expected a text file"):
        read_prompts(file)
    file.write_bytes("\ufeff".encode("utf-16"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8"):
        read_prompts(file)
    file.write_text(" \n\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(file)
    file.write_text("a cat \n\n  två\n", encoding="utf-8")
    assert read_prompts(file) == ("a cat", "två")
    file.write_bytes("\ufeffa cat\u2028runs\r\ntvå".encode())
    assert read_prompts(file) == ("a cat\u2028runs", "två")


def test_numbers_in_names_sort_as_numbers():
    names = ["b1", "a10", "a9", "a9b", "a09", "10", "9"]
    assert sorted(names, key=in_order) == ["9", "10", "a09", "a9", "a9b", "a10", "b1"]


def test_published_prompts_are_there_or_the_benchmark_is_named(tmp_path):
    def broken():
        yield 1
        raise KeyError("prompt")

    def refused():
        raise CheckpointError("as the reader says")

    assert read_published("a", "X", lambda: iter("ab")) == ["a", "b"]
    for read, message in [
        (broken, r"^a holds no prompts as X publishes them \(KeyError\('prompt'\)\)$"),
        (refused, "^as the reader says$"),
        (list, "^a holds no prompts of X$"),
        ((tmp_path / "none").read_text, "^a cannot be read: No such file"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_published("a", "X", read)
