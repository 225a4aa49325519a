"""What every package has in the same shape: files, README, verbs, configs, reports, handles, a demo that repeats."""

import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tables
import workspace
from hone_core.cli import Verb
from hone_core.config import from_dict, to_dict
from hone_core.errors import CheckpointError
from hone_core.flags import flags_of
from hone_core.handles import Handle
from hone_core.hosts import open_host
from hone_core.runs import Report, load_results
from hone_core.training import TrainReport

ROOT = workspace.ROOT
PACKAGES = [
    pytest.param(member, id=member.name)
    for member in workspace.members()
    # In an environment that holds only some members, the others are not there to test.
    if member.kind == "packages" and any(dist.name == member.name for dist in importlib.metadata.distributions())
]
FILES = ("method.py", "config.py", "models.py", "host.py", "demo.py", "train.py", "reproduce.py", "cli.py")
HEADINGS = (
    *("Install", "In 60 seconds", "From Python", "The tiny host", "Results", "Where the paper is"),
    *("Differences from the paper", "Limits and negative results", "Citation"),
)
VERBS = ("info", "demo", "bench", "reproduce", "train-host")
SMALLEST_DEMO = {
    "hone-blade": ("--limit", "1", "--steps", "1"),
    "hone-fpsattention": ("--limit", "1", "--steps", "1"),
    "hone-knockout": ("--limit", "8"),
    "hone-motion-anything": ("--limit", "2", "--steps", "1", "--text", "a person bows"),
    "hone-nar": ("--limit", "1"),
    "hone-pmloss": ("--size", "16", "--steps", "1"),
    "hone-rstitch": ("--limit", "6", "--taus", "0.03"),
    "hone-sparsevar": ("--limit", "1"),
    "hone-zipr1": ("--limit", "6", "--ps", "0.8"),
    "hone-zpressor": ("--limit", "1", "--views", "8", "--targets", "1", "--frames", "2"),
}
ATTACHABLE = {
    "hone-blade": "transformer",
    "hone-fpsattention": "transformer",
    "hone-knockout": "model",
    "hone-motion-anything": "transformer",
    "hone-nar": "nar",
    "hone-pmloss": "host",
    "hone-rstitch": "large",
    "hone-sparsevar": "transformer",
    "hone-zipr1": "model",
    "hone-zpressor": "host",
}
"""Attribute of a package's ``Host`` that ``attach`` takes."""
PARTNERS = {
    "hone-pmloss": lambda host: {
        "teacher": load("hone_pmloss.teachers:OracleTeacher")(load("hone_splat.rooms:Rooms").draw([0]))
    },
    "hone-rstitch": lambda host: {"small": host.small},
}
"""What ``attach`` takes by name beside the model."""


NO_VERB_YET = {}
"""Verbs that are still missing in a package in progress, whose README says so."""


WRONG_PATHS = {
    "hone-blade": """
demo --host NONE
demo --lora NONE
generate --model NONE --prompt x
distill --host NONE
encode-prompts --model here --prompt-file NONE
encode-prompts --model NONE --prompt-file here
distill-pipeline --model here --prompt-file NONE
eval --host NONE
inspect --host NONE
reproduce --host NONE
train-host --start NONE
""",
    "hone-fpsattention": """
calibrate --host NONE
demo --host NONE
demo --tuned NONE
eval --host NONE
generate --model NONE --prompt x
generate --model here --prompt x --schedule NONE
inspect --host NONE
reproduce --host NONE
train --model here --videos NONE
train-host --host NONE
""",
    "hone-knockout": """
demo --host NONE
eval --host NONE
eval --model NONE --data here
eval --model here --data NONE
generate --model NONE --video here --ask x
generate --model here --video NONE --ask x
recommend --run NONE
reproduce --hosts NONE
""",
    "hone-motion-anything": """
convert --source NONE
demo --host NONE
eval --host NONE
generate --text x --edit NONE
generate --text x --host NONE
generate --music NONE
reproduce --host NONE
train --data NONE
""",
    "hone-nar": """
demo --host NONE
eval --host NONE
eval --nll --model NONE --data .
eval --protocol imagenet --model NONE
eval --protocol ucf --model NONE --reference . --detector here
eval --protocol geneval --model NONE --prompts here
extract --images NONE --vae here
extract --images . --vae NONE
generate --model NONE --classes 1
generate --model NONE --prompt x
train --data NONE
train --data . --start NONE
train --data . --raster NONE
""",
    "hone-pmloss": """
eval --ply here --truth NONE
eval --ply NONE.ply --cloud here
eval --ply here --cloud NONE
eval --ply here --cloud here --observed NONE
eval --ply here --cloud here --plane NONE
eval --ply here --colmap NONE --depths .
eval --ply here --transforms NONE --depths .
eval --ply here --transforms here --depths NONE
reproduce --hosts NONE
train --chunks NONE --points here --lpips 0
train --chunks . --points NONE --lpips 0
train --chunks . --points here --start NONE --lpips 0
train --chunks . --points here --vgg NONE
train-host --start NONE
""",
    "hone-rstitch": """
calibrate --small . --large . --data NONE
eval --small . --large . --data NONE
eval --small . --large NONE --data here
generate --ask x --small NONE --large .
generate --ask 1*2 --policy router --router NONE
profile --small NONE --large .
reproduce --hosts NONE
reproduce --pairs 0 --routers NONE
serve --small NONE --large .
serve --policy router --router NONE
train-router --latency NONE
""",
    "hone-sparsevar": """
calibrate --host NONE
calibrate --model NONE --prompt-file here
eval --protocol geneval --model NONE --prompts here --no-grade --preset infinity-0.6
generate --model NONE --prompt x
generate --model NONE --classes 1
demo --host NONE
eval --host NONE
inspect --host NONE
reproduce --hosts NONE
""",
    "hone-zipr1": """
demo --host NONE
eval --model . --data NONE
eval --model NONE --data here
eval --model . --data here --budget NONE
generate --ask x --model . --image NONE
generate --ask x --model NONE --image here
inspect --ask x --model . --video NONE
profile --ask x --model . --video NONE
reproduce --hosts NONE
train --model NONE --data here
train --model . --data NONE
""",
    "hone-zpressor": """
convert --captures NONE
convert --captures NONE.json
demo --host NONE
doctor --colmap NONE
doctor --transforms NONE
eval --chunks NONE --index here
eval --chunks . --index NONE
eval --chunks . --index views.json --model mvsplat --checkpoint NONE
render --colmap NONE
render --transforms NONE
render --transforms here --checkpoint NONE
reproduce --hosts NONE
train --chunks NONE --lpips 0
train --chunks . --vgg NONE
train --chunks . --start NONE --lpips 0
view --splat NONE.ply
view --transforms NONE
""",
}
"""Command lines that name what is not there, ``NONE``, beside a folder and files that are."""
WITHOUT_TORCH = """
import importlib, io, json, sys
from contextlib import redirect_stderr, redirect_stdout

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "diffusers"):
            raise RuntimeError(f"imports {name}")

sys.meta_path.insert(0, Refused())
program, *lines = sys.argv[1:]
main, found = importlib.import_module(program.replace("-", "_") + ".cli").main, []
for line in lines:
    sys.argv, out, err = [program, *line.split()], io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        found.append([line, stop.code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def load(name):
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def wanted_verbs(package):
    return set(VERBS) - set(NO_VERB_YET.get(package.name, ()))


@pytest.fixture(params=PACKAGES)
def package(request):
    return request.param


@pytest.fixture
def verbs(package):
    return load(f"{package.module}.cli:VERBS")


@pytest.fixture
def with_config(package, verbs):
    found = {name: verb for name, verb in verbs.items() if isinstance(verb, Verb) and verb.config is not None}
    assert {name for name in wanted_verbs(package) if name != "info"} <= found.keys()
    return found


def test_files(package):
    missing = NO_VERB_YET.get(package.name, ())
    readme = (ROOT / package.folder / "README.md").read_text(encoding="utf-8")
    for verb in missing:
        assert f"`{verb}` is not there yet" in readme
        assert verb not in load(f"{package.module}.cli:VERBS"), "it is there: take it off NO_VERB_YET"
    files = [name for name in FILES if name.removesuffix(".py") not in missing]
    assert [name for name in files if not (package.source / name).is_file()] == []
    tests = {file.name for file in (ROOT / package.tests).glob("test_*.py")}
    assert {f"test_{name}" for name in files} <= tests


def test_readme_has_its_sections_in_order_a_picture_and_its_tables(package):
    text = (ROOT / package.folder / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert [heading for heading in headings if heading in HEADINGS] == list(HEADINGS)
    # What only one package has stands between what is done from Python and the tiny host, or under the results.
    assert headings[:3] == list(HEADINGS[:3])
    assert headings[headings.index("The tiny host") :] == list(HEADINGS[3:])
    assert f"## In 60 seconds\n\n```sh\nuv run --package {package.name} {package.name} demo\n" in text
    assert "![" in text
    results = ROOT / "results" / package.folder.name
    assert "demo" in tables._specs(results)


def test_readme_has_a_table_of_all_verbs(package, verbs):
    text = (ROOT / package.folder / "README.md").read_text(encoding="utf-8")
    start = text.partition("## In 60 seconds\n")[2].partition("\n## ")[0]
    table = start.partition("| verb | what it does |\n")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z-]+)", table, re.M)) == set(verbs)
    assert f"`{package.name} VERB --help` lists a verb's flags" in " ".join(start.split())


def test_the_readmes_python_runs_as_it_stands(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / package.folder / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## From Python\n")[2].partition("\n## ")[0]
    first, *rest = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    assert f"from {package.module} import " in first
    # The others go on from the first, but for those with published weights, which nobody has here.
    here = [block for block in rest if "from_pretrained" not in block and "from_published" not in block]
    scope = {}
    for block in [first, *here]:
        exec(compile(block, f"{package.name} README", "exec"), scope)


def test_the_readme_says_what_works_together_with_it_and_by_which_tests(package):
    text = (ROOT / package.folder / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n### Works together with\n")[2].partition("\n#")[0]
    head, _, *rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert head == "| with | | test |"
    assert len(rows) >= 6
    written = {
        name
        for folder in (package.tests, *(Path("tests/shared") / part.name for part in (ROOT / "tests/shared").iterdir()))
        for file in (ROOT / folder).glob("test_*.py")
        for name in re.findall(r"^ *(?:def|class) ((?:test_|Test)\w+)", file.read_text(encoding="utf-8"), re.M)
    }
    for row in rows:
        named = set(re.findall(r"`((?:test_|Test)\w+)`", row.rpartition(" | ")[2]))
        assert named <= written, named - written
        assert named or "tried by hand" in row, row


def test_verbs_are_a_table(package, verbs, with_config):
    assert wanted_verbs(package) <= verbs.keys()
    for name, verb in with_config.items():
        assert verb.config.startswith(f"{package.module}.config:"), name
        function = load(verb.run)
        assert list(inspect.signature(function).parameters)[:2] == ["cfg", "run"], verb.run
        report = inspect.get_annotations(function, eval_str=True)["return"]
        assert issubclass(report, Report), verb.run
        assert report is not Report, verb.run
        assert issubclass(report, TrainReport) == (name == "train-host"), verb.run
        for other in filter(None, (verb.prepare, verb.opened)):
            assert callable(load(other)), other


def test_bench_takes_a_published_size_by_the_flag_model(with_config):
    assert "model" in {flag.name for flag in flags_of(load(with_config["bench"].config))}


def test_configs_are_frozen_and_survive_json(package, with_config):
    checked = 0
    for name, verb in with_config.items():
        config = load(verb.config)
        assert config.__dataclass_params__.frozen, f"{name}: {verb.config} is not frozen"
        required = [
            field.name
            for field in dataclasses.fields(config)
            if field.default is field.default_factory is dataclasses.MISSING
        ]
        if not required and not name.startswith("generate"):
            assert from_dict(config, to_dict(config())) == config(), name
            checked += 1
    assert checked >= 4 - len(NO_VERB_YET.get(package.name, ()))


def test_a_host_that_is_not_there_is_refused_before_a_dry_run_prints(package, with_config, tmp_path):
    nowhere, looked_at = tmp_path / "host.safetensors", 0
    needed = {"generate": {"texts": ("a person bows",)}} if package.name == "hone-motion-anything" else {}
    for name, verb in with_config.items():
        config = load(verb.config)
        flags = {field.name: field.type for field in dataclasses.fields(config)}
        for field, value in (("host", nowhere), ("hosts", (nowhere,))):
            if "Path" in str(flags.get(field)):
                assert verb.prepare is not None, name
                with pytest.raises(CheckpointError, match="there is no tiny"):
                    load(verb.prepare)(config(**{field: value}, **needed.get(name, {})))
                looked_at += 1
    assert looked_at >= 1


@pytest.mark.parametrize("name", [param.id for param in PACKAGES if param.id in WRONG_PATHS])
def test_a_wrong_path_is_refused_without_torch(name, tmp_path):
    nowhere = tmp_path / "nowhere" / "file"
    (tmp_path / "here").write_text('{"question": "1+1", "answer": 2}\n', encoding="utf-8")
    (tmp_path / "index.json").write_text('{"scene": "0.torch"}', encoding="utf-8")
    (tmp_path / "views.json").write_text('{"scene": null}', encoding="utf-8")
    lines = [line.replace("NONE", str(nowhere)) for line in WRONG_PATHS[name].strip().splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, name, *lines], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    answers = json.loads(done.stdout)
    assert len(answers) == len(lines)
    for line, code, out, err in answers:
        assert code == 1, (line, err)
        assert str(nowhere) in err, (line, err)
        assert "imports" not in err, (line, err)
        assert not out, line
    assert not (tmp_path / "runs").exists()


def trainings(package):
    """The dataclasses that a training of the package reads, with something in place of required fields."""
    for kind in vars(importlib.import_module(f"{package.module}.config")).values():
        if dataclasses.is_dataclass(kind) and hasattr(kind, "log_every"):
            missing = (dataclasses.MISSING, dataclasses.MISSING)
            needed = [f.name for f in dataclasses.fields(kind) if (f.default, f.default_factory) == missing]
            yield kind, dict.fromkeys(needed, 1)


def test_trainings_refuse_before_work_what_none_runs_with(package):
    looked_at = 0
    for kind, needed in trainings(package):
        for name in {"log_every", "batch", "lr", "adamw_lr", "warmup_steps"} & {
            f.name for f in dataclasses.fields(kind)
        }:
            looked_at += 1
            # Some batches are of two at least, and some rates rise at once.
            with pytest.raises(ValueError, match=rf"\b{name}\b.* must be (positive|at least)"):
                kind(**needed | {name: -1 if name == "warmup_steps" else 0})
    assert looked_at >= 2


def test_presets_say_where_they_come_from(package):
    presets = load(f"{package.module}.config:PRESETS")
    assert "tiny" in presets
    assert len({type(preset.config) for preset in presets.values()}) == 1
    for name, preset in presets.items():
        assert preset.model, name
        assert preset.provenance, name
        assert from_dict(type(preset.config), to_dict(preset.config)) == preset.config, name
    shown = load(f"{package.module}.cli:info")()["presets"]
    assert shown == {name: str(preset) for name, preset in presets.items()}
    assert all(preset.model in shown[name] and preset.provenance in shown[name] for name, preset in presets.items())


def test_host_is_stored_as_core_stores_hosts_and_passes_its_gates(package):
    host_config = load(f"{package.module}.config:HostConfig")
    # What two packages start from lies in shared/.
    packaged = getattr(importlib.import_module(f"{package.module}.host"), "PACKAGED", None)
    stored = open_host(host_config, package.name, packaged)
    assert stored.facts.passed
    assert stored.facts.command.startswith(f"{package.name} train-host")
    assert stored.facts.gates.keys() <= stored.facts.result.keys()


def test_attach_returns_a_handle_that_gives_the_model_back(package):
    import torch

    host = load(f"{package.module}:load_host")()
    model = getattr(host, ATTACHABLE[package.name])
    partners = PARTNERS[package.name](host) if package.name in PARTNERS else {}
    attach = load(f"{package.module}:attach")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with attach(model, "tiny", **partners) as handle:
        assert isinstance(handle, Handle)
        assert handle.config == load(f"{package.module}.config:PRESETS")["tiny"].config
        assert handle.attached
        assert "attached" in repr(handle)
        with handle.disabled():
            assert handle.attached
        with pytest.raises(ValueError, match="no preset 'none'; the presets are "):
            attach(model, "none", **partners)
    assert not handle.attached
    assert "detached" in repr(handle)
    handle.detach()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_demo_run_again_prints_the_same_and_runs_nothing(package, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    main = load(f"{package.module}.cli:main")
    argv = [package.name, "demo", *SMALLEST_DEMO[package.name], "--out", str(folder), "--device", "cpu", "--quiet"]
    monkeypatch.setattr(sys, "argv", argv)

    def demo():
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert stop.value.code == 0, err
        return out, {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}

    printed, files = demo()
    assert str(folder / "results.json") in printed
    assert load_results(folder)["status"] == "done"
    assert demo() == (printed, files)
