import json
import sys

import pytest
from hone_core.errors import CheckpointError
from hone_visual_ar.geneval import check_scorer, read_prompts, score, write_facts

ENTRIES = [{"tag": "colors", "prompt": "a red cat"}, {"tag": "counting", "prompt": "two cats"}]
DETECT = """
import json, pathlib, sys
folder, out = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
with open(out, "w") as file:
    for each in sorted(pathlib.Path(folder).iterdir()):
        facts = json.load(open(each / "metadata.jsonl"))
        for right in (True, False) if facts["tag"] == "counting" else (True,):
            file.write(json.dumps({"tag": facts["tag"], "correct": right}) + "\\n")
"""


def test_prompts_have_the_benchmarks_file_names(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, ENTRIES)) + "\n\n")
    first, second = read_prompts(path)
    assert (first.text, second.facts) == ("a red cat", ENTRIES[1])
    assert [str(file) for file in second.files] == [f"00001/samples/0000{at}.png" for at in range(4)]
    assert len(read_prompts(path, limit=1)) == 1
    for text in ("", "{}", "[]", '{"tag": "", "prompt": "a"}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="holds no prompts"):
            read_prompts(path)


def test_scores_are_those_of_its_script(tmp_path):
    path, scorer = tmp_path / "prompts.jsonl", tmp_path / "geneval"
    path.write_text("\n".join(map(json.dumps, ENTRIES)))
    with pytest.raises(CheckpointError, match="checkout of djghosh13/geneval"):
        check_scorer(scorer)
    (scorer / "evaluation").mkdir(parents=True)
    script = scorer / "evaluation" / "evaluate_images.py"
    script.write_text(DETECT)
    check_scorer(scorer)
    (tmp_path / "images").mkdir()
    write_facts(tmp_path / "images", read_prompts(path))
    options = {"scorer": scorer, "python": sys.executable, "weights": tmp_path}
    assert score(tmp_path / "images", tmp_path / "out" / "a.jsonl", **options) == {
        "colors": [1.0],
        "counting": [1.0, 0.0],
    }
    script.write_text("raise SystemExit('no detector')")
    with pytest.raises(RuntimeError, match="no detector"):
        score(tmp_path / "images", tmp_path / "out" / "a.jsonl", **options)
