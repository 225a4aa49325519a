import json

import numpy as np
import pytest
from hone_lm.tiny import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Qwen2.5-VL as a folder, and a picture."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny("qwen2_5_vl", layers=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    picture = folder.parent / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    return folder, picture


def test_info_names_presets_and_classes(command):
    code, out, err = command("info", "--json")
    assert code == 0, err
    facts = json.loads(out)
    whole, some = facts["classes"].values()
    assert whole.split(", ") == ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"]
    assert "internvl" in some.split(", ")
    assert not set(whole.split(", ")) & set(some.split(", "))
    assert facts["presets"]["paper"].startswith("top-p 0.975. Qwen2-VL-7B, ")


def test_generate_beside_the_dense_model(command, checkpoint, tmp_path):
    folder, picture = checkpoint
    argv = ("generate", "--model", folder, "--image", picture, "--ask", "What?", "--p", "0.5", "--compare-dense")
    argv += ("--max-new-tokens", "4", "--rounds", "1", "--out", tmp_path / "run", "--device", "cpu", "--quiet")
    code, out, err = command(*argv)
    assert code == 0, err
    assert "dense (prefill" in out
    assert "top-p 0.5 (prefill" in out
    assert "uniform attention would keep" in out
    values = {
        (r["metric"], r["variant"]): r["value"] for r in json.loads((tmp_path / "run/results.json").read_text())["rows"]
    }
    assert values["cache", "top-p 0.5"] < values["cache", "dense"]
    assert 0 < values["token_ratio", "top-p 0.5"] < 1
    assert command(*argv)[1] == out


def test_generate_at_p_of_one_is_the_dense_answer(command, checkpoint, tmp_path):
    folder, picture = checkpoint
    argv = ("generate", "--model", folder, "--image", picture, "--ask", "What?", "--p", "1", "--compare-dense")
    argv += ("--max-new-tokens", "4", "--rounds", "1", "--out", tmp_path / "run", "--device", "cpu", "--quiet")
    assert command(*argv)[0] == 0
    said = json.loads((tmp_path / "run/artifacts/answers.json").read_text())
    assert said["answers"]["dense"] == said["answers"]["top-p 1"]
    assert said["layer_ratio"] == [1.0, 1.0]


def test_generate_by_captured_steps_gives_the_same_answers(command, checkpoint, tmp_path):
    folder, picture = checkpoint
    argv = ("generate", "--model", folder, "--image", picture, "--ask", "What?", "--p", "0.5", "--compare-dense")
    argv += ("--max-new-tokens", "6", "--rounds", "1", "--device", "cpu", "--quiet")
    said = []
    for name, more in (("plain", ()), ("captured", ("--captured",))):
        code, _, err = command(*argv, "--out", tmp_path / name, *more)
        assert code == 0, err
        said.append(json.loads((tmp_path / name / "artifacts/answers.json").read_text()))
    assert said[0] == said[1]


def test_inspect_says_what_a_prompt_is_without_weights(command, checkpoint):
    folder, picture = checkpoint
    (folder / "model.safetensors").rename(folder / "away")
    try:
        code, out, err = command("inspect", "--model", folder, "--image", picture, "--ask", "What?", "--json")
    finally:
        (folder / "away").rename(folder / "model.safetensors")
    assert code == 0, err
    found = json.loads(out)
    assert 0 < found["visual"] < found["tokens"]
    assert list(found["uniform"].values()) == sorted(found["uniform"].values())
    assert found["prefill_bound"] > 1
    code, out, err = command("inspect", "--ask", "digit B3")
    assert code == 0, err
    assert "69 tokens, 64 visual; the selection looks at all rows" in out
    assert "uniform attention would keep 44.9 % at p = 0.8" in out


@pytest.mark.parametrize("kind", ["image", "video"])
def test_profile_shows_each_layer(command, checkpoint, tmp_path, kind):
    folder, picture = checkpoint
    media = picture
    if kind == "video":
        media = tmp_path / "clip.npy"
        np.save(media, np.random.default_rng(0).integers(0, 255, (4, 56, 84, 3), dtype=np.uint8))
    argv = ("profile", "--model", folder, f"--{kind}", media, "--ask", "What?", "--p", "0.6", "--shown", "2")
    argv += ("--out", tmp_path / "run", "--device", "cpu", "--quiet")
    code, out, err = command(*argv)
    assert code == 0, err
    assert "uniform attention would keep" in out
    rows = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    ratios = [row["value"] for row in rows if row["metric"] == "token_ratio"]
    assert len(ratios) == 3
    assert ratios[2] == pytest.approx(sum(ratios[:2]) / 2)
    seen = [row for row in rows if row["metric"] == "visual_ratio"]
    # Text is kept in any case, so that the share among visual tokens is lower.
    assert all(row["value"] < ratio for row, ratio in zip(seen, ratios, strict=False))
    assert (tmp_path / "run/figures/kept.png").read_bytes().startswith(b"\x89PNG")
    assert command(*argv)[1] == out


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("generate",), 2, "--ask"),
        (("profile", "--ask", "a", "--shown", "0"), 1, "shown must be positive"),
        (("profile", "--ask", " "), 1, "the question is empty"),
        (("inspect", "--ask", "a", "--model", "x", "--video", "no.mp4"), 1, "there is no no.mp4"),
        (("inspect", "--ask", "what?"), 1, "digit B3"),
        (("inspect",), 2, "inspect: error: --ask is needed: Question; of the tiny host such as"),
        (("generate", "--ask", "a", "--p", "0"), 1, "p is a share"),
        (("generate", "--ask", "a", "--model", "x"), 1, "needs an image or a video"),
        (("generate", "--ask", "a", "--model", "x", "--image", "no.png"), 1, "there is no no.png"),
        (("demo", "--host", "no.safetensors"), 1, "train-host"),
        (("demo", "--ps", "1.5"), 1, "distinct shares"),
        (("train-host", "--steps", "0"), 1, "steps must be at least 1"),
    ],
)
def test_wrong_usage_is_named_before_anything_runs(command, tmp_path, monkeypatch, argv, code, message):
    monkeypatch.chdir(tmp_path)
    found, out, err = command(*argv)
    assert (found, out) == (code, ""), err
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_picture_larger_than_the_context_is_refused_before_weights_are_read(command, checkpoint, tmp_path):
    folder, picture = checkpoint
    (folder / "model.safetensors").rename(folder / "away")
    try:
        argv = ("generate", "--model", folder, "--image", picture, "--ask", "What?", "--max-new-tokens", "5000")
        code, out, err = command(*argv, "--out", tmp_path / "run")
    finally:
        (folder / "away").rename(folder / "model.safetensors")
    assert (code, out) == (1, "")
    assert "has a context of 4096" in err


def test_dry_run_prints_the_settings(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("train-host", "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["config"]["seed"] == 0
    assert not list(tmp_path.iterdir())


def test_an_answer_s_time_is_its_prefill_and_the_rest(command, checkpoint, tmp_path, monkeypatch):
    from contextlib import nullcontext
    from types import SimpleNamespace

    watch = SimpleNamespace(prefill_seconds=0.25, seconds=1.0, peak_bytes=None)
    monkeypatch.setattr("hone_zipr1.sample.AnswerWatch", lambda model: nullcontext(watch))
    folder, picture = checkpoint
    argv = ("generate", "--model", folder, "--image", picture, "--ask", "What?", "--max-new-tokens", "2")
    code, out, err = command(*argv, "--rounds", "1", "--out", tmp_path / "run", "--device", "cpu", "--quiet")
    assert code == 0, err
    assert "prefill 250.0 ms, decode 750.0 ms" in out
