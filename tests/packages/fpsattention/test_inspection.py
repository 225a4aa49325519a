"""What ``inspect`` says of the attention, on a tiny untrained host."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hone_core.runs import Run
from hone_fpsattention.config import PRESETS, InspectConfig, Regime
from hone_fpsattention.inspection import inspect, inspect_model
from hone_fpsattention.models import _FPSAttention, attach
from hone_fpsattention.windows import density
from hone_video.host import load_host

TILES = replace(PRESETS["tiny"].config.constant(Regime(window=(1, 1, 1))), tile=(4, 4, 4))
GRID = (4, 8, 8)


def measured(config, q, k, v, **options):
    return _FPSAttention(config).measure(q, k, v, plan=0, layer=0, grid=GRID, text_tokens=0, **options)


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 2, 256, 32, generator=generator).unbind(0)


def test_the_window_alone_is_exact_attention_within_tiles(qkv):
    q, k, v = qkv
    out, stats = measured(replace(TILES, regimes=(Regime(window=(1, 1, 1), e4m3=False),)), q, k, v)
    own = F.scaled_dot_product_attention(q, k, v)
    # In tile order each run of 64 tokens is a tile, which reads itself.
    parts = (x.unflatten(2, (4, 64)) for x in (q, k, v))
    alone = F.scaled_dot_product_attention(*parts).flatten(2, 3)
    torch.testing.assert_close(out, alone)
    density_, rounding, window, both = stats.tolist()
    assert density_ == density(GRID, (4, 4, 4), (1, 1, 1)).tokens == 0.25
    assert rounding < 1e-6
    assert window == pytest.approx(float((alone - own).norm() / own.norm()), rel=1e-5)
    assert both == window


def test_rounding_alone_does_not_hang_on_the_window_and_what_ran_is_returned(qkv):
    kept = [x.clone() for x in qkv]
    out, stats = measured(TILES, *qkv)
    assert all(torch.equal(a, b) for a, b in zip(qkv, kept, strict=True))
    whole_stats = measured(TILES.constant(Regime()), *qkv)[1]
    assert stats[1] == whole_stats[1] == whole_stats[3]
    assert 0.01 < float(stats[1]) < 0.2
    assert float(whole_stats[2]) < 1e-6
    assert float(whole_stats[0]) == 1
    attended = _FPSAttention(TILES).attend(*kept, plan=0, layer=0, grid=GRID, text_tokens=0)
    assert torch.equal(out, attended)
    own = F.scaled_dot_product_attention(*qkv)
    assert float(stats[3]) == pytest.approx(float((out - own).norm() / own.norm()), rel=1e-5)
    with pytest.raises(ValueError, match="in one regime"):
        _FPSAttention(TILES).measure(*qkv, plan=(0, 1), layer=0, grid=GRID, text_tokens=0)


def test_every_call_has_a_row_and_recording_changes_nothing(tiny_host, tmp_path):
    cfg = InspectConfig(host=tiny_host)
    with Run.start(package="hone-fpsattention", verb="inspect", config=cfg, out=tmp_path / "run", device="cpu") as run:
        report = inspect(cfg, run)
    rows = json.loads(report.inspection.read_text())
    assert [(row["step"], row["layer"]) for row in rows] == [(0, 0), (1, 0)]
    assert all(0 < row["rounding_error"] < 0.3 and row["window_error"] < row["error"] + 0.1 for row in rows)
    assert report.figure.is_file()
    assert len(report.rows) == 4 * (2 + 1)
    text = str(report)
    assert "step 1" in text
    assert "layer 0" in text
    host = load_host(path=tiny_host)
    prompt, noise = host.encode_prompt("a red 7 moving left, slow"), host.noise(1, 0)
    with attach(host.transformer, PRESETS["tiny"].config) as handle:
        plain = host.sample(prompt, noise)
        with handle.record():
            assert torch.equal(host.sample(prompt, noise), plain)


def test_a_model_that_did_not_run_is_refused(tiny_host, tmp_path):
    host, cfg = load_host(path=tiny_host), InspectConfig(host=tiny_host)
    with (
        pytest.raises(ValueError, match="no attention of the method ran"),
        Run.start(package="hone-fpsattention", verb="inspect", config=cfg, out=tmp_path / "run", device="cpu") as run,
        attach(host.transformer, "tiny") as handle,
    ):
        inspect_model(handle, lambda: None, run)


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a schedule is for a pipeline"):
        InspectConfig(schedule=tmp_path)
    with pytest.raises(ValueError, match="drop host and preset, or tuned"):
        InspectConfig(tuned=tmp_path, preset="tiny")
