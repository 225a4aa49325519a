import subprocess
import sys

import pytest
import torch
from hone_video.clips import random_labels
from hone_video.prompts import FIELDS, VOCABULARY, describe, parse_prompt

DEFAULT = {"digit": "0", "color": "white", "direction": "right", "speed": "fast", "background": "plain"}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red 7 moving left, slow", {"digit": "7", "color": "red", "direction": "left", "speed": "slow"}),
        ("Fast. Up right! the NINE cyan", {"digit": "9", "color": "cyan", "direction": "up-right", "speed": "fast"}),
        (
            "a white digit 0 moving down - left, medium, on a textured background",
            {"digit": "0", "direction": "down-left", "speed": "medium", "background": "textured"},
        ),
    ],
)
def test_prompts_are_read(prompt, words):
    assert parse_prompt(prompt) == [VOCABULARY[field].index({**DEFAULT, **words}[field]) for field in FIELDS]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a purple 7 moving left, slow", "unknown word 'purple'.*color: red green"),
        ("a red 7 moving left", "does not say the speed"),
        ("a red 7 or 8 moving left, slow", "unknown word 'or'"),
        ("a red 7 8 moving left, slow", "two values for digit"),
        ("", "digit and the color and the direction and the speed"),
    ],
)
def test_a_prompt_that_cannot_be_read_says_why(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt(prompt)


def test_describe_is_read_back():
    for row in random_labels(50, torch.Generator().manual_seed(1)):
        assert parse_prompt(describe(row)) == row.tolist()


def test_prompts_are_read_without_torch():
    code = "import sys, hone_video.prompts; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
