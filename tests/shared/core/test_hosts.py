import dataclasses
import hashlib
import json

import pytest
import torch
from hone_core import hosts
from hone_core.errors import CheckpointError
from hone_core.hosts import HostFacts, ModuleHost, describe_host, open_host, packaged_host, save_host, write_facts
from torch import nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 4
    sizes: tuple[int, ...] = (1, 2)


FACTS = HostFacts(
    command="hone-core train-host --steps 3",
    seed=1,
    steps=3,
    seconds=0.5,
    result={"accuracy": 0.75},
    gates={"accuracy": 0.9},
    passed=False,
    train_config={"steps": 3, "host": {"width": 4}},
    environment={"gpu": None},
    details={"clips": 12},
)


class Model(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("count", torch.tensor([2**24 + 1]))


def save(path, facts=None, *, width=4, seed=0):
    torch.manual_seed(seed)
    modules = {"model.": Model(width), "head.": nn.Linear(2, 2)}
    words = torch.randn(3)
    save_host(path, Config(width=width), modules, package="hone-core", others={"words": words}, facts=facts)
    return modules, words


@pytest.fixture
def path(tmp_path):
    return tmp_path / "host.safetensors"


def edit(path, **changes):
    sidecar = path.with_suffix(".json")
    data = json.loads(sidecar.read_text()) | changes
    sidecar.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


@pytest.mark.parametrize("value", [70_000.0, float("nan")])
def test_weights_that_16_bits_do_not_hold_are_named(path, value):
    model = Model()
    with torch.no_grad():
        model.linear.bias[2] = value
    with pytest.raises(ValueError, match=r"model\.linear\.bias of the host holds values that are not finite or beyond"):
        save_host(path, Config(), {"model.": model}, package="hone-core")
    assert not path.exists()


def test_round_trip_in_half_precision(path):
    modules, words = save(path, FACTS)
    stored = open_host(Config, "hone-core", path)
    assert (stored.config, stored.facts, stored.path) == (Config(), FACTS, path)
    again = {"model.": Model(), "head.": nn.Linear(2, 2)}
    rest = stored.load(again, ("words",))
    for prefix, module in modules.items():
        for name, value in module.state_dict().items():
            want = value.half().float() if value.is_floating_point() else value
            assert torch.equal(again[prefix].state_dict()[name], want), name
    assert list(rest) == ["words"]
    assert torch.equal(rest["words"], words.half().float())


@dataclasses.dataclass
class Host(ModuleHost):
    package = "hone-core"
    architecture = Config
    tensors = ("words",)
    config: Config
    model: Model
    words: torch.Tensor
    facts: HostFacts | None = None

    @classmethod
    def untrained(cls, config=None, seed=0):
        config = config or Config()
        torch.manual_seed(seed)
        return cls(config, Model(config.width), torch.randn(3))

    @property
    def modules(self):
        return {"model.": self.model}


def test_a_host_of_modules_is_loaded_to_be_run(path):
    host = Host.untrained(Config(width=5), seed=1)
    host.save(path, FACTS)
    again = Host.load(path=path)
    assert (again.config, again.facts) == (Config(width=5), FACTS)
    assert torch.equal(again.words, host.words.half().float())
    assert torch.equal(again.model.linear.weight, host.model.linear.weight.half().float())
    assert not again.model.training
    assert not any(part.requires_grad for part in again.model.parameters())
    assert again.parameters == {"model": 30}
    assert {part.device.type for part in (*again.to("meta").model.parameters(), again.words)} == {"meta"}


def test_sidecar_reads_like_a_record(path):
    save(path, FACTS)
    data = json.loads(path.with_suffix(".json").read_text())
    assert list(data)[:5] == ["format", "package", "config", "bytes", "sha256"]
    assert data["config"] == {"width": 4, "sizes": [1, 2]}
    assert data["bytes"] == path.stat().st_size
    assert data["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data["result"] == {"accuracy": 0.75}


def test_facts_come_when_the_stored_weights_are_graded(path):
    save(path)
    assert open_host(Config, "hone-core", path).facts is None
    assert describe_host("hone-core", path) == {}
    write_facts(path, FACTS, package="hone-core")
    better = dataclasses.replace(FACTS, passed=True, details={})
    write_facts(path, better, package="hone-core")
    assert open_host(Config, "hone-core", path).facts == better
    assert describe_host("hone-core", path) == {
        "command": "hone-core train-host --steps 3",
        "steps": 3,
        "seconds": 0.5,
        "result": {"accuracy": 0.75},
    }


def test_no_host(path):
    with pytest.raises(
        CheckpointError, match=r"no tiny host at .* Train one with hone-core train-host.*pass its host.safetensors"
    ):
        open_host(Config, "hone-core", path)
    assert describe_host("hone-core", path) == "absent"
    # this package ships none
    assert packaged_host("hone-core").parts[-3:] == ("hone_core", "assets", "host.safetensors")
    assert describe_host("hone-core") == "absent"
    with pytest.raises(CheckpointError, match=r"no tiny host at .*assets"):
        open_host(Config, "hone-core")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "hone host 9"}, "must be of format 'hone host 1'; got 'hone host 9'"),
        ({"format": ...}, "must be of format 'hone host 1'; got None"),
        ({"config": ..., "sha256": ...}, "has no config, sha256"),
        ({"package": "hone-other"}, "is a host of hone-other. Train one with hone-core"),
        ({"config": {"width": 4, "depth": 2}}, "is of another version of hone-core: .*unknown key 'depth'"),
        ({"config": {"width": "wide"}}, "is of another version of hone-core: .*width: expected a whole number"),
        ({"passed": ...}, "is of another version of hone-core: .*missing passed"),
    ],
)
def test_other_sidecars_are_refused(path, changes, message):
    save(path, FACTS)
    edit(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_host(Config, "hone-core", path)


def test_a_missing_or_broken_sidecar(path):
    save(path)
    sidecar = path.with_suffix(".json")
    sidecar.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_host(Config, "hone-core", path)
    sidecar.write_text("[]")
    with pytest.raises(CheckpointError, match="got 'list'"):
        describe_host("hone-core", path)
    sidecar.unlink()
    with pytest.raises(CheckpointError, match=r"lacks its sidecar host.json.*copy both files"):
        open_host(Config, "hone-core", path)


def test_weights_of_another_host_are_noticed(path, tmp_path):
    save(path)
    save(tmp_path / "other" / "host.safetensors", seed=1)
    stored = open_host(Config, "hone-core", path)
    path.write_bytes((tmp_path / "other" / "host.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"is not the file that host\.json beside it describes"):
        stored.load({"model.": Model(), "head.": nn.Linear(2, 2)}, ("words",))


def test_a_write_that_is_cut_off_leaves_no_pair_that_loads(path, monkeypatch):
    save(path)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hosts, "atomic_write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        save(path, seed=1)
    with pytest.raises(CheckpointError, match="is not the file that"):
        open_host(Config, "hone-core", path).load({})


def test_weights_must_fit_the_modules(path):
    save(path)
    stored = open_host(Config, "hone-core", path)
    heads = {"head.": nn.Linear(2, 2)}
    with pytest.raises(CheckpointError, match=r"does not fit its own config: .*size mismatch"):
        stored.load({"model.": Model(5), **heads}, ("words",))
    with pytest.raises(CheckpointError, match=r"none missing, words too many\."):
        stored.load({"model.": Model(), **heads})
    with pytest.raises(CheckpointError, match=r"letters missing, words too many\."):
        stored.load({"model.": Model(), **heads}, ("letters",))


def test_damaged_weights(path):
    save(path)
    path.write_bytes(b"no")
    edit(path, sha256=hashlib.sha256(b"no").hexdigest())
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        open_host(Config, "hone-core", path).load({})
