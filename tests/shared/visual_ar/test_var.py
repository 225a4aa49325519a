import pytest
import torch
from hone_core.testing import assert_close
from hone_visual_ar import VAR, VAR_256, Sampling, generate

GOLDEN = {
    False: ([-1.2515, 0.5149, -0.69979, 0.10895, -0.16368, 0.11815], [-0.14925, -0.22192, -0.24013, -0.23476]),
    True: ([-0.47844, -0.54296, 0.72882, 0.57819, -0.82332, -0.29056], [0.20076, 0.14681, 0.13541, 0.24936]),
}
"""Logits of the last token and the first latents of a greedy run, read off the release's own class."""


@pytest.mark.parity
@pytest.mark.parametrize("shared", [False, True])
def test_as_the_release(shared, var, fill):
    _, tokenizer = var
    options = {"depth": 3, "head_dim": 32, "patch_nums": (1, 2, 3, 5, 8), "vocabulary": 64, "code_dim": 16}
    model = fill(VAR(**options, num_classes=10, shared_aln=shared), 0.08)
    inputs = torch.randn(2, model.schedule.total - 1, 16, generator=torch.Generator().manual_seed(7))
    classes = torch.tensor([3, 7])
    logits, latent = GOLDEN[shared]
    with torch.no_grad():
        out = model(model.condition(classes, guided=False), inputs, model.schedule)
    assert_close(out[1, -1, 0, :6], torch.tensor(logits))
    sampling = Sampling(guidance=2.0, greedy=True)
    run = generate(model, tokenizer, model.condition(classes), model.schedule, seeds=[0, 1], sampling=sampling)
    assert_close(run.latent[1].flatten()[:4], torch.tensor(latent))


def test_guidance_grows_with_the_scale():
    c, u = torch.tensor([2.0]), torch.tensor([1.0])
    model = VAR(depth=1, head_dim=8, patch_nums=(1, 2), vocabulary=4, code_dim=2, num_classes=2)
    assert [float(model.guide(c, u, 4.0, share)) for share in (0.0, 0.5, 1.0)] == [2.0, 4.0, 6.0]


def test_bad_input(var):
    model, _ = var
    with pytest.raises(ValueError, match=r"0 to 10 \(10 is unconditional\); got \[11\]"):
        model.condition(torch.tensor([11]))
    with pytest.raises(ValueError, match="learned positions of the scales 1, 2, 3, 5, 8"):
        model.check_schedule(VAR_256)
