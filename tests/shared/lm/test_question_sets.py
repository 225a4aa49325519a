import csv
import json
import sys

import numpy as np
import pytest
import torch
from hone_core.errors import MissingExtraError
from hone_lm.question_sets import Item, check_items, load_items, read_clip
from hone_lm.video import Clip
from PIL import Image


def test_a_category_may_not_have_the_name_of_the_total(tmp_path):
    rows = [
        {"video": "a.mp4", "question": "?", "options": ["x", "y"], "answer": 0, "category": c} for c in ("all", "b")
    ]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = load_items(tmp_path / "qa.jsonl")
    assert "category 'all' is the name of the total; rename it" in first.error
    assert (second.error, second.category) == ("", "b")
    (tmp_path / "qa.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match="is the name of the total"):
        load_items(tmp_path / "qa.jsonl")


def test_items_are_checked():
    clip = Clip(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), (0.0,), 1.0, 1.0)
    good = {"id": "x", "question": "?", "options": ("a", "b"), "answer": 0, "clip": clip}
    Item(**good)
    for change, message in (
        ({"options": ("a",)}, "at least two options"),
        ({"options": ("a", " ")}, "at least two options with text"),
        ({"answer": 2}, "index of one of 2 options"),
        ({"question": " "}, "question is empty"),
        ({"clip": None}, "a video or a clip"),
    ):
        with pytest.raises(ValueError, match=message):
            Item(**(good | change))


def write(path, rows):
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


def test_own_questions(tmp_path):
    rows = [
        {"video": "a.mp4", "question": "what?", "options": ["(A) dog", "B. cat"], "answer": 1, "category": "x"},
        {"video": "b.mp4", "question": "who?", "options": ["me", "you", "A"], "answer": "B", "start": 1, "end": 2.5},
        {"video": "b.mp4", "question": "who?", "options": ["me", "you"], "answer": "you"},
    ]
    items = load_items(write(tmp_path / "qa.jsonl", rows))
    assert items[0].options == ("dog", "cat")
    assert [item.answer for item in items] == [1, 1, 1]
    assert items[0].video == tmp_path / "a.mp4"
    assert (items[1].start, items[1].end) == (1.0, 2.5)
    assert len({item.id for item in items}) == 3
    assert len(check_items(items)) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a"}, r"qa.jsonl:1: 'options' is missing"),
        ({"video": "a", "question": "?", "options": ["x", "y"], "answer": "z"}, "is no index, no letter"),
        ({"video": "a", "question": "?", "options": ["x", "y"], "answer": 5}, "index of one of 2 options; got 5"),
        ({"video": "a", "question": "?", "options": "xy", "answer": 0}, "options must be a list"),
    ],
)
def test_bad_line_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_items(write(tmp_path / "qa.jsonl", [row]))


def test_a_bad_line_costs_only_itself(tmp_path, caplog):
    good = {"video": "a.mp4", "question": "a\u2028b?", "options": ["x", "y"], "answer": 0}
    lines = [
        json.dumps(good, ensure_ascii=False),
        "{",
        "[1]",
        json.dumps(good | {"answer": 7}),
        json.dumps({"video": 1}),
    ]
    lines += [json.dumps(good | {"id": "a.mp4#1"}), "", json.dumps(good | {"start": "x"}), json.dumps(good)]
    path = tmp_path / "qa.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    items = load_items(path)
    assert [item.id for item in items if not item.error] == ["a.mp4#1", "a.mp4#9"]
    assert [item.id for item in items if item.error] == [f"qa.jsonl:{number}" for number in (2, 3, 4, 5, 6, 8)]
    causes = ("not JSON", "expected an object", "index of one of", "is missing", "occurs twice", "could not convert")
    for item, cause in zip([item for item in items if item.error], causes, strict=True):
        assert cause in item.error
        assert f"{path}:" in item.error
        assert cause in caplog.text
        with pytest.raises(ValueError, match=cause):
            read_clip(item, num_frames=2)
    assert len(check_items(items)) == len(items)


def test_a_bad_row_of_a_released_table_costs_only_itself(tmp_path):
    row = {"videoID": "v", "question_id": "1", "question": "When?", "options": ["A. x", "B. y"], "answer": "B"}
    files = {
        "videomme": ("t.json", [{"videoID": "w"}, row, 3]),
        "mvbench": (
            "m.json",
            [{"video": "w"}, {"video": "v", "question": "?", "candidates": ["x", "y"], "answer": "x"}, 3],
        ),
        "egoschema": (
            "e.json",
            [{"question": "?"}, {"q_uid": "u", "question": "?", "option 0": "x", "option 1": "y", "answer": 1}, 3],
        ),
    }
    for format, (name, rows) in files.items():
        items = load_items(write(tmp_path / name, rows), format=format)
        assert [bool(item.error) for item in items] == [True, False, True], format
    (tmp_path / "t.jsonl").write_text("{\n" + json.dumps(row))
    assert [bool(item.error) for item in load_items(tmp_path / "t.jsonl", format="videomme")] == [True, False]


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_items(tmp_path / "none.jsonl")
    (tmp_path / "qa.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"qa.jsonl:1: not JSON"):
        load_items(tmp_path / "qa.jsonl")
    (tmp_path / "qa.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no question"):
        load_items(tmp_path / "qa.jsonl")
    with pytest.raises(ValueError, match="format must be one of"):
        load_items(tmp_path / "qa.jsonl", format="csv")


def test_video_mme(tmp_path):
    row = {"videoID": "fFjv93ACGo8", "question_id": "001-1", "question": "When?", "task_type": "Counting Problem"}
    row |= {"options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. All."], "answer": "C", "duration": "short"}
    for name in ("test.json", "test.jsonl"):
        (item,) = load_items(write(tmp_path / name, [row]), format="videomme", videos=tmp_path / "data")
        assert item.options[2] == "Berries."
        assert (item.id, item.answer, item.category) == ("001-1", 2, "Counting Problem")
        assert item.video == tmp_path / "data" / "fFjv93ACGo8.mp4"
    table = "videoID,question_id,question,options,answer,task_type\n"
    table += "abc,001-1,When?,\"['A. x', 'B. y']\",B,Counting\n"
    (tmp_path / "t.csv").write_text(table)
    assert load_items(tmp_path / "t.csv", format="videomme")[0].options == ("x", "y")


def test_files_with_a_byte_order_mark_as_spreadsheets_write_them(tmp_path):
    row = {"videoID": "abc", "question_id": "1", "question": "When?", "options": ["A. x", "B. y"], "answer": "B"}
    (tmp_path / "t.json").write_text(json.dumps([row]), encoding="utf-8-sig")
    (tmp_path / "t.jsonl").write_text(json.dumps(row), encoding="utf-8-sig")
    table = "videoID,question_id,question,options,answer\nabc,1,When?,\"['A. x', 'B. y']\",B\n"
    (tmp_path / "t.csv").write_text(table, encoding="utf-8-sig")
    for file in sorted(tmp_path.iterdir()):
        (item,) = load_items(file, format="videomme")
        assert (item.error, item.video, item.answer) == ("", tmp_path / "abc.mp4", 1)


def test_fields_that_are_null_are_missing_ones(tmp_path):
    row = {"video": "a.mp4", "question": "?", "options": ["x", "y"], "answer": 0, "id": None, "category": None}
    items = load_items(write(tmp_path / "qa.jsonl", [row, row]))
    assert [(item.error, item.category) for item in items] == [("", "")] * 2
    assert items[0].id != items[1].id


MME = {
    "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8", "videoID": "fFjv93ACGo8", "question_id": "001-1",
    "task_type": "Counting Problem", "question": "When?", "options": ["A. C.", "B. It's red.", "C. A", "D. All."],
    "answer": "C",
}  # fmt: skip


def test_video_mme_as_released(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([MME, MME | {"question_id": "001-2"}]), tmp_path / "test.parquet")
    items = load_items(tmp_path / "test.parquet", format="videomme")
    assert [item.id for item in items] == ["001-1", "001-2"]
    assert items[0].options == ("C.", "It's red.", "A", "All.")
    # The letter C, although an option reads so.
    assert items[0].answer == 2
    (tmp_path / "none.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"none.parquet: not a parquet file"):
        load_items(tmp_path / "none.parquet", format="videomme")


def test_parquet_without_its_reader_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "test.parquet").touch()
    with pytest.raises(MissingExtraError, match=r"converted to JSON lines.*pip install 'hone-lm\[parquet\]'"):
        load_items(tmp_path / "test.parquet", format="videomme")


@pytest.mark.parametrize("place", ["fFjv93ACGo8.mp4", "data/fFjv93ACGo8.mp4", "chunk_01/fFjv93ACGo8.MKV"])
def test_videos_of_video_mme_are_found(tmp_path, place):
    video = tmp_path / "videos" / place
    video.parent.mkdir(parents=True)
    video.write_text("x")
    (tmp_path / "videos" / "subtitle").mkdir()
    (tmp_path / "videos" / "subtitle" / "fFjv93ACGo8.srt").write_text("x")
    (item,) = load_items(write(tmp_path / "t.json", [MME]), format="videomme", videos=tmp_path / "videos")
    assert item.video == video


@pytest.mark.parametrize(
    "written",
    [
        "['A. It's raining', 'B. a, b', \"C. rock 'n' roll\"]",
        repr(["A. It's raining", "B. a, b", "C. rock 'n' roll"]),
        json.dumps(["A. It's raining", "B. a, b", "C. rock 'n' roll"]),
        "['A. It's raining', 'B. a, b', 'C. rock 'n' roll']",
        "[\"A. It's raining\" 'B. a, b'\n \"C. rock 'n' roll\"]",
    ],
    ids=["mixed", "python", "json", "unescaped", "numpy"],
)
def test_options_written_as_text_keep_their_apostrophes(tmp_path, written):
    with (tmp_path / "t.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, MME)
        table.writeheader()
        table.writerow(MME | {"options": written})
    (item,) = load_items(tmp_path / "t.csv", format="videomme")
    assert item.options == ("It's raining", "a, b", "rock 'n' roll")
    assert item.answer == 2


@pytest.mark.parametrize("written", ["A. x, B. y", "[A. x, B. y]", "['A. x', 'B. y' oops]", "[1, 2]", "[]"])
def test_options_that_are_no_list_are_refused(tmp_path, written):
    with pytest.raises(ValueError, match="options must be a list"):
        load_items(write(tmp_path / "t.json", [MME | {"options": written}]), format="videomme")


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        (["A. dog", "(B) cat", "C: A man", "D) x"], ("dog", "cat", "A man", "x")),
        (["A man walks", "B side"], None),
        (["A. Lincoln", "J. Smith"], None),
        (["C. Elegans", "A. Thaliana"], None),
        (["A.M.", "B.C."], None),
        (["A-flat", "B-flat"], None),
        (["Apples", "Berries"], None),
        (["A. dog", "cat"], None),
    ],
)
def test_only_a_letter_of_the_list_is_dropped(tmp_path, options, plain):
    row = {"video": "v.mp4", "question": "?", "options": options, "answer": options[1]}
    (item,) = load_items(write(tmp_path / "qa.jsonl", [row]))
    assert item.options == (plain or tuple(options))
    assert item.answer == 1


@pytest.mark.parametrize(
    ("answer", "index"), [("B", 1), ("(B)", 1), ("B.", 1), ("C: x", 2), ("x", 2), ("B. dog", None), ("A", None)]
)
def test_answers_by_letter_and_text(tmp_path, answer, index):
    row = {"video": "v.mp4", "question": "?", "options": ["dog", "A", "x"], "answer": answer}
    path = write(tmp_path / "qa.jsonl", [row])
    if index is None:
        with pytest.raises(ValueError, match=r"is the text of option \d and the letter of option \d"):
            load_items(path)
    else:
        assert load_items(path)[0].answer == index


def released(tmp_path, task, video, **more):
    """A task's file and video as in the release of MVBench or TVBench."""
    (tmp_path / "json").mkdir(exist_ok=True)
    row = {"video": video, "question": "What?", "candidates": ["2", "1", "A"], "answer": "1"} | more
    write(tmp_path / "json" / f"{task}.json", [row])
    return tmp_path / "video"


def movie(path):
    path.parent.mkdir(parents=True)
    path.write_text("x")
    return path


@pytest.mark.parametrize(
    ("format", "task", "place"),
    [
        ("mvbench", "action_sequence", "star/Charades_v1_480/v.mp4"),
        ("mvbench", "action_sequence", "data0613/star/Charades_v1_480/v.mp4"),
        ("tvbench", "action_sequence", "action_sequence/v.mp4"),
    ],
)
def test_videos_of_a_task_are_found_in_their_folders(tmp_path, format, task, place):
    root = released(tmp_path, task, "v.mp4", start=1, end=2)
    video = movie(root / place)
    for path, videos in (
        (tmp_path, None),
        (tmp_path / "json", None),
        (tmp_path / "json" / f"{task}.json", None),
        (tmp_path / "json", root),
        (tmp_path / "json", tmp_path),
    ):
        (item,) = load_items(path, format=format, videos=videos)
        assert item.video == video
        assert (item.answer, item.start, item.end, item.fps) == (1, 1.0, 2.0, None)


def test_the_published_folder_counts_before_others_of_the_name(tmp_path):
    root = released(tmp_path, "action_count", "v.mp4")
    first = movie(root / "other" / "v.mp4")
    video = movie(root / "perception" / "videos" / "v.mp4")
    assert load_items(tmp_path, format="mvbench")[0].video == video
    with pytest.raises(ValueError, match=r"2 videos in .* are named v.mp4: .*other.*perception"):
        load_items(tmp_path, format="tvbench")
    first.unlink()
    assert load_items(tmp_path, format="tvbench")[0].video == video
    # One that is nowhere is told of by name.
    video.unlink()
    (item,) = load_items(tmp_path, format="mvbench")
    assert "there is no video" in check_items([item])[0]


def test_a_name_with_folders_is_looked_for_with_them(tmp_path):
    root = released(tmp_path, "state_change", "b/v.mp4")
    movie(root / "x" / "a" / "v.mp4")
    video = movie(root / "x" / "b" / "v.mp4")
    assert load_items(tmp_path, format="mvbench")[0].video == video


@pytest.mark.parametrize("place", ["tvqa/frames_fps3_hq", "elsewhere"])
def test_frames_of_mvbench_are_three_a_second(tmp_path, place):
    root = released(tmp_path, "episodic_reasoning", "clip_1", start=1.0, end=3.0)
    folder = root / place / "clip_1"
    folder.mkdir(parents=True)
    for index in range(12):
        Image.fromarray(np.full((8, 8, 3), 20 * index, np.uint8)).save(folder / f"{index + 1:05d}.jpg", quality=100)
    (item,) = load_items(tmp_path, format="mvbench")
    assert item.video == folder
    clip = read_clip(item, num_frames=6)
    # Seconds 1 to 3 are the frames 3 to 8 of the twelve.
    assert clip.frames[:, 0, 0, 0].tolist() == pytest.approx([20 * k for k in range(3, 9)], abs=3)
    assert clip.times[0] == 1.0
    row = {"video": str(folder), "question": "?", "options": ["x", "y"], "answer": 0, "fps": 2}
    (own,) = load_items(write(tmp_path / "qa.jsonl", [row]))
    assert read_clip(own, num_frames=4).duration == 6.0


def test_mvbench_and_tvbench(tmp_path):
    folder = tmp_path / "json"
    folder.mkdir()
    row = {"video": "v.mp4", "question": "What?", "candidates": ["open", "close"], "answer": "close"}
    write(folder / "action_antonym.json", [row, row | {"start": 3, "end": 4.5}])
    write(folder / "moving_direction.json", [row])
    for format in ("mvbench", "tvbench"):
        items = load_items(folder, format=format)
        assert [item.category for item in items] == ["action_antonym"] * 2 + ["moving_direction"]
        assert [item.answer for item in items] == [1, 1, 1]
        assert items[1].end == 4.5
    assert len(load_items(folder / "moving_direction.json", format="tvbench")) == 1


def test_egoschema(tmp_path):
    row = {"q_uid": "u1", "question": "Why?"} | {f"option {i}": f"because {i}" for i in range(5)}
    write(tmp_path / "questions.json", [row, row | {"q_uid": "u2"}])
    write(tmp_path / "subset_answers.json", {"u2": 3})
    (item,) = load_items(tmp_path / "questions.json", format="egoschema")
    assert (item.id, item.answer, len(item.options)) == ("u2", 3, 5)
    (tmp_path / "subset_answers.json").write_text("[]")
    with pytest.raises(ValueError, match=r"subset_answers\.json: expected an object; got list"):
        load_items(tmp_path / "questions.json", format="egoschema")


def task_file(folder, task, **row):
    (folder / "json").mkdir(parents=True, exist_ok=True)
    full = {"question": "?", "candidates": ["x", "y"], "answer": "x"} | row
    write(folder / "json" / f"{task}.json", [full])
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ZS9XR_1.3_4.8.mp4", (None, None)), ("ZS9XR.mp4", (1.3, 4.8)), ("ZS9XR_1.3_5.mp4", (1.3, 4.8))],
)
def test_a_video_whose_name_has_the_cut_is_not_cut_again(tmp_path, name, expected):
    (item,) = load_items(task_file(tmp_path, "action_sequence", video=name, start=1.3, end=4.8), format="mvbench")
    assert (item.start, item.end) == expected


@pytest.mark.parametrize("name", ["v.avi", "v.webm"])
@pytest.mark.parametrize("task", ["state_change", "fine_grained_pose"])
def test_a_video_that_was_converted_is_found(tmp_path, name, task):
    folder = {"state_change": "perception/videos", "fine_grained_pose": "nturgbd"}[task]
    for place in (folder, "other"):
        (tmp_path / "video" / place).mkdir(parents=True)
        (tmp_path / "video" / place / "v.mp4").write_bytes(b"x")
    (item,) = load_items(task_file(tmp_path, task, video=name), format="mvbench")
    assert item.video == tmp_path / "video" / folder / "v.mp4"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_egoschema_as_rows_on_hugging_face(tmp_path, suffix):
    rows = [
        {"question_idx": "1", "question": "?", "video_idx": "u", "option": ["A. x", "B. y", "C. z"], "answer": "2"},
        {"question_idx": "2", "question": "?", "video_idx": "w", "option": ["A. x", "B. y", "C. z"], "answer": None},
    ]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(path, rows)
    (item,) = load_items(path, format="egoschema")
    assert (item.id, item.options, item.answer) == ("u", ("x", "y", "z"), 2)
    assert item.video == tmp_path / "u.mp4"


@pytest.mark.parametrize("answer", ["b", "(b)", 1.0, "1.0", "1", "B"])
def test_ways_to_write_an_answer(tmp_path, answer):
    row = {"video": "a.mp4", "question": "?", "options": ["x", "y"], "answer": answer}
    assert load_items(write(tmp_path / "qa.jsonl", [row]))[0].answer == 1


@pytest.mark.parametrize("answer", [1.5, "1.5", True])
def test_answers_that_are_no_index(tmp_path, answer):
    row = {"video": "a.mp4", "question": "?", "options": ["x", "y"], "answer": answer}
    with pytest.raises(ValueError, match="answer"):
        load_items(write(tmp_path / "qa.jsonl", [row]))


def test_two_options_that_are_the_same_are_refused(tmp_path):
    row = {"video": "a.mp4", "question": "?", "options": ["x", "y", "x "], "answer": 1}
    with pytest.raises(ValueError, match="two options are the same"):
        load_items(write(tmp_path / "qa.jsonl", [row]))
