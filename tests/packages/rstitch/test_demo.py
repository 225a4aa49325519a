import itertools
import json

import pytest
from hone_core.plots import finish
from hone_rstitch import plots
from hone_rstitch.config import DemoConfig
from hone_rstitch.demo import DemoReport, demo, show_answer
from hone_rstitch.evaluate import Answer, Outcome
from matplotlib.backends.backend_agg import FigureCanvasAgg


def token(text, model, entropy=0.1, thrown=None):
    return {"text": text, "model": model, "entropy": entropy, "discarded_entropy": thrown}


ANSWER = {
    "question": "3*4",
    "right": True,
    "tokens": [token("1", 0), token("2", 1, 0.2, 0.8), token("=", 1), token(".", 0)],
    "usage": {"large_tokens": 2, "small_calls": 3, "large_calls": 2},
}


def test_an_answer_says_who_wrote_it():
    line = show_answer(ANSWER, color=False)
    assert line.startswith("3*4 1[2=]. right")
    assert "large 2 of 4 tokens" in line
    assert "highest entropy 0.80" in line


def test_colours_mark_the_same_tokens():
    line = show_answer(ANSWER, color=True)
    assert line.count("\033[1;31m") == 2
    assert line.count("\033[34m") == 2


def test_the_demo_shows_answers_and_the_curve(packaged, start):
    cfg = DemoConfig(items=8, shown=3, taus=(0.2, 0.6))
    with start(cfg) as run:
        report = demo(cfg, run)
    text = str(report)
    assert text.startswith("large model in [brackets]:")
    assert len(report.answers) == 3
    for label in ("small", "large", "tau 0.2", "tau 0.6", "random as tau 0.2", "cascade as tau 0.2"):
        assert f"\n{label} " in text
    assert report.chart.stat().st_size > 5000
    assert report.sheet.stat().st_size > 5000
    shown = json.loads((run.artifacts / "shown.json").read_text())
    for answer in shown:
        assert "".join(t["text"] for t in answer["tokens"]).removesuffix("<eos>").startswith(answer["text"][:3])
        assert answer["usage"]["small_calls"] == answer["usage"]["small_tokens"] + answer["usage"]["discarded"]
    again = start(cfg)
    assert again.done
    assert str(DemoReport.of(again)) == text


@pytest.mark.parametrize("small", [0.1, 0.55, 0.6])
def test_words_of_the_curve_cover_no_line_and_not_each_other(monkeypatch, tmp_path, small):
    def outcome(share, right):
        large = round(20 * share)
        tokens = (20 - large, large)
        answers = [Answer("", at < 20 * right, tokens, tokens, 0, 0, (0.0, 0.0), 0.0) for at in range(20)]
        return Outcome("", tuple(answers))

    figures = []
    monkeypatch.setattr(plots, "finish", lambda figure, **words: (finish(figure, **words), figures.append(figure)))
    shares = (0.0, 0.05, 0.5)
    line = [outcome(share, 0.2 + share) for share in shares]
    alone = {"small": outcome(0, small), "large": outcome(1, 0.6)}
    plots.curve({"stitch": line, "random": line, "cascade": line}, alone, tmp_path / "curve.png", title="pair")
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert axes.lines[0].get_xdata().tolist() == [100 * share for share in shares]
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [label for _, _, label in plots.STYLES.values()]
    assert [text.get_text().split("\n")[0] for text in axes.texts] == ["small model", "large model"]
    boxes = [one.get_window_extent() for one in (legend, *axes.texts, *figure.texts)]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.overlaps(axes.get_window_extent()) for box in boxes)
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.slow
def test_the_packaged_pair_keeps_the_large_models_accuracy(start):
    cfg = DemoConfig(items=100, taus=(0.03,))
    with start(cfg) as run:
        report = demo(cfg, run)
    accuracy = {row.variant: row.value for row in report.rows if row.metric == "accuracy"}
    assert accuracy["tau 0.03"] > accuracy["small"] + 0.05
    assert accuracy["tau 0.03"] > accuracy["random as tau 0.03"]
