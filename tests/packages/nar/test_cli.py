import json
import sys

import pytest
from hone_nar.cli import main


def call(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["hone-nar", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_info(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert set(facts["presets"]) == {"nar", "right-only", "below-only", "tiny"}
    assert facts["sizes"]["nar_xl"] == "815,991,040 parameters"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("demo", "--host", "nowhere/host.safetensors"), "there is no tiny host"),
        (("demo", "--limit", "0"), "limit must be at least 1"),
        (("eval", "--limit", "2"), "limit must be at least 20"),
        (("generate", "--model", "nowhere", "--classes", "1"), "holds no saved pipeline"),
        (("generate", "--model", "nowhere", "--classes", "1", "--dry-run"), "holds no saved pipeline"),
        (("eval", "--nll", "--model", "nowhere", "--data", "x", "--dry-run"), "nowhere holds no saved model"),
        (("generate", "--model", "nowhere"), "give classes or prompts"),
        (("bench", "--model", "nar_l", "--device", "cpu"), "needs a CUDA device"),
        (("reproduce", "--seeds", "1", "1"), "seeds must be different"),
    ],
)
def test_bad_input_is_one_line(argv, message, tmp_path, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, *argv, "--quiet", "--out", tmp_path / "run")
    assert code == 1
    assert out == ""
    assert message in err
