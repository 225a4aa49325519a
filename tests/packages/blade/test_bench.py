from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hone_blade import bench as bench_module
from hone_blade.bench import bench
from hone_blade.config import PRESETS, BenchConfig
from hone_blade.meter import Meter
from hone_blade.models import attach
from hone_core.config import Preset
from hone_core.errors import UnsupportedHardwareError
from hone_core.runs import Run, load_results
from hone_core.testing import requires_gpu
from hone_video.architectures import FULL_SIZE
from hone_video.workloads import WORKLOADS

SMALL = {"rounds": 2, "forward_rounds": 2, "steps": 4, "few_steps": 2, "repeats": 2}
KINDS = pytest.mark.parametrize("kind", ["wan", "cogvideox"])


def measure(folder, device="cpu", **options):
    cfg = BenchConfig(**{**SMALL, **options})
    with Run.start(package="hone-blade", verb="bench", config=cfg, out=folder, device=device, quiet=True) as run:
        report = bench(cfg, run)
    return report, load_results(folder)["rows"]


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "cogvideox-5b"])
def test_published_sizes_fit_together_without_allocating(name, monkeypatch):
    """A sparse forward of the real architecture at its real length, cut to one layer, on the meta device."""
    make, config = FULL_SIZE[name]
    monkeypatch.setitem(FULL_SIZE, name, (make, {**config, "num_layers": 1}))
    state = bench_module._Bench(BenchConfig(model=name, dtype="bfloat16"), None, torch.device("meta"), quiet=True)
    state.model = state.build()
    inputs = state.model_inputs()
    assert state.heads() == {"wan2.1-1.3b": (12, 128, 1), "cogvideox-5b": (48, 64, 1)}[name]
    with torch.no_grad(), attach(state.model, state.variants["asa_g"]):
        out = state.model(**inputs, return_dict=False)[0]
    assert out.shape == inputs["hidden_states"].shape
    assert out.dtype == torch.bfloat16


@KINDS
def test_every_part_runs_and_leaves_rows(kind, tmp_path):
    report, rows = measure(tmp_path / "run", model=f"tiny-{kind}")
    assert len(report.rows) == len(rows)
    by = {(row["split"], row["metric"], row["variant"]): row for row in rows if row["split"] != "e2e"}
    times = {key[2]: row["value"] for key, row in by.items() if key[:2] == ("attention", "time")}
    assert times.keys() == {"dense", "asa", "asa_g", "prober", "selection", "pooling", "kernel", "permutation"}
    assert all(value > 0 for value in times.values())
    assert by["attention", "time", "dense"]["labels"]["tokens"] == WORKLOADS[f"tiny-{kind}"].tokens
    # 240 tokens are 7.5 blocks of 32, of which each row keeps its own. CogVideoX's 8 text tokens lie in the last block,
    # which all rows and columns keep.
    pairs = 7 * 32**2 + 16**2 if kind == "wan" else 7 * 32**2 + 24**2 + 2 * 7 * 32 * 24
    tokens = WORKLOADS[f"tiny-{kind}"].tokens
    assert by["attention", "density", "asa_g"]["value"] == pytest.approx(pairs / tokens**2)
    assert by["attention", "pooled", "asa_g"]["value"] == pytest.approx(15 / WORKLOADS[f"tiny-{kind}"].tokens)
    assert {key[2] for key in by if key[0] == "forward"} == {"dense", "asa", "asa_g"}
    loops = [
        (row["variant"], row["labels"]["steps"], row["labels"]["nfe"], row["n"])
        for row in rows
        if row["split"] == "e2e"
    ]
    assert loops == [("dense", 4, 8, 1), ("dense", 4, 4, 1), ("dense", 2, 2, 2), ("asa", 2, 2, 2), ("asa_g", 2, 2, 2)]
    assert all("measured_steps" not in row["labels"] for row in rows)
    assert "asa_g" in str(report)
    assert "seconds" in str(report)


def test_shortened_loops_say_so_and_are_scaled(tmp_path, monkeypatch):
    ran = []

    def video(self, pipe, text, run_steps, guided, few, step_done):
        ran.append((run_steps, guided))
        return 0.5 * run_steps * (2 if guided else 1), None

    monkeypatch.setattr(bench_module._Bench, "video", video)
    monkeypatch.setattr(bench_module, "_check_sparse", lambda name, density: None)  # nothing is drawn
    _, rows = measure(tmp_path / "run", model="tiny-wan", parts=("e2e",), max_steps=3, steps=12, few_steps=3, repeats=1)
    assert [(row["variant"], row["value"], row["labels"].get("measured_steps")) for row in rows] == [
        ("dense", 12.0, 3),
        ("dense", 6.0, 3),
        ("dense", 1.5, None),
        ("asa", 1.5, None),
        ("asa_g", 1.5, None),
    ]
    assert ran.count((3, True)) == 1


def test_loops_are_what_they_say(tmp_path, monkeypatch):
    """Network evaluations, sampler and attention of each loop, counted at the transformer."""
    seen = []
    real = bench_module._Bench.video

    def video(self, pipe, text, run_steps, guided, few, step_done):
        calls = []

        def count(module, args, kwargs):
            calls.append((kwargs["hidden_states"].shape[0], float(kwargs["timestep"][0])))

        hook = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
        result = real(self, pipe, text, run_steps, guided, few, step_done)
        hook.remove()
        if step_done is not None:
            processor = type(self.model.blocks[0].attn1.processor if self.work.kind == "wan" else None).__name__
            seen.append((sum(batch for batch, _ in calls), processor, type(pipe.scheduler).__name__, calls[-1][1]))
        return result

    monkeypatch.setattr(bench_module._Bench, "video", video)
    measure(tmp_path / "run", model="tiny-wan", parts=("e2e",), steps=5, few_steps=2, repeats=1)
    assert [row[:3] for row in seen] == [
        (10, "WanAttnProcessor", "UniPCMultistepScheduler"),
        (5, "WanAttnProcessor", "UniPCMultistepScheduler"),
        (2, "WanAttnProcessor", "TDMScheduler"),
        (2, "WanProcessor", "TDMScheduler"),
        (2, "WanProcessor", "TDMScheduler"),
    ]
    assert [row[3] for row in seen[2:]] == [499, 499, 499]


def test_wrong_attention_is_not_timed(tmp_path, monkeypatch):
    real = bench_module.block_sparse_attention

    def off(q, k, v, layout, *, backend="auto", **options):
        out = real(q, k, v, layout, backend=backend, **options)
        return out if backend == "reference" else 1.05 * out

    monkeypatch.setattr(bench_module, "block_sparse_attention", off)
    with pytest.raises(RuntimeError, match=r"asa attention is wrong on cpu: relative error 5\.00e-02"):
        measure(tmp_path / "run", model="tiny-wan")
    assert load_results(tmp_path / "run")["rows"] == []


def test_videos_that_are_not_finite_are_not_timed(tmp_path, monkeypatch):
    real = bench_module._Bench.build

    def broken(self, device=None):
        model = real(self, device)
        if device is None:
            model.proj_out.weight.data.fill_(torch.nan)
        return model

    monkeypatch.setattr(bench_module._Bench, "build", broken)
    with pytest.raises(RuntimeError, match="latents of 2 steps are not finite"):
        measure(tmp_path / "run", model="tiny-wan", parts=("e2e",))


def test_compiled_blocks(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    _, rows = measure(tmp_path / "run", model="tiny-cogvideox", parts=("forward",), compile_blocks=True)
    assert compiled == [{"fullgraph": True}] * 2
    assert {(row["variant"], row["labels"]["mode"]) for row in rows} == {
        (variant, mode) for variant in ("dense", "asa", "asa_g") for mode in ("eager", "compiled blocks")
    }


def free(monkeypatch, **changes):
    """A preset that leaves the first step, a layer and short sequences dense, and pools nothing."""
    config = replace(PRESETS["tiny"].config, dense_steps=1, dense_layers=(0,), min_tokens=10_000, pool=0)
    preset = Preset(config=replace(config, **changes), model="test", provenance="test")
    monkeypatch.setitem(PRESETS, "free", preset)


def test_what_a_preset_leaves_dense_is_not_timed_as_sparse(tmp_path, monkeypatch):
    seen = []
    real = bench_module.adaptive_sparse_attention

    def spy(q, k, v, *, cfg, **options):
        seen.append(cfg)
        return real(q, k, v, cfg=cfg, **options)

    monkeypatch.setattr(bench_module, "adaptive_sparse_attention", spy)
    monkeypatch.setattr("hone_blade.models.adaptive_sparse_attention", spy)
    free(monkeypatch)
    _, rows = measure(tmp_path / "run", model="tiny-wan", preset="free", parts=("attention", "forward"))
    assert seen
    assert {(cfg.dense_steps, cfg.dense_layers, cfg.min_tokens) for cfg in seen} == {(0, (), 0)}
    assert {cfg.pool for cfg in seen} == {0, 16}  # that of the tiny models' own preset
    left_out = {"dense_layers, dense_steps, min_tokens"}
    for row in rows:
        whole = row["variant"] in ("dense", "permutation")
        assert {row["labels"].get("preset_without")} == ({None} if whole else left_out), row
    density = {row["variant"]: row["value"] for row in rows if row["metric"] == "density"}
    assert density.keys() == {"asa", "asa_g"}
    assert max(density.values()) < 1


def test_dense_steps_in_whole_videos(tmp_path, monkeypatch):
    free(monkeypatch, min_tokens=0)
    _, rows = measure(tmp_path / "run", model="tiny-wan", preset="free", parts=("e2e",), few_steps=3, repeats=1)
    found = {(row["variant"], row["labels"]["steps"]): row["labels"].get("sparse_steps") for row in rows}
    assert found == {("dense", 4): None, ("dense", 3): None, ("asa", 3): 2, ("asa_g", 3): 2}
    with pytest.raises(ValueError, match=r"few_steps must be above the 1 first steps that preset free.*1"):
        BenchConfig(model="tiny-wan", preset="free", few_steps=1)
    with pytest.raises(ValueError, match=r"max_steps must be at least few_steps = 8 with preset free.* got 4"):
        BenchConfig(model="tiny-wan", preset="free", max_steps=4)
    BenchConfig(model="tiny-wan", preset="free", few_steps=1, parts=("attention",))


@pytest.mark.parametrize(
    ("changes", "part"), [({"max_density": 1.0, "min_density": 1.0}, "attention"), ({"min_tokens": 10_000}, "e2e")]
)
def test_a_sparse_variant_that_is_dense_is_not_timed(changes, part, tmp_path, monkeypatch):
    free(monkeypatch, **changes)
    with pytest.raises(ValueError, match="asa must compute a part of the query-key pairs; its density is 1"):
        measure(tmp_path / "run", model="tiny-wan", preset="free", parts=(part,))
    assert not {row["variant"] for row in load_results(tmp_path / "run")["rows"]} & {"asa", "asa_g"}


def test_pooling_of_a_preset_without_it_is_the_models_own():
    pools = {
        model: BenchConfig(model=model, preset="wan2.1-1.3b-free", few_steps=20).variants["asa_g"].pool
        for model in ("wan2.1-1.3b", "cogvideox-5b")
    }
    assert pools == {"wan2.1-1.3b": 30, "cogvideox-5b": 15}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "wan2.1-1.3b-free"}, "few_steps must be above the 12 first steps .* got 8. Take more steps"),
        ({"model": "flux"}, r"model must be one of wan2\.1-1\.3b"),
        ({"preset": "none"}, "no preset 'none'"),
        ({"parts": ()}, "parts must name some of attention, host, forward, e2e"),
        ({"parts": ("all",)}, "parts must name some of"),
        ({"rounds": 0}, "rounds must be at least 1; got 0"),
        ({"steps": 8}, "few_steps must differ from steps"),
        ({"guidance": 1.0}, r"guidance must be above 1, .*; got 1\.0"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**options)


def test_published_sizes_are_not_run_on_a_cpu(tmp_path):
    with pytest.raises(UnsupportedHardwareError, match=r"wan2\.1-1\.3b at its published size needs .* Use tiny-wan or"):
        measure(tmp_path / "run")


def test_there_is_no_host_of_a_cpu(tmp_path):
    with pytest.raises(UnsupportedHardwareError, match="part host is of what a GPU does not wait for"):
        measure(tmp_path / "run", model="tiny-wan", parts=("host",))


@requires_gpu(min_sm=90)
def test_host_time_of_a_layer(tmp_path, record_property):
    """150 us are aimed at; another process may take the core in between."""
    _, rows = measure(tmp_path / "run", "cuda", model="wan2.1-1.3b", parts=("host",), rounds=20)
    found = {row["variant"]: row["value"] for row in rows}
    record_property("host_us", found)
    assert found.keys() == {"dense", "asa", "asa_g"}
    assert found["asa"] < found["asa_g"] < 300


def test_other_dense_kernels_are_compared_and_the_fastest_draws_the_videos(tmp_path, monkeypatch):
    def kernels(spoil):
        def flash(q, k, v):
            return F.scaled_dot_product_attention(q, k, v) + spoil

        return lambda self: {"dense": F.scaled_dot_product_attention, "flash-attn 3 dense": flash}

    def forwards(self, contexts, warmup=1):
        timings = own(self, contexts, warmup)
        return {name: replace(timing, ms_p50=float("flash" not in name)) for name, timing in timings.items()}

    own = bench_module._Bench.forwards
    monkeypatch.setattr(bench_module._Bench, "forwards", forwards)
    monkeypatch.setattr(bench_module._Bench, "dense_kernels", kernels(0))
    for parts in (("attention", "forward", "e2e"), ("e2e",)):
        _, rows = measure(tmp_path / f"right{len(parts)}", model="tiny-wan", parts=parts)
        for part in {"attention", "forward"} & {*parts}:
            variants = {row["variant"] for row in rows if row["split"] == part and row["metric"] == "time"}
            assert variants >= {"dense", "flash-attn 3 dense", "asa", "asa_g"}
        loops = [row["variant"] for row in rows if row["split"] == "e2e" and row["metric"] == "seconds"]
        assert loops == [*["flash-attn 3 dense"] * 3, "asa", "asa_g"]
    monkeypatch.setattr(bench_module._Bench, "dense_kernels", kernels(1))
    with pytest.raises(RuntimeError, match=r"flash-attn 3 dense is wrong on cpu"):
        measure(tmp_path / "wrong", model="tiny-wan", parts=("attention",))


@KINDS
def test_an_update_of_a_distillation_by_part(kind, tmp_path):
    _, rows = measure(tmp_path / "run", model=f"tiny-{kind}", parts=("training",), updates=2, lora_rank=2)
    seconds = {row["variant"]: row["value"] for row in rows if row["metric"] == "seconds"}
    parts = ("rollout", "fake", "optimiser", "student", "teacher")
    assert seconds.keys() == {*parts, "update", "update of the published batch"}
    assert all(value > 0 for value in seconds.values())
    assert seconds["update"] == pytest.approx(sum(seconds[name] for name in parts))
    published = 10 * (seconds["update"] - seconds["optimiser"]) + seconds["optimiser"]
    assert seconds["update of the published batch"] == pytest.approx(published)


def test_sections_inside_others_are_not_counted_twice(monkeypatch):
    now = iter(float(x) for x in (0, 10, 13, 20, 30, 31))
    monkeypatch.setattr("hone_blade.meter.time.perf_counter", lambda: next(now))
    meter = Meter(torch.device("cpu"))
    with meter("outer"), meter("inner"):
        pass
    with meter("outer"):
        pass
    assert meter.seconds == {"inner": 3.0, "outer": 20.0 - 3.0 + 1.0}
    assert not meter.peak


def test_a_pyramid_is_not_timed():
    with pytest.raises(ValueError, match="bench times asa and asa_g"):
        BenchConfig(model="wan2.1-1.3b", preset="wan2.1-1.3b-psa")
