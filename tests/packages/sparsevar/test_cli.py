import json
import sys
from dataclasses import replace

import pytest
from hone_sparsevar.cli import main
from hone_sparsevar.host import Host


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
        (("bench", "--model", "infinity_2b", "--device", "cpu"), "needs a CUDA device"),
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("demo", "--host", "{host}", "--detector", "2"), "has 2 blocks, 0 to 1; got detector 2"),
        (("inspect", "--host", "{host}", "--start-scale", "0"), "leave a scale before it to be measured; got 0"),
        (("eval", "--host", "{host}", "--start-scale", "9"), "has 7 scales, 0 to 6; got scale 9"),
        (("reproduce", "--hosts", "{host}", "nowhere/host.safetensors"), "there is no tiny host"),
        (("reproduce", "--hosts", "{missed}"), "missed.safetensors missed its gates; train it longer"),
        (("calibrate", "--host", "{host}", "--start-scale", "0"), "leave a scale before it to be measured; got 0"),
        (("eval", "--host", "{host}", "--ratio", "1"), "ratio must lie in [0, 1); got 1"),
        (("reproduce", "--hosts", "{host}", "--ratio", "1"), "ratio must lie in [0, 1); got 1"),
        (("bench", "--stops", "5"), "1 to 4 of the 5 scales; got (5,)"),
        (("bench", "--text-tokens", "17"), "tiny reads at most 16 words of a prompt; got text_tokens 17"),
        (("calibrate", "--model", "{folder}", "--prompt-file", "nowhere.txt"), "nowhere.txt does not exist"),
        (("bench", "--model", "infinity_2b", "--aspect", "1.1"), "no schedule of height / width 1.1"),
        (("bench", "--model", "infinity_8b", "--detector", "40"), "has 40 blocks, 0 to 39; got detector 40"),
        (("bench", "--model", "infinity_2b", "--stops", "1", "13"), "1 to 12 of the 13 scales; got (1, 13)"),
        (
            ("generate", "--model", "{folder}", "--prompt", "a a a a a a a a a"),
            "9 tokens, and this model reads at most 8",
        ),
        (
            (
                "eval",
                "--protocol",
                "hps",
                "--model",
                "{folder}",
                "--prompts",
                "nowhere",
                "--no-grade",
                "--preset",
                "infinity-0.6",
            ),
            "nowhere holds no prompts of hps",
        ),
    ],
)
def test_a_dry_run_looks_at_what_a_command_needs(argv, message, untrained, folder, tmp_path, monkeypatch, capsys):
    host = Host.load(path=untrained)
    missed = host.save(tmp_path / "missed.safetensors", replace(host.facts, passed=False))
    argv = [part.format(host=untrained, missed=missed, folder=folder) for part in argv]
    code, out, err = call(monkeypatch, capsys, *argv, "--dry-run", "--out", tmp_path / "run")
    assert (code, out) == (1, "")
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_what_is_there_prints_it(untrained, folder, tmp_path, monkeypatch, capsys):
    for argv in (("demo", "--host", untrained), ("generate", "--model", folder, "--prompt", "a cat")):
        code, out, _ = call(monkeypatch, capsys, *argv, "--dry-run", "--out", tmp_path / "run")
        assert code == 0
        assert "ratio" in out
