from dataclasses import replace

import pytest
import torch
from hone_core.testing import assert_close
from hone_sparsevar import SparsePolicy, SparseVARConfig, attach, tiny
from hone_sparsevar.config import VARIANTS
from hone_sparsevar.method import anchor_of, kept_count, resize_map
from hone_sparsevar.models import fit, variant_of
from hone_visual_ar import VAR, VQVAE, Policy, Sampling, generate
from hone_visual_ar.transformer import scale_mask

SAMPLING = Sampling(guidance=2.0, top_p=0.97)
SPARSE = SparseVARConfig(ratio=0.6, window=3, start_scale=-3, detector=1)


def draw(model, policy, **options):
    transformer, tokenizer, condition, schedule = model
    options = {"seeds": [3, 4], "sampling": SAMPLING} | options
    return generate(transformer, tokenizer, condition, schedule, policy=policy, **options)


def draw_of(model, condition, seeds, policy):
    return generate(model[0], model[1], condition, model[3], seeds=seeds, sampling=SAMPLING, policy=policy)


@pytest.mark.parametrize("fill", ["anchor", "anchor_code", "bilinear", "expected", "expected_bilinear", "prev", "zero"])
@pytest.mark.parametrize("kv", ["drop", "fill"])
def test_a_ratio_of_zero_is_dense_bit_for_bit(fill, kv, model):
    dense = draw(model, Policy())
    sparse = draw(model, SparsePolicy(replace(SPARSE, ratio=0.0, fill=fill, kv=kv)))
    assert torch.equal(dense.latent, sparse.latent)
    assert torch.equal(dense.image(), sparse.image())


def test_a_start_past_the_last_scale_is_dense(model):
    dense = draw(model, Policy())
    assert torch.equal(draw(model, SparsePolicy(replace(SPARSE, start_scale=5))).latent, dense.latent)


def test_given_maps_are_followed_and_the_measured_ones_go_on(model):
    schedule = model[3]
    maps = {scale: torch.arange(schedule.tokens(scale)).float().view(grid) for scale, grid in enumerate(schedule.grids)}
    given = draw(model, SparsePolicy(SPARSE, maps=maps))
    kept = given.state.kept[2][0]
    assert kept[-1] == 19
    assert torch.equal(given.state.scores[4][1], maps[4])
    assert given.state.map.shape == (2, 10, 9)
    assert not torch.equal(given.state.map[0], maps[4])


@pytest.mark.parametrize("change", [{}, {"kv": "fill", "metric": "rel"}, {"fill": "bilinear"}, {"score": "random"}])
@pytest.mark.parametrize("top_p", [0.0, 0.8])
def test_fused_kernels_draw_what_the_models_own_operations_do(change, top_p, model):
    settings = replace(SPARSE, **change)
    options = {"sampling": replace(SAMPLING, top_p=top_p, temperature=0.7)}
    plain = draw(model, SparsePolicy(settings), **options)
    fused = draw(model, SparsePolicy(replace(settings, backend="reference")), **options)
    assert_close(fused.latent, plain.latent)
    assert fused.records == plain.records
    assert all(torch.equal(fused.state.kept[scale], kept) for scale, kept in plain.state.kept.items())
    if settings.score == "map":
        assert_close(fused.state.map, plain.state.map)
    assert [i.shape for i in fused.indices] == [i.shape for i in plain.indices]


def test_fused_kernels_without_guidance_and_of_the_likeliest_bits(model):
    single = model[2].conditional()
    for sampling in (replace(SAMPLING, guidance=1.0), Sampling(greedy=True), Sampling(top_k=1)):
        plain, fused = (
            generate(
                model[0], model[1], single, model[3], seeds=[3, 4], sampling=sampling,
                policy=SparsePolicy(replace(SPARSE, backend=backend)),
            )
            for backend in ("torch", "reference")
        )  # fmt: skip
        assert_close(fused.latent, plain.latent)


class Keep(SparsePolicy):
    """SparseVAR that keeps its logits at kept positions and the latents that scales were read from."""

    def begin(self, run):
        self.hidden, self.inputs = {}, []
        return super().begin(run)

    def scale(self, run, scale, state):
        if scale:
            self.inputs.append(run.read(scale))
        logits = run.model.logits
        kept = []
        run.model.logits = lambda hidden, condition: kept.append(logits(hidden, condition)) or kept[-1]
        try:
            return super().scale(run, scale, state)
        finally:
            run.model.logits = logits
            self.hidden[scale] = kept[0]


@pytest.mark.parametrize("kv", ["drop", "fill"])
def test_kept_positions_equal_dense_attention_that_cannot_see_the_others(kv, model):
    """The strongest test of the sparse path: rotary rows, cache and gathers."""
    transformer, _, condition, schedule = model
    policy = Keep(replace(SPARSE, kv=kv))
    run = draw(model, policy)
    inputs = torch.cat(policy.inputs, 1)
    start = len(schedule) - 3
    for image in range(2):
        seen = torch.ones(schedule.total, dtype=torch.bool)
        for scale, kept in run.state.kept.items():
            begin = schedule.start(scale)
            seen[begin : begin + schedule.tokens(scale)] = False
            seen[begin + kept[image]] = True
        if kv == "drop":
            with torch.no_grad():
                dense = transformer(condition, torch.cat([inputs, inputs]), schedule, mask=seen)
        else:
            dense = _filled(model, inputs, run, image, seen)
        for scale in range(len(schedule)):
            begin, row = schedule.start(scale), torch.arange(schedule.tokens(scale))
            where = run.state.kept[scale][image] if scale >= start else row
            for half in (0, 2):
                assert_close(policy.hidden[scale][image + half], dense[image + half, begin + where])


def _filled(model, inputs, run, image, seen):
    """Dense forward in which excluded positions have their anchor's keys and values, block by block."""
    from hone_visual_ar.layers import AttentionContext

    transformer, _, condition, schedule = model
    source = torch.arange(schedule.total)
    for scale in run.state.kept:
        begin, count = schedule.start(scale), schedule.tokens(scale)
        anchors = begin + anchor_of(schedule.grids[scale], 3)
        here = seen[begin : begin + count]
        source[begin : begin + count] = torch.where(here, source[begin : begin + count], anchors)
    both = torch.cat([inputs, inputs])
    parts = [transformer.begin(condition, schedule)]
    for scale in range(1, len(schedule)):
        begin = schedule.start(scale) - 1
        parts.append(transformer.embed(both[:, begin : begin + schedule.tokens(scale)], scale, schedule))
    x = torch.cat(parts, 1)
    table = transformer.rope(schedule)
    context = AttentionContext(rope=table, rope_k=table, spread=source.expand(4, -1), mask=scale_mask(schedule, "cpu"))
    with torch.no_grad():
        return transformer.logits(transformer.run_blocks(x, condition, context), condition)


def test_kept_tokens_have_the_draws_of_dense(model):
    """With logits that do not depend on what ran, kept positions come out as dense ones."""
    schedule = model[3]
    dense = draw(model, Policy())
    sparse = draw(model, SparsePolicy(replace(SPARSE, start_scale=-1)))
    kept, scale = sparse.state.kept[4], len(schedule) - 1
    assert sparse.records[-1].kept == kept.shape[1] < schedule.tokens(scale)
    same = (sparse.indices[-1] == dense.indices[-1]).float().mean(-1)
    assert same.gather(1, kept).mean() > 0.9


def test_the_map_is_the_conditional_rows_change_at_the_scale_before(model):
    seen = {}

    class Watch(Policy):
        def scale(self, run, scale, state):
            hidden = run.run(run.embed(scale), scale, observe=lambda n, a, b: seen.update({(scale, n): (a, b)}))
            return run.codes(run.logits(hidden, scale), scale)

    draw(model, Watch())
    sparse = draw(model, SparsePolicy(replace(SPARSE, start_scale=-1)))
    before, after = seen[3, 1]
    change = (after - before)[:2].square().mean(-1).unflatten(1, (7, 6))
    assert_close(sparse.state.scores[4], resize_map(change, (10, 9)))
    inverse = draw(model, SparsePolicy(replace(SPARSE, start_scale=-1, score="inverse")))
    assert_close(inverse.state.scores[4], -sparse.state.scores[4])


def test_what_ran_of_a_sparse_scale_is_measured_again_and_the_rest_stays(model, monkeypatch):
    """Scores of a scale: the map before it, with what ran there in its place, brought up."""
    first, again = torch.rand(2, 6), iter((7.0, 8.0, 9.0))
    monkeypatch.setattr(
        "hone_sparsevar.models.change_map",
        lambda before, *_: first if before.shape[1] == 6 else torch.full(before.shape[:2], next(again)),
    )
    state, grids = draw(model, SparsePolicy(SPARSE)).state, model[3].grids
    want = resize_map(first.view(2, 3, 2), grids[2])
    for scale, measured in ((2, 7.0), (3, 8.0)):
        assert torch.equal(state.scores[scale], want)
        ran = want.flatten(1).scatter(1, state.kept[scale], measured).view(want.shape)
        want = resize_map(ran, grids[scale + 1])
    assert torch.equal(state.scores[4], want)


def test_prev_keeps_the_features_of_the_scale_before_where_nothing_ran(model):
    """By area: a position takes the mean of the cells that it covers."""
    transformer, seen = model[0], []
    policy = SparsePolicy(replace(SPARSE, start_scale=-1, fill="prev"))
    logits = transformer.logits
    transformer.logits = lambda hidden, condition: seen.append(hidden) or logits(hidden, condition)
    try:
        run = draw(model, policy)
    finally:
        del transformer.logits
    (old_h, old_w), (height, width) = model[3].grids[3:]
    old = seen[3].view(4, old_h, old_w, -1)
    for row in range(4):
        kept = set(run.state.kept[4][row % 2].tolist())
        for y in range(height):
            for x in range(width):
                tall = slice(y * old_h // height, -(-(y + 1) * old_h // height))
                wide = slice(x * old_w // width, -(-(x + 1) * old_w // width))
                mean = old[row, tall, wide].mean((0, 1))
                assert torch.allclose(seen[4][row, y * width + x], mean, atol=1e-5) != (y * width + x in kept)


def test_the_middle_block_is_the_detector_unless_said(model):
    assert fit(SparseVARConfig(start_scale=-2), 32, model[3]) == (3, 16)


def test_variants_without_anchors_keep_as_many(model):
    settings = replace(SPARSE, window=3)
    other = variant_of("no-anchors", settings).config
    assert kept_count((9, 9), other.window, other.ratio) == kept_count((9, 9), 3, 0.6) == 38


def test_controls_score_what_they_say(model):
    seen = {}

    class Catch(SparsePolicy):
        def scale(self, run, scale, state):
            seen[scale] = run.embed(scale)
            return super().scale(run, scale, state)

    far = draw(model, Catch(replace(SPARSE, score="distance")))
    tokens = seen[2][:2]
    away = torch.stack([(row - row.mean(0)).square().sum(1) for row in tokens])
    assert_close(far.state.scores[2].flatten(1), away)
    # Chance is an image's own and the settings': it does not come from the company, and is none of the draws.
    scores = {
        (seeds, own): draw(model, SparsePolicy(replace(SPARSE, score="random", seed=own)), seeds=list(seeds)).state
        for seeds in ((3, 4), (5, 4))
        for own in (0, 1)
    }
    first = scores[(3, 4), 0].scores[4]
    assert torch.equal(first[1], scores[(5, 4), 0].scores[4][1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, scores[(3, 4), 1].scores[4])
    drawn = draw(model, SparsePolicy(replace(SPARSE, score="random"))).uniform.flatten()
    assert not torch.isin(scores[(3, 4), 0].scores[2].flatten(), drawn).any()


def test_the_cache_has_room_for_what_runs_and_for_no_more(model):
    for name in ("dense", "sparse", "early-stop-2"):
        cache = draw(model, variant_of(name, SPARSE)).cache
        assert cache.lengths == [cache.capacity] * 3, name
    assert draw(model, variant_of("sparse", SPARSE)).cache.capacity < model[3].start(4)


def test_zero_and_expected_leave_what_they_say(model):
    codes = {}

    class Catch(SparsePolicy):
        def scale(self, run, scale, state):
            codes[scale] = super().scale(run, scale, state)
            return codes[scale]

    for fill in ("zero", "expected", "anchor_code"):
        run = draw(model, Catch(replace(SPARSE, start_scale=-1, fill=fill)))
        runs = torch.zeros(2, 90, dtype=torch.bool).scatter(1, run.state.kept[4], True)
        size = codes[4].abs()
        assert_close(size[runs], torch.full_like(size[runs], 0.5))
        if fill == "zero":
            assert (size[~runs] == 0).all()
        elif fill == "expected":
            assert (size[~runs] < 0.5).all()
        else:
            anchors = anchor_of((10, 9), 3)
            assert torch.equal(codes[4], torch.where(runs[..., None], codes[4], codes[4][:, anchors]))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_draws_and_says_what_ran(name, model):
    schedule = model[3]
    run = draw(model, variant_of(name, replace(SPARSE, bucket=8)))
    assert run.image().isfinite().all()
    expected = {"dense": 159, "early-stop-1": 69, "early-stop-2": 27, "skip-uncond-2": 159}
    ran = sum(record.kept for record in run.records)
    assert ran == expected[name] if name in expected else ran < schedule.total
    if name == "skip-uncond-2":
        assert [record.rows for record in run.records] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("name", ["dense", "sparse", "random", "inverse", "kv-fill"])
def test_images_of_a_batch_come_out_as_alone(name, model):
    transformer = model[0]
    words = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(5))
    policy = variant_of(name, SPARSE)
    for seed in (9, 12):
        both = draw_of(model, transformer.condition(words, [6, 6]), [8, seed], policy)
        assert_close(both.latent[1:], draw_of(model, transformer.condition(words[1:], [6]), [seed], policy).latent)


def test_by_threshold_an_image_keeps_as_many_as_the_fullest_of_its_batch(model):
    transformer = model[0]
    words = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(5))
    policy = SparsePolicy(replace(SPARSE, select="threshold", bucket=1))
    kept = {}
    for rows, seeds in (([0], [3]), ([1], [4]), ([0, 1], [3, 4]), ([1, 1], [4, 4])):
        condition = transformer.condition(words[rows], [6] * len(rows))
        kept[tuple(rows)] = draw_of(model, condition, seeds, policy)
    first = -SPARSE.start_scale  # of the scales that are sparse, the first is chosen from equal maps
    counts = {rows: run.records[-first].kept for rows, run in kept.items()}
    assert counts[0,] != counts[1,]
    assert counts[0, 1] == max(counts[0,], counts[1,])
    # Beside one that keeps as many, it comes out as alone.
    assert_close(kept[1, 1].latent[1:], kept[1,].latent)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_values_that_are_not_finite_are_named(model, backend):
    transformer, tokenizer, condition, schedule = model
    weight = transformer.layers[-1].ffn.fc2.weight
    kept = weight.data.clone()
    weight.data[0] = torch.inf
    try:
        with (
            attach(transformer, SparseVARConfig(start_scale=-2, backend=backend)),
            pytest.raises(RuntimeError, match="values are not finite"),
        ):
            generate(transformer, tokenizer, condition, schedule, seeds=[0, 1])
    finally:
        weight.data.copy_(kept)


def test_unguided_and_var():
    patch_nums = (1, 2, 4, 7)
    model = VAR(depth=2, head_dim=16, patch_nums=patch_nums, vocabulary=32, code_dim=8, num_classes=4).eval()
    tokenizer = VQVAE(vocabulary=32, latent_dim=8, channels=32, scales=4).eval()
    config = SparseVARConfig(ratio=0.6, start_scale=-1)
    for guided in (True, False):
        condition = model.condition(torch.tensor([1, 2]), guided=guided)
        for fill in ("anchor", "expected", "prev", "zero"):
            policy = SparsePolicy(replace(config, fill=fill))
            run = generate(model, tokenizer, condition, model.schedule, seeds=[0, 1], policy=policy)
            assert run.records[-1].kept == 49 - int(0.6 * 45)
            assert run.records[-1].rows == 1 + guided
        dense = generate(model, tokenizer, condition, model.schedule, seeds=[0, 1])
        none = SparsePolicy(replace(config, ratio=0.0))
        sparse = generate(model, tokenizer, condition, model.schedule, seeds=[0, 1], policy=none)
        assert torch.equal(dense.latent, sparse.latent)
    with pytest.raises(ValueError, match="fused kernels are for Infinity; got VAR"):
        generate(
            model,
            tokenizer,
            condition,
            model.schedule,
            seeds=[0, 1],
            policy=SparsePolicy(replace(config, backend="auto")),
        )


def test_attach_switches_what_generate_does_and_detaches(model):
    transformer = model[0]
    dense = draw(model, None).latent
    with attach(transformer, SPARSE) as handle:
        sparse = draw(model, None)
        assert not torch.equal(sparse.latent, dense)
        given = draw(model, SparsePolicy(SPARSE))
        assert torch.equal(sparse.latent, given.latent)
        # What ran can be read of the image, as where the policy is given.
        assert sparse.state.kept.keys() == given.state.kept.keys() != set()
        assert all(torch.equal(sparse.state.kept[scale], kept) for scale, kept in given.state.kept.items())
        with handle.disabled():
            assert torch.equal(draw(model, None).latent, dense)
        with pytest.raises(RuntimeError, match="attached to this model already"):
            attach(transformer, SPARSE)
    assert transformer.policy is None
    assert torch.equal(draw(model, None).latent, dense)
    with attach(transformer, SPARSE) as other:
        handle.detach()
        assert other.attached


def test_what_does_not_fit_is_named(model):
    with pytest.raises(ValueError, match="has 3 blocks, 0 to 2; got detector 3"):
        attach(model[0], replace(SPARSE, detector=3))
    with pytest.raises(TypeError, match="expected Infinity or VAR"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has 3 blocks"):
        draw(model, SparsePolicy(replace(SPARSE, detector=3)))
    with pytest.raises(ValueError, match="has 5 scales, 0 to 4; got scale 6"):
        draw(model, SparsePolicy(replace(SPARSE, start_scale=6)))
    with pytest.raises(ValueError, match="start_scale must leave a scale before it"):
        draw(model, SparsePolicy(replace(SPARSE, start_scale=0)))


def test_tiny_is_the_same_each_time_and_leaves_the_generator():
    state = torch.random.get_rng_state()
    first, second = tiny()[0], tiny()[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
