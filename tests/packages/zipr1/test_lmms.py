"""The adapter on a tiny task of lmms-eval's own evaluator, where lmms-eval is installed."""

import numpy as np
import pytest
from hone_lm.tiny import tiny

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; it is no dependency")
pytestmark = pytest.mark.filterwarnings("ignore")

TASK = """
task: tiny_digits
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function looks.visual
doc_to_text: !function looks.text
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 4
process_results: !function looks.results
metric_list:
  - metric: length
    aggregation: mean
    higher_is_better: true
"""
LOOKS = """
from PIL import Image

def visual(doc):
    with Image.open(doc["image"]) as picture:
        return [picture.convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"length": float(len(results[0]) > 0)}
"""


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    model, processor = tiny("qwen2_5_vl", layers=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_tiny_task(checkpoint, tmp_path):
    import json

    from hone_zipr1.lmms import SparseModel, manifest
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from PIL import Image

    assert manifest().simple_class_path == "hone_zipr1.lmms.SparseModel"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = []
    for at in range(3):
        picture = tmp_path / f"{at}.png"
        Image.fromarray(np.random.default_rng(at).integers(0, 255, (112, 112, 3), dtype=np.uint8)).save(picture)
        lines.append(json.dumps({"image": str(picture), "question": f"What is {at}?", "answer": "a"}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tasks / "tiny_digits.yaml").write_text(TASK.format(file=tmp_path / "data.jsonl"))
    (tasks / "looks.py").write_text(LOOKS)
    model = SparseModel(str(checkpoint), p=0.6, device="cpu")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=model, tasks=["tiny_digits"], task_manager=manager, bootstrap_iters=0)
    assert len(found["samples"]["tiny_digits"]) == 3
    assert len(model.ratios) == 3
    assert all(0 < ratio < 1 for ratio in model.ratios)
    assert found["results"]["tiny_digits"]["length,none"] >= 0


def test_bad_arguments(checkpoint):
    from hone_zipr1.lmms import SparseModel

    with pytest.raises(ValueError, match="batch_size must be 1; got 4"):
        SparseModel(str(checkpoint), batch_size=4)
    with pytest.raises(ValueError, match="p is a share"):
        SparseModel(str(checkpoint), p=1.5)
    with pytest.raises(ValueError, match="preset must be one of"):
        SparseModel(str(checkpoint), preset="x")
