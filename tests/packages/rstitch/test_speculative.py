import functools

import pytest
import torch
from hone_rstitch.config import EvalConfig, SamplingConfig
from hone_rstitch.evaluate import evaluate
from hone_rstitch.models import Pair, tiny
from hone_rstitch.speculative import agreements, speculative_calls
from hone_rstitch.vocabulary import Vocabulary


def test_calls_by_hand():
    # Everything agrees: two drafts of three and the large model's token after each.
    assert speculative_calls([True] * 8, 3, 99) == (6, 2)
    # Nothing does: every round drafts in vain, and the large model writes one token.
    assert speculative_calls([False] * 4, 3, 99) == (12, 4)
    # A draft leaves room for the large model's token.
    assert speculative_calls([False] * 4, 3, 4) == (3 + 2 + 1 + 0, 4)
    # Two kept, one corrected; then one kept, and the text ends.
    assert speculative_calls([True, True, False, True], 3, 99) == (4, 2)
    assert speculative_calls([], 3, 9) == (0, 0)


@pytest.mark.parametrize("near", [0.005, 0.02])
def test_transformers_makes_these_calls(near):
    _, large = tiny("qwen2", rows=(112, 112))
    # A draft that is the large model, a little changed, agrees now and then.
    _, small = tiny("qwen2", rows=(112, 112))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += near * torch.randn(parameter.shape, generator=generator)
    small, large = small.double(), large.double()
    prompt = list(range(3, 12))
    counts = [0, 0]

    def counted(which, forward):
        @functools.wraps(forward)  # generate looks at its signature
        def call(*args, **kwargs):
            counts[which] += 1
            return forward(*args, **kwargs)

        return call

    pair = Pair(small, large, None, None, Vocabulary.shared(112, 112, ()))
    options = dict(max_new_tokens=41, do_sample=False, eos_token_id=None, pad_token_id=0)
    text = large.generate(torch.tensor([prompt]), **options)[0, 9:].tolist()
    (agree,) = agreements(pair, [prompt], [text])
    assert 0 < sum(agree) < len(agree)
    small.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    for which, model in enumerate((small, large)):
        model.forward = counted(which, model.forward)
    again = large.generate(torch.tensor([prompt]), assistant_model=small, **options)[0, 9:].tolist()
    assert again == text
    assert tuple(counts) == speculative_calls(agree, 4, 41)


def test_it_is_a_baseline_of_eval(packaged, start):
    cfg = EvalConfig(
        limit=3, taus=(0.3,), baselines=("large", "speculative"), draft=2, sampling=SamplingConfig(max_new_tokens=8)
    )
    with start(cfg) as run:
        report = evaluate(cfg, run)
    found = {(row.variant, row.metric): row.value for row in report.rows}
    name = "speculative, drafts of 2"
    assert found[name, "accuracy"] == found["large", "accuracy"]
    assert found[name, "tokens"] == found["large", "tokens"]
    assert found[name, "large_calls"] <= found["large", "large_calls"]
    assert found[name, "small_calls"] > 0
    with pytest.raises(ValueError, match="speculative is greedy"):
        EvalConfig(baselines=("speculative",), sampling=SamplingConfig(temperature=1.0))
