"""What ``sanitize`` runs on a GPU, under Triton's interpreter: values are right, and each kernel is launched."""

import contextlib
import importlib
from pathlib import Path
from typing import get_args

import hone_kernels
import pytest
import torch
from hone_core.testing import nan_poison
from hone_kernels import problems
from hone_kernels.config import Part
from hone_kernels.problems import GLUON, PARTS, run_part

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
    "ignore:invalid value encountered:RuntimeWarning",
)
SOURCE = Path(hone_kernels.__file__).parent
RUN = ("ragged_decode", "decoding", "kept_tokens", "splat_blend")
"""Parts that the interpreter is done with in seconds."""


def modules():
    """Files of ops that hold kernels: in Gluon, and in Triton."""
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(SOURCE.glob("*/*.py"))}
    gluon = [file for file, text in texts.items() if "@gluon.jit" in text]
    return gluon, [file for file, text in texts.items() if "@triton.jit" in text and file not in gluon]


def test_every_op_with_a_kernel_is_in_one_part():
    gluon, triton = modules()
    ops = {file.parent.name for file in (*gluon, *triton)}
    assert len(ops) >= 19
    named = [op for part in PARTS.values() for op in part]
    missing = sorted(ops - {*named})
    assert not missing, f"no part of sanitize runs {', '.join(missing)}: add problems to hone_kernels.problems.PARTS"
    assert sorted(named) == sorted(ops)
    assert [*PARTS] == [*get_args(Part)]
    assert {part for part, found in PARTS.items() for file in gluon if file.parent.name in found} == {*GLUON}


class Watched:
    """A kernel whose launches are noted, and done or not."""

    def __init__(self, kernel, name, launched, run):
        self.kernel, self.name, self.launched, self.run = kernel, name, launched, run

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launched.add(self.name)
            if self.run:
                self.kernel[grid](*arguments, **options)

        return launch


@contextlib.contextmanager
def watched(part, run):
    """Names of the kernels of a part's ops, and of those that were launched."""
    every, launched = set(), set()
    with pytest.MonkeyPatch.context() as patch:
        for file in modules()[1]:
            op = file.parent.name
            if op not in PARTS[part]:
                continue
            module = importlib.import_module(f"hone_kernels.{op}.{file.stem}")
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                every.add(f"{op}: {name}")
                patch.setattr(module, name, Watched(getattr(module, name), f"{op}: {name}", launched, run))
        assert {name.partition(":")[0] for name in every} == {*PARTS[part]}
        yield every, launched


@pytest.mark.interpret
@pytest.mark.parametrize("part", RUN)
def test_values_are_right_and_every_kernel_runs(part):
    with watched(part, run=True) as (every, launched), nan_poison():
        run_part(part, "triton", "cpu")
    assert launched == every


# It adds to gradients that Gluon's kernel made.
WITH_GLUON = {"pyramid_attention: _spread_kernel"}


@pytest.mark.interpret
@pytest.mark.parametrize("part", [part for part in PARTS if part not in RUN])
def test_every_kernel_is_launched(monkeypatch, part):
    monkeypatch.setattr(problems, "_close", lambda *_: None)
    with watched(part, run=False) as (every, launched):
        run_part(part, "triton", "cpu")
    assert launched == every - WITH_GLUON


@pytest.mark.slow
@pytest.mark.interpret
def test_values_of_block_scores_are_right():
    run_part("block_scores", "triton", "cpu")


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("part", [part for part in RUN if part != "ragged_decode"])
def test_every_launch_compiles(monkeypatch, part):
    from hone_kernels import backends
    from hone_kernels.compile import compile_launch, record_launches

    def only_once(what, backend, device, limit, call, *given):
        call(backend, *given)

    # Nothing runs: what is made stays zeros, and is not compared. A 1 among the sizes is a constant to the compiler.
    monkeypatch.setattr(backends, "INTERPRETED", True)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(problems, "_half", lambda _: torch.bfloat16)
    monkeypatch.setattr(problems, "_compare", only_once)
    monkeypatch.setattr(problems, "_between", lambda *_: None)
    monkeypatch.setattr(problems, "_close", lambda *_: None)
    with contextlib.ExitStack() as stack:
        launches = []
        for module in [importlib.import_module(f"hone_kernels.{op}.triton") for op in PARTS[part]]:
            names = [name for name in vars(module) if name.endswith("_kernel")]
            launches.append(stack.enter_context(record_launches(module, *names)))
        run_part(part, "triton", "cpu")
    assert all(launches)
    for launch in [launch for found in launches for launch in found]:
        for sm in (80, 90):
            assert compile_launch(launch, sm).cubin, launch


def wrong(found):
    """What a broken kernel would give."""
    if isinstance(found, torch.Tensor):
        return ~found if found.dtype == torch.bool else 1 - found if not found.is_floating_point() else 1.1 * found
    made = [wrong(x) for x in found]
    return type(found)(*made) if hasattr(found, "_fields") else type(found)(made)


OPS = {
    "add_rms_norm": "decoding", "silu_mul": "decoding", "linear_of_one": "decoding", "rotate_append": "decoding",
    "paged_attention": "decoding", "rotate_attend": "decoding", "gated_of_few": "few_tokens",
    "attend_slots": "few_tokens", "prefix_attention": "prefix_attention", "take_tokens": "kept_tokens",
    "spread_tokens": "kept_tokens", "pack_tokens": "kept_tokens", "unpack_tokens": "kept_tokens",
    "gather_modulate": "kept_tokens", "add_change": "kept_tokens", "draw_bits": "kept_tokens",
    "read_logits": "logits", "draw_tokens": "guided_draw", "blend_tiles": "splat_blend", "sweep_planes": "plane_sweep",
    "nearest_points": "nearest_points", "column_mass": "column_mass", "draw_codes": "draw_codes",
    "select_tokens": "token_select", "decode_attention": "ragged_decode",
}  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize("name", OPS)
def test_wrong_values_are_seen(monkeypatch, name):
    (problem,) = {x[OPS[name]] for x in PARTS.values() if OPS[name] in x}

    def stand_in(op, broken):
        def call(*given, backend, **named):
            # No kernel runs: the reference is faster.
            found = op(*given, backend="reference", **named)
            return wrong(found) if broken and backend != "reference" else found

        return call

    for each in OPS:
        monkeypatch.setattr(problems, each, stand_in(getattr(problems, each), each == name))
    with pytest.raises(RuntimeError, match=r"relative error|other |another "):
        problem("triton", "cpu")
