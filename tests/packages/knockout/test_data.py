import json

import pytest
import torch
from hone_knockout.data import (
    COLORS,
    CORNERS,
    DIRECTIONS,
    KINDS,
    SHAPES,
    ClipConfig,
    Item,
    check_items,
    draw_scenes,
    fake_batch,
    generated_items,
    load_items,
    questions,
    read_clip,
    render,
)
from hone_lm.video import Clip

CFG = ClipConfig()


def scenes(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_scenes(count, CFG, generator)
    return drawn, render(drawn, ClipConfig(noise=0.0), generator)


def test_labels_can_be_read_off_the_pixels():
    drawn, video = scenes()
    palette = torch.tensor(list(COLORS.values()))
    for index in range(len(drawn)):
        asked = questions(drawn, index)
        seen = {}
        for which in (0, 1):
            color = palette[drawn.color[index, which]]
            found = (video[index] == color[:, None, None]).all(1)
            frames = found.flatten(1).any(1).nonzero().flatten().tolist()
            seen[which] = frames[0]
            first, last = (found[f].nonzero().float().mean(0) for f in (frames[0], frames[-1]))
            way = last - first
            # The other shape may cover a part; the larger component still tells.
            axis = int(way.abs().argmax())
            name = [["up", "down"], ["left", "right"]][axis][int(way[axis] > 0)]
            assert name == list(DIRECTIONS)[drawn.direction[index, which]]
        order = next(entry for entry in asked if entry[0] == "order")
        assert order[2][order[3]] == list(COLORS)[drawn.color[index, min(seen, key=seen.get)]]
        white = (video[index, 0] == 255).all(0).nonzero().float().mean(0) > CFG.size / 2
        assert CORNERS[drawn.corner[index]] == f"{['top', 'bottom'][int(white[0])]}-{['left', 'right'][int(white[1])]}"


def test_shapes_differ():
    drawn, video = scenes(200)
    areas = {}
    for index in range(len(drawn)):
        color = torch.tensor(list(COLORS.values()))[drawn.color[index, 1]]
        last = (video[index, -1] == color[:, None, None]).all(0)
        areas.setdefault(SHAPES[drawn.shape[index, 1]], []).append(int(last.sum()))
    assert len({max(values) for values in areas.values()}) == 4


def test_attributes_are_uniform_and_inside():
    drawn, _ = scenes(4000)
    for value, options in ((drawn.shape, 4), (drawn.direction, 4), (drawn.corner, 4), (drawn.color, 4)):
        counts = torch.bincount(value.flatten(), minlength=options).float()
        assert float((counts / counts.sum() - 1 / options).abs().max()) < 0.03
    row, column, seen = drawn.path(CFG)
    assert int(row.min()) >= 0
    assert int(row.max()) < CFG.grid
    assert int(column.max()) < CFG.grid
    assert (drawn.color[:, 0] != drawn.color[:, 1]).all()
    assert (drawn.appears[:, 0] != drawn.appears[:, 1]).all()
    assert seen[..., -1].all()
    firsts = [questions(drawn, i)[4][3] for i in range(500)]
    assert 0.4 < sum(firsts) / 500 < 0.6


def test_generated_items():
    items = generated_items(24, seed=1)
    assert [item.category for item in items[:4]] == list(KINDS)
    assert len({item.id for item in items}) == 24
    again = generated_items(24, seed=1)
    assert torch.equal(items[5].clip.frames, again[5].clip.frames)
    assert len(fake_batch(3)) == 3
    with pytest.raises(ValueError, match="at least 4 frames"):
        ClipConfig(frames=2)


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
