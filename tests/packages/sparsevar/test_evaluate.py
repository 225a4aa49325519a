import pytest
import torch
from hone_core.runs import Run
from hone_core.testing import assert_close
from hone_sparsevar import calibrate
from hone_sparsevar.config import CalibrateConfig, EvalConfig, InspectConfig
from hone_sparsevar.evaluate import _grades, compare, evaluate, scenes
from hone_sparsevar.host import Host, load_host
from hone_sparsevar.inspection import inspect
from hone_sparsevar.models import variant_of


def start(out, config, verb):
    return Run.start(
        config=config, package="hone-sparsevar", verb=verb, out=out, seed=0, device="cpu", quiet=True, command="x"
    )


def test_variants_run_at_about_equal_tokens_and_rows_hold_them(untrained, tmp_path):
    names = ("dense", "sparse", "early-stop-1", "random", "no-anchors")
    cfg = EvalConfig(host=untrained, variants=names, limit=3, batch=2)
    with start(tmp_path / "run", cfg, "eval") as run:
        report = evaluate(cfg, run)
    tokens = {row.variant: row.value for row in report.rows if row.metric == "tokens"}
    work = {row.variant: row.value for row in report.rows if row.metric == "gflops"}
    assert tokens["dense"] == 1
    assert tokens["sparse"] == tokens["random"] == tokens["no-anchors"] <= tokens["early-stop-1"] < 0.52
    assert work["sparse"] <= work["early-stop-1"]
    assert {row.variant for row in report.rows if row.metric == "psnr"} == set(names) - {"dense"}
    assert "early-stop-1" in str(report)
    assert (run.figures / "frontier.png").stat().st_size > 0


def test_batches_do_not_change_images(untrained):
    host = load_host(path=untrained)
    labels, _ = scenes(3, 0)
    policies = {name: variant_of(name, EvalConfig().settings) for name in ("dense", "sparse")}
    one, three = (compare(host, policies, labels, seed=4, batch=n, quiet=True) for n in (1, 3))
    for name in policies:
        assert_close(one[name].images, three[name].images)
        assert one[name].gflops == pytest.approx(three[name].gflops, rel=0.01)
    # Against itself: nothing differs.
    same = compare(host, {"dense": policies["dense"], "again": policies["dense"]}, labels, seed=4, batch=3, quiet=True)
    assert torch.equal(same["again"].images, same["dense"].images)
    assert same["again"].grades["psnr"].min() == 100


def test_texture_is_looked_for_where_the_dense_image_has_most(untrained):
    image = torch.zeros(1, 3, 64, 64)
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image[..., :32, :32] = (x + y) % 2  # a quarter of it, of which each pixel differs from its four neighbours by 1
    grades = _grades(load_host(path=untrained), image, image, scenes(1, 0)[0], exact=True)
    assert grades["energy_textured"].item() == pytest.approx(16, rel=0.05)
    assert grades["energy_flat"].item() == 0


def test_tokens_are_counted_over_all_batches(untrained):
    """By threshold each batch runs as many as its fullest image."""
    host, (labels, _) = load_host(path=untrained), scenes(3, 0)
    policies = {name: variant_of(name, EvalConfig().settings) for name in ("dense", "threshold")}
    runs = [host.draw(labels[at : at + 1], [4 + at], policy=policies["threshold"]) for at in range(3)]
    counts = [sum(record.kept for record in run.records) for run in runs]
    assert len(set(counts)) > 1
    found = compare(host, policies, labels, seed=4, batch=1, quiet=True)["threshold"]
    assert found.kept == sum(counts) / (3 * runs[0].schedule.total)


@pytest.mark.parametrize("block", [0, 1])
def test_without_a_detector_drawn_images_choose_one(block, untrained, tmp_path, monkeypatch):
    seen, draw = [], Host.draw

    def watched(*args, **options):
        run = draw(*args, **options)
        seen.append(getattr(run.state, "detector", None))
        return run

    monkeypatch.setattr(Host, "draw", watched)
    monkeypatch.setattr(calibrate, "image_scores", lambda *_: torch.eye(2)[block : block + 1])
    for verb, cfg in (
        (evaluate, EvalConfig(host=untrained, variants=("sparse",), limit=2)),
        (inspect, InspectConfig(host=untrained)),
    ):
        with start(tmp_path / verb.__name__, cfg, verb.__name__) as run:
            verb(cfg, run)
    assert seen == [None, block, block]  # dense and sparse of eval, and inspect's


def test_inspect_writes_a_line_per_scale(untrained, tmp_path):
    cfg = InspectConfig(host=untrained)
    with start(tmp_path / "run", cfg, "inspect") as run:
        report = inspect(cfg, run)
    kept = [row.value for row in report.rows if row.metric == "kept"]
    assert kept == [1, 4, 16, 36, 64, 144 - int(0.7 * 135), 256 - int(0.7 * 240)]
    assert report.maps.stat().st_size > 0
    assert CalibrateConfig().start == cfg.settings.start_scale
