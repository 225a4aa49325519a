"""Training of a model on questions from a file: grades, the policy's two phases, adapters, resume."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hone_lm.tiny import tiny
from hone_zipr1.adapters import load_model
from hone_zipr1.config import ReinforceConfig, SparseConfig
from hone_zipr1.models import attach
from hone_zipr1.objectives import BudgetPolicy
from hone_zipr1.questions import Item, ModelTask, is_right, load_items, model_inputs, prompt_features
from hone_zipr1.reinforce import Reinforcement
from PIL import Image

CFG = ReinforceConfig(ps=(0.4, 0.8), group=2, prompts=2, lr=1e-3)
SELECTION = SparseConfig(recent=4, random=4, protect="none")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A file of two questions of different lengths about pictures of different sizes."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for at, (size, question) in enumerate([(84, "What is it?"), (112, "How many of them are there in all?")]):
        pixels = np.random.default_rng(at).integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{at}.png")
        rows.append({"image": f"{at}.png", "question": question, "answer": str(at + 3), "type": "number"})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "train.jsonl"


@pytest.fixture
def task(asked):
    model, processor = tiny("qwen2_5_vl", layers=2)
    original, _ = tiny("qwen2_5_vl", layers=2)
    return ModelTask(model, processor, load_items(asked), original=original, max_new_tokens=5)


def test_the_update_sees_what_the_rollout_saw(task):
    with attach(task.model, SELECTION) as handle:
        rows = task.draw(0, 2, 2)
        assert not task.inputs(rows)["attention_mask"].all(), "prompts are padded"
        p = torch.tensor([0.4, 0.8, 0.4, 0.8])
        drawn = task.sample(rows, handle, p, 1.2, 0)
        assert len(drawn.ratio.unique()) > 2
        logps = task.logps(rows, drawn.ids, handle, p, 1.2, False).detach()
        assert float((logps - drawn.logps)[drawn.mask].abs().max()) < 1e-3
        assert torch.equal(task.sample(rows, handle, p, 1.2, 0).ids, drawn.ids)
        dense = task.reference(rows, drawn.ids, 1.2, handle)
        assert float((dense - drawn.logps)[drawn.mask].abs().max()) > 1e-2
    plain = task._forced(task.model, task.inputs(rows), drawn.ids, 1.2).detach()
    torch.testing.assert_close(dense, plain)


@pytest.mark.parametrize("objective", ["paper", "budget-policy", "soft-ratio", "supervised"])
def test_a_step_in_parts_is_a_step(asked, objective):
    found = []
    for micro in (0, 3):
        model, processor = tiny("qwen2_5_vl", layers=2)
        original, _ = tiny("qwen2_5_vl", layers=2)
        task = ModelTask(model, processor, load_items(asked), original=original, max_new_tokens=5)
        weight = 0.5 if objective == "soft-ratio" else 0.0
        cfg = ReinforceConfig(
            objective=objective, ps=(0.4, 0.8), group=2, prompts=2, lr=1e-3, micro_batch=micro, soft_weight=weight
        )
        with attach(model, SELECTION) as handle:
            loop = Reinforcement(cfg, task, handle)
            # Untrained answers are all wrong, and would give no advantage.
            loop.judge = lambda drawn: (drawn.ratio, torch.tensor([1.0, -1.0, 0.5, 0.2]))
            values = loop.advance(0)
            if objective != "supervised":
                assert float(values["ratio_error"]) < 1e-3
            found.append([x.grad for x in loop.trained])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_epochs_ask_everything_once_and_processes_share_the_questions(asked):
    items = [Item(asked, False, str(at), "1", "number") for at in range(5)]
    tasks = [ModelTask(None, None, items, process=process, processes=2, seed=3) for process in range(2)]
    drawn = [item.question for step in range(3) for task in tasks for item in task.draw(step, 1, 1)]
    assert sorted(drawn[:5]) == ["0", "1", "2", "3", "4"]
    assert tasks[0].draw(1, 2, 2)[0] is tasks[0].draw(1, 2, 2)[1]


@pytest.mark.parametrize(
    ("type", "gold", "text", "right"),
    [
        ("choice", "B", "(B) a dog", True),
        ("choice", "B", "The answer is B.", True),
        ("choice", "B", "C", False),
        ("choice", "B", "Bird", False),
        ("choice", "B", "I think it is B.", True),
        ("choice", "B", "I'd say (B)", True),
        ("choice", "B", "A dog runs, so B", True),
        ("choice", "A", "A dog runs, so B", False),
        ("choice", "A", "A is right, not B", True),
        ("choice", "A", "A", True),
        ("choice", "I", "I.", True),
        ("number", "1200", "It is 1,200.", True),
        ("number", "7", "7 of 9", False),
        ("number", "-2.5", "-2.50", True),
        ("number", "3", "three", False),
        ("string", "Red car", "a red  car.", True),
        ("string", "Red car", "red", False),
    ],
)
def test_grades(asked, type, gold, text, right):
    assert is_right(text, Item(asked, False, "?", gold, type)) is right


def test_lines_end_with_a_newline_alone_and_pictures_are_turned_as_they_were_taken(tmp_path):
    lying = Image.new("RGB", (6, 4), "red")
    lying.paste("blue", (0, 0, 3, 4))
    exif = lying.getexif()
    exif[0x0112] = 6  # a quarter turn to the right
    lying.save(tmp_path / "0.png", exif=exif)
    row = {"image": "0.png", "question": "a\u2028b", "answer": "1", "type": "number"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8-sig", newline="")
    (item,) = load_items(tmp_path / "a.jsonl")
    assert item.question == "a\u2028b"
    _, processor = tiny("llava_onevision")
    lying.rotate(-90, expand=True).save(tmp_path / "1.png")
    turned = model_inputs(processor, [replace(item, media=tmp_path / "1.png")], 1)
    for name, value in model_inputs(processor, [item], 1).items():
        torch.testing.assert_close(value, turned[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava_onevision", "smolvlm"])
def test_pictures_of_a_batch_are_each_of_its_question(asked, kind):
    model, processor = tiny(kind, layers=2)
    items = load_items(asked)
    both = model_inputs(processor, items, 1)
    with torch.no_grad():
        whole = model(**both).logits[:, -1]
        for at, item in enumerate(items):
            alone = model(**model_inputs(processor, [item], 1)).logits[0, -1]
            torch.testing.assert_close(whole[at], alone, atol=1e-3, rtol=1e-3)


def test_a_number_has_its_tolerance(asked):
    item = Item(asked, False, "?", "100", "number", tolerance=0.05)
    assert is_right("104.9", item)
    assert not is_right("106", item)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], "line 1: expected an object; got list"),
        ({"question": "a", "answer": "b", "type": "string"}, 'line 1: expected "image" or "video"'),
        ({"image": "0.png", "question": None, "answer": "b", "type": "string"}, 'line 1: expected "image" or "video"'),
        ({"image": "0.png", "question": "a", "answer": "b", "type": "string", "tolerance": None}, "line 1: float"),
        ({"image": "0.png", "question": "a", "answer": "b", "type": "text"}, "type must be one of"),
        ({"image": "0.png", "question": "a", "answer": "b", "type": "number"}, "'b' is no number"),
    ],
)
def test_bad_questions_are_named(asked, tmp_path, row, message):
    (tmp_path / "0.png").write_bytes((asked.parent / "0.png").read_bytes())
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        load_items(tmp_path / "q.jsonl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny("qwen2_5_vl", layers=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [0, 2])
def test_the_verb_trains_a_model_and_goes_on_exactly(command, checkpoint, asked, tmp_path, monkeypatch, lora):
    from safetensors.torch import load_file

    argv = ("train", "--model", checkpoint, "--data", asked, "--lora-rank", lora, "--max-new-tokens", 3)
    argv += ("--ps", 0.4, 0.8, "--group", 2, "--prompts", 2, "--lr", 1e-3)
    argv += (
        "--recent",
        4,
        "--random",
        4,
        "--protect",
        "none",
        "--device",
        "cpu",
        "--quiet",
        "--steps",
        3,
    )
    argv += ("--checkpoint-seconds", 0)
    # Answers of random weights are all wrong, and would be worth the same.
    monkeypatch.setattr("hone_zipr1.questions.is_right", lambda text, item: len(text) % 2 == 0 or text == item.answer)
    code, out, err = command(*argv, "--out", tmp_path / "whole")
    assert code == 0, err
    assert "first tenth" in out
    advance = Reinforcement.advance

    def halting(self, step):
        if step == 2:
            raise KeyboardInterrupt
        return advance(self, step)

    monkeypatch.setattr(Reinforcement, "advance", halting)
    command(*argv, "--out", tmp_path / "parts")
    monkeypatch.setattr(Reinforcement, "advance", advance)
    code, _, err = command(*argv, "--out", tmp_path / "parts")
    assert code == 0, err
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    whole, parts = (load_file(tmp_path / run / "artifacts/model" / name) for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    if not lora:
        before = load_file(checkpoint / name)
        changed = {key for key in before if not torch.equal(before[key], whole[key])}
        assert any("layers" in key for key in changed)
        assert not any("visual" in key for key in changed)
    else:
        assert any(float(value.abs().max()) > 0 for key, value in whole.items() if "lora_B" in key)


def test_adapters_that_were_trained_are_graded_and_asked_as_a_model_is(
    command, checkpoint, asked, tmp_path, monkeypatch
):
    from hone_lm.tiny import tiny_inputs
    from hone_zipr1.adapters import base_of
    from safetensors.torch import load_file

    argv = ("train", "--model", checkpoint, "--data", asked, "--lora-rank", 2, "--max-new-tokens", 3, "--steps", 2)
    argv += ("--ps", 0.4, 0.8, "--group", 2, "--prompts", 2, "--lr", 0.1, "--device", "cpu", "--quiet")
    monkeypatch.setattr("hone_zipr1.questions.is_right", lambda text, item: len(text) % 2 == 0 or text == item.answer)
    code, _, err = command(*argv, "--out", tmp_path / "run")
    assert code == 0, err
    folder = tmp_path / "run/artifacts/model"
    assert base_of(str(folder)) == str(checkpoint)
    assert base_of(str(checkpoint)) == str(checkpoint)
    # By hand: the product of the two, times alpha over the rank, which is 2.
    weights, device = load_file(folder / "adapter_model.safetensors"), {"device": "cpu", "dtype": torch.float32}
    plain, processor = load_model(str(checkpoint), **device)
    inputs = tiny_inputs("qwen2_5_vl", processor)
    with torch.no_grad():
        before = plain(**inputs).logits
        for name, module in plain.named_modules():
            if (down := weights.pop(f"base_model.model.{name}.lora_A.weight", None)) is not None:
                module.weight += 2 * weights.pop(f"base_model.model.{name}.lora_B.weight") @ down
        assert not weights
        want, found = plain(**inputs).logits, load_model(str(folder), **device)[0](**inputs).logits
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    assert float((found - before).abs().max()) > 1e-2
    ask = ("--model", folder, "--max-new-tokens", 3, "--device", "cpu", "--quiet")
    code, out, err = command("eval", *ask, "--data", asked, "--ps", 0.9, "--out", tmp_path / "eval")
    assert code == 0, err
    assert "top-p 0.9" in out
    picture = ("--image", asked.parent / "0.png", "--ask", "What?", "--rounds", 1)
    code, out, err = command("generate", *ask, *picture, "--out", tmp_path / "generate")
    assert code == 0, err
    assert "kept" in out
    code, _, err = command("train", *ask, "--data", asked, "--steps", 1, "--out", tmp_path / "more")
    assert code == 1
    assert "holds adapters of" in err
    assert "expected a whole model" in err
    told = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    code, _, err = command("eval", *ask, "--data", asked, "--out", tmp_path / "again")
    assert code == 1
    assert "does not name the model that the adapters were trained on" in err


def test_every_process_loads_whole_weights_under_fsdp(command, checkpoint, asked, tmp_path, monkeypatch):
    """As ``accelerate launch`` sets it: on, and then all processes but the first would train zeros."""
    import accelerate
    from accelerate.utils import FullyShardedDataParallelPlugin
    from hone_lm import checkpoints

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert FullyShardedDataParallelPlugin().cpu_ram_efficient_loading
    found = []

    def load(*given, **named):
        found.append(FullyShardedDataParallelPlugin().cpu_ram_efficient_loading)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "load_model", load)
    argv = ("train", "--model", checkpoint, "--data", asked, "--steps", 1, "--device", "cpu", "--quiet")
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", accelerate.DistributedType.FSDP)
    _, _, err = command(*argv, "--out", tmp_path / "run")
    assert found == [False]
    assert "every process holds the whole model: --shard shares its layers out" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("train", "--model", "m"), "needs --data"),
        (("train", "--lora-rank", "4"), "are of a model"),
        (("train", "--shard"), "are of a model"),
        (("train", "--model", "m", "--data", "no.jsonl"), "there is no no.jsonl"),
        (("train", "--p", "0.8"), "thresholds are those of --ps"),
        (("train", "--policy", "top-k", "--ratio", "0.5"), "thresholds are those of --ps"),
    ],
)
def test_wrong_usage_is_named_before_anything_runs(command, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*argv)
    assert code == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def launch(out, *argv, stop=""):
    """A training in two processes, as accelerate launch starts them; each one's weights."""
    worker = Path(__file__).with_name("zipr1_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, "train"]
    command += ["--steps", 3, "--prompts", 2, "--ps", 0.6, 0.9, "--group", 2, "--lr", 1e-3, "--device", "cpu"]
    command += ["--quiet", "--checkpoint-seconds", 0, "--out", out, *argv]
    given = {**os.environ, "STOP": str(stop)}
    done = subprocess.run(list(map(str, command)), env=given, capture_output=True, text=True, timeout=280)
    assert (done.returncode == 0) == (not stop), done.stderr
    return [torch.load(path) for path in sorted(out.glob("weights-*.pt"))]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_the_same_weights_and_go_on_exactly(tmp_path):
    first, second = launch(tmp_path / "whole", "--rows", "all")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert launch(tmp_path / "parts", "--rows", "all", stop=2) == []
    third, _ = launch(tmp_path / "parts", "--rows", "all")
    assert all(torch.equal(first[name], third[name]) for name in first)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lora", [0, 2])
def test_layers_that_are_shared_out_train_as_whole_ones_and_go_on_exactly(checkpoint, asked, tmp_path, lora):
    from safetensors.torch import load_file

    argv = ("--model", checkpoint, "--data", asked, "--max-new-tokens", 3, "--lora-rank", lora)
    argv += ("--recent", 4, "--random", 4, "--protect", "none")
    plain, _ = launch(tmp_path / "plain", *argv)
    first, second = launch(tmp_path / "shared", *argv, "--shard")
    assert first.keys() == second.keys() == plain.keys()
    for name in plain:
        assert torch.equal(first[name], second[name])
        # AdamW's first steps go by a gradient's sign, which rounding decides where it is all but zero.
        assert float((first[name] - plain[name]).abs().mean()) < 1e-5
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    stored, whole = (load_file(tmp_path / run / "artifacts/model" / name) for run in ("shared", "plain"))
    assert {key: value.shape for key, value in stored.items()} == {key: value.shape for key, value in whole.items()}
    assert launch(tmp_path / "parts", *argv, "--shard", stop=2) == []
    third, _ = launch(tmp_path / "parts", *argv, "--shard")
    assert all(torch.equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_picture_larger_than_the_context_is_refused_before_weights_are_read(
    command, checkpoint, asked, tmp_path, monkeypatch, verb
):
    def load(*given, **named):
        raise AssertionError("weights were read")

    monkeypatch.setattr("hone_lm.checkpoints.load_model", load)
    argv = (verb, "--model", checkpoint, "--data", asked, "--device", "cpu", "--quiet", "--out", tmp_path / "run")
    # The larger picture of the two has 16 visual tokens, the smaller one 9; both questions fit 4096 positions.
    code, _, err = command(*argv, "--max-new-tokens", 4070)
    assert code == 1
    assert "1.png has" in err
    assert "has a context of 4096" in err


@pytest.mark.parametrize(("kind", "refused"), [("llava_onevision", True), ("qwen2_5_vl", False)])
def test_videos_that_do_not_go_into_one_batch_are_refused_before_weights_are_read(command, tmp_path, kind, refused):
    model, processor = tiny(kind, layers=2)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    rows = []
    for count in (2, 4):
        frames = np.random.default_rng(count).integers(0, 255, (count, 56, 56, 3), dtype=np.uint8)
        np.save(tmp_path / f"{count}.npy", frames)
        rows.append({"video": f"{count}.npy", "question": "How many?", "answer": str(count), "type": "number"})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ("train", "--model", tmp_path / "model", "--data", tmp_path / "a.jsonl", "--device", "cpu", "--dry-run")
    code, _, err = command(*argv, "--frames", 4)
    assert code == int(refused), err
    assert ("2.npy gives 2 frames and" in err) == refused
    assert command(*argv, "--frames", 2)[0] == 0
    assert command(*argv, "--frames", 4, "--prompts", 1)[0] == 0


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_video_larger_than_the_context_is_refused_before_weights_are_read(
    command, checkpoint, tmp_path, monkeypatch, verb
):
    def load(*given, **named):
        raise AssertionError("weights were read")

    monkeypatch.setattr("hone_lm.checkpoints.load_model", load)
    rows = []
    # The longest question is about the smallest video; the largest is neither the longest nor the one of most pixels.
    for name, shape in (("short", (4, 56, 56)), ("long", (6, 112, 112)), ("wide", (2, 140, 140))):
        np.save(tmp_path / f"{name}.npy", np.zeros((*shape, 3), dtype=np.uint8))
        question = "How many of them are there?" if name == "short" else "Which?"
        rows.append({"video": f"{name}.npy", "question": question, "answer": "3", "type": "number"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = (verb, "--model", checkpoint, "--data", tmp_path / "data.jsonl", "--device", "cpu", "--quiet")
    # Prompts of 56 tokens; those of the others have 37 and 33.
    code, _, err = command(*argv, "--frames", 6, "--max-new-tokens", 4045, "--out", tmp_path / "run")
    assert code == 1
    assert "long.npy has" in err
    assert "has a context of 4096" in err
    assert not (tmp_path / "run").exists()


def test_a_learned_budget_gives_each_question_its_threshold(command, checkpoint, asked, tmp_path):
    train = ("train", "--model", checkpoint, "--data", asked, "--objective", "budget-policy", "--steps", 1)
    shape = ("--ps", 0.3, 1, "--group", 2, "--prompts", 1, "--max-new-tokens", 3, "--device", "cpu", "--quiet")
    code, _, err = command(*train, *shape, "--out", tmp_path / "train")
    assert code == 0, err
    budget = tmp_path / "train/artifacts/model/budget.safetensors"
    assert set(BudgetPolicy.load(budget).thresholds.tolist()) == {torch.tensor(p).item() for p in (0.3, 1.0)}
    # One that tells the two questions apart.
    model, processor = load_model(str(checkpoint), device=torch.device("cpu"), dtype=torch.float32)
    features = [prompt_features(model, model_inputs(processor, [item], 32)) for item in load_items(asked)]
    policy = BudgetPolicy((0.3, 1.0), features[0].shape[1])
    with torch.no_grad():
        apart = policy.norm(features[0])[0] - policy.norm(features[1])[0]
        policy.out.weight.copy_(torch.stack([apart, -apart]))
    policy.save(budget)
    argv = ("eval", "--model", checkpoint, "--data", asked, "--ps", 0.3, 1, "--budget", budget, "--max-new-tokens", 3)
    code, out, err = command(*argv, "--device", "cpu", "--quiet", "--out", tmp_path / "run")
    assert code == 0, err
    assert "learned budget" in out
    rows = [json.loads(line) for line in (tmp_path / "run/artifacts/answers.jsonl").read_text().splitlines()]
    assert [row["learned budget"]["p"] for row in rows] == pytest.approx([0.3, 1.0])
    for row in rows:
        same = row[f"top-p {row['learned budget']['p']:.2g}"]
        assert row["learned budget"]["ratio"] == pytest.approx(same["ratio"], abs=1e-6)
        assert row["learned budget"]["answer"] == same["answer"]
    assert rows[0]["learned budget"]["ratio"] < rows[1]["learned budget"]["ratio"] == 1
    BudgetPolicy((0.3, 1.0), 7).save(budget)
    code, _, err = command(*argv, "--out", tmp_path / "other")
    assert code == 1
    assert "was learned for a model of width 7" in err


def test_a_model_is_graded_beside_itself_and_a_stopped_run_goes_on(command, checkpoint, asked, tmp_path, monkeypatch):
    from hone_zipr1 import evaluate

    argv = ("eval", "--model", checkpoint, "--data", asked, "--ps", 0.9, 1, "--peers", "--max-new-tokens", 3)
    argv += ("--device", "cpu", "--quiet", "--out", tmp_path / "run")
    ask, asks = evaluate._ask, []

    def halting(*given):
        asks.append(given)
        if len(asks) == 14:  # in the second question
            raise KeyboardInterrupt
        return ask(*given)

    monkeypatch.setattr(evaluate, "_ask", halting)
    command(*argv)
    with (tmp_path / "run/artifacts/answers.jsonl").open("a") as file:
        file.write('{"dense": {"ans')
    questions = asked.read_text()
    asked.write_text("\n".join(reversed(questions.splitlines())))
    code, _, err = command(*argv)
    assert code == 1
    assert "has other questions than when" in err
    asked.write_text(questions)
    code, out, err = command(*argv)
    assert code == 0, err
    assert len(asks) == 14 + 11
    rows = [json.loads(line) for line in (tmp_path / "run/artifacts/answers.jsonl").read_text().splitlines()]
    peers = {f"{name} as top-p {p}" for name in ("FastV", "VisionZip", "top-k", "random") for p in ("0.9", "1")}
    assert [set(row) for row in rows] == [{"dense", "top-p 0.9", "top-p 1", *peers}] * 2
    for row in rows:
        assert row["top-p 1"]["answer"] == row["dense"]["answer"]
        assert row["top-p 1"]["ratio"] == 1
        assert row["random as top-p 0.9"]["ratio"] < 1
        assert abs(row["top-k as top-p 0.9"]["ratio"] - row["top-p 0.9"]["ratio"]) < 0.05
        assert row["top-k as top-p 1"]["answer"] == row["dense"]["answer"]
    assert "points from dense" in out


def test_a_change_is_from_the_dense_model(command, checkpoint, asked, tmp_path, monkeypatch):
    from hone_zipr1 import evaluate

    # The right answers are 3 and 4.
    said = iter(["3", "3", "4", "0"])
    monkeypatch.setattr(
        evaluate, "_ask", lambda *given: {"answer": next(said), "ratio": 1.0 if given[-1] is None else 0.5}
    )
    argv = ("eval", "--model", checkpoint, "--data", asked, "--ps", 0.9, "--device", "cpu", "--quiet")
    code, out, err = command(*argv, "--out", tmp_path / "run")
    assert code == 0, err
    rows = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    values = {(row["metric"], row["variant"]): row["value"] for row in rows}
    assert (values["accuracy", "dense"], values["accuracy", "top-p 0.9"]) == (1.0, 0.5)
    (change,) = (row for row in rows if row["metric"] == "change")
    assert (change["value"], change["labels"]["to_wrong"], change["labels"]["to_right"]) == (-0.5, 1, 0)
    assert "top-p 0.9: -50.0 [" in out


def test_a_report_has_the_first_and_the_last_tenth(tmp_path):
    from types import SimpleNamespace

    from hone_zipr1.finetune import _write_rows

    lines = [{"step": step, "accuracy": step / 20, "tau": 1 - step / 20} for step in range(20)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = {}
    _write_rows(
        SimpleNamespace(path=tmp_path, row=lambda name, value, **said: found.update({(name, said["split"]): value}))
    )
    want = {("accuracy", "first"): 0.025, ("tau", "first"): 0.975, ("accuracy", "last"): 0.925, ("tau", "last"): 0.075}
    assert found == pytest.approx(want)
