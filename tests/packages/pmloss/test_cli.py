import json
import sys

import pytest
from hone_pmloss import cli


def call(capsys, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["hone-pmloss", *argv])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, *capsys.readouterr()


def test_info_lists_the_presets(capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "info", "--json")
    assert code == 0
    assert json.loads(out)["presets"].keys() == {"paper", "detached", "paired", "known", "tiny"}


def test_flags_reach_the_config(capsys, monkeypatch, tmp_path):
    code, out, err = call(capsys, monkeypatch, "train-host", "--dry-run", "--weight", "0.5", "--json")
    assert code == 0, err
    assert '"weight": 0.5' in out + err
    # The flag that the README and reproduce name.
    code, out, err = call(capsys, monkeypatch, "train-host", "--dry-run", "--offset", "unconstrained", "--json")
    assert code == 0, err
    assert '"offset": "unconstrained"' in out + err
    absent = str(tmp_path / "absent")
    code, _, err = call(capsys, monkeypatch, "eval", "--dry-run", "--ply", absent, "--truth", absent)
    assert code == 1
    assert "there is no file" in err
