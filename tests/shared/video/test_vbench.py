import json
import stat
import sys

import pytest
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_video.vbench import Suite, describe_grades, find_suite, grade_videos
from hone_video.vbench_config import DIMENSIONS, VBenchConfig

ENTRIES = [
    {"prompt_en": "a cat", "dimension": ["subject_consistency", "color"]},
    {"prompt_en": "a dog runs", "dimension": ["color"]},
    {"prompt_en": "a red cat", "dimension": ["scene"]},
    {"prompt_en": "a cat", "dimension": ["scene"]},
]
# Stands for the package's command: what it was asked, and a result in the package's layout.
COMMAND = """#!{python}
import json, sys, pathlib
args = sys.argv[1:]
value = {{name: args[args.index(name) + 1] for name in ("--videos_path", "--dimension", "--output_path")}}
with open({log!r}, "a") as log:
    log.write(json.dumps(args) + "\\n")
if value["--dimension"] == "scene" and {broken}:
    sys.exit(print("no weights", file=sys.stderr))
out = pathlib.Path(value["--output_path"])
out.mkdir(parents=True)
names = sorted(path.name for path in pathlib.Path(value["--videos_path"]).iterdir())
(out / "results_today_eval_results.json").write_text(json.dumps({{value["--dimension"]: [len(names) / 10, names]}}))
"""


@pytest.fixture
def info(tmp_path):
    file = tmp_path / "VBench_full_info.json"
    file.write_text(json.dumps(ENTRIES))
    return file


@pytest.fixture
def command(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(broken=False):
        file = folder / "vbench"
        file.write_text(COMMAND.format(python=sys.executable, log=str(tmp_path / "log"), broken=broken))
        file.chmod(file.stat().st_mode | stat.S_IEXEC)

    monkeypatch.setenv("PATH", str(folder))
    return make


def start(tmp_path, **config):
    return Run.start(package="hone-video", verb="eval", out=tmp_path / "run", config=config)


def test_prompts_are_those_of_the_dimensions_each_once(info, command):
    command()
    assert find_suite(VBenchConfig(vbench_info=info)).prompts == ("a cat", "a dog runs", "a red cat")
    assert find_suite(VBenchConfig(vbench_info=info, dimensions=("color",))).prompts == ("a cat", "a dog runs")
    suite = find_suite(VBenchConfig(vbench_info=info, dimensions=("scene",), videos_per_prompt=2), limit=1)
    assert suite == Suite(("a red cat",), info, 2)
    assert len(DIMENSIONS) == 16


def test_files_are_called_by_prompt_and_number(info, command, tmp_path):
    command()
    suite = find_suite(VBenchConfig(vbench_info=info), limit=2)
    names = [path.name for path in suite.targets(start(tmp_path))]
    assert names[:6] == [*(f"a cat-{i}.mp4" for i in range(5)), "a dog runs-0.mp4"]
    assert suite.expanded[4:6] == ("a cat", "a dog runs")
    assert len(suite.expanded) == len(names) == 10


def test_grades_are_rows_and_are_not_made_twice(info, command, tmp_path):
    cfg = VBenchConfig(vbench_info=info, dimensions=("color", "scene"))
    command(broken=True)
    suite = find_suite(cfg, limit=1)
    with start(tmp_path) as run:
        for target in suite.targets(run):
            target.parent.mkdir(exist_ok=True)
            target.touch()
        with pytest.raises(RuntimeError, match=r"vbench left no result for scene: no weights\. The videos are in"):
            grade_videos(cfg, suite, run)
        command()
        grade_videos(cfg, suite, run)
    assert {row.metric: row.value for row in run.rows} == {"color": 0.5, "scene": 0.5}
    asked = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [args[args.index("--dimension") + 1] for args in asked] == ["color", "scene", "scene"]
    assert asked[0][0] == "evaluate"
    assert asked[0][asked[0].index("--full_json_dir") + 1] == str(info)
    assert "color" in describe_grades(tuple(run.rows), run.path)


def test_without_grading_it_says_how(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na dog\n")
    cfg = VBenchConfig(vbench_info=file, grade=False)
    suite = find_suite(cfg)
    assert suite.prompts == ("a cat", "a dog")
    with start(tmp_path) as run:
        grade_videos(cfg, suite, run)
    assert run.rows == []
    assert "not graded; in an environment with vbench: vbench evaluate" in describe_grades((), run.path)


def test_what_cannot_be_done_is_said_before_anything_is_made(info, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="the command vbench is not on the path"):
        find_suite(VBenchConfig(vbench_info=info))
    with pytest.raises(CheckpointError, match="pass --vbench-info with its VBench_full_info"):
        find_suite(VBenchConfig())
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_suite(VBenchConfig(vbench_info=tmp_path / "none.json"))
    text = tmp_path / "prompts.txt"
    text.write_text("a cat")
    with pytest.raises(ValueError, match=r"is a text file\. Add --no-grade"):
        find_suite(VBenchConfig(vbench_info=text))
    text.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        find_suite(VBenchConfig(vbench_info=text, grade=False))
    for prompt in ("either/or", "long " * 60):
        text.write_text(prompt)
        with pytest.raises(ValueError, match="is no file name"):
            find_suite(VBenchConfig(vbench_info=text, grade=False))
    info.write_text('{"prompt": 1}')
    with pytest.raises(CheckpointError, match="holds no prompts as VBench publishes them"):
        find_suite(VBenchConfig(vbench_info=info, grade=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimensions": ("beauty",)}, "dimensions must name some of"),
        ({"videos_per_prompt": 0}, "videos_per_prompt must be at least 1"),
        ({"guidance": 0.5}, "guidance must be at least 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        VBenchConfig(**change)
    for protocol, cfg, said in (
        ("clips", VBenchConfig(model="x"), "model is for protocol vbench"),
        ("clips", VBenchConfig(height=480, grade=False), "height, grade are for protocol vbench"),
        ("vbench", VBenchConfig(), "protocol vbench needs a pipeline"),
        ("other", VBenchConfig(), "protocol must be one of clips, vbench"),
    ):
        with pytest.raises(ValueError, match=said):
            cfg.check(protocol)
