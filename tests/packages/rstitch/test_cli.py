import json

import pytest
import torch
from hone_rstitch.router import Router, save_router


def test_info_names_presets_and_pairs(command):
    code, out, err = command("info", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["tiny pairs"].keys() == {"host", "host-1", "host-2"}
    assert "Table 1" in facts["presets"]["fast"]


def test_generate_says_who_wrote_what(command, packaged, tmp_path):
    argv = (
        "generate",
        "--ask",
        "123*45",
        "--tau",
        "0.4",
        "--max-new-tokens",
        "10",
        "--out",
        tmp_path / "run",
        "--quiet",
    )
    code, out, err = command(*argv)
    assert code == 0, err
    assert out.startswith("123*45 ")
    assert "steps" in out
    answer = json.loads((tmp_path / "run" / "artifacts" / "answer.json").read_text())
    assert len(answer["tokens"]) == answer["usage"]["small_tokens"] + answer["usage"]["large_tokens"]
    assert command(*argv)[1] == out


def test_generate_asks_a_router(command, packaged, tmp_path):
    router = Router(16)
    with torch.no_grad():
        router.out.bias.copy_(torch.tensor([9.0, 0.0]))  # it keeps every small token
    save_router(tmp_path / "router.safetensors", router)
    save_router(tmp_path / "wide.safetensors", Router(24))
    argv = ("generate", "--ask", "123*45", "--tau", "0.001", "--policy", "router", "--max-new-tokens", "10", "--json")
    code, out, err = command(*argv, "--router", tmp_path / "router.safetensors", "--out", tmp_path / "run")
    assert code == 0, err
    tokens = {row["variant"]: row["value"] for row in json.loads(out)["rows"] if row["metric"] == "tokens"}
    assert tokens == {"small": 10, "large": 0}
    code, _, err = command(*argv, "--router", tmp_path / "wide.safetensors", "--out", tmp_path / "other")
    assert code == 1
    assert "is for a small model of 24 channels; this one has 16" in err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("generate",), 1, "--ask"),
        (("generate", "--ask", "1*1", "--small", "x"), 1, "small and large"),
        (("generate", "--ask", "1*1", "--no-chat"), 1, "chat is of models that small and large name; got neither"),
        (("generate", "--ask", "12 * 3"), 1, "are # * + . 0 1 2 3 4 5 6 7 8 9 = ?; it would read ' ' as <unk>"),
        (("generate", "--ask", "12x3", "--dry-run"), 1, "is asked products, such as 123*45"),
        (("generate", "--ask", "1*1", "--tau", "much"), 2, "tau"),
        (("generate", "--ask", "1*1", "--policy", "router"), 1, "needs a router; make one with train-router"),
        (("generate", "--ask", "1*1", "--router", "r.safetensors"), 1, "asked by policy 'router' alone"),
        (("generate", "--ask", "1*1", "--policy", "router", "--router", "none"), 1, "none"),
        (("eval", "--stitch-policy", "small"), 2, ""),
        (("calibrate", "--share", "2"), 1, "share must"),
        (("calibrate", "--share", "0.2", "--data", "no.jsonl"), 1, "multiplies"),
        (("reproduce", "--pairs", "9"), 1, "train-host"),
        (("simulate", "--q", "0"), 1, "q in"),
    ],
)
def test_wrong_usage_is_named_before_anything_runs(command, tmp_path, monkeypatch, argv, code, message):
    monkeypatch.chdir(tmp_path)
    found, out, err = command(*argv)
    assert found == code
    assert out == ""
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["demo", "eval", "simulate", "train-host", "reproduce"])
def test_dry_run_prints_the_settings(command, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(verb, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["config"]["seed"] == 0
    assert not list(tmp_path.iterdir())


def test_a_config_file_and_a_flag_over_it(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps({"requests": [5], "p": 0.5}))
    code, out, err = command("simulate", "--config", "c.json", "--p", "0.25", "--dry-run", "--json")
    assert code == 0, err
    settings = json.loads(out)["config"]
    assert settings["requests"] == [5]
    assert settings["p"] == 0.25
