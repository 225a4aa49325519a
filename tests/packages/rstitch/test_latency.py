import itertools

import pytest
import torch
from hone_rstitch.config import LARGE, SMALL, ProfileConfig, StitchConfig
from hone_rstitch.generation import stitch_generate
from hone_rstitch.latency import Call, Latency, calls, read_latency, text_latency, write_latency
from hone_rstitch.vocabulary import Vocabulary


class Token:
    def __init__(self, model, discarded=None):
        self.model, self.discarded_entropy = model, discarded


def test_calls_by_hand():
    # Prompts of 5 and 7; small, small, large after a thrown-away token, large, small.
    text = [Token(SMALL), Token(SMALL), Token(LARGE, 0.5), Token(LARGE), Token(SMALL)]
    assert calls(text, (5, 7)) == [
        Call(SMALL, 5, 0),
        Call(SMALL, 1, 5),
        Call(SMALL, 1, 6),  # thrown away
        Call(LARGE, 9, 0),  # prompt and two tokens
        Call(LARGE, 1, 9),
        Call(SMALL, 2, 7),  # what the large model wrote
    ]


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_calls_are_those_that_were_made(pairs, share):
    small, large = pairs()
    seen = []
    output = stitch_generate(
        large, small, torch.arange(3, 12)[None], small_input_ids=torch.arange(3, 8)[None],
        stitch=StitchConfig(policy="random", share=share, discards=True), seed=4,
        vocabulary=Vocabulary.shared(96, 112, (2,)), max_new_tokens=40, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, on_token=seen.append,
    )  # fmt: skip
    usage = output.usage[0]
    found = calls(seen, (5, 9))
    for model in (SMALL, LARGE):
        own = [call for call in found if call.model == model]
        assert len(own) == usage.calls[model]
        assert [call.tokens for call in own[1:]] == usage.gaps[model]
        assert all(b.cached == a.cached + a.tokens for a, b in itertools.pairwise(own))


def test_fit_finds_the_coefficients(tmp_path):
    true = Latency((1e-5, 2e-4, 0.03, 4.0), (2e-3, 3.0))
    points = [(n, kv, true.of(n, kv)) for n in (1, 2, 8, 64) for kv in (0, 100, 1000)]
    found = Latency.fit(points)
    assert found.prefill == pytest.approx(true.prefill)
    assert found.decode == pytest.approx(true.decode)
    write_latency(tmp_path / "a.json", (true, found))
    assert read_latency(tmp_path / "a.json") == (true, found)
    with pytest.raises(ValueError, match="calls that read one token to fit 2 coefficients"):
        Latency.fit([point for point in points if point[0] > 1])
    with pytest.raises(ValueError, match="several tokens to fit 4"):
        Latency.fit([point for point in points if point[1] == 0])
    one = '{"prefill": [0, 0, 1, 2], "decode": [0, 1]}'
    odd = one.replace("2", '"x"')
    for text in ('{"small": {}}', "[]", "\x93", f'{{"small": {one}, "large": {odd}}}', "NaN"):
        (tmp_path / "b.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="make it with hone-rstitch profile"):
            read_latency(tmp_path / "b.json")


def test_a_text_takes_the_sum_of_its_calls():
    small, large = Latency((0, 0, 1.0, 0), (0.5, 2.0)), Latency((0, 0, 10.0, 0), (0, 7.0))
    assert text_latency((small, large), [Call(SMALL, 5, 0), Call(SMALL, 1, 5), Call(LARGE, 3, 0)]) == 5 + 4.5 + 30


def test_missing_latencies_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.json; expected the latency\.json of hone-rstitch"):
        read_latency(tmp_path / "none.json")


def test_calls_are_timed_within_the_models_positions(command, packaged, tmp_path):
    argv = ("profile", "--rounds", "1", "--tokens", "1", "2", "4", "8", "--quiet", "--out", tmp_path / "run")
    code, _, err = command(*argv, "--cached", "0", "249")
    assert code == 1
    assert "calls of up to 8 tokens after 249 take 257 positions; the small model has 256" in err
    code, out, err = command(*argv[:-1], tmp_path / "other", "--cached", "0", "248")
    assert code == 0, err
    assert "reads    8 after   248" in out
    read_latency(tmp_path / "other/artifacts/latency.json")


@pytest.mark.parametrize("values", [{"tokens": (1, 8, 64)}, {"cached": (32,)}, {"tokens": (2, 2, 8, 8)}])
def test_calls_that_no_fit_can_follow_are_refused_before_they_are_timed(values):
    with pytest.raises(ValueError, match="the fit wants three different numbers of tokens above 1, and two of cached"):
        ProfileConfig(**values)
