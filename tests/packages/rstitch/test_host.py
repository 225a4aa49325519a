import pytest
import torch
from hone_core.errors import CheckpointError
from hone_rstitch import host
from hone_rstitch.config import LARGE, SMALL, SamplingConfig, StitchConfig
from hone_rstitch.data import grade, products
from hone_rstitch.host import ROWS, build_tokenizer, load_host, open_pair


def test_tokenizers_are_of_one_family():
    small, large = build_tokenizer("small"), build_tokenizer("large")
    text = "123*45=615+4920=#5535."
    assert small.encode(text) == large.encode(text)
    assert small.decode(small.encode(text)) == text
    assert small.eos_token_id != large.eos_token_id
    assert len(large) < ROWS["large"]


def test_a_pair_translates_ends_and_leaves_padding_out(untrained):
    pair = load_host(path=untrained)
    eos = [tokenizer.eos_token_id for tokenizer in (pair.small_tokenizer, pair.tokenizer)]
    assert int(pair.vocabulary.to_small[eos[1]]) == eos[0]
    assert pair.vocabulary.eos == (eos[1],)
    assert (pair.vocabulary.to_small[len(pair.tokenizer) :] == -1).all()


def test_the_verbose_model_takes_the_large_ones_place(untrained):
    path = untrained
    plain, verbose = load_host(path=path), load_host(path=path, verbose=True)
    assert torch.equal(plain.small.lm_head.weight, verbose.small.lm_head.weight)
    assert not torch.equal(plain.large.lm_head.weight, verbose.large.lm_head.weight)


def test_a_missing_pair_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="train-host"):
        open_pair(path=tmp_path / "host.safetensors")
    with pytest.raises(CheckpointError, match="pairs are of seeds 0, 1, 2"):
        open_pair(7)


def test_packaged_pairs_passed_their_gates_and_are_small():
    for seed in (0, 1, 2):
        stored = open_pair(seed)
        assert stored.facts.passed
        assert stored.facts.seed == seed
    folder = host.packaged_pair(0).parent
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6


def test_the_packaged_pair_is_as_good_as_its_sidecar_says():
    pair = load_host(0)
    problems = products(96, seed=20_000)
    facts = open_pair(0).facts
    for policy, name, tokens in (("small", "small", SMALL), ("large", "large", LARGE)):
        texts, output = pair.answer(
            [problem.question for problem in problems], StitchConfig(policy=policy), SamplingConfig()
        )
        right = sum(grade(text, problem.answer) for text, problem in zip(texts, problems, strict=True)) / 96
        assert abs(right - facts.result[name]) < 0.15
        assert all(usage.tokens[1 - tokens] == 0 for usage in output.usage)
