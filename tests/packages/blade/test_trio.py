"""Teacher, student and fake score on one set of weights."""

import pytest
import torch
from hone_blade.config import BladeConfig
from hone_blade.models import attach
from hone_blade.trio import Trio, WholeTrio
from hone_video.architectures import tiny, tiny_inputs

SPARSE = BladeConfig(block=16, max_density=0.3, pool=8, samples=4)
TEXT = tiny_inputs("wan")["encoder_hidden_states"]


def call(model, state, time, text):
    return model(state, time, text, return_dict=False)[0]


@pytest.fixture
def inputs():
    given = tiny_inputs("wan")
    return given["hidden_states"], given["timestep"]


@pytest.fixture
def made():
    model = tiny("wan")
    with attach(model, SPARSE) as handle:
        yield model, Trio(model, call, handle, rank=2, seed=0)


def test_all_three_begin_as_the_teacher(made, inputs):
    _, trio = made
    trio.dense = True
    plain = tiny("wan")
    with torch.no_grad():
        expected = call(plain, *inputs, TEXT)
        for role in ("teacher", "student", "fake"):
            torch.testing.assert_close(trio.network(role, TEXT)(*inputs), expected)


def test_each_role_has_its_own_adapter_and_the_teacher_none(made, inputs):
    _, trio = made
    trio.dense = True
    with torch.no_grad():
        for parameter in (*trio.student.parameters, *trio.fake.parameters):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(parameter)))
        for parameter in trio.fake.parameters:
            parameter.neg_().mul_(2)
        student, fake = (trio.network(role, TEXT)(*inputs) for role in ("student", "fake"))
        teacher = trio.network("teacher", TEXT)(*inputs)
        assert torch.equal(trio.network("student", TEXT)(*inputs), student)
        torch.testing.assert_close(teacher, call(tiny("wan"), *inputs, TEXT))
        for one, other in ((student, teacher), (fake, teacher), (student, fake)):
            assert (one - other).abs().max() > 1e-3


def test_the_attention_goes_with_the_role(made, inputs):
    _, trio = made
    with torch.no_grad():
        dense = trio.network("teacher", TEXT)(*inputs)
        sparse = trio.network("student", TEXT)(*inputs)
        assert (dense - sparse).abs().max() > 1e-4
        assert torch.equal(trio.network("fake", TEXT)(*inputs), sparse)
        trio.fake_sparse = False
        assert torch.equal(trio.network("fake", TEXT)(*inputs), dense)
        trio.dense = True
        assert torch.equal(trio.network("student", TEXT)(*inputs), dense)


def test_a_role_trains_its_own_adapter_alone(made, inputs):
    model, trio = made
    for role, own, other in (("student", trio.student, trio.fake), ("fake", trio.fake, trio.student)):
        loss = trio.network(role, TEXT)(*inputs).square().mean()
        with torch.no_grad():
            # What is asked in between, as the student's loss does.
            trio.network("teacher", TEXT)(*inputs)
        trio.switch(role)
        loss.backward()
        assert sum(p.grad is not None and p.grad.abs().max() > 0 for p in own.parameters) == len(own.parameters) // 2
        assert all(p.grad is None for p in other.parameters)
        assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)
        for parameter in own.parameters:
            parameter.grad = None


def test_a_checkpointed_backward_is_the_plain_one(made, inputs):
    model, trio = made
    grads = []
    for _ in range(2):
        loss = trio.network("student", TEXT)(*inputs).square().mean()
        with torch.no_grad():
            trio.network("teacher", TEXT)(*inputs)
        trio.switch("student")
        loss.backward()
        grads.append([p.grad.clone() for p in trio.student.parameters if p.grad is not None])
        for parameter in trio.student.parameters:
            parameter.grad = None
        model.enable_gradient_checkpointing()
        model.train()
    assert len(grads[0]) == len(grads[1]) > 0
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_adapters_are_those_of_their_seed_in_float32_and_draw_nothing_else():
    found = []
    for seed in (0, 0, 1):
        model = tiny("wan").bfloat16()
        before = torch.get_rng_state()
        trio = Trio(model, call, attach(model, SPARSE), rank=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        found.append([*trio.student.parameters, *trio.fake.parameters])
        assert {p.dtype for p in found[-1]} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*found[1:], strict=True))


def test_what_is_trained_whole_is_float32_beside_a_teacher_of_16_bits():
    trio = WholeTrio(tiny("wan").bfloat16(), call, SPARSE)
    assert {p.dtype for p in trio.pair.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in trio.pair.parameters())
    teacher = list(trio.model_of("teacher").parameters())
    assert torch.bfloat16 in {p.dtype for p in teacher}
    assert not any(p.requires_grad for p in teacher)


def test_adapters_come_back_from_their_state(made):
    _, trio = made
    with torch.no_grad():
        for parameter in trio.student.parameters:
            parameter.normal_()
    state = {name: value.clone() for name, value in trio.student.state_dict().items()}
    before = [p.clone() for p in trio.fake.parameters]
    trio.fake.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(trio.student.parameters, trio.fake.parameters, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, trio.fake.parameters, strict=True))
    with pytest.raises(RuntimeError, match="of another rank or model"):
        trio.fake.load_state_dict({name: value[:1] for name, value in state.items()})
