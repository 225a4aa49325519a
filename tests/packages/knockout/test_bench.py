import pytest
import torch
from hone_core.runs import Run
from hone_core.testing import requires_gpu
from hone_knockout import bench as module
from hone_knockout.bench import BenchReport, bench, bound, check_kernel, layout_of, variants
from hone_knockout.config import BenchConfig
from hone_knockout.flops import WORKLOADS
from hone_knockout.prompts import Prompt
from hone_lm.layouts import find_layouts


def start(cfg, folder):
    return Run.start(package="hone-knockout", verb="bench", config=cfg, out=folder / "run", device="cpu", quiet=True)


def test_tiny(tmp_path):
    cfg = BenchConfig(model="tiny", frames=(8,), rounds=1, decode_tokens=2)
    with Run.start(
        package="hone-knockout", verb="bench", config=cfg, out=tmp_path / "run", device="cpu", quiet=True
    ) as run:
        report = bench(cfg, run)
    rows = {(row.metric, row.variant): row.value for row in run.rows}
    assert {name for metric, name in rows if metric == "prefill"} == set(variants(WORKLOADS["tiny"]))
    assert rows["flop_bound", "exit + window"] > rows["flop_bound", "exit"] > 1
    assert rows["decode", "exit"] > 0
    assert "exit + window" in str(report)
    assert str(BenchReport.of(run)) == str(report)


def test_what_starts_a_prefill_is_timed(tmp_path, monkeypatch):
    """Layout and masks are made in every timed prefill of a variant; the baseline has nothing attached.

    By this clock nothing else takes any time.
    """
    clock, calls = [0.0], []
    take_up, find = Prompt.of, module.find_layouts

    def slowly(*args):
        calls.append("start")
        clock[0] += 0.002
        return take_up(*args)

    def find_slowly(*args, **more):
        calls.append("find")
        clock[0] += 0.001
        return find(*args, **more)

    monkeypatch.setattr(Prompt, "of", slowly)
    monkeypatch.setattr(module, "find_layouts", find_slowly)
    monkeypatch.setattr(module, "check", lambda *args: None)
    monkeypatch.setattr(module, "_decode_rate", lambda *args: 1.0)
    monkeypatch.setattr("hone_core.timing.time.perf_counter", lambda: clock[0])
    cfg = BenchConfig(model="tiny", frames=(8,), rounds=2)
    with start(cfg, tmp_path) as run:
        bench(cfg, run)
    prefill = {row.variant: row.value for row in run.rows if row.metric == "prefill"}
    assert prefill.pop("baseline") == 0
    assert list(prefill.values()) == pytest.approx([3.0] * 3)
    # In each round a warm-up, a timed one and that of the decode steps, for each of three variants.
    assert calls == ["find", "start"] * 18


def test_layout_that_is_timed_is_that_of_the_workload():
    from hone_knockout.bench import _token_ids, build

    work, device = WORKLOADS["tiny"], torch.device("cpu")
    layout = layout_of(work, 8)
    model = build(BenchConfig(model="tiny"), device, torch.float32)
    inputs = {"input_ids": _token_ids(layout, work, device)}
    (found,) = find_layouts(model, inputs, tokens_per_frame=work.tokens_per_frame)
    assert torch.equal(found.frame, layout.frame)


@pytest.mark.parametrize("frames", [8, 32, 64])
def test_bounds_at_real_sizes(frames):
    work = WORKLOADS["llava-onevision-7b"]
    plans = variants(work)
    base = bound(work, frames, plans["baseline"]).total
    # 1629, 6333 and 12605 tokens: what the exit leaves is 65.6, 64.6 and 64.4 %.
    assert len(layout_of(work, frames).frame) == frames * 196 + 61
    expected = {8: 65.6, 32: 64.6, 64: 64.4}[frames]
    assert 100 * bound(work, frames, plans["exit"]).total / base == pytest.approx(expected, abs=0.1)


def test_qwen_fuses_two_frames():
    layout = layout_of(WORKLOADS["qwen2.5-vl-7b"], 8)
    assert layout.num_frames == 4
    assert layout.tokens_per_frame == (196,) * 4


@pytest.mark.parametrize("place", ["models", "bench"])
def test_no_time_on_wrong_values(tmp_path, monkeypatch, place):
    cfg = BenchConfig(model="tiny", frames=(8,), rounds=1)
    monkeypatch.setattr(
        f"hone_knockout.{place}.frame_local_attention", lambda q, k, v, where, scale=None: v.repeat_interleave(2, 1)
    )
    with (
        pytest.raises(RuntimeError, match="No time is reported"),
        Run.start(
            package="hone-knockout", verb="bench", config=cfg, out=tmp_path / "run", device="cpu", quiet=True
        ) as run,
    ):
        bench(cfg, run)
    assert run.rows == []


def test_bad_settings():
    with pytest.raises(ValueError, match="multiples of 2"):
        BenchConfig(model="qwen2.5-vl-7b", frames=(7,))
    with pytest.raises(ValueError, match="model must be one of"):
        BenchConfig(model="llava")
    with pytest.raises(ValueError, match="rounds must be positive"):
        BenchConfig(rounds=0)


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("arch", ["llava-onevision-7b", "qwen2.5-vl-7b"])
def test_kernel_on_a_gpu(arch):
    check_kernel(WORKLOADS[arch], torch.device("cuda"), torch.bfloat16)
