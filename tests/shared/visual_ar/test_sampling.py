import pytest
import torch
from hone_core.testing import assert_close
from hone_visual_ar import Sampling
from hone_visual_ar.sampling import draw, filter_logits, uniforms


def test_draws_follow_the_distribution_and_skip_what_is_filtered():
    logits = torch.tensor([0.1, 0.5, 0.0, 0.3, 0.1]).log().expand(40_000, 5)
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    counts = draw(logits, uniform, Sampling()).bincount(minlength=5) / 40_000
    assert_close(counts, torch.tensor([0.1, 0.5, 0.0, 0.3, 0.1]), atol=0.01)  # three standard deviations
    kept = draw(logits, uniform, Sampling(top_k=2)).bincount(minlength=5) / 40_000
    assert_close(kept, torch.tensor([0, 0.625, 0, 0.375, 0]), atol=0.01)
    assert draw(logits, uniform, Sampling(greedy=True)).unique().tolist() == [1]


def test_extreme_uniforms_never_hit_a_choice_of_no_mass():
    logits = torch.tensor([[-torch.inf, 0.3, -1.0, 2.0, -torch.inf]]).expand(2, 5)
    drawn = draw(logits, torch.tensor([0.0, 1 - 2**-24]), Sampling())
    assert drawn.tolist() == [1, 3]


def test_top_p_leaves_out_from_the_least_likely():
    logits = torch.tensor([[0.02, 0.18, 0.8], [0.3, 0.3, 0.4]]).log()
    assert filter_logits(logits, top_p=0.9).isfinite().tolist() == [[False, True, True], [True, True, True]]
    # With two choices: the likelier alone where the other has at most 1 - top_p.
    bits = torch.tensor([[0.02, 0.98], [0.04, 0.96]]).log()
    assert filter_logits(bits, top_p=0.97).isfinite().tolist() == [[False, True], [True, True]]
    assert filter_logits(bits, top_k=900).isfinite().all()
    # The likeliest stays, however little is asked for.
    assert filter_logits(logits, top_p=1e-9).isfinite().tolist() == [[False, False, True]] * 2


@pytest.mark.parametrize("top_k", [0, 1])
@pytest.mark.parametrize("top_p", [0.0, 0.8, 0.97, 1.0])
def test_bits_are_drawn_as_any_choice_is(top_k, top_p):
    """To the bit, ties and infinite logits with them."""
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(20_000, 2, generator=generator) ** 3
    logits[:50, 1], logits[50:60, 0], logits[60:70, 1] = logits[:50, 0], -torch.inf, -200.0
    uniform = torch.rand(20_000, generator=generator)
    uniform[:20], uniform[45:65] = 0.0, 1 - 2**-24
    mass = filter_logits(logits, top_k=top_k, top_p=top_p).softmax(-1).cumsum(-1)
    want = (mass[:, 0] <= uniform * mass[:, 1]).long()
    assert torch.equal(draw(logits, uniform, Sampling(top_k=top_k, top_p=top_p)), want)


def test_an_images_draws_do_not_depend_on_its_batch():
    together = uniforms([3, 4], 7, 2, "cpu")
    assert torch.equal(together[1:], uniforms([4], 7, 2, "cpu"))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 1.5}, "top_p lie in .0, 1.; got 0 and 1.5"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"temperature": 0.0}, "temperature must be positive and finite; got 0.0. Use greedy"),
        ({"temperature": float("inf")}, "temperature must be positive and finite; got inf"),
        ({"guidance": float("nan")}, "guidance must be finite; got nan"),
        ({"guidance": (1.0, float("inf"))}, "guidance must be finite"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_values_per_scale():
    sampling = Sampling(guidance=(1.0, 2.0, 3.0), temperature=0.5)
    assert sampling.at(1, 3) == (2.0, 0.5)
    with pytest.raises(ValueError, match="guidance needs one value or one of each of 4 scales; got 3"):
        sampling.at(1, 4)
