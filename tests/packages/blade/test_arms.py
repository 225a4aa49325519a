"""The arms of distillation, on a tiny untrained host."""

import numpy as np
import pytest
import torch
from hone_blade import arms
from hone_blade.arms import ARMS, DIFFERENCES, frechet, trainings, verdicts
from hone_blade.config import Comparison, ReproduceConfig, StudentsConfig, TDMConfig
from hone_blade.reproduce import ReproduceReport, reproduce
from hone_core.runs import Row, Run
from hone_video.host import Host, save_host
from hone_video.host_config import HostConfig

TINY = HostConfig(
    frames=4, height=16, width=16, layers=1, heads=1, head_dim=32, ffn_dim=32, text_dim=16, steps=2, solver="euler",
    guidance=1.0,
)  # fmt: skip
STUDENTS = StudentsConfig(
    updates=2,
    train_batch=2,
    lora_rank=2,
    tdm=TDMConfig(student_steps=3, teacher_guidance=2.0),
    comparison=Comparison(block=16, density=0.75, pool=4, samples=4),
)


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "TEACHER_STEPS", 2)
    monkeypatch.setattr(arms, "REPEATED", (2, 2))
    made = Host.untrained(TINY)
    torch.nn.init.normal_(made.transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    host = save_host(made, tmp_path / "host.safetensors")

    def start(gate=0.0, name="run", seeds=2, workers=1):
        options = {"gate": gate, "seeds": seeds, "workers": workers, "host": host}
        cfg = ReproduceConfig(claim="distillation", students=STUDENTS, prompts=3, batch=2, **options)
        with Run.start(package="hone-blade", verb="reproduce", config=cfg, out=tmp_path / name) as run:
            run.device, run.quiet = "cpu", True
            return reproduce(cfg, run)

    return start


def test_every_arm_is_trained_drawn_and_compared_and_a_stopped_run_goes_on(start, tmp_path, monkeypatch):
    real, calls = arms.work, []

    def work(cfg, folder, job, device):
        calls.append(job)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(cfg, folder, job, device)

    monkeypatch.setattr(arms, "work", work)
    with pytest.raises(KeyboardInterrupt):
        start()
    report = start()
    assert calls[3] == calls[4]
    assert len(calls) == 1 + 2 * (1 + len(trainings(STUDENTS, 64, 0)))
    accuracy = {row.variant: row for row in report.rows if row.metric == "accuracy"}
    assert accuracy.keys() == ARMS.keys()
    assert {row.n for row in accuracy.values()} == {6}
    assert {row.variant for row in report.rows if row.metric == "psnr"} == {"C", "C asa", "C 2 dense", "D"}
    text = str(report)
    assert text.count("\nD - ") == len(DIFFERENCES)
    assert "the central claim" in text
    folder = tmp_path / "run"
    assert (folder / "figures" / "arms.svg").exists()
    assert (folder / "figures" / "arms_clips.png").exists()
    kept = sorted(file.name for file in (folder / "artifacts").iterdir() if file.suffix != ".pt")
    assert [name for name in kept if name.endswith("safetensors")] == ["D-0.safetensors", "D-1.safetensors"]
    assert not [name for name in kept if "checkpoint" in name]
    with Run.start(package="hone-blade", verb="reproduce", config=None, out=tmp_path / "other") as other:
        other.rows = list(report.rows)
        assert str(ReproduceReport.of(other)).splitlines()[:-1] == text.splitlines()[:-1]


def test_a_teacher_below_its_gate_is_not_distilled(start, tmp_path):
    with pytest.raises(RuntimeError, match=r"must reach 100% of digits and directions .* Train the host longer"):
        start(gate=1.0)
    assert {file.name for file in (tmp_path / "run" / "artifacts").glob("*.pt")} == {"A-0.pt"}


@pytest.mark.slow
def test_processes_side_by_side_find_the_same(start):
    one, two = start(seeds=1), start(seeds=1, workers=2, name="two")

    def students(report):
        # What the processes import is not patched: the teacher takes all its steps there.
        return [(row.metric, row.value) for row in report.rows if row.metric == "accuracy" and row.variant != "A"]

    assert students(one) == students(two)
    psnr = [[row.value for row in report.rows if row.metric == "psnr"] for report in (one, two)]
    assert psnr[0] == psnr[1]


def test_students_differ_from_d_in_one_thing():
    made = trainings(STUDENTS, 64, 5)
    of_d = {name: getattr(made["D"], name) for name in made["D"].__slots__}
    changes = {}
    for arm, cfg in made.items():
        changes[arm] = {name for name, value in of_d.items() if getattr(cfg, name) != value}
    assert changes.pop("D") == set()
    assert changes.pop("B") == changes.pop("F") == {"dense_share"}
    assert changes.pop("J") == {"tdm"}
    assert set(changes) == {"E", "G", "H", "I"}
    assert set.union(*changes.values()) == {"attention"}


def test_frechet_distance_of_known_normals():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200000, 2)), 2 * rng.standard_normal((200000, 2)) + 3
    assert frechet(a, b) == pytest.approx(2 * 3**2 + 2 * (2 - 1) ** 2, rel=0.01)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    # In one axis by the closed form of one dimension.
    x, y = a[:50, :1], b[:50, :1]
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert frechet(x, y) == pytest.approx(expected)


def rows(**ends):
    """Differences of accuracy (D minus the arm), and of C in Frechet distance."""
    made = [
        Row(metric="accuracy_difference", variant=f"D - {arm}", value=sum(both) / 2, interval=both, better="none")
        for arm, both in ends.items()
        if arm != "far"
    ]
    both = ends["far"]
    return [
        *made,
        Row(metric="frechet_difference", variant="D - C", value=sum(both) / 2, interval=both, better="none"),
    ]


UP, DOWN, NONE = (0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2)


NOTHING = "no: on accuracy better, on Frechet distance no difference found"


@pytest.mark.parametrize(
    ("ends", "answers", "claim"),
    [
        ({"C": UP, "far": DOWN, "B": NONE, "F": UP, "G": UP, "H": UP}, ["yes"] * 5, "confirmed"),
        (
            {"C": UP, "far": NONE, "B": UP, "F": NONE, "G": NONE, "H": DOWN},
            [NOTHING, "yes", "not confirmed: no difference found", "no: no difference found", "no: worse"],
            "not confirmed",
        ),
        (
            {"C": UP, "far": DOWN, "B": DOWN, "F": DOWN, "G": UP, "H": UP},
            ["yes", "no: worse", "no: sequential is better here", "yes", "yes"],
            "not confirmed",
        ),
    ],
)
def test_the_verdict_follows_the_rules(ends, answers, claim):
    *lines, last = verdicts(rows(**ends))
    assert [line.split("): ")[1] for line in lines] == answers
    assert last == f"the central claim, the first two together: {claim} here"
