"""Reproduce ROBE (arXiv 2108.02191) on a laptop: click models with 10, 100 and 1000 times fewer embedding numbers.

What does not hold: blocks of 16 cost up to 0.003 AUC against blocks of one number, most where the array has only 403
numbers: rows of 16 begin at few places there and share most of what they read.
"""

from __future__ import annotations

import _crossed_fields as clicks
import torch
from _harness import Outcome, Reproduction, Void, at_least

from quernel import _timing

robe = Reproduction("robe", paper="2108.02191")

DATA = "FARS accident records, 26 crossed fields (stand-in for Criteo), fixed 70 / 10 / 20 split"
SCALE = "DLRM of 26 fields x 16, perceptron 64-32, own best epoch of 5, optimiser and rate tuned for each model"
SEEDS = (0, 1, 2)
CLOSE, BETTER = 0.001, 0.002
RATIOS, BLOCKS = (10, 100, 1000), (1, 4, 16)


def row(name: str, kind: str, ratio: int, block: int, seed: int) -> dict[str, object]:
    result = clicks.tuned(kind, ratio, block, seed=seed)
    optimizer, rate = clicks.best_setting(kind, ratio)
    return {
        "embedding": name,
        "numbers": result.numbers,
        "test AUC": f"{result.test:.4f}",
        "validation AUC": f"{result.validation:.4f}",
        "epoch": result.epoch,
        "setting": f"{optimizer} {rate:g}",
    }


@robe.claim(
    name="full-tables",
    claim="An array 100 times smaller than the tables reaches their accuracy",
    scale=SCALE,
    data=DATA,
    metric="test AUC at 100 times fewer embedding numbers, Z=16",
    baseline="full tables",
    rule=at_least(-0.003, of="ours - baseline", partly=-0.006),
    seeds=SEEDS,
)
def full_tables(seed: int) -> Outcome:
    ours, full = clicks.tuned("robe", 100, 16, seed=seed), clicks.tuned("full", seed=seed)
    rows = [row("full tables", "full", 1, 16, seed), row("ROBE, Z=16", "robe", 100, 16, seed)]
    held = clicks.fields()
    size = sum(p.numel() for p in clicks.ClickModel(clicks.embedding_of("full", 1, 16, 0)).parameters())
    note = (
        f"vocabularies {min(held.sizes)} to {max(held.sizes)}, {sum(held.sizes)} rows; positives "
        f"{100 * float(held.labels.mean()):.1f} %; of the whole model's {size} numbers "
        f"{size - full.numbers + ours.numbers} stay"
    )
    return Outcome(ours.test, full.test, rows=rows, notes=[note])


def faster_than(kind: str) -> bool:
    """Whether rows are looked up faster than by a peer of equal bytes; one batch on one thread, interleaved."""
    ours, peer = (clicks.embedding_of(k, 100, 16, 0) for k in ("robe", kind))
    ids = clicks.fields().take("test")[0][:2048]
    with _timing.threads(1), torch.inference_mode():
        result = _timing.paired_ratios(lambda: ours(ids), {kind: lambda: peer(ids)}, rounds=99, min_ms=5.0)[kind]
    if not result.valid:
        raise Void(result.void)
    return result.ratio > 1


@robe.claim(
    name="equal-bytes",
    claim="At equal bytes it is better than hashing rows and than quotient-remainder tables",
    scale=SCALE,
    data=DATA,
    metric="test AUC at 100 times fewer embedding numbers",
    baseline="the better of hashed rows and quotient-remainder",
    rule=at_least(-CLOSE, of="ours - baseline"),
    checks=(f"better by {BETTER}, or faster to look up",),
    seeds=SEEDS,
)
def equal_bytes(seed: int) -> Outcome:
    ours = clicks.tuned("robe", 100, 16, seed=seed)
    peers = {kind: clicks.tuned(kind, 100, seed=seed) for kind in ("rows", "qr")}
    better = max(peers, key=lambda kind: peers[kind].test)
    gap = ours.test - peers[better].test
    checks = {f"better by {BETTER}, or faster to look up": gap >= BETTER or faster_than(better)}
    rows = [row("ROBE, Z=16", "robe", 100, 16, seed)]
    rows += [row(name, kind, 100, 16, seed) for name, kind in (("hashed rows", "rows"), ("quotient-remainder", "qr"))]
    return Outcome(ours.test, peers[better].test, checks, rows)


@robe.claim(
    name="block-size",
    claim="Larger blocks, which cost fewer cache lines, do not cost accuracy",
    scale=f"{SCALE}; Z=1, 4, 16 at 10, 100 and 1000 times fewer numbers",
    data=DATA,
    metric="test AUC where the larger block (Z=4 or 16) loses most",
    baseline="Z=1",
    rule=at_least(-CLOSE, of="ours - baseline"),
    seeds=SEEDS,
)
def block_size(seed: int) -> Outcome:
    scores = {
        (ratio, block): clicks.tuned("robe", ratio, block, seed=seed).test for ratio in RATIOS for block in BLOCKS
    }
    rows = [row(f"ROBE, Z={block}, 1/{ratio}", "robe", ratio, block, seed) for ratio, block in scores]
    worst = min(
        ((ratio, block) for ratio, block in scores if block > 1),
        key=lambda case: scores[case] - scores[case[0], 1],
    )
    note = f"worst: Z={worst[1]} at 1/{worst[0]}"
    return Outcome(scores[worst], scores[worst[0], 1], rows=rows, notes=[note])


if __name__ == "__main__":
    raise SystemExit(robe.main())
