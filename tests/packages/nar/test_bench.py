import pytest
import torch
from hone_core.errors import UnsupportedHardwareError
from hone_nar.bench import bench, check_draws, weight_bytes
from hone_nar.checkpoints import build
from hone_nar.config import BenchConfig
from hone_nar.models import tiny
from hone_nar.release_loop import ReleaseLoop


@pytest.mark.parametrize(("kind", "grid"), [("nar", (6, 6)), ("nar", (3, 5)), ("nar", (5, 2)), ("llamagen", (3, 4))])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_releases_loop_gives_the_teacher_forced_logits(kind, grid, guidance):
    model = tiny(kind, grid=grid)
    labels = torch.tensor([1, 5])
    tokens = torch.randint(32, (2, model.tokens), generator=torch.Generator().manual_seed(0))
    _, found = ReleaseLoop(model, guidance)(labels, forced=tokens)
    with torch.no_grad():
        wanted = model(tokens, labels).logits
        if guidance != 1:
            without = model(tokens, labels, drop=torch.ones(2, dtype=torch.bool)).logits
            wanted = without + guidance * (wanted - without)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    drawn, none = ReleaseLoop(model, guidance)(labels)
    assert none is None
    assert drawn.shape == tokens.shape
    assert len(drawn.unique()) > 3


@pytest.mark.parametrize("kind", ["text", "raster text", "video"])
def test_the_releases_loop_draws_texts_and_clips(kind):
    options = {} if kind == "video" else {"num_classes": None, "cls_token_num": 5, "caption_dim": 24, "grid": (3, 4)}
    model = tiny({"text": "nar", "raster text": "llamagen", "video": "video"}[kind], **options)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(32, (2, model.tokens), generator=generator)
    words = torch.tensor([[False, False, True, True, True], [True] * 5])
    given = {"labels": torch.tensor([1, 5])}
    if kind != "video":
        given = {"text": torch.randn(2, 5, 24, generator=generator) * words[..., None], "words": words}
    _, found = ReleaseLoop(model, 3.0)(**given, forced=tokens)
    with torch.no_grad():
        without = model(tokens, **given, drop=torch.ones(2, dtype=torch.bool)).logits
        wanted = without + 3.0 * (model(tokens, **given).logits - without)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_the_tiny_model_is_timed_on_a_cpu(start, tmp_path):
    cfg = BenchConfig(rounds=1, warmup=0, batches=(1, 2), bandwidth=3.0)
    with start(cfg, "bench", tmp_path / "run") as run:
        report = bench(cfg, run)
    times = {(row.labels["batch"], row.variant) for row in report.rows if row.metric == "time"}
    variants = ("release", "eager", "raster-release", "raster-eager")
    assert times == {(batch, variant) for batch in (1, 2) for variant in variants}
    passes = {row.variant: row.value for row in report.rows if row.metric == "passes"}
    assert passes == {"nar": 11, "raster": 36}
    assert "x release, weights alone" in str(report)


def test_draws_are_checked_by_their_uniforms():
    logits = torch.tensor([[[2.0, 1.0, 1.0], [1.0, 2.0, 1.0]]]).log()
    uniform = torch.tensor([[0.49, 0.76]])
    assert check_draws("x", torch.tensor([[0, 2]]), logits, uniform, tolerance=1e-6) == 0
    assert check_draws("x", torch.tensor([[1, 2]]), logits, uniform, tolerance=0.1) == pytest.approx(0.01)
    with pytest.raises(RuntimeError, match=r"a uniform lies 1\.00e-02 outside of its code's share"):
        check_draws("x", torch.tensor([[0, 1]]), logits, uniform, tolerance=1e-3)


def test_the_floor_counts_what_every_pass_reads():
    model = build("nar_b")
    looked_up = 16384 * 768 + 1001 * 768
    assert weight_bytes(model) == 4 * (130_551_552 - looked_up)


def test_what_a_cpu_cannot_time_is_refused(start, tmp_path):
    wrong = (BenchConfig(models=("nar_l",)), BenchConfig(graphs=True), BenchConfig(modes=("fused",)))
    for at, cfg in enumerate(wrong):
        with start(cfg, "bench", tmp_path / str(at)) as run, pytest.raises(UnsupportedHardwareError):
            bench(cfg, run)
    cfg = BenchConfig(models=("nar_s",))
    with start(cfg, "bench", tmp_path / "x") as run, pytest.raises(ValueError, match="model must be of tiny, nar_b"):
        bench(cfg, run)
