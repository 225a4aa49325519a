import json

import pytest
import torch
from hone_blade.config import BladeConfig
from hone_blade.inspection import inspect_model, to_rows
from hone_blade.method import Stats, mass_recall, sparse_layout
from hone_blade.models import attach
from hone_core.runs import Run, load_results
from hone_video.architectures import tiny
from hone_video.handle import LayerStats
from matplotlib import image
from torch import nn


def arguments(time, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 4, 4, 16, 16, generator=generator),
        "timestep": torch.full((2,), time),
        "encoder_hidden_states": torch.randn(2, 8, 32, generator=generator),
    }


def start(folder):
    return Run.start(package="hone-blade", verb="inspect", out=folder)


def test_rows_are_the_means_of_the_statistics():
    stats = Stats(
        density=torch.tensor([[0.1, 0.3], [0.2, 0.2]]),
        pooled=0.0625,
        clamped=torch.tensor([[0.0, 1.0], [1.0, 1.0]]),
        recall=torch.tensor([[0.5, 0.9], [0.7, 0.9]]),
    )
    [row, other] = to_rows(
        [LayerStats(3, 1, 0, 2, stats), LayerStats(0, 0, 0, 0, Stats(*[torch.ones(1, 1)] * 3, None))]
    )
    assert (row.step, row.call, row.model, row.layer) == (3, 1, 0, 2)
    assert row.density == pytest.approx(0.2)
    assert row.pooled == 0.0625
    assert row.clamped == 0.75
    assert (row.recall, row.recall_low, row.recall_high) == pytest.approx((0.75, 0.6, 0.9))
    assert (other.recall, other.recall_low) == (None, None)


def test_values_against_the_attention_that_ran(tmp_path, monkeypatch):
    """Density and recall again, from the probabilities of the very q and k that the layer saw."""
    model, seen = tiny("wan", num_layers=1), {}
    config = BladeConfig(block=32, samples=8, max_density=0.4)
    from hone_blade import models

    real = models.adaptive_sparse_attention

    def spy(q, k, v, **options):
        seen.update(q=q.double(), k=k.double())
        return real(q, k, v, **options)

    monkeypatch.setattr(models, "adaptive_sparse_attention", spy)
    with attach(model, config) as handle, start(tmp_path / "run") as run:

        def call():
            with torch.no_grad():
                model(**arguments(999))

        report = inspect_model(handle, call, run, title="tiny")
    layout = sparse_layout(seen["q"].float(), seen["k"].float(), cfg=config)
    kept = layout.to_mask().repeat_interleave(32, 2).repeat_interleave(32, 3)
    probability = (seen["q"] @ seen["k"].transpose(-1, -2) / 32**0.5).softmax(-1)
    recall = (probability * kept).sum(-1).mean(-1)
    [row] = json.loads((tmp_path / "run" / "artifacts" / "inspection.json").read_text())
    assert row["recall"] == pytest.approx(recall.mean().item(), abs=1e-5)
    assert row["recall_low"] == pytest.approx(recall.mean(0).min().item(), abs=1e-5)
    assert row["density"] == pytest.approx(kept.double().mean().item(), abs=1e-6)
    assert report.recall == pytest.approx(row["recall"])
    assert mass_recall(seen["q"], seen["k"], layout).mean().item() == pytest.approx(row["recall"], abs=1e-5)


def test_run_folder(tmp_path):
    model = tiny("wan", num_layers=3)
    config = BladeConfig(block=32, samples=8, max_density=0.4, dense_layers=(1,), dense_steps=1)

    def call():
        with torch.no_grad():
            for time in (999, 874, 749):
                for seed in (0, 1):
                    model(**arguments(time, seed))

    with attach(model, config) as handle, start(tmp_path / "run") as run:
        report = inspect_model(handle, call, run, recall=False)
    assert report.calls == 2 * 2 * 2
    assert report.recall is None
    rows = json.loads((tmp_path / "run" / "artifacts" / "inspection.json").read_text())
    assert sorted({(row["step"], row["call"], row["layer"]) for row in rows}) == [
        (s, c, layer) for s in (1, 2) for c in (0, 1) for layer in (0, 2)
    ]
    results = load_results(tmp_path / "run")
    means = {row["metric"]: (row["value"], row["n"]) for row in results["rows"]}
    assert means.keys() == {"density", "clamped"}
    assert means["density"] == (pytest.approx(sum(r["density"] for r in rows) / 8), 8)
    picture = image.imread(report.figure)
    assert picture.shape[1] > 600
    assert len(set(map(tuple, picture.reshape(-1, picture.shape[-1])[:, :3].round(2)))) > 20


def test_nothing_sparse_is_an_error(tmp_path):
    model = tiny("wan", num_layers=1)
    with (
        attach(model, BladeConfig(block=32, min_tokens=10_000)) as handle,
        pytest.raises(ValueError, match=r"no sparse self-attention ran.*min_tokens=10000"),
        start(tmp_path / "run") as run,
    ):
        inspect_model(handle, lambda: nn.Identity()(1), run)
    assert load_results(tmp_path / "run")["status"] == "failed"
