"""tools/gpu_eval.py, on a tiny untrained host."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hone_blade.config import Comparison, HostConfig
from hone_blade.host import Host, save_host

SCRIPT = Path(__file__).parents[3] / "tools" / "gpu_eval.py"
TINY = HostConfig(
    frames=4,
    height=16,
    width=16,
    layers=1,
    heads=1,
    head_dim=32,
    ffn_dim=32,
    text_dim=16,
    steps=2,
    solver="euler",
    guidance=1.0,
)


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_eval", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    half = Comparison(block=16, density=0.5, pool=4, samples=4)
    monkeypatch.setattr(module, "SETTINGS", {"half": half, "half, first dense": half})
    return module


def test_a_setting_is_kept_when_a_later_one_is_cut_off(script, tmp_path, monkeypatch, capsys):
    save_host(Host.untrained(TINY), tmp_path / "host.safetensors")
    folders = ["--out", os.fspath(tmp_path / "runs"), "--export", os.fspath(tmp_path / "results")]
    options = ["--host", os.fspath(tmp_path / "host.safetensors"), "--device", "cpu", "--allow-dirty"]
    monkeypatch.setattr(sys, "argv", ["gpu_eval.py", *folders, *options, "--prompts", "2", "--seeds", "2"])
    real, calls = script.compare, []

    def compare(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(script, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["tiny_host_half.json"]
    rows = json.loads((tmp_path / "results" / "tiny_host_half.json").read_text())["rows"]
    assert {row["variant"] for row in rows} == {"dense", "asa", "asa_g", "window", "random"}
    assert {row["n"] for row in rows if row["metric"] == "accuracy"} == {4}
    assert "half: seed 2 of 2 in " in capsys.readouterr().out
    script.main()  # goes on with the setting that was cut off
    assert len(calls) == 5
    assert "half: was there" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results" / "tiny_host_half_first_dense.json").read_text())["rows"]
    assert {row["variant"] for row in rows} == {"asa", "asa_g", "window", "random"}
    assert {row["labels"]["setting"] for row in rows} == {"half, first dense"}


def test_it_needs_no_tyro():
    code = f"import runpy, sys\nsys.modules['tyro'] = None\nrunpy.run_path({os.fspath(SCRIPT)!r}, run_name='gpu_eval')"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
