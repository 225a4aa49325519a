"""Prompts, file names and scorers of the benchmarks; scorers are stand-ins that are called as the real ones."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hone_core.errors import CheckpointError, MissingExtraError
from hone_core.runs import Run
from hone_sparsevar import benchmarks
from hone_sparsevar.benchmarks import read_prompts
from hone_sparsevar.config import BenchmarkConfig, EvalConfig, ImageConfig
from hone_sparsevar.evaluate import evaluate
from PIL import Image

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"},
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a red cat"},
]
DETECT = """
import argparse, json, pathlib
p = argparse.ArgumentParser()
p.add_argument("imagedir"); p.add_argument("--outfile"); p.add_argument("--model-path")
a = p.parse_args()
assert pathlib.Path(a.model_path).is_dir() and pathlib.Path("evaluation").is_dir()
with open(a.outfile, "w") as out:
    for folder in sorted(pathlib.Path(a.imagedir).iterdir()):
        facts = json.load(open(folder / "metadata.jsonl"))
        for number, file in enumerate(sorted((folder / "samples").iterdir())):
            right = facts["tag"] == "colors" or number == 0
            out.write(json.dumps({"filename": str(file), "tag": facts["tag"], "correct": right}) + "\\n")
"""
ASK = """
import argparse, os
p = argparse.ArgumentParser()
for name in ("image-root-path", "resolution", "pic-num", "res-path"): p.add_argument("--" + name)
a = p.parse_args()
assert a.pic_num == "4"
with open(a.res_path, "w") as out:
    for at, name in enumerate(sorted(os.listdir(a.image_root_path))):
        out.write(f"{a.image_root_path}/{name}, 1.0, 0.5, {0.25 + at / 2}\\n")
    out.write("DPG-Bench score: 50.0\\n")
"""


HPS = BenchmarkConfig(model=Path("unused"), prompts=Path("unused"))


@pytest.fixture
def suite(tmp_path):
    """Every benchmark's prompts, and a checkout of the two that have one."""
    (tmp_path / "geneval.jsonl").write_text("\n".join(map(json.dumps, GENEVAL)))
    (tmp_path / "imagereward.json").write_text(json.dumps([{"id": "005695-0057", "prompt": "a cat"}]))
    for name in ("hps", "dpg", "scorer/evaluation", "scorer/dpg_bench", "weights"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "hps" / "anime.json").write_text('["a cat", "cat"]')
    (tmp_path / "hps" / "photo.json").write_text('["a"]')
    for name in ("0", "7"):
        (tmp_path / "dpg" / f"{name}.txt").write_text(f"a cat {name}\n")
    (tmp_path / "scorer" / "evaluation" / "evaluate_images.py").write_text(DETECT)
    (tmp_path / "scorer" / "dpg_bench" / "compute_dpg_bench.py").write_text(ASK)
    return tmp_path


def judged(folder, suite, protocol, prompts, seed=0, **options):
    own = BenchmarkConfig(
        model=folder,
        prompts=suite / prompts,
        image=ImageConfig(pixels="0.06M"),
        **{"scorer_python": sys.executable} | options,
    )
    cfg = EvalConfig(protocol=protocol, benchmark=own, preset="infinity-0.6", batch=4, seed=seed)
    run = Run.start(package="hone-sparsevar", verb="eval", config=cfg, out=suite / "run", device="cpu", quiet=True)
    with run:
        report = evaluate(cfg, run)
    return report, {row.metric: row.value for row in report.rows}, run.artifacts / "images"


def test_geneval_is_the_mean_over_tasks(folder, suite):
    options = {"scorer": suite / "scorer", "weights": suite / "weights", "images_per_prompt": 2}
    report, values, images = judged(folder, suite, "geneval", "geneval.jsonl", **options)
    names = sorted(str(file.relative_to(images)) for file in images.rglob("*.png"))
    assert names == [f"0000{a}/samples/0000{b}.png" for a in (0, 1) for b in (0, 1)]
    assert json.loads((images / "00001" / "metadata.jsonl").read_text()) == GENEVAL[1]
    assert values == {"images": 4, "single_object": 0.5, "colors": 1.0, "score": 0.75}
    assert "single_object" in str(report)


def test_dpg_sees_squares_of_four(folder, suite):
    _, values, images = judged(folder, suite, "dpg", "dpg", scorer=suite / "scorer")
    assert sorted(file.name for file in images.iterdir()) == [f"{a}_{b}.png" for a in (0, 7) for b in range(4)]
    squares = suite / "run" / "scorer" / "squares"
    small, square = Image.open(images / "7_1.png"), Image.open(squares / "7.png")
    assert square.size == (2 * small.width, 2 * small.height)
    assert square.crop((small.width, 0, 2 * small.width, small.height)).tobytes() == small.tobytes()
    assert values == {"images": 8, "all": 50.0, "score": 50.0}


@pytest.mark.parametrize(
    ("protocol", "prompts", "module", "code", "expected", "names"),
    [
        (
            "hps", "hps", "hpsv2",
            "def score(file, prompt, hps_version):\n    assert hps_version == 'v2.1'\n    return [len(prompt) / 100]",
            {"images": 3, "anime": 4.0, "photo": 1.0, "score": 2.5},
            ["anime/00000.jpg", "anime/00001.jpg", "photo/00000.jpg"],
        ),
        (
            "imagereward", "imagereward.json", "ImageReward",
            "class M:\n    def score(self, prompt, file):\n        return float(file[-5])\ndef load(name): return M()",
            {"images": 2, "all": 0.5, "score": 0.5}, ["005695-0057_0.png", "005695-0057_1.png"],
        ),
    ],
)  # fmt: skip
def test_scores_of_pairs(protocol, prompts, module, code, expected, names, folder, suite, monkeypatch):
    count = {"images_per_prompt": 2} if protocol == "imagereward" else {}
    with pytest.raises(ValueError, match=f"has not the package {module}"):
        judged(folder, suite, protocol, prompts, **count)
    (suite / f"{module}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(suite))
    _, values, images = judged(folder, suite, protocol, prompts, **count)
    assert sorted(str(file.relative_to(images)) for file in images.rglob("*.*g")) == names
    assert values == expected


def test_fid_is_that_of_torch_fidelity(folder, suite, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    options = {"grade": False, "fid": suite / "weights"}
    with pytest.raises(MissingExtraError, match="fid"):
        judged(folder, suite, "hps", "hps", **options)
    asked = []
    monkeypatch.setattr(benchmarks, "resolve_device", lambda name: torch.device("cuda", 0))

    def metrics(**options):
        asked.append(options)
        return {"frechet_inception_distance": 12.5}

    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(calculate_metrics=metrics))
    _, values, images = judged(folder, suite, "hps", "hps", **options)
    assert values == {"images": 3, "fid": 12.5}
    assert (asked[0]["input1"], asked[0]["input2"]) == (str(images), str(suite / "weights"))
    assert asked[0]["cuda"]


@pytest.mark.parametrize("protocol", ["geneval", "dpg"])
def test_a_python_is_named_from_where_the_command_was_typed(protocol, folder, suite, monkeypatch):
    monkeypatch.chdir(suite)
    (suite / "env").symlink_to(Path(sys.executable).parent)
    options = {"scorer": suite / "scorer", "weights": suite / "weights"}
    prompts = "geneval.jsonl" if protocol == "geneval" else "dpg"
    with pytest.raises(ValueError, match="there is no Python at 'nowhere/python'"):
        judged(folder, suite, protocol, prompts, scorer_python="nowhere/python", **options)
    assert not list(suite.glob("run/artifacts/**/*.png"))
    _, values, _ = judged(folder, suite, protocol, prompts, scorer_python="env/python", **options)
    assert "score" in values


def test_a_scorer_that_fails_is_quoted(folder, suite):
    (suite / "scorer" / "evaluation" / "evaluate_images.py").write_text("raise SystemExit('no detector')")
    options = {"scorer": suite / "scorer", "weights": suite / "weights", "images_per_prompt": 1}
    with pytest.raises(CheckpointError, match="name a checkout of djghosh13/geneval"):
        judged(folder, suite, "geneval", "geneval.jsonl", **options | {"scorer": suite})
    with pytest.raises(RuntimeError, match="no detector"):
        judged(folder, suite, "geneval", "geneval.jsonl", **options)


@pytest.mark.parametrize("protocol", ["geneval", "hps", "imagereward", "dpg"])
def test_files_that_are_no_prompts(protocol, tmp_path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    path = tmp_path / "other.json" if protocol in ("geneval", "imagereward") else tmp_path / "none"
    with pytest.raises(CheckpointError, match=f"(?i)no prompts .*{protocol}") as caught:
        read_prompts(protocol, path, 1)
    assert str(caught.value).count("holds no prompts") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "magic"}, "protocol must be one of scenes, geneval"),
        ({"benchmark": BenchmarkConfig(grade=False)}, "takes a host and no pipeline"),
        ({"protocol": "hps"}, "needs a pipeline and its prompts"),
        ({"preset": "infinity-0.5"}, "preset is for benchmarks"),
        ({"protocol": "hps", "benchmark": HPS}, "these settings are the tiny host's: name a --preset"),
        ({"protocol": "hps", "benchmark": replace(HPS, variant="dense"), "preset": "tiny"}, "dense has no settings"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**options)


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("geneval", {}, "scored by its own checkout"),
        ("geneval", {"scorer": "x"}, "--weights FOLDER"),
        ("dpg", {"images_per_prompt": 2}, "a square of four"),
        ("hps", {"images_per_prompt": 0}, "at least 1"),
    ],
)
def test_what_a_benchmark_needs(protocol, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig(model=tmp_path, prompts=tmp_path, **options).check(protocol)
