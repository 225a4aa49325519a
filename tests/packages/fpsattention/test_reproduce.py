import dataclasses

import pytest
from hone_core.runs import Row, Run
from hone_fpsattention import reproduce as module
from hone_fpsattention.config import PRESETS, ReproduceConfig
from hone_fpsattention.evaluate import mean_density
from hone_fpsattention.reproduce import ARMS, ReproduceReport, constant_window, reproduce, verdicts
from hone_video.host import load_host


def test_every_arm_has_its_rows_and_a_run_goes_on(tiny_host, tmp_path, monkeypatch):
    cfg = ReproduceConfig(host=tiny_host, prompts=2, seeds=2, train_steps=2, train_batch=2, batch=2, glyphs="segments")

    def start():
        return Run.start(
            package="hone-fpsattention", verb="reproduce", config=cfg, out=tmp_path / "run", device="cpu", quiet=True
        )

    right = module.compare
    calls = []

    def broken(*args, **options):
        calls.append(options["seed"])
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return right(*args, **options)

    monkeypatch.setattr(module, "compare", broken)
    with pytest.raises(RuntimeError, match="power cut"), start() as run:
        reproduce(cfg, run)
    with start() as run:
        report = reproduce(cfg, run)
    assert calls == [0, 1, 1]  # the first seed is not sampled again
    accuracy = [row for row in report.rows if row.metric == "accuracy"]
    assert [row.variant for row in accuracy] == list(ARMS)
    assert all(row.n == 4 for row in accuracy)
    text = str(report)
    assert text == str(ReproduceReport.of(run))
    assert "Does scale granularity matter?" in text


def test_the_constant_window_reads_as_much_or_the_next_less():
    host = load_host()
    host.config = dataclasses.replace(host.config, guidance=1.0)
    staged = PRESETS["tiny-wide"].config
    found = constant_window(host, staged)
    assert mean_density(host, staged) == pytest.approx(0.5625)
    assert mean_density(host, staged.constant(found)) == pytest.approx(0.5625)


def cells(**accuracy):
    """Rows of every arm: accuracy intervals as given, else (0.90, 0.94); PSNR 30 +- 1."""
    found = {}
    for arm in ARMS:
        low, high = accuracy.get(arm.replace(" ", "_"), (0.90, 0.94))
        found[arm] = {
            "accuracy": Row(metric="accuracy", value=(low + high) / 2, better="higher", interval=(low, high)),
            "psnr": Row(metric="psnr", value=30.0, better="higher", interval=(29.0, 31.0)),
        }
    return found


def test_verdicts():
    said = verdicts(cells(both=(0.1, 0.2), flow=(0.5, 0.6)))
    assert "rescued: both, trained on dense velocity." in said[0]
    assert said[1].endswith("No.")
    assert said[2].endswith("No.")
    assert "nothing to rescue" in verdicts(cells())[0]
    assert "not rescued" in verdicts(cells(both=(0.1, 0.2), flow=(0.5, 0.6), distillation=(0.7, 0.8)))[0]
    assert "Yes: the schedule" in verdicts(cells(constant_distillation=(0.7, 0.8)))[1]
    assert "Yes: the constant window" in verdicts(cells(distillation=(0.7, 0.8)))[1]
    finer = cells()
    finer["token"]["psnr"] = Row(metric="psnr", value=33.0, better="higher", interval=(32.0, 34.0))
    assert verdicts(finer)[2].endswith("Yes.")
