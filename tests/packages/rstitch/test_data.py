import json

import pytest
import torch
from hone_rstitch import data
from hone_rstitch.data import (
    CHARACTERS,
    HUB,
    SETS,
    Problem,
    check_answers,
    grade,
    is_held_out,
    product_batch,
    products,
    read_problems,
    working,
)


def test_working_of_a_product():
    assert working(123, 45) == "615+4920=#5535."
    assert working(123, 45, checks=2) == "615+4920=5535?615+4920=5535?615+4920=#5535."
    assert working(200, 30) == "0+6000=#6000."


def test_a_tenth_is_held_out():
    held = [is_held_out(a, b) for a in range(100, 1000) for b in range(10, 100)]
    assert abs(sum(held) / len(held) - 0.1) < 0.005


def test_products_are_held_out_distinct_and_right():
    found = products(300, seed=4)
    assert len({problem.id for problem in found}) == 300
    for problem in found:
        a, b = map(int, problem.question.split("*"))
        assert is_held_out(a, b)
        assert int(problem.answer) == a * b
    assert products(5, seed=4) == found[:5]
    with pytest.raises(ValueError, match="held-out"):
        products(10**6)


def text_of(ids):
    return "".join(CHARACTERS[i] for i in ids if i < len(CHARACTERS))


def test_training_batches_hold_no_held_out_product():
    ids, targets = product_batch(200, (0, 1, 2), eos=17, pad=18)
    for row, target in zip(ids.tolist(), targets.tolist(), strict=True):
        question, _, rest = text_of(row).partition("=")
        a, b = map(int, question.split("*"))
        assert not is_held_out(a, b)
        assert rest == working(a, b)
        # What is learned is everything after the question, its end included, and no padding.
        learned = [id for id in target if id >= 0]
        assert text_of(learned) == rest
        assert learned[-1] == 17
        assert row.count(17) == 1


def test_a_batch_is_a_function_of_its_key():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    batches = [product_batch(8, key, eos=17, pad=18)[0] for key in keys]
    assert torch.equal(batches[0], product_batch(8, keys[0], eos=17, pad=18)[0])
    assert len({tuple(batch[:, :6].flatten().tolist()) for batch in batches}) == 4


def test_verbose_batches_check_themselves_as_often_as_said():
    ids, _ = product_batch(400, (3,), eos=17, pad=18, verbose=0.7)
    share = sum("?" in text_of(row) for row in ids.tolist()) / 400
    assert abs(share - 0.7) < 0.07


def test_jsonl(tmp_path):
    file = tmp_path / "set.jsonl"
    file.write_text('{"problem": "1+1", "solution": "2"}\n\n{"id": "b", "question": "2+2", "answer": 4}\n')
    assert read_problems(file) == [Problem("1", "1+1", "2"), Problem("b", "2+2", "4")]
    assert len(read_problems(file, limit=1)) == 1


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "set.parquet"
    rows = [
        {"id": 7, "problem": "1+1", "solution": "because", "answer": 2.0},
        {"id": 8, "problem": "1/2", "answer": 0.5},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    # An answer stands before a solution, and whole numbers are written as such.
    assert read_problems(file) == [Problem("7", "1+1", "2"), Problem("8", "1/2", "0.5")]


def test_problems_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    file = tmp_path / "test.jsonl"
    file.write_text('{"problem": "1+1", "answer": "2"}\n')
    asked = []

    def download(name, path, **options):
        asked.append((name, path, options["revision"]))
        assert options["repo_type"] == "dataset"
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    want = [Problem("1", "1+1", "2")]
    assert read_problems("math500") == want
    assert read_problems("hf://datasets/me/sums@v2/data/test.jsonl") == want
    assert asked == [("HuggingFaceH4/MATH-500", "test.jsonl", None), ("me/sums", "data/test.jsonl", "v2")]
    assert all(HUB.fullmatch(address) for address in SETS.values())
    with pytest.raises(ValueError, match="expected hf://datasets/OWNER/NAME/FILE; got hf://datasets/me"):
        read_problems("hf://datasets/me")
    for error, kind, match in (
        (LocalEntryNotFoundError("no"), ConnectionError, "cannot be reached"),
        (EntryNotFoundError("no"), FileNotFoundError, "the hub has no hf://"),
    ):

        def fail(*args, error=error, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        with pytest.raises(kind, match=match):
            read_problems("hf://datasets/me/sums/test.jsonl")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "set.jsonl:1: not JSON"),
        ('{"question": "1+1"}', "set.jsonl:1: expected one of answer"),
        ("[1, 2]", "expected one of question"),
        ('{"id": 1, "question": "a", "answer": "b"}\n' * 2, "one id"),
        ("", "no problem"),
    ],
)
def test_bad_jsonl_is_named(tmp_path, text, match):
    file = tmp_path / "set.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_problems(file)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("615+4920=#5535.", "5535", True),
        ("so 1,234.50 dollars", "1234.5", True),
        ("x = -3", "-3", True),
        ("x = 3", "-3", False),
        ("615+4920=", "5535", False),
        ("nothing", "0", False),
    ],
)
def test_numbers_are_graded(text, answer, right):
    assert grade(text, answer) is right


def test_math_needs_its_extra(monkeypatch):
    import sys

    from hone_core.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtraError, match="math"):
        grade("1", "1", "math")


def test_math():
    pytest.importorskip("math_verify", reason="the extra math is not installed")
    assert grade("the answer is \\boxed{\\frac{2}{4}}", "$\\frac{1}{2}$", "math")
    assert not grade("the answer is \\boxed{3}", "$\\frac{1}{2}$", "math")


@pytest.mark.parametrize(
    ("written", "answer", "right"),
    [
        ("3\\sqrt{13}", "3\\sqrt{13}", True),
        ("\\sqrt{13}", "3\\sqrt{13}", False),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("3", "\\left( 3, \\frac{\\pi}{2} \\right)", False),
        ("5", "6 - 5i", False),
        ("q - p", "p - q", False),
        ("p - q", "p - q", True),
        ("\\text{Evelyn}", "\\text{Evelyn}", True),
        ("\\text{x is even}", "\\text{x is even}", True),
        ("10080", "10,\\!080", True),
        ("18", "16 - 3 - 4 = 9 eggs are sold a day, which makes 9 * 2 = 18", True),
        ("204", "204", True),
    ],
)
def test_answers_without_marks_around_them_are_mathematics_as_math500_has_them(written, answer, right):
    pytest.importorskip("math_verify", reason="the extra math is not installed")
    assert grade(f"so it is \\boxed{{{written}}}", answer, "math") is right


def test_an_answer_that_nobody_can_work_out_is_wrong_after_a_while(monkeypatch):
    pytest.importorskip("math_verify", reason="the extra math is not installed")
    monkeypatch.setattr(data, "SECONDS", 1)
    assert not grade("it is \\boxed{9^{9^{9^{9}}}}", "5", "math")


@pytest.mark.parametrize("answer", ["\\frac{3}{4}", "\\text{Evelyn}", "p - q"])
def test_answers_that_are_no_numbers_are_not_graded_as_numbers(answer):
    problems = [Problem("1", "1+1", "2"), Problem("2", "?", "#### 1,234"), Problem("3", "?", answer)]
    check_answers(problems[:2], "number")
    check_answers(problems, "math")
    with pytest.raises(ValueError, match=r"the answer of problem 3, .* is no number; grade these by --format math"):
        check_answers(problems, "number")


def test_lines_end_with_a_newline_alone(tmp_path):
    file = tmp_path / "set.jsonl"
    rows = [{"id": None, "question": "a\u2028b\x85c", "answer": "1"}, {"id": None, "question": "d", "answer": "2"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text(lines, encoding="utf-8-sig", newline="")
    assert read_problems(file) == [Problem("1", "a\u2028b\x85c", "1"), Problem("2", "d", "2")]


def test_a_missing_file_is_named_with_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.jsonl; expected problems as JSON lines or parquet"):
        read_problems(tmp_path / "none.jsonl")
