"""lm-evaluation-harness drives the server, where its command is installed."""

import json
import os
import shutil
import subprocess

import pytest
from hone_rstitch.config import SamplingConfig, StitchConfig
from hone_rstitch.data import grade, products

from .test_serve import Served, pair  # noqa: F401, a fixture

TASK = """\
task: tiny_products
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 40}
filter_list:
  - name: sum
    filter: [{function: regex, regex_pattern: "#([0-9]+)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.skipif(shutil.which("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_the_harness_finds_the_pairs_accuracy(pair, tmp_path):  # noqa: F811
    problems = products(24, seed=9)
    gate = StitchConfig(tau=0.02)
    texts, _ = pair.answer([problem.question for problem in problems], gate, SamplingConfig(max_new_tokens=40))
    right = [grade(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
    data = tmp_path / "products.jsonl"
    data.write_text("".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems))
    (tmp_path / "tiny_products.yaml").write_text(TASK.replace("DATA", str(data)))
    served = Served(pair, stitch=gate)
    try:
        done = subprocess.run(
            [
                "lm_eval", "--model", "local-chat-completions", "--tasks", "tiny_products", "--apply_chat_template",
                "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--model_args",
                f"model=hone-rstitch,base_url={served.url}/v1/chat/completions,num_concurrent=4,tokenized_requests=False",
            ],
            env=os.environ | {"OPENAI_API_KEY": "none", "HF_HOME": str(tmp_path / "hub"), "HF_DATASETS_OFFLINE": "1"},
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    finally:
        served.close()
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["tiny_products"]
    assert found["exact_match,sum"] == pytest.approx(sum(right) / len(right))
