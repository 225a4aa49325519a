import math
from itertools import pairwise

import pytest
import torch
from hone_core.testing import assert_close, requires_gpu
from hone_visual_ar import BSQVAE, Infinity, Sampling, generate, infinity_schedule
from hone_visual_ar.layers import AttentionContext, ScaleKVCache, SelfAttention, attend

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


def test_the_temperature_of_attention_ends_at_a_hundred():
    attention, x = SelfAttention(8, 2), torch.randn(1, 3, 8)
    lengths = []
    for log_scale in (2.0, 4.7):
        attention.scale_mul_1H11.data.fill_(log_scale)
        lengths.append(attention.project(x, None, None, None)[0].norm(dim=-1).mean().item())
    assert lengths == pytest.approx([math.exp(2), 100])


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


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [48, 64, 128])
def test_attention_of_every_scale_on_a_gpu(dim, dtype):
    """All at once and over a cache, of few and of odd numbers of keys: as one by one in float64, gradients too."""
    schedule, generator = infinity_schedule("0.06M"), torch.Generator().manual_seed(0)
    ends = tuple(schedule.start(scale + 1) for scale in range(len(schedule)))
    shape = (2, 3, schedule.total, dim)
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    q, k = 4 * torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    # Keys and values as the blocks make them: heads behind tokens in memory.
    q, k, v, grad = (x.transpose(1, 2).contiguous().to("cuda", dtype).transpose(1, 2) for x in (q, k, v, grad))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = attend(*inputs, AttentionContext(ends=ends), 0)
    cache = ScaleKVCache(1, 2, 3, ends[-2], dim, device=q.device, dtype=dtype)
    want, cached = [], []
    for begin, end in pairwise((0, *ends)):
        scores = exact[0][:, :, begin:end] @ exact[1][:, :, :end].mT
        want.append(scores.softmax(-1) @ exact[2][:, :, :end])
        part = (x[:, :, begin:end].detach() for x in inputs)
        cached.append(attend(*part, AttentionContext(cache=cache, write=end != ends[-1]), 0))
    grads = torch.autograd.grad(out, inputs, grad)
    wants = torch.autograd.grad(torch.cat(want, 2), exact, grad.double())
    limit = 0.03 if dtype == torch.bfloat16 else 2e-3
    for name, found, right in zip(
        ("out", "cached", "dq", "dk", "dv"),
        (out, torch.cat(cached, 2), *grads),
        (torch.cat(want, 2), torch.cat(want, 2), *wants),
        strict=True,
    ):
        error = (found.double() - right).abs().amax((0, 1, 3))
        for scale, (begin, end) in enumerate(pairwise((0, *ends))):
            size = right[:, :, begin:end].abs().max().item()
            assert error[begin:end].max() < limit * max(1.0, size), (name, scale)
