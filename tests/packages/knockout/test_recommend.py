import json

import pytest
from hone_knockout.config import EvalConfig, Knockout, KnockoutConfig
from hone_knockout.evaluate import BASELINE, configurations
from hone_knockout.recommend import choose, halves

LAYERS = 6
CFG = EvalConfig(settings=("global1", "local"), step=1)
FOUND = configurations(CFG, LAYERS)


def answers(wrong, count=100):
    """Every question right everywhere, but for the shares of questions that ``wrong`` gives by label."""
    made = {}
    for index in range(count):
        results = {label: {"p": [0.0, 1.0] if index < wrong.get(label, 0) * count else [1.0, 0.0]} for label in FOUND}
        made[f"q{index}"] = {"id": f"q{index}", "answer": 0, "category": "", "results": results}
    return made


def test_earliest_exit_and_widest_window_within_the_budget():
    wrong = {"global1 LV 0-5": 0.9, "global1 LV 1-5": 0.5, "global1 LV 2-5": 0.3}
    wrong |= {"local VT 0-4": 0.4, "local VT 0-5": 0.4}
    recipe = choose(answers(wrong), FOUND, num_layers=LAYERS)
    assert (recipe.exit, recipe.window) == (3, 4)
    # The window ends where the tokens leave.
    assert recipe.config == KnockoutConfig(knockouts=(Knockout(kind="VT", layers=(0, 1, 2)),), exit=3)
    assert recipe.exit_change.change == 0
    assert recipe.chosen_on + recipe.reported_on == 100
    assert "visual tokens leave before layer 3" in str(recipe)
    assert "in the first 3 layers (up to the exit; 4 layers, alone): +0.0 points" in str(recipe)
    shown = json.loads(json.dumps(recipe.to_dict()))
    assert (shown["exit"], shown["window"], shown["window_alone"]) == (3, 3, 4)
    assert shown["exit_change"]["change"] == 0


def test_a_late_layer_that_is_needed_forbids_every_earlier_exit():
    recipe = choose(answers({"global1 LV 4-5": 0.2}), FOUND, num_layers=LAYERS)
    assert recipe.exit == 5


def test_nothing_within_the_budget():
    recipe = choose(answers(dict.fromkeys(FOUND, 0.5) | {BASELINE: 0}), FOUND, num_layers=LAYERS)
    assert (recipe.exit, recipe.window) == (None, 0)
    assert recipe.config == KnockoutConfig()
    assert "none within the budget" in str(recipe)


def test_exit_is_never_before_the_last_deepstack_layer_or_before_any_layer():
    assert choose(answers({}), FOUND, num_layers=LAYERS, deepstack_layers=3).exit == 3
    assert choose(answers({}), FOUND, num_layers=LAYERS).exit == 1


def test_what_was_chosen_on_is_not_what_is_reported_on():
    made = answers({})
    first, second = halves(list(made))
    assert not set(first) & set(second)
    assert halves(list(made)[::-1]) == (first, second)
    assert halves(list(made), seed=1)[0] != first
    # Every question of the choosing half is right, every other is wrong under an exit at 2.
    for name in second:
        made[name]["results"]["global1 LV 2-5"]["p"] = [0.0, 1.0]
        made[name]["results"]["global1 LV 1-5"]["p"] = [0.0, 1.0]
    for name in first:
        made[name]["results"]["global1 LV 1-5"]["p"] = [0.0, 1.0]
    recipe = choose(made, FOUND, num_layers=LAYERS)
    assert recipe.exit == 2
    assert recipe.exit_change.change == -1.0


def test_bad_input():
    with pytest.raises(ValueError, match="no global1 configuration"):
        choose(answers({}), configurations(EvalConfig(settings=("local",)), LAYERS), num_layers=LAYERS)
    with pytest.raises(ValueError, match="not negative"):
        choose(answers({}), FOUND, num_layers=LAYERS, max_drop=-1)
    with pytest.raises(ValueError, match="at least two questions"):
        halves(["a"])
