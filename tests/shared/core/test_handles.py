import copy
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
from hone_core.config import Preset
from hone_core.handles import CallState, Handle, Hooks, resolve
from torch import nn


@dataclass(frozen=True)
class Settings:
    factor: float = 2.0


class Attachment:
    """Scales the input of the last layer by a number that the first hook of a forward has chosen."""

    def __init__(self, model, factor):
        self.factor, self.state, self.hooks = factor, CallState(), Hooks(model)
        self.hooks.add("", lambda module: module.register_forward_pre_hook(self.start))
        self.hooks.add("1", lambda module: module.register_forward_pre_hook(self.scale))
        self.hooks.add("", lambda module: module.register_forward_hook(self.finish, always_call=True))

    def start(self, model, args):
        if not self.state.disabled:
            self.hooks.check()
            self.state.current = self.factor * len(args[0])

    def scale(self, module, args):
        return None if self.state.current is None else (args[0] * self.state.current,)

    def finish(self, model, args, output):
        self.state.current = None


class Scaled(Handle[Settings]):
    def __init__(self, config, model):
        super().__init__(config, [model])
        self.attachment = Attachment(model, config.factor)

    @property
    def attached(self):
        return bool(self.attachment.hooks)

    def detach(self):
        self.attachment.hooks.remove()

    def _states(self):
        return [self.attachment.state]


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).requires_grad_(False)


X = torch.tensor([[1.0, 2.0]])


def test_names_and_settings_resolve():
    presets = {"three": Preset(Settings(3.0), model="a test", provenance="this test")}
    assert resolve("three", presets, Settings) == Settings(3.0)
    assert resolve(Settings(5.0), presets, Settings) == Settings(5.0)
    with pytest.raises(ValueError, match="no preset 'four'; the presets are three"):
        resolve("four", presets, Settings)
    with pytest.raises(TypeError, match="expected a preset's name or a Settings; got float"):
        resolve(4.0, presets, Settings)


def test_a_handle_detaches_and_says_so(model):
    plain = model(X)
    with Scaled(Settings(), model) as handle:
        assert handle.attached
        assert repr(handle) == "<Scaled on Sequential, attached>"
        assert torch.equal(model(X), 2 * plain)
    assert not handle.attached
    assert repr(handle) == "<Scaled on Sequential, detached>"
    assert torch.equal(model(X), plain)
    handle.detach()


def test_disabled_is_as_if_detached_also_after_an_error(model):
    plain = model(X)
    handle = Scaled(Settings(), model)
    with handle.disabled():
        with handle.disabled():
            pass
        assert torch.equal(model(X), plain)
    assert torch.equal(model(X), 2 * plain)
    with pytest.raises(KeyError), handle.disabled():
        raise KeyError
    assert torch.equal(model(X), 2 * plain)


def test_disabled_holds_in_its_own_thread_only(model):
    plain = model(X)
    handle = Scaled(Settings(), model)
    found = []
    with handle.disabled():
        other = threading.Thread(target=lambda: found.append(model(X)))
        other.start()
        other.join()
        assert torch.equal(model(X), plain)
    assert torch.equal(found[0], 2 * plain)


def test_state_set_in_a_compiled_function_is_there_after_it():
    state = CallState()

    def begin(x):
        state.current, state.disabled = ("grid", x.shape[0]), True
        return x + 1

    def read(x):
        return x if state.current is None else x * state.current[1]

    torch.compile(begin, backend="eager", fullgraph=True)(torch.ones(3))
    assert (state.current, state.disabled) == (("grid", 3), True)
    assert torch.equal(torch.compile(read, backend="eager", fullgraph=True)(torch.ones(3)), torch.full((3,), 3.0))
    torch.compiler.reset()


def test_forwards_of_two_threads_keep_apart():
    state, seen = CallState(), []
    met = threading.Barrier(2)

    def forward(value):
        state.current = value
        met.wait()
        seen.append((value, state.current))

    threads = [threading.Thread(target=forward, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(1.0, 1.0), (2.0, 2.0)]
    assert state.current is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_has_hooks_and_state_of_its_own(model, duplicate):
    handle = Scaled(Settings(), model)
    again = duplicate(handle)
    with handle.disabled():
        assert torch.equal(again.models[0](X), 2 * model(X))
    again.detach()
    assert torch.equal(2 * again.models[0](X), model(X))


def test_a_replaced_module_is_noticed_and_detaching_still_works(model):
    handle = Scaled(Settings(), model)
    first = model[1]
    model[1] = copy.deepcopy(first)
    with pytest.raises(RuntimeError, match=r"1 was replaced after attach.*Linear stands where Linear was"):
        model(X)
    model[1] = nn.Sequential(first)
    with pytest.raises(RuntimeError, match=r"1 was replaced after attach.*Sequential stands where Linear was"):
        model(X)
    handle.detach()
    assert torch.equal(model(X), first(model[0](X)))
    assert not first._forward_pre_hooks


def test_compiled_in_one_graph(model):
    plain = model(X)
    handle = Scaled(Settings(), model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), 2 * plain)
    with handle.disabled():
        assert torch.equal(compiled(X), plain)
    assert torch.equal(compiled(X), 2 * plain)
    model[1] = nn.Sequential(model[1])
    with pytest.raises(RuntimeError, match="was replaced after attach"):
        compiled(X)
