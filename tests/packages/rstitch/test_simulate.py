import pytest
from hone_rstitch.config import SimulateConfig
from hone_rstitch.simulate import Load, can_start, simulate, throughput

R2R = Load(p=0.35, q=1.0, small_ms=6.0, large_ms=27.9)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("requests", "batch", "published"),
    [
        (2, 1, 99.0),
        (2, 2, 110.3),
        (3, 1, 142.3),
        (3, 2, 158.1),
        (3, 3, 151.9),
        (4, 1, 187.2),
        (4, 2, 195.4),
        (4, 3, 207.9),
        (4, 4, 190.7),
    ],
)
def test_published_predictions(requests, batch, published):
    # TokenRouter's offline model of R2R routing, in tokens per second.
    found = throughput(R2R, requests=requests, batches=(1, batch), tokens=6_000_000)
    assert found == pytest.approx(published, abs=0.2)


@pytest.mark.parametrize(("p", "q", "discard"), [(0.2, 1.0, True), (0.2, 0.4, True), (0.2, 0.4, False)])
def test_one_request_is_a_chain(p, q, discard):
    load = Load(p=p, q=q, small_ms=5.0, large_ms=20.0, discard=discard)
    # Per excursion: 1 / p small steps, of which the last may be thrown away, then 1 / q large ones.
    tokens = 1 / p - discard + 1 / q
    seconds = (5.0 / p + 20.0 / q) / 1000
    assert throughput(load, requests=1) == pytest.approx(tokens / seconds, rel=0.01)


def test_alone_the_small_model_serves_all_at_once():
    load = Load(p=0.0, q=1.0, small_ms=5.0, large_ms=20.0)
    assert throughput(load, requests=7, tokens=7000) == pytest.approx(7 * 200)


def test_one_device_serves_less():
    apart, shared = (
        throughput(Load(p=0.35, q=1.0, small_ms=6.0, large_ms=27.9, shared=shared), requests=4, tokens=200_000)
        for shared in (False, True)
    )
    assert shared < 0.9 * apart


def test_what_can_deadlock_is_refused():
    assert can_start(4, (1, 4))
    assert not can_start(4, (1, 5))
    assert not can_start(4, (3, 3))
    with pytest.raises(ValueError, match="all would wait"):
        throughput(R2R, requests=2, batches=(2, 2))


def test_the_verb_tries_what_can_start(start):
    cfg = SimulateConfig(requests=(1, 3), large_batches=(1, 2, 3), tokens=2000)
    with start(cfg) as run:
        report = simulate(cfg, run)
    tried = {(row.labels["requests"], row.labels["large_batch"]) for row in report.rows}
    assert tried == {(1, 1), (3, 1), (3, 2), (3, 3)}
    assert str(report).count("best") == 2


def test_the_verb_refuses_when_nothing_can_start(start):
    cfg = SimulateConfig(requests=(1,), large_batches=(2,))
    with pytest.raises(ValueError, match="deadlock"), start(cfg) as run:
        simulate(cfg, run)
