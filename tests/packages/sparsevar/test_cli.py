import json
import sys

import pytest
from hone_sparsevar.cli import main


def call(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["hone-sparsevar", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_info(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert set(facts["presets"]) >= {"infinity-0.6", "tiny"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("demo", "--ratio", "1.5"), "must lie in"),
        (("demo", "--host", "nowhere/host.safetensors"), "there is no tiny host"),
        (("demo", "--detector", "9"), "has 2 blocks, 0 to 1; got detector 9"),
        (("demo", "--start-scale", "8"), "has 7 scales, 0 to 6; got scale 8"),
        (("bench", "--model", "infinity_2b", "--aspect", "1.1", "--device", "cpu"), "needs a CUDA device"),
        (("bench", "--model", "magic"), "model must be tiny or one of"),
        (("eval", "--variants", "magic"), "no variant magic"),
    ],
)
def test_bad_input_is_one_line(argv, message, untrained, tmp_path, monkeypatch, capsys):
    host = ("--host", untrained) if argv[0] == "demo" and "--host" not in argv else ()
    code, out, err = call(monkeypatch, capsys, *argv, *host, "--quiet", "--out", tmp_path / "run")
    assert code == 1
    assert out == ""
    assert message in err
