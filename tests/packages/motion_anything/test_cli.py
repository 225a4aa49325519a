import json
import sys

import pytest
from hone_motion_anything.cli import main


def call(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["hone-motion-anything", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_info(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "info", "--json")
    assert code == 0
    assert set(json.loads(out)["presets"]) >= {"paper", "default", "tiny"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("demo", "--text", ""), "the text is empty"),
        (("demo", "--text", "a person flies"), "and not flies"),
        (("demo", "--host", "nowhere/host.safetensors"), "there is no tiny host"),
        (("demo", "--tempo", "10"), "from 60 to 180"),
        (("reproduce", "--arms", "attention"), "arms must be two or more"),
        (("train-host", "--masking", "cosine", "--steps", "0"), "steps must be at least 1"),
    ],
)
def test_bad_input_is_one_line(argv, message, untrained, tmp_path, monkeypatch, capsys):
    host = ("--host", untrained) if argv[0] == "demo" and "--host" not in argv else ()
    code, out, err = call(monkeypatch, capsys, *argv, *host, "--quiet", "--out", tmp_path / "run")
    assert code == 1
    assert out == ""
    assert message in err
