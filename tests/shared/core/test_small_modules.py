import importlib
import io
import logging
import pickle
import re
import sys

import hone_core
import hone_core.progress as progress
import pytest
import torch
from hone_core.devices import resolve_device, resolve_dtype, use_device
from hone_core.environment import TRIED, code_version, environment, untried
from hone_core.errors import CheckpointError, MissingExtraError, MissingProgramError, UnsupportedHardwareError
from hone_core.lazy import lazy_names
from hone_core.tensors import not_finite


def test_a_module_for_another_program_says_which():
    error = MissingProgramError("lmms-eval", "hone-zipr1")
    assert "pip install lmms-eval hone-zipr1" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_missing_extra_gives_the_install_line():
    error = MissingExtraError("train", "hone-blade", "Training")
    assert str(error).startswith("Training needs the extra 'train' of hone-blade")
    assert "pip install 'hone-blade[train]'" in str(error)
    assert isinstance(error, ImportError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_unsupported_hardware_says_needed_found_use():
    error = UnsupportedHardwareError("triton needs CUDA", found="no GPU", use="backend='reference'")
    assert str(error) == "triton needs CUDA; found no GPU. Use backend='reference'."
    assert str(UnsupportedHardwareError("triton needs CUDA.")) == "triton needs CUDA."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert issubclass(CheckpointError, ValueError)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:x", "cpu:0:1", "mps", "cuda:"):
        with pytest.raises(ValueError, match="device must be auto, cpu, cuda"):
            resolve_device(name)
    with pytest.raises(UnsupportedHardwareError, match=r"'cuda:99' was asked for; found .* CUDA device"):
        resolve_device("cuda:99")


def test_the_first_tensor_that_is_not_finite_is_named():
    good = {"a": torch.ones(2), "b": [torch.ones(1, dtype=torch.long), {"c": torch.ones(1, dtype=torch.complex64)}]}
    good |= {"text": "nan", "number": float("nan"), "eight": torch.ones(2).to(torch.float8_e4m3fn)}
    assert not_finite(good) is None
    assert not_finite({**good, "d": {1: (torch.ones(1), torch.tensor([1.0, torch.inf]))}}) == "d.1.1"
    assert not_finite({**good, "eight": torch.full((2,), torch.nan).to(torch.float8_e4m3fn)}, "part") == "part.eight"


def test_dtypes():
    assert resolve_dtype("auto", "cpu") is torch.float32
    assert resolve_dtype("bfloat16") is torch.bfloat16
    assert resolve_dtype(torch.float16, "cpu") is torch.float16
    with pytest.raises(ValueError, match="got 'int8'"):
        resolve_dtype("int8")


def test_environment_describes_code_and_machine():
    data = environment()
    assert data["torch"] == torch.__version__
    assert data["gpu_count"] == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert data["packages"]["hone-core"] == hone_core.__version__
    assert data["cpu"]


def test_untried_versions_are_named(monkeypatch):
    versions = {"torch": "2.12.1+cu130", "numpy": "2.4.0", "transformers": TRIED["transformers"][0]}
    monkeypatch.setattr("hone_core.environment._version", versions.get)
    assert untried() == [f"torch 2.12.1+cu130 (tried: {', '.join(TRIED['torch'])})"]
    monkeypatch.setattr("hone_core.environment._version", {"accelerate": "1.99"}.get)
    assert untried() == ["accelerate 1.99 (tried: 1.15.0)"]
    assert environment()["untried"] == untried()


def test_commit_comes_from_git_or_from_the_variable(monkeypatch):
    monkeypatch.delenv("HONE_COMMIT", raising=False)
    commit, dirty = code_version()
    if commit:
        assert re.fullmatch(r"[0-9a-f]{40}", commit)
        assert isinstance(dirty, bool)
    monkeypatch.setenv("HONE_COMMIT", "abc")
    assert code_version() == ("abc", None)
    monkeypatch.delenv("HONE_COMMIT")
    monkeypatch.setattr("hone_core.environment._git", lambda *args: None)
    assert code_version() == (None, None)


def test_version_agrees_with_the_metadata():
    import importlib.metadata

    assert hone_core.__version__ == importlib.metadata.version("hone-core")


def test_lazy_names(tmp_path, monkeypatch):
    package = tmp_path / "lazy_sample"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from hone_core.lazy import lazy_names\n"
        "names = {'heavy': ['Thing', 'run'], 'run_mod': [], 'twin': 'twin'}\n"
        "__getattr__, __dir__, __all__ = lazy_names(__name__, names)\n"
    )
    (package / "heavy.py").write_text("class Thing: pass\ndef run(): return 5\n")
    (package / "run_mod.py").write_text("X = 1\n")
    (package / "twin.py").write_text("def twin(): return 6\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import lazy_sample

    assert lazy_sample.__all__ == ["Thing", "run", "run_mod", "twin"]
    assert "lazy_sample.heavy" not in sys.modules
    assert {"Thing", "run", "heavy", "run_mod"} <= set(dir(lazy_sample))
    assert lazy_sample.run() == 5
    assert "lazy_sample.heavy" in sys.modules
    assert lazy_sample.run_mod.X == 1
    with pytest.raises(AttributeError, match="no attribute 'nope'; it has Thing, run, run_mod, twin"):
        _ = lazy_sample.nope
    # A function of its module's name is the function, although the module is imported first.
    importlib.import_module("lazy_sample.twin")
    assert lazy_sample.twin() == 6
    assert sys.modules["lazy_sample.twin"].twin is lazy_sample.twin


def test_every_lazy_name_of_core_resolves():
    for name in hone_core.__all__:
        assert getattr(hone_core, name) is not None
    assert callable(lazy_names)


def test_progress_is_silent_when_quiet_and_when_it_takes_no_time(capsys):
    for quiet in (True, False):
        with progress.progress_bar(2, desc="steps", quiet=quiet) as bar:
            bar.update(2)
            bar.show(loss=1)
    assert capsys.readouterr() == ("", "")


def test_progress_lines_off_a_terminal(monkeypatch, caplog):
    now = iter([0.0, 4.0, 12.0, 13.0, 25.0, 26.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with caplog.at_level(logging.INFO), progress.progress_bar(4, desc="sampling") as bar:
        for loss in (4, 3, 2, 1):
            bar.show(loss=loss)
            bar.update()
    # A line at 12 s (two of four done: 12 s left), one at 25 s, one at the end.
    assert caplog.messages == [
        "sampling: 2/4 in 12 s, 12 s left, loss 3",
        "sampling: 4/4 in 25 s, loss 1",
        "sampling: 4/4 in 26 s, loss 1",
    ]


def test_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.progress_bar(3, desc="frames") as bar:
        bar.update(2)
        bar.show(loss="0.5")
    assert "frames" in terminal.getvalue()
    assert "2/3" in terminal.getvalue()
    assert "loss=0.5" in terminal.getvalue()


def test_a_device_without_an_index_is_in_use_already(monkeypatch):
    """As ``--device cuda`` gives it: torch refuses it."""
    from torch.cuda import _utils

    used = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append(_utils._get_device_index(device)))
    with pytest.raises(ValueError, match="with a specified index"):
        torch.cuda.set_device(torch.device("cuda"))
    for name in ("cuda", "cpu", "cuda:1"):
        use_device(torch.device(name))
    assert used == [1]
