import pytest
import torch
from hone_core.testing import assert_close
from hone_visual_ar import BSQVAE, Infinity, Sampling, generate, infinity_schedule

# Logits of the last token and the summed latent of greedy runs, read off the release's own class with the same weights
# (its cross-attention in float32).
GOLDEN = {
    "square": (16, False, 1.0, [-2.34878, -0.09999, 1.39022, 1.29913, -1.01205, -1.07422], 24625.78, 11648.0),
    "tall": (16, False, 1.25, [-2.44054, 0.00546, 1.71042, 1.37596, -0.67113, -1.25727], 29062.86, 14542.165),
    "patchified": (6, True, 0.571, [-2.33568, 0.17709, 1.29944, 1.15552, -1.0682, -1.35576], 33474.07, 12171.838),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", GOLDEN)
def test_as_the_release(name, make_infinity, text):
    code_dim, patchify, aspect, logits, total, latent = GOLDEN[name]
    model, schedule = make_infinity(code_dim, patchify), infinity_schedule("0.06M", aspect)
    padded, lengths, state = text
    generator = torch.Generator()
    generator.set_state(state)
    inputs = 0.3 * torch.randn(2, schedule.total - 1, model.token_dim, generator=generator)
    with torch.no_grad():
        out = model(model.condition(padded, lengths, guided=False), inputs, schedule)
    assert_close(out[1, -1].flatten()[:6], torch.tensor(logits))
    assert_close(out.double().abs().sum(), torch.tensor(total), dtype=torch.float32)
    tokenizer = BSQVAE(latent_dim=code_dim, channels=32, multipliers=(1, 1))
    sampling = Sampling(guidance=3.0, temperature=0.5, greedy=True)
    run = generate(model, tokenizer, model.condition(padded, lengths), schedule, seeds=[0, 1], sampling=sampling)
    assert_close(run.latent.double().abs().sum(), torch.tensor(latent), dtype=torch.float32)


def test_padding_of_prompts_is_not_read(make_infinity, text):
    model, schedule = make_infinity(), infinity_schedule("0.06M")
    padded, lengths, _ = text
    inputs = torch.randn(2, schedule.total - 1, 16)
    noisy = padded.clone()
    noisy[0, 5:] = 100.0
    with torch.no_grad():
        first = model(model.condition(padded, lengths, guided=False), inputs, schedule)
        assert torch.equal(first, model(model.condition(noisy, lengths, guided=False), inputs, schedule))
        alone = model(model.condition(padded[:1, :5], [5], guided=False), inputs[:1], schedule)
    assert_close(first[:1], alone)


def test_unconditional_rows_are_as_long_as_the_prompts_or_the_negative_ones(make_infinity, text):
    model = make_infinity()
    padded, lengths, _ = text
    guided = model.condition(padded, lengths)
    assert guided.rows == 4
    assert guided.mask[:, 0, 0].sum(-1).tolist() == [5, 9, 5, 9]
    other = model.condition(model.cfg_uncond[:9].expand(2, -1, -1), lengths, guided=False)
    assert_close(guided.vector[2:], other.vector)
    negative = model.condition(padded, lengths, negative=(torch.ones(2, 12, 256), [12, 3]))
    assert negative.mask[:, 0, 0].sum(-1).tolist() == [5, 9, 12, 3]
    assert_close(negative.vector[:2], guided.vector[:2])
    assert torch.equal(guided.conditional().vector, guided.vector[:2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: m.condition(torch.zeros(2, 17, 256), [17, 17]), "reads at most 16 words; got 17"),
        (lambda m, t: m.condition(t, [0, 9]), "lengths must lie in 1 to 9"),
        (lambda m, t: m.condition(t[..., :5], [5, 9]), r"text must be \[B, T, 256\]"),
        (lambda m, t: m.condition(t, [5, 9], negative=(t[:1], [5])), "must be as many as prompts; got 1 and 2"),
        (lambda m, t: Infinity(depth=4, width=64, num_heads=2, chunks=3), "multiple of chunks; got 4 and 3"),
        (lambda m, t: Infinity(depth=1, width=64, num_heads=1, chunks=1, text_channels=64), "multiple of 128; got 64"),
        (lambda m, t: Infinity(depth=1, width=66, num_heads=3, chunks=1, text_channels=128), "a multiple of 4"),
    ],
)
def test_bad_input(call, message, make_infinity, text):
    with pytest.raises(ValueError, match=message):
        call(make_infinity(), text[0])


def test_saved_and_loaded_as_diffusers_does(make_infinity, text, tmp_path):
    model = make_infinity(6, True)
    model.save_pretrained(tmp_path)
    again = Infinity.from_pretrained(tmp_path)
    assert again.config["patchify"]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
