import json
import sys

import pytest
from hone_zpressor import cli


def call(capsys, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["hone-zpressor", *argv])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, *capsys.readouterr()


def test_info_lists_the_presets(capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "info", "--json")
    assert code == 0
    assert json.loads(out)["presets"].keys() == {"depthsplat", "mvsplat", "pixelsplat", "tiny"}


def test_flags_reach_the_config(capsys, monkeypatch, stored):
    path = str(stored())
    code, out, err = call(
        capsys, monkeypatch, "demo", "--dry-run", "--host", path, "--views", "12", "--limit", "3", "--json"
    )
    assert code == 0, err
    assert '"rooms": 3' in out + err
    code, _, err = call(capsys, monkeypatch, "demo", "--dry-run", "--views", "99")
    assert code != 0
    assert "anchors <= views" in err
