"""The paper's claims on tiny pairs of several seeds, reported whichever way they come out.

1. Entropy of the small model's tokens tells its wrong answers from its right ones.
2. The gate keeps the large model's accuracy at a fraction of its tokens.
3. It does so better than routing at random, with as many large tokens, or as many in runs as long.
4. It does so better than asking the large model anew where the small one was in doubt, with as many large steps.
5. With a large model that writes at length, stitched answers are shorter as well.
6. The gate averaged over a window of tokens is no better than the plain one at equal share.
7. A trained router (R-Stitch+) is right more often than thresholds are at its cost.

Claim 6 is ours to ask: the paper's own figure finds the tokens around a harmful one uncertain, not itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hone_core.claims import SEEDS, VerdictReport, decided, decided_over, verdict_over_seeds
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.runs import Run

from . import plots
from .calibrate import matching_tau
from .config import LARGE, ReproduceConfig, SamplingConfig, StitchConfig
from .data import products
from .evaluate import Answers, Outcome, auroc, cascade, matched_random, step_ratio, write_rows
from .host import load_host
from .pairs import pairs_of
from .reinforce import at_cost
from .router import Routing, load_router

__all__ = ["MARGIN", "RULES", "ReproduceReport", "reproduce"]

MARGIN = 2.0
"""Points of accuracy within which it counts as kept; set before any pair was run."""
RULES = {
    "doubt": "AUROC of an answer's highest entropy for its being wrong, above 0.5",
    "kept": f"accuracy at most {MARGIN:g} points below the large model's",
    "random": "accuracy above that of random routing with the same share",
    "random runs": "accuracy above that of random routing with the same share and run length",
    "cascade": "accuracy above that of the cascade with the same large steps",
    "verbose kept": f"accuracy at most {MARGIN:g} points below that of a large model that checks itself",
    "verbose shorter": "fewer tokens than it",
    "window": "accuracy of the gate averaged over a window above the plain gate's at the same share",
    "router": "accuracy of a trained router above the best mixture of two thresholds at its cost",
}
"""Each is a difference that must be above zero; so decides its 95 % interval."""
DRAWS = 2000
VERBOSE = SamplingConfig(max_new_tokens=96)
TUNED = 200
"""Problems, none of them reported on, on which the window gate's threshold is chosen."""


@dataclass(frozen=True, kw_only=True)
class ReproduceReport(VerdictReport):
    """Verdicts; as text, with their numbers."""

    def __str__(self) -> str:
        found = self.verdict
        lines = [f"{len(found['pairs'])} pair(s), {found['items']} problems each, judged at tau {found['judged']:g}"]
        for claim, rule in RULES.items():
            lines.append(f"{claim}: {found['claims'][claim]} ({rule})")
            for pair in found["pairs"]:
                numbers = pair["claims"][claim]
                low, high = numbers["interval"]
                lines.append(
                    f"  {pair['name']}: {numbers['margin']:+.3g} [{low:+.3g}, {high:+.3g}]  {numbers['shown']}"
                )
        lines += [f"note: {note}" for note in found["notes"]]
        return "\n".join([*lines, f"pictures {self.path / 'figures'}", f"results  {self.path / 'results.json'}"])


def reproduce(cfg: ReproduceConfig, run: Run) -> ReproduceReport:
    """Put every pair to the test, apply the rules, and write the verdict."""
    device = resolve_device(run.device)
    routers = cfg.routers or (None,) * len(pairs_of(cfg))
    pairs = [
        _pair(cfg, run, name, path, router, device) for (name, path), router in zip(pairs_of(cfg), routers, strict=True)
    ]
    claims = {
        claim: verdict_over_seeds([pair["claims"][claim]["holds"] for pair in pairs if claim in pair["claims"]])
        for claim in RULES
    }
    notes = [] if len(pairs) >= SEEDS else [f"{len(pairs)} pair(s); a verdict wants {SEEDS} seeds"]
    notes.append(
        "the verbose model was taught to check itself twice in 7 of 10 texts, so that its length is ours; what is "
        "found is whether the small model's text cuts it short"
    )
    verdict = {
        "items": cfg.items,
        "judged": cfg.judged,
        "rules": RULES,
        "claims": claims,
        "pairs": pairs,
        "notes": notes,
    }
    atomic_write_json(run.artifacts / "verdict.json", verdict)
    return ReproduceReport.of(run)


def _pair(
    cfg: ReproduceConfig, run: Run, name: str, path: Path | None, router: Path | None, device: Any
) -> dict[str, Any]:
    number = int(name.split()[-1])
    pair, verbose = (load_host(number, path=path, verbose=verbose, device=device) for verbose in (False, True))
    ratio = step_ratio(pair)
    problems = products(cfg.items, seed=40_000 + 100 * cfg.seed + number)

    def ask_of(file: str, who: Any, asked: Any, sampling: SamplingConfig) -> Answers:
        return Answers(
            run.artifacts / f"{file}-{number}.jsonl",
            who,
            asked,
            sampling,
            batch=cfg.batch,
            seed=cfg.seed,
            quiet=run.quiet,
        )

    plain = ask_of("answers", pair, problems, SamplingConfig())
    gate = StitchConfig(tau=cfg.judged)
    alone = {policy: plain.ask(StitchConfig(policy=policy)) for policy in ("small", "large")}
    lines: dict[str, list[Outcome]] = {"stitch": [], "random": [], "cascade": []}
    for tau in cfg.taus:
        outcome = plain.ask(replace(gate, tau=tau))
        lines["stitch"].append(outcome)
        lines["random"].append(plain.ask(matched_random(outcome), label=f"random as {outcome.label}"))
        found = cascade(alone["small"], alone["large"], calls=outcome.calls(LARGE))
        lines["cascade"].append(replace(found, label=f"cascade as {outcome.label}"))
    at = cfg.taus.index(cfg.judged)
    stitched, drawn, cascaded = (lines[key][at] for key in ("stitch", "random", "cascade"))
    runs = plain.ask(matched_random(stitched, runs=True), label=f"random runs as {stitched.label}")
    # The window gate's threshold is chosen on problems drawn anew, of which about one in sixteen is among these.
    tuning = ask_of("tuning", pair, products(TUNED, seed=60_000 + number), SamplingConfig())
    target = tuning.ask(gate).share
    search = matching_tau(tuning, replace(gate, window=cfg.window), target, tolerance=0.01, rounds=12)
    window = plain.ask(replace(gate, tau=search.tau, window=cfg.window), label=f"window {cfg.window}")
    long = ask_of("verbose", verbose, problems, VERBOSE)
    long_alone = long.ask(StitchConfig(policy="large"), label="verbose large")
    long_stitched = long.ask(gate, label=f"verbose {gate.label}")
    everything = [*alone.values(), *(o for line in lines.values() for o in line), runs, window]
    routed: list[Outcome] = []
    if router is not None:
        asked = replace(gate, policy="router", tau=cfg.asked)
        routed = [plain.ask(asked, routing=Routing(load_router(router).to(device)))]
    for outcome in [*everything, *routed, long_alone, long_stitched]:
        write_rows(run, outcome, ratio, split=name)
    plots.curve(lines, alone, run.figures / f"curve-{number}.png", title=f"tiny {name}, {cfg.items} held-out products")

    def differ(first: Outcome, second: Outcome, shift: float = 0.0) -> dict[str, Any]:
        gaps = 100 * (np.asarray(first.right, dtype=float) - np.asarray(second.right, dtype=float)) + shift
        shown = (
            f"{100 * first.accuracy:.1f} % at {100 * first.share:.1f} % large tokens, "
            f"{100 * second.accuracy:.1f} % at {100 * second.share:.1f} %"
        )
        return decided(gaps, seed=cfg.seed) | {"shown": shown}

    doubts = np.asarray([answer.doubt for answer in alone["small"].answers])
    wrong = ~np.asarray(alone["small"].right)
    rng = np.random.default_rng(cfg.seed)
    samples = [np.arange(len(doubts)), *(rng.integers(0, len(doubts), len(doubts)) for _ in range(DRAWS))]
    areas = np.asarray([auroc(doubts[chosen], wrong[chosen]) for chosen in samples])
    shorter = [sum(a.tokens) - sum(b.tokens) for a, b in zip(long_alone.answers, long_stitched.answers, strict=True)]
    claims = {
        "doubt": decided_over(areas[0] - 0.5, areas[1:] - 0.5)
        | {"shown": f"AUROC {areas[0]:.3f}, {int(wrong.sum())} wrong answers"},
        "kept": differ(stitched, alone["large"], MARGIN),
        "random": differ(stitched, drawn),
        "random runs": differ(stitched, runs),
        "cascade": differ(stitched, cascaded),
        "verbose kept": differ(long_stitched, long_alone, MARGIN),
        "verbose shorter": decided(shorter, seed=cfg.seed)
        | {
            "shown": f"{long_stitched.tokens:.1f} tokens, {long_alone.tokens:.1f}; "
            f"cost {long_stitched.cost(ratio):.1f} large steps, {long_alone.cost(ratio):.1f}"
        },
        "window": differ(window, stitched)
        | ({} if search.reached else {"note": f"share {search.value:.3f} on the tuning set, wanted {target:.3f}"}),
    }
    for outcome in routed:
        curve = [*alone.values(), *lines["stitch"]]
        gaps = 100 * (np.asarray(outcome.right, dtype=float) - at_cost(curve, outcome.cost(ratio), ratio))
        shown = f"{100 * outcome.accuracy:.1f} % at {outcome.cost(ratio):.1f} large steps"
        claims["router"] = decided(gaps, seed=cfg.seed) | {"shown": shown}
    for claim, numbers in claims.items():
        run.row(
            "margin",
            numbers["margin"],
            better="none",
            n=cfg.items,
            interval=tuple(numbers["interval"]),
            variant=claim,
            split=name,
            labels={"holds": numbers["holds"]},
        )
    return {"name": name, "path": str(path or "packaged"), "claims": claims}
