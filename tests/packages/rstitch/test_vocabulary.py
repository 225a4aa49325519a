import pytest
import torch
from hone_rstitch.config import LARGE, SMALL
from hone_rstitch.vocabulary import Vocabulary, check_text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ALPHABET = "abcdefghij"


def tokenizer(special, alphabet=ALPHABET, plain=()):
    """Characters, then special tokens in order, as the Qwen family has them after its merges."""
    words = {word: at for at, word in enumerate([*alphabet, "<unk>"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    core.add_tokens([AddedToken(token) for token in plain])
    return PreTrainedTokenizerFast(tokenizer_object=core)


# As R1-Distill and QwQ: the end of text, chat markers and the marks of thinking have other ids or names.
SMALL_TOKENS = tokenizer(["<end>", "<User>", "<Assistant>"], plain=["<think>", "</think>"])
LARGE_TOKENS = tokenizer(["<endoftext>", "<im_start>", "<im_end>", "<box>"], plain=["<think>", "</think>"])
FIRST = len(ALPHABET) + 1


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.of(
        SMALL_TOKENS,
        LARGE_TOKENS,
        rows_small=20,
        rows_large=24,
        eos_small=[FIRST],
        eos_large=[FIRST + 2, FIRST],
    )


def test_ordinary_tokens_keep_their_ids(vocabulary):
    assert vocabulary.to_small[:FIRST].tolist() == list(range(FIRST))


def test_added_tokens_go_by_their_text(vocabulary):
    for token in ("<think>", "</think>"):
        large, small = (t.convert_tokens_to_ids(token) for t in (LARGE_TOKENS, SMALL_TOKENS))
        assert large != small
        assert int(vocabulary.to_small[large]) == small


def test_ends_of_text_go_by_what_they_do(vocabulary):
    im_end, end = LARGE_TOKENS.convert_tokens_to_ids("<im_end>"), SMALL_TOKENS.convert_tokens_to_ids("<end>")
    assert int(vocabulary.to_small[im_end]) == end
    # <endoftext> has <end>'s id and is another token: the small model has none for it.
    assert LARGE_TOKENS.convert_tokens_to_ids("<endoftext>") == end
    assert int(vocabulary.to_small[end]) == -1


def test_what_ends_a_text_for_the_small_model_alone_is_closed_to_it():
    end, other = (LARGE_TOKENS.convert_tokens_to_ids(token) for token in ("<im_end>", "<endoftext>"))
    of = {"rows_small": 24, "rows_large": 24, "eos_small": [end, other]}
    one = Vocabulary.of(LARGE_TOKENS, LARGE_TOKENS, eos_large=[end], **of)
    both = Vocabulary.of(LARGE_TOKENS, LARGE_TOKENS, eos_large=[end, other], **of)
    assert (int(one.to_small[end]), int(one.to_small[other])) == (end, -1)
    assert (int(both.to_small[end]), int(both.to_small[other])) == (end, other)
    assert torch.isinf(one.read(torch.zeros(1, 24), SMALL)[0, other])


def test_markers_and_padding_have_no_counterpart(vocabulary):
    for token in ("<im_start>", "<box>"):
        assert int(vocabulary.to_small[LARGE_TOKENS.convert_tokens_to_ids(token)]) == -1
    assert vocabulary.to_small[len(LARGE_TOKENS) :].tolist() == [-1] * (24 - len(LARGE_TOKENS))
    assert vocabulary.size == FIRST + 3


def test_logits_of_both_models_stand_on_the_large_ids(vocabulary):
    small = torch.arange(20.0)[None]
    read = vocabulary.read(small, SMALL)[0]
    im_end = LARGE_TOKENS.convert_tokens_to_ids("<im_end>")
    assert read[im_end] == FIRST
    assert read[4] == 4
    assert torch.isinf(read[LARGE_TOKENS.convert_tokens_to_ids("<im_start>")])
    large = vocabulary.read(torch.arange(24.0)[None], LARGE)[0]
    # Both ends of the large model stay open to it, the small model's markers and padding do not.
    assert large[FIRST] == FIRST
    assert large[im_end] == im_end
    assert torch.isinf(large[LARGE_TOKENS.convert_tokens_to_ids("<box>")])
    assert torch.isinf(large[-1])


def test_text_reaches_the_small_model_in_its_own_ids(vocabulary):
    ids = LARGE_TOKENS.encode("ab<think>c")
    assert vocabulary.small_ids(ids) == SMALL_TOKENS.encode("ab<think>c")
    with pytest.raises(ValueError, match="small_input_ids"):
        vocabulary.small_ids([LARGE_TOKENS.convert_tokens_to_ids("<im_start>")])
    assert vocabulary.small_ids([]) == []


def test_one_end_of_text_in_common_needs_no_role():
    found = Vocabulary.of(
        tokenizer(["<endoftext>", "<x>"]),
        tokenizer(["<im_end>", "<endoftext>"]),
        rows_small=20,
        rows_large=20,
        eos_small=[FIRST],
        eos_large=[FIRST, FIRST + 1],
    )
    assert int(found.to_small[FIRST + 1]) == FIRST
    assert int(found.to_small[FIRST]) == -1


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (tokenizer(["<end>"], alphabet="abcdefghik"), "'j'"),
        (tokenizer(["<end>"], alphabet="bacdefghij"), "'a'"),
    ],
)
def test_pairs_that_disagree_are_refused(other, match):
    with pytest.raises(ValueError, match=match):
        Vocabulary.of(SMALL_TOKENS, other, rows_small=20, rows_large=20, eos_small=[FIRST], eos_large=[FIRST])


def test_other_merges_are_refused():
    other = tokenizer(["<end>"])
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    with pytest.raises(ValueError, match="differently"):
        Vocabulary.of(SMALL_TOKENS, other, rows_small=20, rows_large=20, eos_small=[FIRST], eos_large=[FIRST])


def test_a_model_without_an_end_is_refused():
    with pytest.raises(ValueError, match="eos_token_id"):
        Vocabulary.of(SMALL_TOKENS, LARGE_TOKENS, rows_small=20, rows_large=24, eos_small=[], eos_large=[3])


def test_shared():
    found = Vocabulary.shared(6, 8, [2])
    assert found.to_small.tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert found.size == 6


def test_a_vocabulary_without_ends_is_read():
    vocabulary = Vocabulary.shared(3, 5, ())
    logits = torch.arange(5.0)[None]
    assert vocabulary.read(logits, 1)[0].isfinite().tolist() == [True, True, True, False, False]


def test_a_text_that_would_be_read_otherwise_is_refused():
    check_text(SMALL_TOKENS, "abc<think>j<User>")
    with pytest.raises(ValueError, match=r"a b c d e f g h i j; it would read 'x', ' ', 'é' as <unk>"):
        check_text(SMALL_TOKENS, "ax xé b")
    with pytest.raises(ValueError, match=r"'r' and 4 more as <unk>"):
        check_text(SMALL_TOKENS, "klmnopqrstuvk")


def test_a_text_may_name_the_unknown_token_and_bytes_read_everything():
    core = Tokenizer(models.WordLevel({"two": 0, "words": 1, "<unk>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=core)
    check_text(words, "two <unk> words")
    with pytest.raises(ValueError, match=r"can read; it would read 'three' as <unk>"):
        check_text(words, "three words")
    letters = {letter: at for at, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    core = Tokenizer(models.BPE(letters, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel()
    check_text(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<|endoftext|>"), "naïve 漢字 <|endoftext|>")
