import json
import subprocess
import sys

import pytest
from hone_core.cli import Verb, run_cli
from hone_core.processes import Processes

WORKER = """
import json, sys
from pathlib import Path
from hone_core.processes import Processes
from hone_core.runs import Run

together = Processes.of_launcher()
out = Path(sys.argv[1])
said = [together.share("value", {"rank": together.rank, "turn": turn}) for turn in range(2)]
taken = [together.take("items") for _ in range(3)]
run = Run.start(package="hone-core", verb="x", out=out / "run" if together.main else None, processes=together)
with run:
    run.row("rank", together.rank, better="none")
    run.log(step=1, rank=together.rank)
(out / f"{together.rank}.json").write_text(json.dumps([said, taken, str(run.path)]))
together.wait("end")
assert all((out / f"{rank}.json").is_file() for rank in range(together.count))
"""


VERB = """
from dataclasses import dataclass

import torch
import torch.distributed as dist
from hone_core.cli import Verb, run_cli
from hone_core.runs import Report, Run

@dataclass(frozen=True)
class Config:
    seed: int = 0

def work(cfg: Config, run: Run) -> Report:
    dist.init_process_group("gloo")
    for _ in range(20):
        dist.all_reduce(torch.ones(4))
    return Report.of(run)

if __name__ == "__main__":
    try:
        run_cli("hone-core", {"work": Verb(config="verb:Config", run="verb:work", help="Work.", shared=True)}, "")
    except SystemExit as stop:
        assert stop.code in (0, None)
    assert not dist.is_initialized()
"""


def test_one_process_alone():
    alone = Processes()
    assert alone.main
    assert alone.share("x", 3) == 3
    assert [alone.take("a"), alone.take("a"), alone.take("b")] == [0, 1, 0]
    alone.wait("end")
    alone.end()
    alone.alone("eval")
    with pytest.raises(ValueError, match="eval runs in one process; it was launched in 2"):
        Processes(0, 2).alone("eval")


def test_two_processes_share_values_work_and_a_run(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(worker), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for said, _, path in found:
        assert said == [{"rank": 0, "turn": 0}, {"rank": 0, "turn": 1}]
        assert path == str(tmp_path / "run")
    assert sorted(found[0][1] + found[1][1]) == list(range(6))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "done"
    assert [row["value"] for row in results["rows"]] == [0]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1, "rank": 0.0}\n'


def test_a_verb_ends_the_group_that_it_made(tmp_path):
    (tmp_path / "verb.py").write_text(VERB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "verb.py"), "work", "--device", "cpu", "--quiet", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_verb_for_one_process_refuses_more(monkeypatch, capsys, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    lines = ["from dataclasses import dataclass", "@dataclass(frozen=True)", "class Config:", "    seed: int = 0"]
    (tmp_path / "one_process.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    verb = Verb(run="hone_core.runs:Report", help="Nothing.", config="one_process:Config")
    with pytest.raises(SystemExit) as end:
        run_cli("hone-core", {"x": verb}, "", ["x"])
    assert end.value.code == 2
    assert "x runs in one process; it was launched in 2. Leave the launcher out" in capsys.readouterr().err


def test_devices_of_several_processes(monkeypatch):
    import torch
    from hone_core.devices import resolve_device

    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(resolve_device("auto")) == str(resolve_device("cuda")) == "cuda:1"
    assert str(resolve_device("cuda:0")) == "cuda:0"
    assert str(resolve_device("cpu")) == "cpu"
