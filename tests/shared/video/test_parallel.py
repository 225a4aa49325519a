"""Diffusers' context parallelism under an attached method: two processes give what one does."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hone_core.testing import assert_close
from hone_video.architectures import tiny
from hone_video.attachment import Method
from hone_video.handle import VideoHandle, attach_method

WORKER = Path(__file__).parent / "ulysses_worker.py"


class Near(Method):
    """Tokens of the order attend to those less than 20 places away; rotates q and k itself if asked to."""

    name = "near"
    dense_layers = (1,)

    def __init__(self, order, rotates):
        self.config, self.order, self.rotates, self.tile = order, order, rotates, (2, 2, 4)

    def plan(self, step, timestep):
        return "near"

    def attend(self, q, k, v, *, plan, layer, grid, text_tokens, rope=None):
        if rope is not None:
            cos, sin = (x.repeat_interleave(2, -1) for x in rope)
            q, k = (x * cos + torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2) * sin for x in (q, k))
        place = torch.arange(q.shape[2])
        near = (place[:, None] - place).abs() < 20
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)


def attach(model, config):
    return attach_method(model, Near(*config), VideoHandle)


def config(ring=1, context=True):
    parallel = SimpleNamespace(ring_degree=ring) if context else None
    return SimpleNamespace(context_parallel_config=parallel)


def test_what_does_not_run_is_refused():
    model = tiny("wan")
    for given, message in (
        (config(ring=2), "near attention does not run under ring attention, where a process never has all keys"),
        (config(context=False), "near attention does not run under tensor parallelism"),
    ):
        model._parallel_config = given
        with pytest.raises(ValueError, match=f"active parallel config. {message}"):
            attach(model, ("tile", False))
        model._parallel_config = None
        with attach(model, ("tile", False)), pytest.raises(RuntimeError, match=message):
            model.blocks[0].attn1.processor._parallel_config = given
    for kind in ("cogvideox", "hunyuan"):
        model = tiny(kind)
        model._parallel_config = config()
        with pytest.raises(ValueError, match="diffusers has no context parallelism for"):
            attach(model, ("tile", False))


CASES = [
    (("gilbert", False), {}),
    (("tile", True), {"late": True}),
    (("tile", True), {"uneven": True}),
    (("gilbert", False), {"uneven": True, "times": True}),
    (("raster", True), {"times": True}),
    (("tile", True), {"grad": True}),
    (("gilbert", False), {"grad": True, "late": True}),
]


@pytest.mark.slow
def test_two_processes_give_what_one_does(tmp_path):
    cases = [("test_parallel:attach", settings, options) for settings, options in CASES]
    torch.save(cases, tmp_path / "cases.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent)}
    subprocess.run([*command, tmp_path / "cases.pt", tmp_path / "found.pt"], check=True, env=environment)
    for case, found in zip(CASES, torch.load(tmp_path / "found.pt"), strict=True):
        for name, want in (("shared", "alone"), ("detached", "plain")):
            for i, (mine, theirs) in enumerate(zip(found[name], found[want], strict=True)):
                assert_close(mine, theirs, atol=2e-5 * max(1.0, float(theirs.abs().max())), what=f"{case} {name} {i}")
        assert float((found["shared"][0] - found["detached"][0]).abs().max()) > 1e-4, case
