import json
import re
import subprocess
import sys

import pytest
from hone_blade.cli import PACKAGE, VERBS
from hone_core.cli import run_cli
from hone_core.runs import load_results
from hone_video.host import Host, save_host
from hone_video.host_config import PACKAGED, HostConfig

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
def checkpoint(tmp_path):
    save_host(Host.untrained(TINY), tmp_path / "host.safetensors")
    return str(tmp_path / "host.safetensors")


@pytest.fixture
def small(tmp_path):
    """Settings that fit 64 tokens."""
    comparison = {"block": 16, "density": 0.5, "pool": 4, "samples": 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"comparison": comparison}))
    return str(path)


def call(capsys, *argv):
    """Run the command in this process; return exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as exit:
        run_cli(PACKAGE, VERBS, "", argv)
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def test_info_names_presets_and_versions(capsys):
    code, out, _ = call(capsys, "info", "--json")
    assert code == 0
    shown = json.loads(out)
    assert "wan2.1-1.3b" in shown["presets"]
    assert shown["torch"]
    assert "tiny host" in shown


def test_demo_runs_and_does_not_repeat_itself(capsys, tmp_path, checkpoint, small):
    argv = ["demo", "--host", checkpoint, "--config", small, "--limit", "1", "--out", str(tmp_path / "run"), "--quiet"]
    code, out, err = call(capsys, *argv, "--device", "cpu")
    assert code == 0, err
    assert "random blocks" in out
    first = load_results(tmp_path / "run")
    assert {row["variant"] for row in first["rows"]} == {"dense", "asa", "asa_g", "psa", "window", "random"}
    code, again, _ = call(capsys, *argv, "--device", "cpu")
    assert code == 0
    assert again == out
    assert load_results(tmp_path / "run") == first
    code, _, err = call(capsys, *argv, "--seed", "1")
    assert code == 1
    assert "another command (--seed 0 there, 1 here); choose another --out" in err


def test_eval_runs_and_draws(capsys, tmp_path, checkpoint, small):
    argv = ["--host", checkpoint, "--config", small, "--out", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    code, out, err = call(capsys, "eval", "--limit", "2", "--batch", "2", "--json", *argv)
    assert code == 0, err
    assert json.loads(out)["clips"] == 2
    assert call(capsys, "eval", "--limit", "2", "--batch", "2", "--json", *argv)[1] == out
    assert (tmp_path / "run" / "figures" / "accuracy.png").stat().st_size > 1000


def test_inspect_looks_at_the_tiny_host(capsys, tmp_path, checkpoint):
    argv = ["inspect", "--host", checkpoint, "--preset", "tiny", "--out", str(tmp_path / "run"), "--device", "cpu"]
    code, out, err = call(capsys, *argv, "--json")
    assert code == 0, err
    shown = json.loads(out)
    # 64 tokens are 2 blocks of 32, of which a fifth, at least one, is kept; one layer, two steps
    assert shown["density"] == pytest.approx(0.5)
    assert shown["calls"] == 2
    assert 0 < shown["recall"] < 1
    assert (tmp_path / "run" / "figures" / "inspection.png").is_file()
    code, again, _ = call(capsys, *argv, "--json")
    assert code == 0
    assert again == out
    code, text, _ = call(capsys, *argv)
    assert code == 0
    assert "means over 2 calls of self-attention" in text
    assert call(capsys, *argv)[1] == text


def test_bench_runs_on_a_cpu(capsys, tmp_path):
    argv = ["bench", "--model", "tiny-wan", "--parts", "attention", "--rounds", "2", "--device", "cpu", "--quiet"]
    code, out, err = call(capsys, *argv, "--out", str(tmp_path / "run"))
    assert code == 0, err
    assert "asa_g" in out
    rows = load_results(tmp_path / "run")["rows"]
    assert {"dense", "asa", "asa_g", "prober"} <= {row["variant"] for row in rows}


def test_generate_reads_a_file_and_flags(capsys, tmp_path, monkeypatch):
    from hone_blade import inputs

    monkeypatch.setattr(inputs, "find_pipeline", lambda *_, **__: "WanPipeline")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\nthree\n")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": "there", "prompts": ["unused"], "steps": 4, "guidance": 2.0}))
    argv = ["generate", "--config", str(config), "--prompt-file", str(prompts), "--limit", "2", "--steps", "6"]
    code, out, err = call(capsys, *argv, "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)["config"]
    assert plan["prompts"] == ["one", "two"]
    assert (plan["model"], plan["steps"], plan["guidance"], plan["dense"]) == ("there", 6, 2.0, False)


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["demo", "--density", "0.5", "--prompt", "a red 7 moving left, slow"], {"density": 0.5}),
        (["eval", "--limit", "9", "--dense-steps", "2"], {"dense_steps": 2}),
    ],
)
def test_dry_run_prints_the_settings_and_does_nothing(capsys, tmp_path, monkeypatch, argv, found):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, *argv, "--dry-run", "--json")
    assert code == 0
    plan = json.loads(out)["config"]
    assert found.items() <= plan["comparison"].items()
    assert not list(tmp_path.iterdir())


def test_train_host_flags_reach_the_settings(capsys):
    code, out, _ = call(capsys, "train-host", "--steps", "7", "--batch", "3", "--no-compile", "--dry-run", "--json")
    assert code == 0
    plan = json.loads(out)["config"]
    assert (plan["steps"], plan["batch"], plan["compile"], plan["lr"]) == (7, 3, False, 0.005)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["demo", "--host", "absent.safetensors"], 1, "no tiny host at absent.safetensors"),
        (["demo", "--limit", "0"], 1, "limit must be at least 1; got 0"),
        (["demo", "--density", "2"], 1, "density must lie in"),
        (["demo", "--device", "tpu"], 1, "device must be auto, cpu, cuda"),
        (["eval", "--limit", "0"], 1, "prompts and batch must be at least 1"),
        (["demo", "--steps", "many"], 2, "many"),
        (["generate", "--prompt", "a fox"], 2, "--model is needed: Folder of a diffusers pipeline"),
        (["generate", "--prompt", "a fox", "--model", "./absent"], 1, "absent does not exist"),
        (["inspect", "--prompt", "a fox"], 1, "unknown word 'fox'"),
        (["inspect", "--preset", "none"], 1, "no preset 'none'"),
        (["bench", "--model", "sora"], 1, "model must be one of wan2.1-1.3b"),
        (["inspect", "--lora", "x", "--offload"], 1, "lora and offload: for a pipeline; pass --model too"),
        (["inspect", "--frames", "0", "--model", "x"], 1, "frames must be at least 1"),
        (["inspect", "--steps", "0"], 1, "steps must be at least 1; got 0"),
        (["inspect", "--preset", "wan2.1-1.3b-free"], 1, "above the 12 first steps that preset wan2.1-1.3b-free"),
        (["demo", "--steps", "0"], 1, "steps must be at least 1; got 0"),
        (["demo", "--density", "0.08"], 1, "ASA_G cannot keep to density 0.08 on 1024 tokens"),
        (["eval", "--dense-steps", "8", "--steps", "8"], 1, "dense_steps must lie in [0, steps = 8)"),
        (["bench", "--preset", "wan2.1-1.3b-free"], 1, "few_steps must be above the 12 first steps"),
        (
            ["generate", "--model", "a/b"],
            1,
            "give prompts (--prompt TEXT) or prompt_file (--prompt-file FILE, one a line); got no",
        ),
        (["generate", "--model", "a/b", "--prompt-file", "none.txt"], 1, "none.txt does not exist"),
    ],
)
def test_bad_input_is_one_line_on_stderr(capsys, tmp_path, monkeypatch, argv, code, message):
    monkeypatch.chdir(tmp_path)
    got, out, err = call(capsys, *argv)
    assert got == code
    assert out == ""
    assert message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a fox"], "--model is needed"),
        (["--model", "a/b"], "no prompt"),
        (["--model", "a/b", "--prompt-file", "none.txt"], "none.txt does not exist"),
        (["--model", "a/b", "--prompt", "a fox", "--preset", "none"], "no preset 'none'"),
    ],
)
def test_cheap_checks_of_generate_come_before_torch(argv, message):
    code = (
        "import sys, hone_blade.cli as cli\n"
        "try: cli.run_cli(cli.PACKAGE, cli.VERBS, '', ['generate', *sys.argv[1:]])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, *argv], capture_output=True, text=True, check=False)
    assert message in done.stderr
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_one_default_and_no_none(capsys, verb):
    code, out, _ = call(capsys, verb, "--help")
    assert code == 0
    text = re.sub(r"[\s│]+", " ", out)
    assert "None" not in text
    # "(0.25). (default: ...)" would read as two
    assert not re.search(r"\)\. \(default", text)
    if verb == "demo":
        assert "--prompt [STR [STR ...]] What to draw" in text
        assert "Of the starting noise, and of the random masks. (default: 0)" in text
        assert "--steps INT Denoising steps (default: the host's own number)." in text


@pytest.mark.parametrize(
    ("verb", "stored", "flag", "changed"),
    [
        ("train-host", {"compile": True}, "--no-compile", ("compile", False)),
        ("train-host", {"compile": False}, "--compile", ("compile", True)),
        ("bench", {"compile_blocks": True}, "--no-compile-blocks", ("compile_blocks", False)),
        ("inspect", {"recall": True}, "--no-recall", ("recall", False)),
    ],
)
def test_switches_change_what_a_file_says(capsys, tmp_path, verb, stored, flag, changed):
    (tmp_path / "config.json").write_text(json.dumps(stored))
    code, out, err = call(capsys, verb, "--config", str(tmp_path / "config.json"), flag, "--dry-run", "--json")
    assert code == 0, err
    name, value = changed
    assert json.loads(out)["config"][name] is value


@pytest.mark.parametrize(
    ("flags", "preset"), [([], "default"), (["--seed", "3"], "default"), (["--stats-every", "7"], None)]
)
def test_folders_of_default_settings_say_so(capsys, tmp_path, monkeypatch, flags, preset):
    from hone_blade import demo as module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_host", lambda *_, **__: (_ for _ in ()).throw(ValueError("enough")))
    assert call(capsys, "demo", *flags)[0] == 1
    [folder] = (tmp_path / "runs" / "hone-blade" / "demo").iterdir()
    assert folder.name.endswith(f"-{preset or 'custom'}-{3 if '--seed' in flags else 0}")
    assert load_results(folder)["preset"] == preset


# Torch and diffusers take 20 seconds to import here, which nobody should wait for to read of a typing error.
WITHOUT_TORCH = """
import json, sys
from hone_blade.cli import main
heavy = {"torch", "diffusers", "transformers"}
for argv in json.loads(sys.argv[1]):
    sys.argv = ["hone_blade", *argv]
    try:
        main()
    except SystemExit as end:
        print(json.dumps([end.code, sorted(heavy & set(sys.modules))]))
"""


def test_wrong_paths_and_settings_are_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat")
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    wrong = {
        "demo --host nope": "no tiny host at nope",
        "demo --lora nope": "nope does not exist",
        "distill --host nope": "no tiny host at nope",
        "eval --host nope": "no tiny host at nope",
        "reproduce --host nope": "no tiny host at nope",
        "inspect --host nope": "no tiny host at nope",
        "train-host --start nope": "no tiny host at nope",
        "generate --model nope --prompt cat": "nope does not exist",
        "generate --model nope --prompt-file nope": "file of prompts nope does not exist",
        "generate --model nope --prompt cat --preset nope": "no preset 'nope'",
        "generate --model pipeline --prompt cat --lora nope": "nope does not exist; expected a safetensors file",
        "generate --model pipeline --prompt cat --transformer nope": "nope is no transformer",
        "generate --model pipeline --prompt cat --image nope.png": "images are for an image-to-video pipeline",
        "generate --model pipeline --prompt cat --scheduler dpm": "scheduler must be one of tdm, unipc, default",
        "generate --model pipeline --prompt cat --preset cogvideox-5b": "preset must be one of",
        "generate --model pipeline --prompt cat --preset wan2.1-1.3b-free --steps 4": "steps must be above",
        "inspect --model nope": "nope does not exist",
        "encode-prompts --model nope --prompt-file prompts.txt": "nope does not exist",
        "encode-prompts --model pipeline --prompt-file nope": "file of prompts nope does not exist",
        "encode-prompts --model pipeline --image-folder nope": "nope holds no metadata.jsonl",
        "distill-pipeline --model nope --prompt-file prompts.txt": "nope does not exist",
        "distill-pipeline --model pipeline --prompt-file nope": "file of prompts nope does not exist",
        "distill-pipeline --model pipeline --cache nope": "nope is no folder of encoded prompts",
        "eval --protocol vbench --model nope --vbench-info prompts.txt --no-grade": "nope does not exist",
        "bench --model nope": "model must be one of",
        # What fits no host, which a dry run has to say too.
        "demo --dense-steps 100 --dry-run": "dense_steps must lie in [0, steps = 8)",
        "demo --steps 2 --dense-steps 2 --dry-run": "dense_steps must lie in [0, steps = 2)",
        "demo --stats-every 0 --dry-run": "stats_every must be at least 1",
        "demo --density 0.07 --dry-run": "ASA_G cannot keep to density 0.07 on 1024 tokens",
        "demo --block 48 --dry-run": "block must be one of",
        "eval --dense-steps 100 --dry-run": "dense_steps must lie in [0, steps = 8)",
        "reproduce --config settings.json --dry-run": "dense_steps must lie in [0, steps = 8)",
        "reproduce --claim recall --config students.json --dry-run": "ASA_G cannot keep to density 0.07",
        "inspect --preset wan2.1-1.3b-free --steps 1 --dry-run": "steps must be above the",
        f"train-host --config host.json --start {PACKAGED} --dry-run": "has another architecture",
    }
    configs = {
        "settings": {"settings": {"late": {"dense_steps": 100}}},
        "students": {"students": {"comparison": {"density": 0.07}}},
        "host": {"host": {"layers": 2}},
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    argv = [sys.executable, "-c", WITHOUT_TORCH, json.dumps([case.split() for case in wrong])]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[1, []]] * len(wrong), done.stderr
    for case, message, line in zip(wrong, wrong.values(), lines, strict=True):
        assert message in line, (case, line)
