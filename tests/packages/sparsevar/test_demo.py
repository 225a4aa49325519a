from hone_core.runs import Run
from hone_sparsevar.config import DemoConfig
from hone_sparsevar.demo import SHOWN, demo


def test_pictures_and_a_row_for_each(untrained, tmp_path):
    cfg = DemoConfig(host=untrained, limit=2)
    run = Run.start(
        config=cfg, package="hone-sparsevar", verb="demo", out=tmp_path / "run", seed=0, device="cpu", quiet=True,
        command="x",
    )  # fmt: skip
    with run:
        report = demo(cfg, run)
    assert report.sheet.stat().st_size > 1000
    assert report.maps.stat().st_size > 1000
    assert {row.variant for row in report.rows} == set(SHOWN)
    assert all(name in str(report) for name in SHOWN)
