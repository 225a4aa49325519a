import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hone_core.runs import Run
from hone_core.testing import assert_close
from hone_sparsevar.calibrate import auroc, calibrate, chosen, image_scores, mask_scores, spearman
from hone_sparsevar.config import CalibrateConfig, ImageConfig, SparseVARConfig
from hone_sparsevar.data import random_labels, render
from hone_sparsevar.host import SCHEDULE, load_host


def test_auroc_against_pairs():
    score = torch.tensor([[0.1, 0.9, 0.4, 0.3, 0.8]])
    mask = torch.tensor([[False, True, False, True, True]])
    pairs = [(a, b) for a in score[mask].tolist() for b in score[~mask].tolist()]
    assert_close(auroc(score, mask), torch.tensor([sum(a > b for a, b in pairs) / len(pairs)], dtype=torch.float64))
    assert auroc(score, torch.zeros_like(mask)).isnan().all()
    assert auroc(torch.arange(4.0)[None], torch.tensor([[False, False, True, True]])) == 1


def test_rank_correlation():
    a = torch.tensor([[1.0, 5.0, 2.0, 9.0]])
    assert_close(spearman(a, a.exp()), torch.tensor([1.0], dtype=torch.float64))
    assert_close(spearman(a, -a), torch.tensor([-1.0], dtype=torch.float64))
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 1, 1, 0, 0.
    assert_close(spearman(a, torch.tensor([[2.0, 5.0, 1.0, 9.0]])), torch.tensor([0.8], dtype=torch.float64))


def test_the_choice_is_the_best_by_drawn_images(untrained, tmp_path):
    cfg = CalibrateConfig(host=untrained, limit=3)
    run = Run.start(
        config=cfg, package="hone-sparsevar", verb="calibrate", out=tmp_path / "run", seed=0, device="cpu", quiet=True,
        command="x",
    )  # fmt: skip
    with run:
        report = calibrate(cfg, run)
    choice = json.loads(report.file.read_text())
    assert choice["detector"] == max(range(2), key=choice["rank_correlation"].__getitem__)
    assert len(choice["auroc"]) == 2
    with pytest.raises(ValueError, match="must leave a scale before it"):
        calibrate(CalibrateConfig(host=untrained, start_scale=0), run)


def test_a_pipeline_is_calibrated_on_what_it_draws(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\ncat\n")
    options = {"model": folder, "prompt_file": tmp_path / "prompts.txt", "image": ImageConfig(pixels="0.06M")}
    found = []
    for number, (batch, limit) in enumerate(((1, 64), (2, 64), (1, 1))):
        cfg = CalibrateConfig(batch=batch, limit=limit, **options)
        with Run.start(
            package="hone-sparsevar", verb="calibrate", config=cfg, out=tmp_path / str(number), device="cpu", quiet=True
        ) as run:
            report = calibrate(cfg, run)
        found.append(json.loads(report.file.read_text()))
    assert found[0]["rank_correlation"] == pytest.approx(found[1]["rank_correlation"], abs=2e-3)
    assert (found[0]["images"], found[0]["start_scale"], found[0]["grid"]) == (2, -3, [16, 16])
    assert found[2]["images"] == 1
    assert "auroc" not in found[0]
    assert str(report).count("\n") == 4
    with pytest.raises(ValueError, match="go together"):
        CalibrateConfig(model=folder)
    with pytest.raises(ValueError, match="is for a pipeline"):
        CalibrateConfig(batch=2)


def test_maps_are_of_the_scale_before(untrained, monkeypatch):
    seen = {}

    def correlation(images, changes, grid):
        seen["map"], seen["grid"] = changes[0].shape[1:], grid
        return torch.zeros(1, 2)

    def area(score, mask):
        seen["mask"] = mask
        return auroc(score, mask)

    monkeypatch.setattr("hone_sparsevar.calibrate._correlation", correlation)
    monkeypatch.setattr("hone_sparsevar.calibrate.auroc", area)
    host = load_host(path=untrained)
    image_scores(host, 1, 5, 0)
    assert seen == {"map": SCHEDULE.grids[4], "grid": SCHEDULE.grids[5]}
    mask_scores(host, 2, 5, 3)
    generator = torch.Generator().manual_seed(70_003)
    textured = render(random_labels(2, generator), generator).textured
    # A token is textured where more than a quarter of its pixels are; 12 tokens a side are no whole number of pixels.
    assert torch.equal(seen["mask"], F.adaptive_avg_pool2d(textured[:, None].float(), 12).flatten(1) > 0.25)


def test_drawn_images_choose_where_no_block_is_named(monkeypatch):
    scores = torch.tensor([[0.1, 0.9, float("nan")], [0.5, float("nan"), 0.6], [0.3, 0.2, 0.7]])
    asked = []
    monkeypatch.setattr("hone_sparsevar.calibrate.image_scores", lambda *args: asked.append(args[1:]) or scores)
    free = SparseVARConfig(start_scale=-2)
    assert chosen(None, free, 3).detector == 2
    assert asked == [(3, 5, 9)]
    assert chosen(None, replace(free, detector=0), 3).detector == 0
    assert chosen(None, replace(free, start_scale=7), 3).detector is None
