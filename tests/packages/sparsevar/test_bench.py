from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hone_core.errors import UnsupportedHardwareError
from hone_core.runs import Run
from hone_core.testing import requires_gpu
from hone_sparsevar.bench import ScaleGraphs, _Bench, bench, without_blocks
from hone_sparsevar.config import BenchConfig, SparseVARConfig
from hone_sparsevar.flops import gflops, scale_gflops
from hone_sparsevar.models import SparsePolicy, tiny
from hone_visual_ar import Policy, Sampling, generate
from hone_visual_ar.checkpoints import build
from hone_visual_ar.generation import Generation, ScaleRecord
from hone_visual_ar.schedules import infinity_schedule


def start(out, cfg):
    return Run.start(
        config=cfg, package="hone-sparsevar", verb="bench", out=out, seed=0, device="cpu", quiet=True, command="x"
    )


def test_the_tiny_model_is_timed_on_a_cpu(tmp_path):
    cfg = BenchConfig(rounds=1, warmup=0, settings=SparseVARConfig(start_scale=-2))
    with start(tmp_path / "run", cfg) as run:
        report = bench(cfg, run)
    times = {row.variant for row in report.rows if row.metric == "time"}
    assert times == {"dense", "sparse", "early-stop-1", "early-stop-2", "early-stop-3"}
    assert "x dense, 1.00 of 1.00 by work" in str(report)
    cache = {row.variant: row.value for row in report.rows if row.metric == "cache"}
    assert cache["early-stop-2"] < cache["sparse"] < cache["early-stop-1"] == cache["dense"]
    model, tokenizer, schedule = tiny()
    dense = generate(model, tokenizer, model.condition(torch.randn(1, 16, 128), [16], guided=True), schedule, seeds=[0])
    work = {row.variant: row.value for row in report.rows if row.metric == "gflops"}
    assert work["dense"] == pytest.approx(gflops(dense.records, model, 16))


def test_a_run_without_its_blocks_goes_through_every_policy():
    model, tokenizer, schedule = tiny()
    condition = model.condition(torch.randn(1, 6, 128), [6])
    maps = {k: torch.rand(grid) for k, grid in enumerate(schedule.grids)}
    for policy in (Policy(), SparsePolicy(SparseVARConfig(start_scale=-2), maps=maps)):
        with without_blocks(model):
            run = generate(model, tokenizer, condition, schedule, seeds=[0], policy=policy)
        assert len(run.indices) == len(schedule)
        assert run.cache.lengths == [0, 0]
        assert "run_blocks" not in vars(model)


class Graph:
    """In place of a CUDA graph: what is captured runs, and a replay does nothing."""

    made = 0

    def __init__(self):
        Graph.made += 1

    def pool(self):
        return "pool"

    def replay(self):
        pass


def test_graphs_of_every_variant_are_timed_and_rows_stored_as_they_come(tmp_path, monkeypatch):
    """All that a GPU would do, with captures that run: each scale that a variant has, and none else."""

    def capture(graph, pool=None):
        return nullcontext()

    class Stream:
        def wait_stream(self, other):
            pass

    fakes = {"Stream": Stream, "current_stream": Stream, "stream": lambda _: nullcontext(), "graph": capture}
    fakes |= {"CUDAGraph": Graph, "max_memory_allocated": lambda: 1 << 20, "empty_cache": lambda: None}
    fakes |= {"reset_peak_memory_stats": lambda: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    saved, save = [], Run.save

    def count(run):
        save(run)
        saved.append({row["variant"] for row in run.results()["rows"]})

    monkeypatch.setattr(Run, "save", count)
    monkeypatch.setattr(Graph, "made", 0)
    cfg = BenchConfig(
        rounds=1, warmup=0, batch=2, modes=("graphs",), stops=(1, 2), settings=SparseVARConfig(start_scale=-2)
    )
    with start(tmp_path / "run", cfg) as run, torch.no_grad():
        _Bench(cfg, run, torch.device("cpu")).all()
    assert Graph.made == 2 * (5 + 5 + 4 + 3)
    variants = ["dense", "sparse", "early-stop-1", "early-stop-2", "tokenizer"]
    assert saved == [set(variants[: count + 1]) for count in range(5)]
    scales = {(row.variant, row.split) for row in run.rows if row.metric == "scale_time"}
    assert {sum(name == variant for name, _ in scales) for variant in variants[:4]} == {5, 4, 3}
    assert [row.variant for row in run.rows if row.metric == "outside_blocks"] == variants[:4]
    assert [row.value for row in run.rows if row.metric == "peak_memory"] == [2**-10] * 4


def test_what_a_cpu_cannot_time_is_refused(tmp_path):
    for cfg in (BenchConfig(model="infinity_2b"), BenchConfig(modes=("graphs",))):
        with start(tmp_path / cfg.model / cfg.modes[0], cfg) as run, pytest.raises(UnsupportedHardwareError):
            bench(cfg, run)
    with start(tmp_path / "x", BenchConfig()) as run, pytest.raises(ValueError, match="model must be tiny or one of"):
        bench(BenchConfig(model="infinity_3b"), run)


@requires_gpu(min_sm=80)
def test_an_image_by_graphs_equals_an_eager_one_at_every_replay():
    transformer, tokenizer, schedule = tiny()
    transformer, tokenizer = transformer.cuda(), tokenizer.cuda()
    # 16 MB of latents: a block of its own, which the driver gets back where nothing holds it.
    seeds = range(1 << 14)
    with torch.no_grad():
        condition = transformer.condition(
            torch.randn(1, 6, 128, device="cuda").expand(len(seeds), -1, -1), [6] * len(seeds)
        )
        start = partial(
            Generation.start, transformer, tokenizer, condition, schedule, seeds=seeds, sampling=Sampling(guidance=3.0)
        )
        graphs = ScaleGraphs(start, Policy())
        plain = generate(transformer, tokenizer, condition, schedule, seeds=seeds, sampling=Sampling(guidance=3.0))
        for _ in range(2):
            torch.cuda.empty_cache()
            torch.testing.assert_close(graphs(), plain.latent)


def records(keep=lambda scale, tokens: tokens):
    schedule, found, cached = infinity_schedule("1M"), [], 0
    for scale in range(len(schedule)):
        tokens = schedule.tokens(scale)
        kept = keep(scale, tokens)
        found.append(ScaleRecord(scale=scale, tokens=tokens, kept=kept, rows=2, keys=cached + kept))
        cached += kept
    return found


def test_work_of_infinity_2b_as_in_the_published_shapes():
    """57.7 TFLOP of one row: 28 C^2 and 4 C per key, and cross-attention, of each token and block."""
    model = build("infinity_2b")
    dense = gflops(records(), model) / 2
    per_token = 32 * (28 * 2048**2)
    linear = sum(r.kept for r in records()) * per_token
    attention = sum(32 * 4 * 2048 * r.kept * r.keys for r in records())
    head = 10521 * 2 * 2048 * 64
    assert dense == pytest.approx(1e-9 * (linear + attention + head))
    assert 57_000 < dense < 58_000
    # 60 % of the last three scales with an anchor in 16: 2.04 times less, by the method's own count.
    sparse = gflops(records(lambda k, n: n if k < 10 else n - int(0.6 * n * 15 / 16)), model) / 2
    assert dense / sparse == pytest.approx(2.04, abs=0.02)


def test_records_of_a_run_are_counted(model):
    transformer, tokenizer, condition, schedule = model
    sparse = SparsePolicy(SparseVARConfig(ratio=0.5, window=3, start_scale=-1))
    runs = [
        generate(transformer, tokenizer, condition, schedule, seeds=[0, 1], policy=policy)
        for policy in (Policy(), sparse)
    ]
    dense, less = (gflops(run.records, transformer) for run in runs)
    assert less < dense
    last = scale_gflops(runs[0].records[-1], transformer)
    # Two rows of 90 tokens, three blocks of width 64: two products over each word that is read.
    assert scale_gflops(runs[0].records[-1], transformer, 10) - last == pytest.approx(1e-9 * 2 * 90 * 3 * 4 * 64 * 10)
    assert dense - last == pytest.approx(sum(scale_gflops(r, transformer) for r in runs[0].records[:-1]))
