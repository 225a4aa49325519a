import dataclasses
import json
import re
import subprocess
import sys

import pytest
from hone_fpsattention import cli
from hone_fpsattention.config import FPSAttentionConfig, Regime
from hone_fpsattention.models import describe_model
from hone_fpsattention.schedule import Schedule
from hone_video.architectures import tiny_pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def call(capsys, monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["hone-fpsattention", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    tiny_pipeline("wan").save_pretrained(folder)
    return folder


VIDEO = ("--prompt", "a cat", "--steps", "3", "--guidance", "1", "--height", "64", "--width", "64", "--frames", "9")
STAGED = FPSAttentionConfig(
    tile=(2, 2, 2), block=64, regimes=(Regime(window=(1, 1, 1)), Regime()), boundaries=(0.5,), shift=3.0
)


def schedule(**change):
    made = Schedule(
        config=STAGED,
        model=describe_model(tiny_pipeline("wan")),
        sampler="UniPCMultistepScheduler",
        steps=3,
        grid=(3, 4, 4),
        budget=0.6,
        provenance="a test",
    )
    return dataclasses.replace(made, **change)


def test_info_names_presets_and_their_provenance(capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "info", "--json")
    assert code == 0
    facts = json.loads(out)
    presets = facts["presets"]
    assert "Published: Tile (6, 8, 8)" in presets["wan2.1-1.3b"]
    assert "Ours: Boundaries 0.2 and 0.8" in presets["wan2.1-1.3b"]
    assert "Published: As wan2.1-1.3b. Suggested: As wan2.1-1.3b. Ours: As wan2.1-1.3b." in presets["wan2.1-14b"]
    parts = [part for text in presets.values() for part in re.split(r" ?(?:Published|Suggested|Ours): ", text)]
    long = [part for part in parts if len(part) > 80]
    assert len(long) == len({*long}) > 3


def test_demo_runs_and_does_not_repeat_itself(capsys, monkeypatch, tiny_host, tmp_path):
    argv = ("demo", "--host", tiny_host, "--limit", "1", "--out", tmp_path / "run", "--device", "cpu", "--quiet")
    code, out, err = call(capsys, monkeypatch, *argv)
    assert code == 0, err
    assert "E4M3 only" in out
    made = (tmp_path / "run" / "artifacts" / "demo.mp4").stat().st_mtime_ns
    assert call(capsys, monkeypatch, *argv)[:2] == (0, out)
    assert (tmp_path / "run" / "artifacts" / "demo.mp4").stat().st_mtime_ns == made


def test_calibrate_then_generate_with_its_schedule(capsys, monkeypatch, pipeline, tmp_path):
    argv = ("calibrate", "--model", pipeline, *VIDEO, "--preset", "tiny", "--budget", "1", "--out", tmp_path / "cal")
    code, out, err = call(capsys, monkeypatch, *argv, "--device", "cpu", "--quiet")
    assert code == 0, err
    file = tmp_path / "cal" / "artifacts" / "schedule.json"
    found = Schedule.load(file)
    assert found.sampler == "UniPCMultistepScheduler"
    assert (found.steps, found.config.shift) == (3, 3.0)
    assert (tmp_path / "cal" / "figures" / "errors.png").is_file()
    assert "mean density" in out
    argv = ("generate", "--model", pipeline, *VIDEO, "--schedule", file, "--out", tmp_path / "gen", "--device", "cpu")
    code, out, err = call(capsys, monkeypatch, *argv, "--quiet")
    assert code == 0, err
    [video] = (tmp_path / "gen" / "artifacts").glob("*.mp4")
    assert video.name == "0000-a-cat.mp4"
    assert str(video) in out


def test_a_sampler_at_another_shift_takes_a_schedule_of_that_shift(capsys, monkeypatch, pipeline, tmp_path):
    file = schedule(config=dataclasses.replace(STAGED, shift=5.0)).save(tmp_path / "schedule.json")
    argv = ("generate", "--model", pipeline, *VIDEO, "--flow-shift", "5", "--out", tmp_path / "run", "--device", "cpu")
    code, out, err = call(capsys, monkeypatch, *argv, "--schedule", file, "--quiet")
    assert code == 0, err
    assert "of the tiles are read" in out


def test_a_shift_is_of_wan_and_positive(capsys, monkeypatch, tmp_path):
    tiny_pipeline("cogvideox").save_pretrained(tmp_path / "cog")
    argv = ("generate", "--model", tmp_path / "cog", "--prompt", "a", "--device", "cpu", "--out", tmp_path / "run")
    code, _, err = call(capsys, monkeypatch, *argv, "--flow-shift", "5", "--quiet")
    assert code == 1
    assert "flow_shift is of Wan's samplers; CogVideoXPipeline has none" in err
    code, _, err = call(capsys, monkeypatch, *argv, "--flow-shift", "0", "--quiet")
    assert code == 1
    assert "flow_shift must be a positive number, 1 for none; got 0.0" in err


def test_inspect_a_pipeline(capsys, monkeypatch, pipeline, tmp_path):
    argv = ("inspect", "--model", pipeline, *VIDEO, "--preset", "tiny", "--out", tmp_path / "run", "--device", "cpu")
    code, out, err = call(capsys, monkeypatch, *argv, "--quiet")
    assert code == 0, err
    assert "relative errors" in out
    rows = json.loads((tmp_path / "run" / "artifacts" / "inspection.json").read_text(encoding="utf-8"))
    assert {row["step"] for row in rows} == {0, 1, 2}


def test_calibrate_on_the_tiny_host(capsys, monkeypatch, tiny_host, tmp_path):
    argv = (
        "calibrate",
        "--host",
        tiny_host,
        "--prompt",
        "a red 7 moving left, slow",
        "--prompt",
        "a blue 1 moving up, fast",
    )
    argv = (*argv, "--regimes", "2", "--budget", "0.5", "--out", tmp_path / "run", "--device", "cpu", "--quiet")
    code, out, err = call(capsys, monkeypatch, *argv, "--json")
    assert code == 0, err
    rows = {(row["metric"], row["variant"]): row["value"] for row in json.loads(out)["rows"]}
    assert rows["density", "schedule"] <= 0.5
    # Reading everything in E4M3 is nearest to the model's own attention.
    snr = {variant: value for (metric, variant), value in rows.items() if metric == "snr"}
    assert max(snr, key=snr.get) == "all tiles, E4M3, scales per tile"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "WanTransformer3DModel, 40 layers, 40 heads of 128"},
            "calibrated with model 'WanTransformer3DModel",
        ),
        ({"sampler": "DDIMScheduler"}, "calibrated with sampler 'DDIMScheduler'"),
        ({"config": dataclasses.replace(STAGED, shift=5.0)}, "scheduler has shift 3, but these settings"),
        (
            {"config": dataclasses.replace(STAGED, regimes=(Regime(window=(9, 9, 9)), Regime()))},
            "are larger than the grid of",
        ),
    ],
)
def test_schedules_that_do_not_fit_are_refused_before_weights_are_read(
    capsys, monkeypatch, pipeline, tmp_path, change, message
):
    file = schedule(**change).save(tmp_path / "schedule.json")
    argv = ("--model", pipeline, *VIDEO, "--schedule", file, "--out", tmp_path / "run", "--dry-run")
    for verb in ("generate", "inspect"):
        code, out, err = call(capsys, monkeypatch, verb, *argv)
        assert (code, out) == (1, "")
        assert message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("verb", "argv", "message"),
    [
        ("generate", (), "are larger than the grid of (3, 4, 4) tokens"),
        ("generate", ("--preset", "tiny", "--width", "72"), "width must be a multiple of 16 for this model; got 72"),
        ("calibrate", ("--preset", "tiny", "--budget", "0.1"), "the sparsest has density 0.25. Raise the budget"),
        ("calibrate", ("--preset", "tiny", "--regimes", "4"), "regimes must lie in [1, 3], the denoising steps; got 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_weights_are_read(
    capsys, monkeypatch, pipeline, tmp_path, verb, argv, message
):
    video = () if "--width" in argv else ("--height", "64", "--width", "64", "--frames", "9")
    code, out, err = call(capsys, monkeypatch, verb, "--model", pipeline, *VIDEO[:4], *video, *argv, "--dry-run")
    assert (code, out) == (1, "")
    assert message in err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("generate", "--prompt", "a cat"), 1, "generate needs a pipeline and a prompt"),
        (("generate", "--model", "nowhere", "--prompt", "a cat"), 1, "nowhere does not exist"),
        (("generate", "--model", "x", "--prompt", "a", "--preset", "tiny", "--dense"), 1, "give one of preset"),
        (("generate", "--model", "x", "--prompt", "a", "--schedule", "none.json"), 1, "none.json"),
        (("demo", "--host", "absent.safetensors"), 1, "no tiny host at absent.safetensors"),
        (("demo", "--prompt", "a purple 7"), 1, "unknown word 'purple'"),
        (("train-host", "--minutes", "0"), 1, "minutes must be positive"),
        (("calibrate", "--budget", "2"), 1, "budget is a mean density"),
        (("calibrate", "--regimes", "9", "--dry-run"), 1, "regimes must lie in [1, 8], the denoising steps; got 9"),
        (("calibrate", "--budget", "0.001", "--dry-run"), 1, "no candidate keeps to budget 0.001"),
        (("bench", "--model", "sora"), 1, "model must be one of"),
        (("fly",), 2, "unknown verb 'fly'"),
    ],
)
def test_bad_input_is_one_line_on_stderr(capsys, monkeypatch, tmp_path, argv, code, message):
    monkeypatch.chdir(tmp_path)
    got, out, err = call(capsys, monkeypatch, *argv)
    assert (got, out) == (code, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_settings_and_does_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, monkeypatch, "train-host", "--steps", "5", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["config"]["steps"] == 5
    assert not any(tmp_path.iterdir())


WITHOUT_TORCHVISION = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else find_spec(name, *rest)
import hone_video.architectures
from hone_fpsattention.cli import main
main()
"""


@pytest.mark.slow
def test_no_word_about_torchvision_which_only_images_need(pipeline):
    argv = ["generate", "--model", str(pipeline), *VIDEO, "--preset", "tiny", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCHVISION, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torchvision" not in done.stderr


def test_eval_makes_vbench_s_videos_and_goes_on_where_it_stopped(capsys, monkeypatch, pipeline, tmp_path):
    info = tmp_path / "VBench_full_info.json"
    entries = [{"prompt_en": "a cat", "dimension": ["color"]}, {"prompt_en": "a dog", "dimension": ["scene"]}]
    info.write_text(json.dumps(entries))
    argv = ("eval", "--protocol", "vbench", "--model", pipeline, "--vbench-info", info, *VIDEO[2:], "--no-grade")
    argv += ("--videos-per-prompt", "2", "--dense", "--out", tmp_path / "run", "--device", "cpu", "--quiet")
    # The second video fails, as a machine does that goes down.
    from hone_fpsattention import sample

    draw, calls = sample.draw, []

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no power")
        return draw(*args, **options)

    monkeypatch.setattr(sample, "draw", fail)
    code, _, err = call(capsys, monkeypatch, *argv)
    assert (code, "no power" in err) == (1, True)
    videos = tmp_path / "run" / "artifacts" / "videos"
    assert [path.name for path in videos.iterdir()] == ["a cat-0.mp4"]
    code, out, err = call(capsys, monkeypatch, *argv)
    assert code == 0, err
    assert sorted(path.name for path in videos.iterdir()) == [f"a {x}-{i}.mp4" for x in ("cat", "dog") for i in (0, 1)]
    assert len(calls) == 5
    assert "not graded" in out
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert sorted(row["labels"]["prompt"] for row in rows if row["metric"] == "seconds") == [0, 1, 2, 3]
    # Two videos of one prompt are of different noise.
    assert (videos / "a cat-0.mp4").read_bytes() != (videos / "a cat-1.mp4").read_bytes()
    code, _, err = call(capsys, monkeypatch, "eval", "--protocol", "vbench", "--vbench-info", info)
    assert (code, "protocol vbench needs a pipeline: --model FOLDER" in err) == (1, True)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A pipeline whose transformer holds a NaN, and one that overflows."""
    made = {}
    for name, value in (("weights", float("nan")), ("activations", 3e38)):
        pipe = tiny_pipeline("wan")
        pipe.transformer.blocks[0].attn1.to_v.weight.data[0] = value
        made[name] = tmp_path_factory.mktemp(name)
        pipe.save_pretrained(made[name])
    return made


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights", "the weight blocks.0.attn1.to_v.weight of the transformer holds NaN or infinity"),
        ("activations", "prompt 0: the model's activations became NaN or infinite in step 0; try dtype"),
    ],
)
def test_what_is_not_finite_is_named_before_time_is_spent(capsys, monkeypatch, damaged, tmp_path, name, message):
    argv = ("generate", "--model", damaged[name], *VIDEO, "--preset", "tiny", "--out", tmp_path / "run", "--quiet")
    code, _, err = call(capsys, monkeypatch, *argv, "--device", "cpu")
    assert (code, message in err) == (1, True), err
    assert list((tmp_path / "run" / "artifacts").glob("*.mp4")) == []


def test_linear_layers_in_e4m3_need_a_gpu(capsys, monkeypatch, pipeline, tmp_path):
    pytest.importorskip("torchao")
    argv = ("generate", "--model", pipeline, *VIDEO, "--preset", "tiny", "--e4m3-linears", "--out", tmp_path / "run")
    code, _, err = call(capsys, monkeypatch, *argv, "--device", "cpu")
    assert code == 1
    assert "linear layers in E4M3 need a GPU of compute capability 8.9; found cpu. Use the same command without" in err


# Torch and diffusers take 20 seconds to import here, which nobody should wait for to read of a typing error.
WITHOUT_TORCH = """
import json, sys
from hone_fpsattention.cli import main
heavy = {"torch", "diffusers", "transformers"}
for argv in json.loads(sys.argv[1]):
    sys.argv = ["hone_fpsattention", *argv]
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
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").touch()
    (videos / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "a cat"}')
    wrong = {
        "demo --host nope": "no tiny host at nope",
        "demo --tuned nope": "no tiny host at nope",
        "eval --host nope": "no tiny host at nope",
        "reproduce --host nope": "no tiny host at nope",
        "train-host --host nope": "no tiny host at nope",
        "inspect --host nope": "no tiny host at nope",
        "inspect --tuned nope": "no tiny host at nope",
        "inspect --model nope": "nope does not exist",
        "calibrate --host nope": "no tiny host at nope",
        "calibrate --model nope": "nope does not exist",
        "generate --model nope --prompt cat": "nope does not exist",
        "generate --model nope --prompt cat --preset nope": "no preset 'nope'",
        "generate --model pipeline --prompt cat --schedule nope": "nope: expected a JSON config",
        "generate --model pipeline --prompt cat --tuned nope": "nope is not what hone-fpsattention train exports",
        "train --model nope --videos nope": "nope holds no metadata.jsonl",
        "train --model nope --cache nope": "nope is no folder of encoded prompts",
        "train --model nope --videos videos": "nope does not exist",
        "train --model pipeline --videos videos --schedule nope": "nope: expected a JSON config",
        "eval --protocol vbench --model nope --vbench-info prompts.txt --no-grade": "nope does not exist",
        "bench --model nope": "model must be one of",
        "bench --parts parallel --dry-run": "parts=('parallel',) is what several processes do",
    }
    argv = [sys.executable, "-c", WITHOUT_TORCH, json.dumps([case.split() for case in wrong])]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[1, []]] * len(wrong), done.stderr
    for case, message, line in zip(wrong, wrong.values(), lines, strict=True):
        assert message in line, (case, line)
