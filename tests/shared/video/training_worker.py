"""A small training, run by the tests of the loop alone and by ``torchrun``."""

import contextlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from hone_core.processes import Processes
from hone_core.runs import Run
from hone_video.architectures import tiny
from hone_video.lora import add_lora
from hone_video.training import Group, Loop
from hone_video.training_config import LoopConfig

SHAPE = (4, 2, 4, 4)


def train(out, *, steps, stop=None, kind="lora", micro_batch=1, processes=None):
    """Losses by step and the exported weights; ``stop`` breaks off after that step, as a crash does."""
    cfg = LoopConfig(
        steps=steps, batch=4, micro_batch=micro_batch, lr=1e-2, warmup_steps=2, ema=0.5, log_every=1,
        checkpoint_every=2,
    )  # fmt: skip
    run = Run.start(
        package="hone-video", verb="train", config=cfg, out=out, device="cpu", quiet=True, processes=processes
    )
    with run:
        model = tiny("wan", num_layers=1)
        with torch.no_grad():
            model.proj_out.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        loop = Loop(cfg, run)
        if kind == "full":
            model.requires_grad_(True)
        else:
            add_lora(model, 2, seed=3)
        if kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        loop.prepare(model, {"student": Group(lr=cfg.lr, ema=cfg.ema)})
        loop.resume()

        def update():
            if stop is not None and loop.step == stop:
                raise KeyboardInterrupt
            total = 0.0
            for part in loop.parts():
                clean = torch.stack([torch.full(SHAPE, 0.1 * item) for item in part.items(8)])
                noisy = clean + part.randn(SHAPE, "noise")
                text = part.randn((8, 32), "text")
                out = loop.model(noisy, torch.full((len(noisy),), 500), text, return_dict=False)[0]
                total += loop.backward(F.mse_loss(out, clean), part)
            return {"loss": total, "norm": loop.apply("student")}

        loop.follow(update)
        weights = loop.weights("student")
    return weights


if __name__ == "__main__":
    # One launch for all kinds: it is what costs the time.
    out, together = Path(sys.argv[1]), Processes.of_launcher()
    for name in ("lora", "fsdp"):
        found = train(out / name, steps=6, kind=name, processes=together)
        if together.main:
            torch.save(found, out / f"{name}.pt")
    with contextlib.suppress(KeyboardInterrupt):
        train(out / "stopped", steps=6, stop=5, kind="fsdp", processes=together)
    together.end()
