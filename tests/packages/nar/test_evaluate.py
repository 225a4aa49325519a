import math

import torch
from hone_nar.config import EvalConfig
from hone_nar.data import digits
from hone_nar.evaluate import evaluate
from hone_nar.host import load_host


def test_rows_of_every_variant(untrained, start, tmp_path):
    cfg = EvalConfig(host=untrained, limit=20, batch=10)
    with start(cfg, "eval", tmp_path / "run") as run:
        report = evaluate(cfg, run)
    found = {(row.metric, row.variant) for row in report.rows}
    metrics = ("bits_per_token", "accuracy", "distance", "passes", "time_per_image")
    assert {
        (metric, variant) for metric in metrics for variant in ("nar", "raster", "right-only", "below-only")
    } <= found
    assert ("accuracy", "real digits") in found
    titles = str(report).splitlines()[0].split()
    assert titles == ["bits/token", "accuracy", "distance", "passes", "ms/image"]


def test_likelihoods_alone_are_exact(untrained, start, tmp_path):
    cfg = EvalConfig(host=untrained, nll=True)
    with start(cfg, "eval", tmp_path / "run") as run:
        report = evaluate(cfg, run)
    assert {row.metric for row in report.rows} == {"bits_per_token"}
    assert str(report).splitlines()[0].split() == ["bits/token"]
    model, test = load_host(path=untrained).raster, digits("test")
    with torch.no_grad():
        logs = model(test.tokens[:5], test.labels[:5]).logits.double().log_softmax(-1)
    by_hand = -logs.gather(-1, test.tokens[:5, :, None]).sum() / (5 * 64 * math.log(2))
    with torch.no_grad():
        few = float(model.nll(test.tokens[:5], test.labels[:5]).mean()) / math.log(2)
    assert abs(few - float(by_hand)) < 1e-5
    value = next(row for row in report.rows if row.variant == "raster")
    assert value.interval[0] < value.value < value.interval[1]
    assert value.n == 297
