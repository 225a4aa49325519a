import dataclasses
import itertools

import pytest
import torch
from hone_core.testing import assert_close
from hone_fpsattention.calibration import attach_probe, candidate_regimes, gather_errors, search
from hone_fpsattention.config import FPSAttentionConfig, Regime
from hone_fpsattention.models import attach
from hone_fpsattention.schedule import step_regimes
from hone_fpsattention.windows import covers, density
from hone_video.architectures import tiny, tiny_pipeline
from hone_video.handle import LayerStats

BASE = FPSAttentionConfig(tile=(2, 4, 4), block=64, shift=3.0)


# ---- candidates


def test_candidates_of_a_grid_are_all_different_and_end_dense():
    grid, tile = (21, 45, 80), (6, 8, 8)
    found = candidate_regimes(grid, tile)
    densities = [density(grid, tile, regime.window).tiles for regime in found]
    assert densities == sorted(densities)
    assert len(found) == 27
    assert found[0].window == (1, 1, 1)
    assert found[-1].window is None
    assert sum(covers(grid, tile, regime.window) for regime in found) == 1


def test_candidates_of_a_short_axis_are_not_repeated():
    # One tile along time: 1 and 3 are the same.
    found = candidate_regimes((2, 8, 12), (2, 4, 4))
    assert [regime.window for regime in found].count(None) == 1
    assert len(found) == 4  # (1 or all) of 2 tiles, (1 or all) of 3


def test_scales_multiply_candidates_only_where_they_round():
    grid, tile = (4, 8, 8), (2, 4, 4)
    one = candidate_regimes(grid, tile)
    assert len(candidate_regimes(grid, tile, scales=("tile", "tensor"))) == 2 * len(one)
    plain = candidate_regimes(grid, tile, scales=("tile", "tensor"), e4m3=False)
    assert len(plain) == len(one)
    assert not any(regime.e4m3 for regime in plain)


def test_a_window_larger_than_the_grid_is_refused():
    assert candidate_regimes((21, 45, 80), (6, 8, 8), windows=[(5, 7, 11)])[0].window is None
    with pytest.raises(ValueError, match=r"window \(7, 7, 1\) is larger than the grid of \(4, 6, 10\) tiles"):
        candidate_regimes((21, 45, 80), (6, 8, 8), windows=[(7, 7, 1)])


def test_candidates_of_windows_that_are_cut_at_the_border():
    # Of 3 tiles in a row, a window of 3 leaves one out at each end; one of 5 reads them all.
    grid, tile = (2, 4, 12), (2, 4, 4)
    found = candidate_regimes(grid, tile, windows=[(1, 1, 3), (1, 1, 5)], border="cut")
    assert [regime.window for regime in found] == [(1, 1, 3), None]
    assert [regime.window for regime in candidate_regimes(grid, tile, windows=[(1, 1, 3)])] == [None]


# ---- errors


def row(step, layer, stats, call=0, model=0):
    return LayerStats(step, call, model, layer, torch.tensor(stats, dtype=torch.float64))


def test_errors_by_hand():
    # One candidate: products, powers, squared differences, count; two calls of the first step add up.
    rows = [
        row(0, 0, [[3.0, 4.0, 4.0, 2.0, 10.0]]),
        row(0, 0, [[1.0, 5.0, 5.0, 8.0, 10.0]], call=1),
        row(1, 0, [[7.0, 7.0, 7.0, 0.0, 10.0]]),
    ]
    errors = gather_errors(rows)
    assert errors.cosine.shape == (2, 1, 1)
    assert_close(errors.cosine.flatten(), torch.tensor([4 / 9, 1.0]))
    assert_close(errors.mse.flatten(), torch.tensor([10 / 20, 0.0]))
    assert_close(errors.snr_db.flatten()[0], torch.tensor(9 / 10).log10() * 10)
    assert float(errors.snr_db.flatten()[1]) == 200
    assert_close(errors.relative[0, 0], torch.tensor(10 / 9))


def test_what_was_not_recorded_or_is_not_finite_is_named():
    with pytest.raises(ValueError, match="nothing was recorded"):
        gather_errors([])
    good = [[1.0, 1.0, 1.0, 0.0, 1.0]]
    with pytest.raises(ValueError, match="not finite from step 1, layer 0"):
        gather_errors([row(0, 0, good), row(1, 0, [[float("nan")] * 5])])
    with pytest.raises(ValueError, match="a layer was not recorded at some step"):
        gather_errors([row(0, 0, good), row(1, 1, good)])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_the_probe_leaves_the_video_alone_and_measures_each_candidate(kind):
    pipe = tiny_pipeline(kind)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "output_type": "latent"}

    def sample():
        return pipe("a cat", generator=torch.Generator().manual_seed(0), guidance_scale=3.0, **options).frames

    expected = sample()
    candidates = (
        Regime(window=(1, 1, 1), e4m3=False),
        Regime(window=(9, 9, 9), e4m3=False),
        Regime(),
    )
    with attach_probe(pipe, BASE) as handle:
        assert_close(sample(), expected, atol=1e-3)
        with handle.record(candidates=candidates) as rows:
            assert_close(sample(), expected, atol=1e-3)
    assert torch.equal(sample(), expected)
    errors = gather_errors(rows)
    assert errors.snr_db.shape == (3, 1, 3)
    window, everything, rounded = errors.snr_db.mean((0, 1)).tolist()
    assert window < rounded < everything
    assert 20 < rounded < 50
    assert bool((errors.cosine <= 1 + 1e-12).all())


@torch.no_grad()
def test_the_measured_error_is_that_of_attention_itself():
    # With one layer, the first forward of a window's model reads the same queries: its attention differs as measured.
    from hone_fpsattention import calibration

    model = tiny("wan", num_layers=1)
    args = torch.randn(1, 4, 3, 10, 14), torch.tensor([500.0]), torch.randn(1, 8, 32)
    regime = Regime(window=(1, 1, 1), e4m3=False)
    seen = []
    to_out = model.blocks[0].attn1.to_out[0]
    hook = to_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with attach_probe(model, BASE) as handle, handle.record(candidates=(regime,)) as rows:
        model(*args)
    with attach(model, dataclasses.replace(BASE, regimes=(regime,))):
        model(*args)
    hook.remove()
    own, window = (x.double() for x in seen)
    expected = calibration._sums(window, own)
    assert_close(rows[0].stats[0], expected, dtype=torch.float32)


# ---- search


def brute_force(error, densities, budget, regimes):
    steps, count = error.shape
    best = (float("inf"), None)
    for cuts in itertools.combinations(range(1, steps), regimes - 1):
        edges = (0, *cuts, steps)
        for choice in itertools.product(range(count), repeat=regimes):
            pieces = list(zip(choice, itertools.pairwise(edges), strict=True))
            share = sum(densities[c] * (high - low) for c, (low, high) in pieces) / steps
            loss = sum(float(error[low:high, c].sum()) for c, (low, high) in pieces) / steps
            if share <= budget + 1e-12 and loss < best[0]:
                best = (loss, share)
    return best


@pytest.mark.parametrize("regimes", [1, 2, 3])
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.55, 1.0])
def test_search_finds_the_best(regimes, budget):
    candidates = [Regime(window=(w, 1, 1)) for w in (1, 3, 5)] + [Regime()]
    densities = [0.1, 0.3, 0.5, 1.0]
    error = torch.rand(7, 4, dtype=torch.float64) * torch.tensor([4.0, 2.0, 1.0, 0.1])
    found = search(error, candidates, densities, BASE, budget=budget, regimes=regimes)
    loss, _ = brute_force(error, densities, budget, regimes)
    assert found.error == pytest.approx(loss)
    assert found.density <= budget + 1e-12
    # The config that comes out does at each step what was chosen for it.
    steps = step_regimes(found.config, 7)
    assert found.error == pytest.approx(sum(float(error[i, found.choice[r]]) for i, r in enumerate(steps)) / 7)
    assert found.density == pytest.approx(sum(densities[found.choice[r]] for r in steps) / 7)
    assert tuple(candidates[c] for c in found.choice) == found.config.regimes


def test_neighbours_of_one_choice_become_one_regime():
    error = torch.tensor([[0.0, 1.0]]).repeat(6, 1)
    found = search(error, [Regime(), Regime(window=(1, 1, 1))], [1.0, 0.1], BASE, budget=1.0, regimes=3)
    assert found.config.regimes == (Regime(),)
    assert found.config.boundaries == ()


def test_a_sensitive_middle_gets_the_dense_regime():
    # The paper's finding in small: the middle is where the window hurts.
    error = torch.zeros(10, 2)
    error[3:7, 1] = 1.0
    error[:, 1] += 0.01
    found = search(error, [Regime(), Regime(window=(1, 1, 1))], [1.0, 0.1], BASE, budget=0.5, regimes=3)
    assert found.choice == (1, 0, 1)
    assert found.config.boundaries == (0.3, 0.7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0.05}, "no candidate keeps to budget 0.05: the sparsest has density 0.1"),
        ({"budget": 0.0}, r"budget is a mean density in \(0, 1\]; got 0"),
        ({"regimes": 0}, r"regimes must lie in \[1, 4\]"),
        ({"regimes": 5}, r"regimes must lie in \[1, 4\]"),
        ({"densities": [0.1]}, "a regime and a density for each of 2 candidates; got 2 and 1"),
        ({"error": torch.full((4, 2), torch.nan)}, "every candidate's error is infinite or no number"),
    ],
)
def test_bad_searches_are_named(change, message):
    values = {"error": torch.rand(4, 2), "densities": [0.1, 1.0], "budget": 0.5, "regimes": 2, **change}
    with pytest.raises(ValueError, match=message):
        search(
            values["error"],
            [Regime(window=(1, 1, 1)), Regime()],
            values["densities"],
            BASE,
            budget=values["budget"],
            regimes=values["regimes"],
        )
