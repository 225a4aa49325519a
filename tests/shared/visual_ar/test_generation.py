import pytest
import torch
from hone_core.testing import assert_close
from hone_visual_ar import VQVAE, Policy, Sampling, ScaleSchedule, generate
from hone_visual_ar.generation import Generation
from hone_visual_ar.layers import ScaleKVCache
from hone_visual_ar.transformer import scale_mask
from torch._dynamo.utils import counters

SAMPLING = Sampling(guidance=2.0, temperature=0.7, top_p=0.95)


class Keep(Policy):
    """The dense policy, which keeps the logits of every scale."""

    def begin(self, run):
        return []

    def scale(self, run, scale, state):
        hidden = run.run(run.embed(scale), scale)
        state.append(run.model.logits(hidden, run.condition))
        self.logits = state
        return run.codes(run.logits(hidden, scale), scale)


class Stop(Policy):
    """Leaves the last scale out."""

    def scale(self, run, scale, state):
        return None if run.is_last(scale) else super().scale(run, scale, state)


def teacher_forced(model, run):
    """Logits of one forward over all scales, on the latents that a run went through."""
    latent, inputs = torch.zeros_like(run.latent), []
    for scale, indices in enumerate(run.indices[:-1]):
        grid = run.embed_indices(indices).transpose(1, 2).unflatten(2, run.schedule.grids[scale])
        latent = latent + run.tokenizer.spread(grid, run.schedule.last, scale=scale, scales=len(run.schedule))
        inputs.append(run.tokenizer.shrink(latent, run.schedule.grids[scale + 1]).flatten(2).transpose(1, 2))
    inputs = torch.cat(inputs, 1)
    return model(run.condition, torch.cat([inputs, inputs]), run.schedule)


def test_cached_equals_teacher_forced_infinity(small):
    model, tokenizer, condition, schedule = small
    policy = Keep()
    run = generate(model, tokenizer, condition, schedule, seeds=[0, 1], sampling=SAMPLING, policy=policy)
    with torch.no_grad():
        assert_close(torch.cat(policy.logits, 1), teacher_forced(model, run))
    assert set(run.cache.lengths) == {schedule.total - schedule.tokens(len(schedule) - 1)}


def test_cached_equals_teacher_forced_var(var):
    model, tokenizer = var
    policy = Keep()
    run = generate(
        model, tokenizer, model.condition(torch.tensor([1, 2])), model.schedule, seeds=[0, 1], sampling=SAMPLING,
        policy=policy,
    )  # fmt: skip
    with torch.no_grad():
        assert_close(torch.cat(policy.logits, 1), teacher_forced(model, run))


def test_values_that_are_not_finite_are_named(small, var):
    """Draws of what is no number are codes like any other, so that an image of them looks like one."""
    for (model, tokenizer), schedule in ((small[:2], small[3]), (var, var[0].schedule)):
        text = model is small[0]
        condition = small[2] if text else model.condition(torch.tensor([1, 2]))
        weight = model.layers[-1].ffn.fc2.weight
        kept = weight.data.clone()
        weight.data[0] = torch.inf
        try:
            for policy in (None, Stop()):
                with pytest.raises(RuntimeError, match=r"values are not finite, with blocks in torch\.float32"):
                    generate(model, tokenizer, condition, schedule, seeds=[0, 1], policy=policy)
        finally:
            weight.data.copy_(kept)
        run = generate(model, tokenizer, condition, schedule, seeds=[0, 1])
        assert run.unguided is None


def test_what_lies_behind_a_text_is_not_read(small):
    model, tokenizer, _, schedule = small
    words = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(1))
    wanted = generate(model, tokenizer, model.condition(words, [6, 4]), schedule, seeds=[5, 6], sampling=SAMPLING)
    words[1, 4:] = torch.nan
    found = generate(model, tokenizer, model.condition(words, [6, 4]), schedule, seeds=[5, 6], sampling=SAMPLING)
    assert torch.equal(found.latent, wanted.latent)


def test_an_image_does_not_depend_on_its_batch(small):
    model, tokenizer, _, schedule = small
    words = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(1))
    both = generate(model, tokenizer, model.condition(words, [6, 4]), schedule, seeds=[5, 6], sampling=SAMPLING)
    alone = generate(model, tokenizer, model.condition(words[1:, :4], [4]), schedule, seeds=[6], sampling=SAMPLING)
    assert_close(both.latent[1:], alone.latent)
    assert torch.equal(both.indices[-1][1:], alone.indices[-1])
    assert not torch.equal(both.latent[0], both.latent[1])


def test_images_are_decoded_in_range_and_the_records_count(small):
    model, tokenizer, condition, schedule = small
    run = generate(model, tokenizer, condition, schedule, seeds=[0, 1], sampling=SAMPLING)
    image = run.image()
    assert tuple(image.shape) == (2, 3, 40, 32)
    assert image.abs().max() <= 1
    assert [record.kept for record in run.records] == [schedule.tokens(k) for k in range(7)]
    assert [record.keys for record in run.records] == [schedule.start(k) + schedule.tokens(k) for k in range(7)]
    assert {record.rows for record in run.records} == {2}


def test_rows_without_a_partner_are_not_guided(small):
    model, tokenizer, condition, schedule = small
    plain = generate(model, tokenizer, condition.conditional(), schedule, seeds=[0, 1], sampling=SAMPLING)
    strong = generate(
        model, tokenizer, condition, schedule, seeds=[0, 1], sampling=Sampling(temperature=0.7, top_p=0.95)
    )
    assert_close(plain.latent, strong.latent)  # guidance 1


def test_what_does_not_go_together(small, var):
    model, tokenizer, condition, schedule = small
    with pytest.raises(ValueError, match="a seed for each of 2 images; got 1"):
        generate(model, tokenizer, condition, schedule, seeds=[0])
    with pytest.raises(ValueError, match="do not belong together: tokens of 4 channels and 2 choices, codes of 16"):
        generate(model, var[1], condition, schedule, seeds=[0, 1])
    book = VQVAE(vocabulary=64, latent_dim=4, channels=32, scales=5)
    with pytest.raises(ValueError, match="4 channels and 2 choices, codes of 4 and 64"):
        generate(model, book, condition, schedule, seeds=[0, 1])
    with pytest.raises(ValueError, match="must be one token"):
        generate(model, tokenizer, condition, ScaleSchedule(((2, 2),)), seeds=[0, 1])
    # Before anything runs.
    with pytest.raises(ValueError, match="one of each of 7 scales; got 2"):
        Generation.start(model, tokenizer, condition, schedule, seeds=[0, 1], sampling=Sampling(guidance=(1.0, 2.0)))


def test_a_full_cache_says_so():
    cache = ScaleKVCache(1, 1, 1, 3, 4, device=torch.device("cpu"), dtype=torch.float32)
    one = torch.ones(1, 1, 2, 4)
    assert cache.extend(0, one, one, write=True)[0].shape[2] == 2
    assert cache.lengths == [2]
    assert cache.extend(0, 2 * one, one, write=False)[0][0, 0, :, 0].tolist() == [1, 1, 2, 2]
    with pytest.raises(RuntimeError, match="holds 3 positions and cannot take 4"):
        cache.extend(0, one, one, write=True)
    assert cache.bytes == 2 * 3 * 4 * 4


def test_the_mask_of_training():
    mask = scale_mask(ScaleSchedule(((1, 1), (1, 2))), "cpu")
    assert mask.tolist() == [[True, False, False], [True, True, True], [True, True, True]]


def test_all_scales_at_once_read_what_the_mask_says(small):
    model, _, condition, schedule = small
    inputs = torch.randn(4, schedule.total - 1, 4, generator=torch.Generator().manual_seed(2))
    everything = torch.ones(schedule.total, schedule.total, dtype=torch.bool)
    with torch.no_grad():
        assert_close(model(condition, inputs, schedule), model(condition, inputs, schedule, mask=everything))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_blocks_and_scales_share_compiled_code(small):
    model, tokenizer, _, schedule = small
    with torch.no_grad():
        condition = model.condition(torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(1)), [6, 4])
    before = generate(model, tokenizer, condition, schedule, seeds=[0, 1], sampling=SAMPLING)
    torch._dynamo.reset()
    for block in model.layers:
        block.compile_around(backend="eager", dynamic=True, fullgraph=True)
    try:
        counters["stats"].clear()
        after = generate(model, tokenizer, condition, schedule, seeds=[0, 1], sampling=SAMPLING)
        # Three parts; the first scale has one token, which dynamo never takes for a variable.
        assert counters["stats"]["unique_graphs"] <= 6
    finally:
        for block in model.layers:
            block.as_written()
    assert torch.equal(before.latent, after.latent)
