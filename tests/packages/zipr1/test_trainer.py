"""TRL's GRPO over the sparse policy: thresholds that stay with their rows, a dense reference, the paper's reward."""

import json
from itertools import chain

import numpy as np
import pytest
import torch
from hone_lm.tiny import tiny
from hone_zipr1.config import SparseConfig
from hone_zipr1.models import attach
from hone_zipr1.objectives import advantages, grpo_loss, rewards
from hone_zipr1.questions import load_items

# TRL's own default, in a word that newer transformers has another one for.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

PS = (0.4, 0.8)
SELECTION = SparseConfig(recent=4, random=4, protect="none")
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}\n"
)


@pytest.fixture(scope="module")
def ours():
    """The module, which TRL comes with; a run of GPU tests alone does without."""
    from hone_zipr1 import trainer

    return trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory, ours):
    """A tiny checkpoint and rows of two questions."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("trl")
    model, processor = tiny("qwen2_5_vl", layers=2)
    model.save_pretrained(folder / "model")
    processor.chat_template = TEMPLATE
    processor.save_pretrained(folder / "model")
    lines = []
    for at, (size, question) in enumerate([(84, "What is it?"), (112, "How many of them are there in all?")]):
        pixels = np.random.default_rng(at).integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{at}.png")
        lines.append({"image": f"{at}.png", "question": question, "answer": str(at), "type": "number"})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder, ours.dataset_rows(load_items(folder / "train.jsonl"))


def even(completions, **_):
    """Stands for a grade: the answers of random weights are all wrong."""
    return [float(len(c[-1]["content"]) % 2 == 0) for c in completions]


def build(made, out, **changes):
    from datasets import Dataset
    from hone_zipr1.trainer import SparseGRPOTrainer, paper_args

    folder, rows = made
    options = {
        name: changes.pop(name) for name in ("correct", "ps", "gated", "peft_config", "tools") if name in changes
    }
    settings = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4, "max_steps": 1}
    settings |= {"learning_rate": 1e-3, "use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "seed": 1} | changes
    return SparseGRPOTrainer(
        str(folder / "model"),
        args=paper_args(out, **settings),
        train_dataset=Dataset.from_list(rows),
        sparse=SELECTION,
        **({"correct": even, "ps": PS} | options),
    )


@pytest.mark.parametrize("adapters", [False, True])
def test_a_step_is_the_paper_s(made, tmp_path, monkeypatch, adapters):
    from peft import LoraConfig

    more = {"peft_config": LoraConfig(r=2, target_modules=r".*language_model.*[qv]_proj")} if adapters else {}
    trainer = build(made, tmp_path, steps_per_generation=2, per_device_train_batch_size=4, max_steps=2, **more)
    policy = trainer.handle.models[0]
    seen = {"losses": [], "inputs": [], "sampled": [], "ps": []}
    generate, compute = policy.generate, trainer._compute_loss

    def recorded(**given):
        out = generate(**given, output_logits=True, return_dict_in_generate=True)
        logps = torch.stack(out.logits, 1).float().log_softmax(-1)
        ids = out.sequences[:, given["input_ids"].shape[1] :]
        seen["sampled"].append((ids, logps.gather(2, ids[..., None])[..., 0], given))
        seen["ps"].append(trainer._p)
        return out.sequences

    def loss(model, inputs):
        value = compute(model, inputs)
        seen["losses"].append(float(value.detach()))
        seen["inputs"].append(dict(inputs))
        return value

    monkeypatch.setattr(policy, "generate", recorded)
    monkeypatch.setattr(trainer, "_compute_loss", loss)
    trainer.train()
    torch.testing.assert_close(torch.stack(seen["ps"]), torch.tensor([PS * 4]))
    ids, sampled, given = seen["sampled"][0]
    # TRL shuffles the rows: each is found again by what was drawn, and has kept its threshold.
    rows = {tuple(row): at for at, row in enumerate(ids.tolist())}
    assert len(rows) == 8
    order = []
    for inputs in seen["inputs"]:
        length = inputs["completion_ids"].shape[1]
        order.append([next(at for row, at in rows.items() if list(row[:length]) == own) for own in
                      inputs["completion_ids"].tolist()])  # fmt: skip
        torch.testing.assert_close(inputs["budget_p"], torch.tensor(PS)[torch.tensor(order[-1]) % 2])
    assert sorted(chain(*order)) == list(range(8))
    assert order != [[0, 1, 2, 3], [4, 5, 6, 7]]
    # The update's log-probabilities are those of the rollout: the same tokens of each prompt were kept.
    for at, inputs in zip(order, seen["inputs"], strict=True):
        mask = inputs["completion_mask"].bool()
        scored = inputs["old_per_token_logps"]
        assert float((scored - sampled[at][:, : mask.shape[1]])[mask].abs().max()) < 1e-3
        dense = inputs["ref_per_token_logps"]
        assert float((dense - scored)[mask].abs().max()) > 1e-2
    # tau of each row, from a run apart, and by it the paper's advantages and loss.
    trainer.handle.detach()
    fresh, _ = tiny("qwen2_5_vl", layers=2)
    with torch.no_grad(), attach(fresh, SELECTION) as handle, handle.using(p=torch.tensor(PS).repeat(4)):
        fresh(**{name: given[name] for name in given if name not in ("generation_config",)})
        tau = handle.stats.ratio
    texts = trainer._tokenizer.batch_decode(
        [row[: int(m.sum())] for row, m in zip(ids, _masks(ids, trainer), strict=True)], skip_special_tokens=True
    )
    correct = torch.tensor([len(text) % 2 == 0 for text in texts]).view(2, 4)
    want = advantages(rewards(correct, tau.view(2, 4)), floor=1e-9).flatten()
    for at, inputs, value in zip(order, seen["inputs"], seen["losses"], strict=True):
        # TRL adds 1e-4 to the deviation.
        torch.testing.assert_close(inputs["advantages"], want[at], atol=5e-3, rtol=5e-3)
        old, mask = inputs["old_per_token_logps"], inputs["completion_mask"].bool()
        if at is order[0]:  # later, the policy has moved
            given = (old, old, inputs["ref_per_token_logps"], inputs["advantages"], mask)
            assert value == pytest.approx(float(grpo_loss(*given, epsilon=0.2, beta=0.04).loss), abs=1e-5)


def _masks(ids, trainer):
    ended = torch.isin(ids, torch.tensor(trainer.eos_token_ids))
    return ended.cumsum(1) - ended.long() == 0


def test_efficiency_counts_only_beside_a_right_answer(made, tmp_path):
    trainer = build(made, tmp_path)
    trainer._ratio = torch.tensor([0.2, 0.4, 0.6, 0.8, 0.2, 0.4, 0.6, 0.8])
    said = [[{"role": "assistant", "content": text}] for text in ["a", "bb", "a", "a", "a", "a", "a", "a"]]
    given = ([{}] * 8, [""] * 8, said, [[0]] * 8)
    found = trainer._calculate_rewards(*given)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(found[:, 1], torch.tensor([0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0]))
    trainer.gated = False
    torch.testing.assert_close(trainer._calculate_rewards(*given)[4:, 1], torch.tensor([0.8, 0.6, 0.4, 0.2]))


def test_rows_are_graded_as_the_verbs_grade_them(made, ours):
    _, rows = made
    assert rows[1]["prompt"] == [{"role": "user", "content": "How many of them are there in all?"}]
    assert rows[1]["image"].size == (112, 112)
    said = [[{"role": "assistant", "content": text}] for text in ("It is 1.", "2")]
    given = {name: [rows[1][name]] * 2 for name in ("answer", "type", "tolerance")}
    assert ours.right_answers(completions=said, prompts=None, **given) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_vllm": True}, "vLLM and continuous batching attend to whole prompts"),
        ({"num_generations": 3, "per_device_train_batch_size": 6}, "multiple of the 2 thresholds; got 3"),
        ({"tools": [print]}, "leave tools out"),
        ({"ps": (0.4, 1.5)}, "distinct shares"),
    ],
)
def test_what_cannot_be_is_named(made, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build(made, tmp_path, **change)


def test_a_video_is_refused(made, ours):
    folder, _ = made
    items = load_items(folder / "train.jsonl")
    object.__setattr__(items[0], "is_video", True)
    with pytest.raises(ValueError, match="TRL trains on pictures; got the video"):
        ours.dataset_rows(items)


@pytest.mark.parametrize(
    ("installed", "error", "message"),
    [
        (False, "MissingExtraError", "needs the extra 'trl'"),
        (True, "ModuleNotFoundError", "No module named 'none'"),
    ],
)
def test_the_module_that_is_missing_is_named(monkeypatch, tmp_path, ours, installed, error, message):
    import importlib.util
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    if installed:
        (tmp_path / "trl.py").write_text("import none")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setitem(sys.modules, "trl", None)
    spec = importlib.util.spec_from_file_location("hone_zipr1.again", ours.__file__)
    with pytest.raises(ImportError, match=message) as found:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert type(found.value).__name__ == error
