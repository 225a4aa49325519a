import json

import costs
import pytest
from tables import TableError


def test_a_shared_forward_is_a_part_that_divides_and_a_rest():
    assert costs.shared(10.0, 6.0, 1) == 10.0
    assert costs.shared(10.0, 6.0, 2) == 6.0
    assert costs.shared(10.0, 6.0, 8) == pytest.approx(8 / 8 + 2)
    assert costs.shared(10.0, 5.0, 8) == pytest.approx(10 / 8)


@pytest.mark.parametrize("two", [4.9, 10.1])
def test_times_that_no_division_explains_are_refused(two):
    with pytest.raises(ValueError, match="one / 2 <= two <= one"):
        costs.shared(10.0, two, 8)


def test_a_value_is_the_only_one_that_fits(tmp_path):
    (tmp_path / "results" / "x").mkdir(parents=True)
    rows = [{"metric": "time", "value": 2.5, "variant": name, "labels": {"n": 1}} for name in "aab"]
    (tmp_path / "results" / "x" / "y.json").write_text(json.dumps({"rows": rows}))
    assert costs.measured("x/y.json", {"variant": "b", "n": 1}, tmp_path) == 2.5
    for variant, count in [("a", 2), ("c", 0)]:
        with pytest.raises(TableError, match=f"{count} results fit"):
            costs.measured("x/y.json", {"variant": variant}, tmp_path)


def test_rates_are_of_the_measured_times():
    for _, one, *rates, _, _ in costs.independent():
        number, unit = one.split()
        hour = {"s": 1, "ms": 1000}[unit] * 3600 / float(number)
        counted = [float(rate.replace(",", "")) for rate in rates]
        assert counted[1:] == pytest.approx([8 * counted[0], 1000 * counted[0]], rel=0.01)
        if unit == "s":
            assert counted[0] == pytest.approx(hour, rel=0.01)


def test_numbers_have_three_digits_that_count():
    assert [costs._number(value) for value in (1234567.0, 57.94, 464.2, 0.5)] == ["1,230,000", "57.9", "464", "0.5"]
