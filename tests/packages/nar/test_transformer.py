import itertools
import math

import pytest
import torch
from hone_core.testing import assert_close, requires_gpu
from hone_nar.generation import Decoding
from hone_nar.models import tiny
from hone_nar.transformer import (
    Attention,
    LlamaGenForImageGeneration,
    NARForImageGeneration,
    NARForVideoGeneration,
    SlotCache,
    Span,
    rope_table,
)
from hone_visual_ar.sampling import Sampling
from torch.nn import functional as F

ZEROS = torch.zeros(1, 36, dtype=torch.long)
LABELS = torch.tensor([1, 5])


def filled(model):
    """Weights by a formula, so that numbers of the release's classes can be written down."""
    with torch.no_grad():
        for at, (_, value) in enumerate(sorted(model.state_dict().items())):
            wave = 0.35 * torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + 1.3 * at)
            value.copy_((wave + (value.ndim == 1)).view(value.shape))
    return model.eval()


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        (
            False,
            [0.44234, 1.71109, -2.09323, 0.75879, -0.07817, 0.11031, -0.07031, -0.84792, -0.04223],
            [0.06479, 0.62896, 1.08766, 0.21309, -0.52274, -0.21518, 0.53003, 0.68021, 1.28068],
        ),
        (
            True,
            [0.57592, 0.64145, -1.04463, 0.17423, 0.40181, 0.18871, 0.79047, 0.069, -0.35694],
            [0.21533, 0.45012, 0.45462, 0.00957, -0.19601, 0.48854, 1.07169, 0.47422, 0.87064],
        ),
    ],
)
def test_teacher_forced_logits_are_the_releases(text, first, second):
    options = {"num_classes": None, "cls_token_num": 4, "caption_dim": 6} if text else {"num_classes": 3}
    model = NARForImageGeneration(
        dim=16, n_layer=2, n_head=2, multiple_of=16, vocab_size=7, grid=(3, 3), dropout=0.0, **options
    )
    model = filled(model.double())
    tokens = (torch.arange(18).view(2, 9) * 5) % 7
    given = {"labels": torch.tensor([0, 2])}
    if text:
        words = torch.tensor([[False, False, True, True], [True] * 4])
        given = {"text": torch.sin(torch.arange(48, dtype=torch.float64)).view(2, 4, 6), "words": words}
    logits = model(tokens, **given).logits.detach()
    for row, step, wanted in ((0, 3, first), (1, 2, second)):
        found = torch.tensor([float(logits[row, at, (step * at) % 7]) for at in range(9)])
        # The release computes norms and angles in float32.
        torch.testing.assert_close(found, torch.tensor(wanted), atol=2e-5, rtol=0)


def text_of(model, rows=2):
    features = torch.randn(
        rows, model.cls_token_num, model.config.caption_dim, generator=torch.Generator().manual_seed(3)
    )
    words = torch.ones(rows, model.cls_token_num, dtype=torch.bool)
    words[0, :2] = False
    return {"text": features, "words": words}


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nar", {}),
        ("nar", {"grid": (3, 7)}),
        ("nar", {"grid": (7, 2)}),
        ("nar", {"n_kv_head": 2}),
        ("nar", {"num_classes": None, "cls_token_num": 5, "caption_dim": 24}),
        ("llamagen", {}),
        ("llamagen", {"grid": (4, 5), "diagonal": True}),
        ("flashar", {"grid": (4, 5)}),
        ("flashar", {"depth": 2, "num_classes": None, "cls_token_num": 5, "caption_dim": 24}),
        ("video", {}),
        ("video", {"grid": (3, 2, 3)}),
    ],
)
def test_cached_steps_are_the_teacher_forced_forward(kind, options, guidance):
    model = tiny(kind, **options)
    given = {"labels": LABELS} if model.num_classes else text_of(model)
    run = Decoding(model, 2, sampling=Sampling(guidance=guidance, top_k=8))
    run.load(model.condition(**given, guided=guidance != 1), [3, 4])
    steps = []
    with torch.no_grad():
        tokens = run.run(lambda step: steps.append(run.logits))
        wanted = model(tokens, **given).logits
        if guidance != 1:
            without = model(tokens, **given, drop=torch.ones(2, dtype=torch.bool)).logits
            wanted = without + guidance * (wanted - without)
    found = torch.cat(steps, 1)[:, torch.tensor(model.order.ids).argsort()]
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < 5e-6 * max(1.0, scale)


def test_a_token_reaches_later_steps_alone():
    model = tiny("nar").double()
    tokens = torch.randint(32, (1, 36), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    place = 2 * 6 + 1
    other[0, place] = (other[0, place] + 1) % 32
    with torch.no_grad():
        change = (model(tokens, LABELS[:1]).logits - model(other, LABELS[:1]).logits).abs().amax(-1)[0].view(6, 6)
    step = torch.arange(6)[:, None] + torch.arange(6)[None]
    assert bool((change[step <= 3] == 0).all())
    assert bool((change[step > 3] > 1e-6).all())


@pytest.mark.parametrize(
    ("kind", "grid"), [("nar", (2, 2)), ("llamagen", (2, 2)), ("flashar", (2, 2)), ("video", (1, 2, 2))]
)
def test_likelihoods_of_all_grids_sum_to_one(kind, grid):
    model = tiny(kind, grid=grid, vocab_size=3, dim=16, n_head=2, multiple_of=16).double()
    every = torch.tensor(list(itertools.product(range(3), repeat=math.prod(grid))))
    with torch.no_grad():
        nll = model.nll(every, torch.full((len(every),), 4)).sum(1)
    assert float(torch.exp(-nll).sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(nll.std()) > 0.1


def test_condition_rows_of_the_rotary_table_vanish():
    model = tiny("nar", num_classes=None, cls_token_num=5, caption_dim=24)
    table = rope_table(model.order, 5, 16, 10_000.0, "cpu")
    assert not table.cos[:5].any()
    assert not table.sin[:5].any()
    # Slot 2 is (1, 0): the row's half turns, the column's does not.
    assert_close(table.cos[5 + 2], torch.cat([torch.tensor([1.0, 1e-1, 1e-2, 1e-3]).cos(), torch.ones(4)]))


def test_losses_are_the_mean_over_tokens_and_have_gradients():
    model = tiny("nar")
    tokens = torch.randint(32, (2, 36), generator=torch.Generator().manual_seed(0))
    found = model(tokens, LABELS, loss="mixture")
    assert_close(found.loss, model.nll(tokens, LABELS).mean())
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not torch.isclose(model(tokens, LABELS, loss="separate").loss, found.loss)


@pytest.mark.parametrize("kind", ["nar", "llamagen", "flashar", "video", "text"])
def test_prefixes_are_the_mask(kind):
    """Values and gradients, of texts with padding too."""
    if kind == "text":
        model = tiny("nar", num_classes=None, cls_token_num=5, caption_dim=24, n_kv_head=2)
        words = torch.tensor([[False, True, True, True, True], [False, False, False, False, True]])
        given = {"text": torch.randn(2, 5, 24), "words": words}
    else:
        model, given = tiny(kind), {"labels": LABELS}
    tokens = torch.randint(32, (2, model.tokens))
    found = []
    for prefixes in (False, True):
        out = model(tokens, **given, loss="mixture", prefixes=prefixes)
        found.append((out.logits, torch.autograd.grad(out.loss, model.layers[0].attention.wqkv.weight)[0]))
    for a, b in zip(*found, strict=True):
        assert_close(b, a)


def test_checkpointed_blocks_have_the_same_gradient():
    plain, again = tiny("nar"), tiny("nar")
    again.enable_gradient_checkpointing()
    tokens = torch.randint(32, (2, 36), generator=torch.Generator().manual_seed(0))
    for model in (plain, again):
        model(tokens, LABELS, loss="mixture").loss.backward()
    for first, second in zip(plain.parameters(), again.parameters(), strict=True):
        assert_close(second.grad, first.grad)


def test_saved_weights_come_back(tmp_path):
    for kind, cls in (
        ("nar", NARForImageGeneration), ("llamagen", LlamaGenForImageGeneration), ("video", NARForVideoGeneration)
    ):  # fmt: skip
        model = tiny(kind)
        model.save_pretrained(tmp_path / kind)
        again = cls.from_pretrained(tmp_path / kind)
        tokens = torch.zeros(1, model.tokens, dtype=torch.long)
        assert torch.equal(model(tokens, LABELS[:1]).logits, again(tokens, LABELS[:1]).logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 35, dtype=torch.long), LABELS[:1]), r"grids of 6 x 6, so codes must be \[B, 36\]"),
        (lambda m: m(torch.full((1, 36), 32), LABELS[:1]), "codes must lie in 0 to 31; got 32 to 32"),
        (lambda m: m(torch.full((1, 36), -1), LABELS[:1]), "codes must lie in 0 to 31; got -1 to -1"),
        (lambda m: m.condition(torch.tensor([10])), "classes are 0 to 9; got 10"),
        (lambda m: m.condition(torch.tensor([-1])), "classes are 0 to 9; got -1"),
        (lambda m: m.condition(torch.tensor([1.0])), "labels must be integers"),
        (lambda m: m.condition(text=torch.zeros(1, 1, 1)), "draws classes; give labels and no text"),
        (lambda m: m(ZEROS, LABELS[:1], loss="mixtrue"), "loss must be one of mixture, separate, flashar; got 'mixt"),
        (lambda m: m(ZEROS, LABELS[:2]), "a class or text for each of 1 rows; got 2"),
        (lambda m: m(ZEROS.expand(2, -1), LABELS[:2], drop=torch.tensor([True])), r"drop must be bool \[2\]"),
        (
            lambda m: m(ZEROS, LABELS[:1], drop=torch.tensor([1])),
            r"drop must be bool \[1\], of each row; got torch.int64",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny("nar"))


def test_codes_are_whole_numbers_of_either_width():
    model = tiny("nar")
    with pytest.raises(TypeError, match=r"codes must be int64 or int32.*got torch\.float32"):
        model(ZEROS.float(), LABELS[:1])
    assert torch.equal(model.nll(ZEROS.int(), LABELS[:1]), model.nll(ZEROS, LABELS[:1]))
    assert torch.equal(
        model(ZEROS.int(), LABELS[:1], loss="mixture").loss, model(ZEROS, LABELS[:1], loss="mixture").loss
    )


def test_bad_text_is_named():
    model = tiny("nar", num_classes=None, cls_token_num=5, caption_dim=24)
    with pytest.raises(ValueError, match="draws texts; give text and words"):
        model.condition(LABELS)
    with pytest.raises(ValueError, match=r"text must be \[B, 5, 24\]"):
        model.condition(text=torch.zeros(1, 4, 24), words=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="one row is all padding"):
        model.condition(text=torch.zeros(1, 5, 24), words=torch.zeros(1, 5, dtype=torch.bool))
    # As a tokenizer pads; the first token would be drawn of a place without a word.
    right = torch.tensor([[True, True, False, False, False], [True] * 5])
    with pytest.raises(ValueError, match=r"words must stand at its end.*pad_left"):
        model.condition(text=torch.zeros(2, 5, 24), words=right)
    assert len(model.condition(text=torch.zeros(2, 5, 24), words=right.flip(1)).embedding) == 2


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (NARForImageGeneration, {"grid": (2, 2, 2)}, "rows and columns"),
        (NARForVideoGeneration, {"grid": (2, 2)}, "frames, rows and columns"),
        (LlamaGenForImageGeneration, {"dim": 30, "n_head": 4}, "dim must be a multiple of n_head"),
    ],
)
def test_sizes_that_do_not_exist(cls, options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        cls(**options)


@requires_gpu()
@pytest.mark.parametrize("dim", [16, 64])
def test_attention_over_few_cached_keys_in_half_precision(dim):
    """What lies in the cache behind the keys is large, and none of it may be seen."""
    attention = Attention(4 * dim, 4, 2, 0.0)
    for keys in (8, 17, 64, 121, 127, 128, 200):
        q = torch.randn(2, 4, 8, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(2, 2, keys, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache = SlotCache(1, (2, 2, 300, dim), device=q.device, dtype=q.dtype)
        for held, new in ((cache.k[0], k), (cache.v[0], v)):
            held.fill_(3e4)[:, :, :keys] = new
        span = Span(None, None, cache, keys - 8)
        found = attention.attend(q, k[:, :, -8:], v[:, :, -8:], span, 0)
        wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
        assert_close(found.double(), wanted.transpose(1, 2).flatten(2), atol=3e-2, rtol=3e-2)
