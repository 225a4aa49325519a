"""Attached models in one process and in two that share their tokens; run by ``torchrun`` with a file of cases.

A case is ``(attach, config, options)``: where the function is (``module:name``), its settings, and of the options
``uneven`` (three heads), ``late`` (parallelism after attach), ``times`` (a time for each token) and ``grad``.
"""

import importlib
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from hone_video.architectures import tiny, tiny_inputs


def arguments(times=False, **rest):
    given = tiny_inputs("wan", width=16)  # 120 tokens; gloo cannot gather shares of different length
    if times:
        given["timestep"] = torch.linspace(0, 900, 120).repeat(2, 1)
    return given


def enable(model, uneven=False, **rest):
    # Without an accelerator diffusers divides by their number.
    with mock.patch("torch.accelerator.device_count", return_value=2):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=uneven))


def results(model, given, grad):
    with torch.set_grad_enabled(grad):
        out = model(**given, return_dict=False)[0]
    if not grad:
        return [out]
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = [block.attn1.to_q.weight.grad.clone() for block in model.blocks]
    model.zero_grad()
    return [out.detach(), *grads]


def measure(case):
    """In one process, in two, and in two after detach."""
    where, config, options = case
    module, name = where.split(":")
    attach = getattr(importlib.import_module(module), name)
    model, given, grad = (
        tiny("wan", num_attention_heads=3 if options.get("uneven") else 2),
        arguments(**options),
        options.get("grad", False),
    )
    plain = results(model, given, grad)
    with attach(model, config):
        alone = results(model, given, grad)
    if options.get("late"):
        handle = attach(model, config)
        enable(model, **options)
    else:
        enable(model, **options)
        handle = attach(model, config)
    shared = results(model, given, grad)
    handle.detach()
    detached = results(model, given, grad)
    for found in (shared, detached):
        for x in found[1:]:  # each process has the gradient of its tokens
            dist.all_reduce(x)
    return {"plain": plain, "alone": alone, "shared": shared, "detached": detached}


if __name__ == "__main__":
    cases, out = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.append(str(cases.parent))
    dist.init_process_group("cpu:gloo")  # which is what diffusers looks for
    found = [measure(case) for case in torch.load(cases, weights_only=False)]
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    # Not through the interpreter's end: gloo's threads may still run there, and then abort a process that is done.
    sys.stdout.flush()
    os._exit(0)
