import pytest
from hone_core.config import from_dict, to_dict
from hone_knockout.config import PRESETS, Knockout, KnockoutConfig, format_layers, parse_layers


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = PRESETS[name].config
    assert from_dict(KnockoutConfig, to_dict(config)) == config
    assert PRESETS[name].provenance


def test_published_recipe():
    config = PRESETS["exit-window-7b"].config
    config.check(28)
    assert config.exit == 18
    assert config.knockouts[0].layers == tuple(range(8))
    assert config.label == "VT 0-7 + exit 18"
    assert KnockoutConfig().label == "baseline"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "TV", "layers": (0,)}, "kind must be one of"),
        ({"kind": "LV", "layers": ()}, "at least one layer"),
        ({"kind": "LV", "layers": (0, 0)}, "distinct"),
        ({"kind": "LV", "layers": (-1,)}, "counted from 0"),
        ({"kind": "LV", "layers": (0,), "frames": ()}, "at least one"),
        ({"kind": "LV", "layers": (0,), "source": "visual"}, "belong to kind='span'"),
        ({"kind": "span", "layers": (0,)}, "needs both"),
        ({"kind": "LV", "layers": (0,), "control": "shuffled"}, "control must be one of"),
    ],
)
def test_bad_knockout(values, message):
    with pytest.raises(ValueError, match=message):
        Knockout(**values)


@pytest.mark.parametrize("layers", [5, "5", ("5",), (5.0,), [5], range(5, 7)])
def test_layers_that_are_no_tuple_of_numbers(layers):
    with pytest.raises(TypeError, match=r"layers must be a tuple of whole numbers, such as \(4, 5\); got "):
        Knockout(kind="LV", layers=layers)
    with pytest.raises(TypeError, match="frames must be a tuple of whole numbers"):
        Knockout(kind="LV", layers=(5,), frames=layers)


@pytest.mark.parametrize("knockouts", [(3,), (None,), [Knockout(kind="LV", layers=(5,))]])
def test_knockouts_that_are_none(knockouts):
    with pytest.raises(TypeError, match="knockouts must be a tuple of Knockout; got "):
        KnockoutConfig(knockouts=knockouts)


@pytest.mark.parametrize("exit", [2.5, 18.0, True, "18"])
def test_an_exit_that_is_no_whole_number(exit):
    with pytest.raises(TypeError, match="exit must be a whole number of layers, such as 18; got "):
        KnockoutConfig(exit=exit)


def test_bad_config():
    with pytest.raises(ValueError, match="at least one layer"):
        KnockoutConfig(exit=0)
    with pytest.raises(ValueError, match=r"layers \[5\] have no visual tokens"):
        KnockoutConfig(exit=4, knockouts=(Knockout(kind="VT", layers=(2, 5)),))
    with pytest.raises(ValueError, match=r"layers are 0 .. 3 \(1 .. 4 in the paper's count\)"):
        KnockoutConfig(knockouts=(Knockout(kind="VT", layers=(4,)),)).check(4)
    # An exit after the last layer would do nothing and pass for a result.
    for exit in (4, 5):
        with pytest.raises(ValueError, match="exit must be at most 3"):
            KnockoutConfig(exit=exit).check(4)
    KnockoutConfig(exit=3).check(4)
    with pytest.raises(ValueError, match="DeepStack"):
        KnockoutConfig(exit=2).check(8, deepstack_layers=3)
    KnockoutConfig(exit=3).check(8, deepstack_layers=3)


def test_labels():
    assert Knockout(kind="LV", layers=(3, 1, 2, 7)).label == "LV 1-3,7"
    assert Knockout(kind="LV", layers=(0,), control="random", frames=(0, 1)).label == "LV random frames 0-1 0"
    assert Knockout(kind="span", source="question", target="last", layers=(1,)).label == "question->last 1"


def test_layers_from_text():
    assert parse_layers("0-3, 7") == (0, 1, 2, 3, 7)
    assert parse_layers("all", 3) == (0, 1, 2)
    assert parse_layers("1-", 3) == (1, 2)
    assert format_layers(parse_layers("5,0-2")) == "0-2,5"
    for text, message in (
        ("a", "numbers from 0"),
        ("3-1", "upwards"),
        ("all", "needs the number"),
        ("", "numbers from 0"),
        ("1,1", "named twice"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_layers(text)
    with pytest.raises(ValueError, match=r"0 .. 2; got '5'"):
        parse_layers("5", 3)
