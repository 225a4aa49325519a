import pytest
from hone_visual_ar import HART_1024, VAR_256, VAR_512, ScaleSchedule, infinity_schedule
from hone_visual_ar.schedules import ASPECTS


def test_published_sizes():
    assert infinity_schedule("1M").total == 10521
    assert [infinity_schedule(size).last[0] for size in ("0.06M", "0.25M", "0.60M", "1M")] == [16, 32, 48, 64]
    assert (VAR_256.total, VAR_512.total, HART_1024.total) == (680, 2240, 9451)


def test_every_aspect_has_its_mirror_and_the_rope_grid_of_the_largest_size():
    assert len(ASPECTS) == 15
    tall, wide = infinity_schedule("0.06M", 1.25), infinity_schedule("0.06M", 0.8)
    assert [grid[::-1] for grid in tall.grids] == list(wide.grids)
    assert tall.rope_grid == (70, 56)
    assert wide.rope_grid == (56, 70)
    for aspect in ASPECTS:
        height, width = infinity_schedule("1M", aspect).last
        assert abs(height / width - aspect) < 0.01


def test_positions_and_scales_from_the_end():
    schedule = ScaleSchedule(((1, 1), (2, 2), (3, 2)))
    assert [schedule.start(k) for k in range(3)] == [0, 1, 5]
    assert schedule.total == 11
    assert schedule.resolve(-1) == 2
    with pytest.raises(ValueError, match="has 3 scales, 0 to 2; got scale 3"):
        schedule.resolve(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: infinity_schedule("2M"), "pixels must be one of 0.06M"),
        (lambda: infinity_schedule("1M", 1.1), "no schedule of height / width 1.1; it has 0.333, .* 3"),
        (lambda: ScaleSchedule(()), "at least one scale"),
        (lambda: ScaleSchedule(((2, 2), (1, 2))), "never shrink; got .1, 2. after .2, 2."),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()
