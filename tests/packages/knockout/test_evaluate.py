import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from hone_core.runs import Run, load_results
from hone_knockout.config import EvalConfig, KnockoutConfig
from hone_knockout.data import generated_items
from hone_knockout.evaluate import (
    BASELINE,
    SweepReport,
    configurations,
    is_right,
    item_digest,
    read_answers,
    reopen,
    summarise,
    sweep,
)
from hone_lm.choices import choice_inputs, choice_prompt, option_token_ids, read_choices
from hone_lm.question_sets import Item, load_items
from hone_lm.tiny import tiny

CFG = EvalConfig(
    settings=("global1", "global2", "window", "local"), width=2, stride=2, batch=5, style="text", shuffle=False
)


def start(cfg, out):
    return Run.start(package="hone-knockout", verb="eval", config=cfg, out=out, seed=cfg.seed, quiet=True)


def test_configurations_of_the_paper():
    found = configurations(EvalConfig(), 28)
    settings = [entry.setting for entry in found.values()]
    assert settings.count("global1") == 14
    assert settings.count("global2") == 3
    assert settings.count("window") == 3 * 7
    assert next(iter(found)) == BASELINE
    exit = found["global1 LV 18-27"]
    assert (exit.first, exit.last) == (18, 27)
    sliding = configurations(EvalConfig(settings=("window",), stride=1, kinds=("LV",)), 28)
    assert len(sliding) == 1 + 25
    controls = configurations(EvalConfig(settings=("global2",), random_control=True), 4)
    assert [entry.kind for entry in controls.values()] == [
        "none", "LV", "LV random", "VT", "VT random", "VS", "VS random",
    ]  # fmt: skip


def test_sweep_with_and_without_reuse(host, tmp_path):
    items = generated_items(12, host.config.clip)
    tables = []
    for reuse in (True, False):
        cfg = dataclasses.replace(CFG, reuse=reuse)
        with start(cfg, tmp_path / str(reuse)) as run:
            sweep(host.model, host.processor, items, cfg, run)
        answers, failed = read_answers(run.path)
        assert not failed
        tables.append({(n, label): r["p"] for n, row in answers.items() for label, r in row["results"].items()})
    assert tables[0].keys() == tables[1].keys()
    for key, p in tables[0].items():
        assert p == pytest.approx(tables[1][key], abs=2e-5)
    rows = {row["metric"]: row["value"] for row in load_results(tmp_path / "True")["rows"]}
    assert rows["evaluated_layers"] < rows["evaluated_layers_without"]
    report = SweepReport.of(run)
    assert report.items == 12
    assert "chance level" in str(report)


@pytest.mark.parametrize("reuse", [True, False])
def test_batches_change_no_answer(host, tmp_path, reuse):
    """Random controls among them: their pairs belong to the question, wherever it stands and however it is padded."""
    items = generated_items(8, host.config.clip)
    cfg = dataclasses.replace(CFG, settings=("global2",), random_control=True, reuse=reuse)
    tables = []
    for batch in (1, 4):
        each = dataclasses.replace(cfg, batch=batch)
        with start(each, tmp_path / str(batch)) as run:
            sweep(host.model, host.processor, items, each, run)
        answers, _ = read_answers(run.path)
        tables.append({(n, label): r["p"] for n, row in answers.items() for label, r in row["results"].items()})
    assert tables[0].keys() == tables[1].keys()
    for key, p in tables[0].items():
        assert p == pytest.approx(tables[1][key], abs=2e-5), key


def test_a_spread_model_is_refused_before_any_question(tmp_path):
    model, processor = tiny("llava_onevision", layers=3)
    model.model.language_model.layers[2].to("meta")
    cfg = dataclasses.replace(CFG, settings=("global2",))
    with start(cfg, tmp_path / "run") as run, pytest.raises(ValueError, match="all on one device"):
        sweep(model, processor, generated_items(2), cfg, run)
    assert not (run.path / "artifacts" / "answers.jsonl").exists()


def test_rows(host, tmp_path):
    items = generated_items(16, host.config.clip)
    with start(CFG, tmp_path / "run") as run:
        sweep(host.model, host.processor, items, CFG, run)
    answers, _ = read_answers(run.path)
    rows = {(r["metric"], r["variant"], r["split"]): r for r in load_results(run.path)["rows"]}
    for split in ("all", "shape", "place", "order", "direction"):
        kept = [row for row in answers.values() if split in ("all", row["category"])]
        accuracy = sum(is_right(row, BASELINE) for row in kept) / len(kept)
        assert rows["accuracy", BASELINE, split]["value"] == accuracy
        assert rows["accuracy", BASELINE, split]["n"] == len(kept)
    assert rows["chance", "", "all"]["value"] == pytest.approx((3 * 0.25 + 0.5) / 4)
    assert rows["chance", "", "order"]["value"] == 0.5
    row = rows["performance_ratio", "global1 LV 2-4", "all"]
    assert row["labels"]["layer_ratio"] == pytest.approx(2 / 5)
    change, wrong, right = (
        rows[name, "global2 LV 0-4", "all"]["value"] for name in ("accuracy_change", "to_wrong", "to_right")
    )
    assert change == pytest.approx((right - wrong) / 16)


def test_a_sweep_goes_on_where_it_was(host, tmp_path, monkeypatch):
    items = generated_items(10, host.config.clip)
    cfg = dataclasses.replace(CFG, settings=("global2",), batch=2)
    original, asked, power = sweep.__globals__["_answer_batch"], [], [2]

    def spy(model, processor, batch, *rest):
        if not power[0]:
            raise MemoryError("the machine went down")
        power[0] -= 1
        asked.extend(item.id for item in batch)
        return original(model, processor, batch, *rest)

    def go():
        with start(cfg, tmp_path / "run") as run:
            sweep(host.model, host.processor, items, cfg, run)
        return run

    monkeypatch.setitem(sweep.__globals__, "_answer_batch", spy)
    with pytest.raises(MemoryError):
        go()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "failed"
    assert asked == [item.id for item in items[:4]]
    path = tmp_path / "run" / "artifacts" / "answers.jsonl"
    path.write_text(path.read_text() + '{"id": "cut')
    asked.clear()
    power[0] = 99
    run = go()
    assert run.resumed
    assert asked == [item.id for item in items[4:]]
    answers, failed = read_answers(run.path)
    assert list(answers) == [item.id for item in items]
    assert not failed
    rows = {(row["metric"], row["variant"], row["split"]): row for row in load_results(run.path)["rows"]}
    assert rows["accuracy", BASELINE, "all"]["n"] == 10


def test_bad_items_are_written_down_and_left_out(host, tmp_path):
    good = generated_items(4, host.config.clip)
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    bad = [
        Item(id="gone", question="?", options=("up", "down"), answer=0, video=tmp_path / "none.mp4"),
        Item(id="broken", question="?", options=("up", "down"), answer=0, video=broken),
        dataclasses.replace(good[0], id="same", options=("up", "up right"), answer=0),
    ]
    cfg = dataclasses.replace(CFG, settings=("global2",), batch=4)
    with start(cfg, tmp_path / "run") as run:
        report = sweep(host.model, host.processor, [bad[0], *good, *bad[1:]], cfg, run)
    assert report.items == 4
    assert set(report.failed) == {"gone", "broken", "same"}
    assert "there is no video" in report.failed["gone"]
    assert "could not be decoded" in report.failed["broken"]
    assert "cannot be told apart" in report.failed["same"]
    rows = {row["metric"]: row for row in load_results(run.path)["rows"]}
    assert (rows["failed_items"]["value"], rows["failed_items"]["n"]) == (3, 7)
    with start(cfg, tmp_path / "none") as run, pytest.raises(ValueError, match="every question failed; the first"):
        sweep(host.model, host.processor, bad[:1], cfg, run)


def test_one_bad_prompt_does_not_take_its_batch_along(host, tmp_path, monkeypatch):
    items = generated_items(4, host.config.clip)
    original = sweep.__globals__["choice_inputs"]

    def picky(processor, prompts, clips):
        if any(clip is items[2].clip for clip in clips):
            raise ValueError("a frame is torn")
        return original(processor, prompts, clips)

    monkeypatch.setitem(sweep.__globals__, "choice_inputs", picky)
    cfg = dataclasses.replace(CFG, settings=("global2",), batch=4)
    with start(cfg, tmp_path / "run") as run:
        report = sweep(host.model, host.processor, items, cfg, run)
    assert report.items == 3
    assert report.failed == {items[2].id: "a frame is torn"}


@pytest.mark.parametrize("kind", [RuntimeError, IndexError, TypeError, KeyError, AttributeError])
def test_whatever_a_question_raises_is_written_down(host, tmp_path, monkeypatch, kind):
    items = generated_items(4, host.config.clip)
    originals = {name: sweep.__globals__[name] for name in ("read_clip", "choice_inputs")}

    def read(item, **more):
        if item is items[0]:
            raise kind("torn")
        return originals["read_clip"](item, **more)

    def picky(processor, prompts, clips):
        if any(clip is items[2].clip for clip in clips):
            raise kind("too long")
        return originals["choice_inputs"](processor, prompts, clips)

    monkeypatch.setitem(sweep.__globals__, "read_clip", read)
    monkeypatch.setitem(sweep.__globals__, "choice_inputs", picky)
    cfg = dataclasses.replace(CFG, settings=("global2",), kinds=("LV",), batch=4)
    with start(cfg, tmp_path / "run") as run:
        report = sweep(host.model, host.processor, items, cfg, run)
    assert report.failed == {
        items[0].id: f"{kind.__name__}: {kind('torn')}",
        items[2].id: f"{kind.__name__}: {kind('too long')}",
    }
    lines = [json.loads(line) for line in (run.artifacts / "answers.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines if "error" in line] == [kind.__name__] * 2


def test_a_batch_too_large_for_memory_is_halved(host, tmp_path, monkeypatch):
    items = generated_items(8, host.config.clip)
    original, sizes = sweep.__globals__["_run_all"], []

    def small(model, inputs, *rest):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return original(model, inputs, *rest)

    monkeypatch.setitem(sweep.__globals__, "_run_all", small)
    cfg = dataclasses.replace(CFG, settings=("global2",), kinds=("LV",), batch=8)
    with start(cfg, tmp_path / "run") as run:
        report = sweep(host.model, host.processor, items, cfg, run)
    assert (report.items, report.failed) == (8, {})
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


@pytest.mark.parametrize("reuse", [True, False])
def test_tokens_per_frame_of_a_sweep(host, tmp_path, monkeypatch, reuse):
    """With all of the clip as one frame, no frame reads another, and VT-K has nothing to block."""
    items = generated_items(2, host.config.clip)
    cfg = dataclasses.replace(CFG, settings=("global2",), kinds=("VT",), reuse=reuse)
    whole = dataclasses.replace(cfg, tokens_per_frame=host.config.tokens)
    with start(cfg, tmp_path / "frames") as run:
        assert not sweep(host.model, host.processor, items, cfg, run).failed
    with start(whole, tmp_path / "whole") as run, pytest.raises(ValueError, match="blocks no pair"):
        sweep(host.model, host.processor, items, whole, run)
    assert json.loads((run.path / "config.json").read_text())["tokens_per_frame"] == host.config.tokens
    with pytest.raises(ValueError, match="tokens_per_frame must be positive"):
        dataclasses.replace(cfg, tokens_per_frame=0)


def test_a_line_that_cannot_be_read_counts_as_failed(host, tmp_path):
    clip = generated_items(1, host.config.clip)[0].clip
    np.save(tmp_path / "a.npy", clip.frames.permute(0, 2, 3, 1).numpy())
    row = {"video": "a.npy", "question": "where is the white dot ?", "options": ["top-left", "top-right"], "answer": 0}
    (tmp_path / "qa.jsonl").write_text(json.dumps(row) + "\n{\n" + json.dumps(row | {"answer": 5}))
    items = load_items(tmp_path / "qa.jsonl")
    cfg = dataclasses.replace(CFG, settings=("global2",), kinds=("LV",), batch=2, frames=4)
    with start(cfg, tmp_path / "run") as run:
        report = sweep(host.model, host.processor, items, cfg, run)
    assert report.items == 1
    assert list(report.failed) == ["qa.jsonl:2", "qa.jsonl:3"]
    assert "not JSON" in report.failed["qa.jsonl:2"]
    rows = {row["metric"]: row for row in load_results(run.path)["rows"]}
    assert (rows["failed_items"]["value"], rows["failed_items"]["n"]) == (2, 3)


def test_failed_questions_are_asked_again_on_resume(host, tmp_path, monkeypatch):
    items = generated_items(4, host.config.clip)
    original, broken = sweep.__globals__["read_clip"], {items[0].id, items[1].id}

    def read(item, **more):
        if item.id in broken:
            raise OSError("the drive is away")
        return original(item, **more)

    monkeypatch.setitem(sweep.__globals__, "read_clip", read)
    cfg = dataclasses.replace(CFG, settings=("global2",), kinds=("LV",), batch=2)

    def stopped():
        with start(cfg, tmp_path / "run") as run:
            assert set(sweep(host.model, host.processor, items, cfg, run).failed) == broken
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    broken.remove(items[0].id)
    with start(cfg, tmp_path / "run") as run:
        assert run.resumed
        report = sweep(host.model, host.processor, items, cfg, run)
    assert report.items == 3
    assert report.failed == {items[1].id: "the drive is away"}
    rows = {row["metric"]: row["value"] for row in load_results(run.path)["rows"]}
    assert rows["failed_items"] == 1


def test_shuffled_letters_come_back_in_the_question_s_order(tmp_path, monkeypatch):
    model, processor = tiny("qwen2_5_vl", layers=2)
    processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'video' %}"
        "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    items = [dataclasses.replace(item, options=("a", "b", "c"), answer=1) for item in generated_items(6)]
    cfg = EvalConfig(settings=("global2",), kinds=("LV",), batch=3)
    asked = []

    def noted(processor, question, options, **style):
        asked.append(options)
        return choice_prompt(processor, question, options, **style)

    monkeypatch.setitem(sweep.__globals__, "choice_prompt", noted)
    with start(cfg, tmp_path / "run") as run:
        sweep(model, processor, items, cfg, run)
    orders = [[item.options.index(option) for option in options] for item, options in zip(items, asked, strict=True)]
    assert len({tuple(order) for order in orders}) > 1
    # By hand: the letter at place j stands for option order[j].
    item, order = items[0], orders[0]
    prompt = choice_prompt(processor, item.question, asked[0])
    inputs = choice_inputs(processor, [prompt], [item.clip])
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    p = read_choices(logits, option_token_ids(processor.tokenizer, prompt, item.options)).probability
    stored = read_answers(run.path)[0][item.id]["results"][BASELINE]["p"]
    assert [stored[index] for index in order] == pytest.approx(p, abs=1e-4)


def test_summary_by_hand(tmp_path):
    def answer(name, right, base, knocked):
        p = {True: [0.8, 0.2], False: [0.3, 0.7]}
        results = {BASELINE: {"p": p[base], "mass": 1.0}, "global2 LV 0": {"p": p[knocked], "mass": 1.0}}
        return {"id": name, "answer": 0, "category": right, "results": results}

    answers = {str(i): answer(str(i), "x", *pair) for i, pair in enumerate([(1, 1), (1, 0), (1, 0), (0, 1)])}
    answers = json.loads(json.dumps(answers))
    cfg = EvalConfig(settings=("global2",), kinds=("LV",))
    with start(cfg, tmp_path / "run") as run:
        summarise(answers, configurations(cfg, 1), run, num_layers=1)
    rows = {(r.metric, r.variant): r.value for r in run.rows if r.split == "all"}
    label = "global2 LV 0"
    assert rows["accuracy", BASELINE] == 0.75
    assert rows["accuracy", label] == 0.5
    assert rows["accuracy_change", label] == -0.25
    assert (rows["to_wrong", label], rows["to_right", label]) == (2, 1)
    assert rows["performance_ratio", label] == pytest.approx(2 / 3)
    assert rows["accuracy_of_correct", label] == pytest.approx(1 / 3)
    assert rows["mcnemar_p", label] == 1.0
    # Of the three that the baseline has right.
    assert rows["p_right_change", label] == pytest.approx(100 * (0 + 2 * (0.3 - 0.8) / 0.8) / 3)


def test_a_hopeless_question_does_not_carry_the_relative_change(tmp_path):
    label = "global2 LV 0"

    def answer(base, knocked):
        results = {name: {"p": [p, 1 - p], "mass": 1.0} for name, p in ((BASELINE, base), (label, knocked))}
        return {"answer": 0, "category": "x", "results": results}

    cfg = EvalConfig(settings=("global2",), kinds=("LV",))
    with start(cfg, tmp_path / "run") as run:
        summarise({"a": answer(0.8, 0.6), "b": answer(1e-6, 0.5)}, configurations(cfg, 1), run, num_layers=1)
    (row,) = [row for row in run.rows if row.metric == "p_right_change" and row.split == "all"]
    assert row.value == pytest.approx(-25)
    assert row.n == 1


def test_bad_settings():
    for values, message in (
        ({"settings": ()}, "settings must be some of"),
        ({"kinds": ("span",)}, "no span targets"),
        ({"stride": 0}, "stride must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalConfig(**values)
    with pytest.raises(ValueError, match="width"):
        configurations(EvalConfig(width=9), 4)
    assert configurations(EvalConfig(settings=("local",)), 4)["local VT 0-1"].config != KnockoutConfig()


def test_edited_and_removed_questions_are_not_answered_by_what_is_stored(host, tmp_path):
    items = generated_items(8, host.config.clip)
    with start(CFG, tmp_path / "run") as run:
        sweep(host.model, host.processor, items, CFG, run)
    before, _ = read_answers(run.path)
    first = items[0]
    edited = [dataclasses.replace(first, answer=(first.answer + 1) % len(first.options)), *items[1:7]]
    asked = []

    class Noted(type(host.model)):
        def forward(self, *args, **kwargs):
            asked.append(kwargs["input_ids"].shape[0])
            return super().forward(*args, **kwargs)

    model = copy.deepcopy(host.model)
    model.__class__ = Noted
    again = Run.start(package="hone-knockout", verb="eval", config=CFG, out=tmp_path / "run", seed=CFG.seed, quiet=True)
    again.reopen()
    with again:
        report = sweep(model, host.processor, edited, CFG, again)
    answers, _ = read_answers(run.path)
    assert report.items == 7
    assert set(answers) == {item.id for item in edited}
    assert answers[first.id]["answer"] == edited[0].answer
    assert answers[items[1].id] == before[items[1].id]
    assert set(asked) == {1}


def test_answers_of_other_weights_are_refused(host, tmp_path):
    items = generated_items(4, host.config.clip)
    with start(CFG, tmp_path / "run") as run:
        sweep(host.model, host.processor, items, CFG, run)
    model = copy.deepcopy(host.model)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.01)
    again = start(CFG, tmp_path / "run")
    again.reopen()
    with again, pytest.raises(ValueError, match="answers of other weights"):
        sweep(model, host.processor, items, CFG, again)


def test_a_finished_run_is_taken_up_again_where_a_question_was_edited(tmp_path, monkeypatch):
    cfg = EvalConfig()
    items = generated_items(3)
    run = start(cfg, tmp_path / "run")
    with run:
        rows = [{"id": item.id, "digest": item_digest(item), "results": {}} for item in items]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        run.artifacts.mkdir(parents=True, exist_ok=True)
        (run.artifacts / "answers.jsonl").write_text(lines)
        run.row("failed_items", 0, better="lower", n=3)
    for asked, done in ((items, True), ([dataclasses.replace(items[0], question="Else?"), *items[1:]], False)):
        monkeypatch.setattr("hone_knockout.evaluate.read_questions", lambda *args, asked=asked: asked)
        again = start(cfg, tmp_path / "run")
        reopen(cfg, again)
        assert again.done is done
