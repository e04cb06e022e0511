"""How often intervals hold the truth, and how often the gate ships what it must not, over simulated evaluations.

    OMP_NUM_THREADS=1 python bench/gate_simulation.py --out bench/results/statistics.jsonl --run-id ID [--simulations N]

(2,000 simulations a setting, and five times as many of each for the coverage of means and differences.)

Coverage: each simulation draws scores whose true mean is known; `below` and `above` are the shares whose whole interval
lay below and above it. A 0/1 interval can not cover 95% at each single rate, because so few outcomes are possible:
rates and shares of ties are therefore drawn anew in each simulation from a range (Newcombe 1998), and the worst single
rate is reported beside them, exact, by enumeration. `sparse` marks settings with fewer than 12 expected items that
say anything; no interval can be short there without being wrong, so only too low a coverage counts as a miss. A graded
setting whose share lies within two standard errors of a bound is drawn ten times more, and all draws count.

The reach of the support (means.REACH, paired.MARGIN) was chosen on settings like these. Those marked `held_out` were
not looked at before it was, but when REACH went from 0.5 to 0.55, for one that was covered too often.

False ship: `decide` on results whose true gain is at the limit, or whose true loss is; the share that it ships.
Power: `decide` at the gain that `detectable_gain` names; the share that it ships, which should be 80%.
One JSON line a setting; exit 1 if one is outside its bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from environment import origin
from scipy import stats

from whet.evals.gate import Rules, decide
from whet.evals.results import Item, TaskResult
from whet.evals.statistics import (
    detectable_gain,
    over_seeds,
    paired_bootstrap,
    paired_difference,
    proportion,
    ratio,
)
from whet.evals.statistics.means import mean_ends
from whet.evals.statistics.paired import paired_ends

CONFIDENCE = 0.95
BAND = (0.935, 0.965)
SPARSE = 12
FALSE_SHIP = 0.05
POWER_BAND = (0.76, 0.86)
SIZES = (30, 100, 400)
BOOTSTRAP_RESAMPLES = 1000
BOOTSTRAPPED = 2000
AGAIN = 10
RATES = {"0/1 near 0": (0.01, 0.10), "0/1": (0.10, 0.90), "0/1 near 1": (0.90, 0.99)}
UNEQUAL = {"0/1, 2-10% unequal": (0.02, 0.10), "0/1, 10-30% unequal": (0.10, 0.30), "0/1, 30-60% unequal": (0.3, 0.6)}

Rng = np.random.Generator
Draw = Callable[[int, int, Rng], tuple[np.ndarray, np.ndarray]]
"""(simulations S, items N, rng) -> scores or differences [S, N], true means [S]."""
Ends = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]
"""(scores or differences [S, N], confidence) -> lower ends [S], upper ends [S]."""


def beta(a: float, b: float) -> Draw:
    return lambda s, n, rng: (rng.beta(a, b, (s, n)), np.full(s, a / (a + b)))


def levels(values: tuple[float, ...], shares: tuple[float, ...]) -> Draw:
    mean = float(np.dot(values, shares))
    return lambda s, n, rng: (rng.choice(values, (s, n), p=shares), np.full(s, mean))


def mostly(value: float, share: float, low: float, high: float) -> Draw:
    """`value` with a chance of `share`, else uniform in low..high."""

    def draw(s: int, n: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
        x = np.where(rng.random((s, n)) < share, value, rng.uniform(low, high, (s, n)))
        return x, np.full(s, share * value + (1 - share) * (low + high) / 2)

    return draw


def skewed(s: int, n: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Small losses and a long tail of gains."""
    return np.minimum(rng.exponential(0.1, (s, n)), 1) - 0.08, np.full(s, 0.1 * -np.expm1(-10.0) - 0.08)


GRADED = {
    "graded, spread": beta(2, 5),
    "graded, near 0": beta(0.5, 8),
    "graded, near 1": beta(8, 0.5),
    "five levels": levels((0, 0.25, 0.5, 0.75, 1), (0.05, 0.1, 0.2, 0.3, 0.35)),
    "graded, 80% at 1": mostly(1.0, 0.8, 0, 1),
    "graded, 80% at 0": mostly(0.0, 0.8, 0, 1),
    "graded, both ends": beta(0.3, 0.3),
    "graded, below 1": beta(5, 1),
    "graded, 60% at 1": mostly(1.0, 0.6, 0.2, 0.9),
}
GRADED_PAIRS = {
    "graded, no ties": lambda s, n, rng: (rng.beta(20, 20, (s, n)) - 0.45, np.full(s, 0.05)),
    "graded, 70% ties": mostly(0.0, 0.7, -1, 1),
    "graded, 90% ties": mostly(0.0, 0.9, -1, 1),
    "graded, 80% ties, gains only": mostly(0.0, 0.8, 0, 1),
    "graded, 80% ties, losses only": mostly(0.0, 0.8, -1, 0),
    "levels, 65% ties": levels((-1, -0.5, -0.25, 0, 0.25, 0.5, 1), (0.01, 0.03, 0.1, 0.65, 0.13, 0.06, 0.02)),
    "graded, skewed": skewed,
    "graded, two betas": lambda s, n, rng: (rng.beta(3, 4, (s, n)) - rng.beta(3, 5, (s, n)), np.full(s, 3 / 7 - 3 / 8)),
    "graded, 50% ties": mostly(0.0, 0.5, -0.3, 0.6),
}
HELD_OUT = {"graded, below 1", "graded, 60% at 1", "graded, two betas", "graded, 50% ties"}
TIES = {"50%": 0.5, "70%": 0.3, "90%": 0.1, "80%": 0.2, "65%": 0.35}


def rates(low: float, high: float, s: int, n: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """0/1 scores, each simulation with a rate of its own."""
    rate_S = rng.uniform(low, high, s)
    return (rng.random((s, n)) < rate_S[:, None]).astype(float), rate_S


def unequal_pairs(low: float, high: float, s: int, n: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Differences of 0/1 scores: each simulation has a share of unequal pairs, and of the better among them."""
    unequal_S, better_S = rng.uniform(low, high, s), rng.uniform(0.2, 0.8, s)
    u_SN = rng.random((s, n))
    gains_S = unequal_S * better_S
    d_SN = np.where(u_SN < gains_S[:, None], 1.0, np.where(u_SN < unequal_S[:, None], -1.0, 0.0))
    return d_SN, 2 * gains_S - unequal_S


def coverage(of: str, setting: str, n: int, low: np.ndarray, high: np.ndarray, truth: np.ndarray, sparse: bool) -> dict:
    held = float(((low <= truth + 1e-9) & (truth <= high + 1e-9)).mean())
    ok = held >= BAND[0] and (held <= BAND[1] or sparse)
    return {
        "kind": "coverage", "of": of, "setting": setting, "n": n, "simulations": len(truth), "coverage": round(held, 4),
        "below": round(float((high < truth - 1e-9).mean()), 4), "above": round(float((low > truth + 1e-9).mean()), 4),
        "width": round(float((high - low).mean()), 4), "sparse": sparse,
        "held_out": setting in HELD_OUT, "ok": ok,
    }  # fmt: skip


def graded_coverage(of: str, setting: str, n: int, draw: Draw, ends: Ends, s: int, rng: Rng, sparse: bool) -> dict:
    """As `coverage`, of what `draw` makes; drawn again where chance could decide on which side of a bound it lies."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def simulate() -> dict:
        x, truth = draw(s, n, rng)
        parts.append((*ends(x, CONFIDENCE), truth))
        return coverage(of, setting, n, *(np.concatenate(part) for part in zip(*parts, strict=True)), sparse)

    line = simulate()
    error = (line["coverage"] * (1 - line["coverage"]) / s) ** 0.5
    if min(abs(line["coverage"] - bound) for bound in BAND) < 2 * error:
        for _ in range(AGAIN):
            line = simulate()
    return line


def means(s: int, rng: Rng) -> Iterator[dict[str, Any]]:
    for n in SIZES:
        table = [proportion(k, n, CONFIDENCE) for k in range(n + 1)]
        lows, highs = np.array([i.low for i in table]), np.array([i.high for i in table])
        for name, (low, high) in RATES.items():
            x, truth = rates(low, high, s, n, rng)
            k = x.sum(1).astype(int)
            line = coverage("mean", name, n, lows[k], highs[k], truth, sparse=False)
            grid = np.linspace(low, high, 400)
            held = (lows[:, None] <= grid) & (grid <= highs[:, None])
            exact = (stats.binom.pmf(np.arange(n + 1)[:, None], n, grid) * held).sum(0)
            ok = BAND[0] <= exact.mean() <= BAND[1]  # known exactly, so chance has no part in it
            yield line | {
                "exact": round(float(exact.mean()), 4),
                "exact_worst": round(float(exact.min()), 4),
                "ok": bool(ok),
            }
        for name, draw in GRADED.items():
            sparse = "80%" in name and 0.2 * n < SPARSE
            yield graded_coverage("mean", name, n, draw, mean_ends, s, rng, sparse)


def pairs(s: int, rng: Rng) -> Iterator[dict[str, Any]]:
    draws = {name: (lambda s, n, rng, r=r: unequal_pairs(*r, s, n, rng), sum(r) / 2) for name, r in UNEQUAL.items()}
    draws |= {
        name: (draw, next((share for ties, share in TIES.items() if f"{ties} ties" in name), 1.0))
        for name, draw in GRADED_PAIRS.items()
    }
    for n in SIZES:
        for name, (draw, unequal) in draws.items():
            sparse = unequal * n < SPARSE
            yield graded_coverage("paired difference", name, n, draw, paired_ends, s, rng, sparse)
            if n == 100:
                yield bootstrap(name, n, *draw(BOOTSTRAPPED, n, rng), sparse)


def bootstrap(name: str, n: int, x_SN: np.ndarray, truth_S: np.ndarray, sparse: bool) -> dict[str, Any]:
    """The paired bootstrap on such data; it decides nothing in the gate, so it is reported without bounds."""
    found = [
        paired_bootstrap(np.maximum(x, 0), np.maximum(-x, 0), resamples=BOOTSTRAP_RESAMPLES, seed=i)
        for i, x in enumerate(x_SN)
    ]
    ends = np.array([[i.low, i.high] for i in found]).T
    return coverage("paired bootstrap", name, n, *ends, truth_S, sparse) | {"ok": None}


def others(s: int, rng: Rng) -> Iterator[dict[str, Any]]:
    """Loss ratios of unequal texts, and means over seeds."""
    for n in (50, 400):
        tokens = rng.integers(50, 800, (s, n)).astype(float)
        rise = tokens * 0.02 + np.sqrt(tokens) * rng.standard_t(5, (s, n)) * 0.5
        found = [ratio(rise[i], tokens[i], CONFIDENCE) for i in range(s)]
        yield coverage("ratio", "loss a token", n, *_ends(found), np.full(s, 0.02), sparse=False)
    for k in (3, 5):
        seeds = [over_seeds(row, CONFIDENCE) for row in rng.normal(0.7, 0.02, (s, k))]
        yield coverage("over seeds", "one mean a seed", k, *_ends(seeds), np.full(s, 0.7), sparse=False)
        found = []
        for _ in range(s):
            x = 0.5 + rng.normal(0, 0.02, (k, 1)) + rng.normal(0, 0.2, (1, 200)) + rng.normal(0, 0.2, (k, 200))
            found.append(over_seeds(x, CONFIDENCE))
        yield coverage("over seeds", "scores of 200 items", k, *_ends(found), np.full(s, 0.5), sparse=False)


def _ends(found: list[Any]) -> np.ndarray:
    return np.array([[i.low, i.high] for i in found]).T


def result(task: str, scores: np.ndarray) -> TaskResult:
    items = tuple(Item(str(i), "", None, "", float(score)) for i, score in enumerate(scores))
    return TaskResult(task, "d", "m", items, 0.0)


def both(n: int, gain: float, unequal: float, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """0/1 scores (candidate, baseline) with a true gain and a share of unequal pairs."""
    u, equal = rng.random(n), (rng.random(n) < 0.5).astype(float)
    better, worse = u < (unequal + gain) / 2, (u >= (unequal + gain) / 2) & (u < unequal)
    return np.where(better, 1.0, np.where(worse, 0.0, equal)), np.where(better, 0.0, np.where(worse, 1.0, equal))


def graded(n: int, gain: float, unequal: float, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Graded scores; the unequal ones differ by half the scale at most, up more often where there is a gain."""
    start = rng.uniform(0.25, 0.75, n)
    step = rng.uniform(0, 0.5, n) * np.where(rng.random(n) < 0.5 + 2 * gain / unequal, 1, -1)
    step = np.where(rng.random(n) < unequal, step, 0)
    return np.clip(start + step / 2, 0, 1), np.clip(start - step / 2, 0, 1)


Scores = tuple[np.ndarray, np.ndarray]
Task = tuple[Callable[[int, float, float, Rng], Scores], float, float]
"""How scores are drawn, the true gain, the share of unequal pairs."""

NULLS: dict[str, tuple[Rules, dict[str, Task], tuple[int, ...]]] = {
    "no gain, 10% unequal": (Rules(task="a"), {"a": (both, 0, 0.1)}, (20, 40, 100, 400)),
    "no gain, 30% unequal": (Rules(task="a"), {"a": (both, 0, 0.3)}, (20, 40, 100, 400)),
    "gain of 3 points, 3 required": (Rules(task="a", min_gain=0.03), {"a": (both, 0.03, 0.1)}, (40, 100, 400)),
    "gain of 1 point, 1 required, none worse": (
        Rules(task="a", min_gain=0.01), {"a": (both, 0.01, 0.01)}, (17, 40, 400),
    ),
    "gain of 5 points, 5 required, none worse": (Rules(task="a", min_gain=0.05), {"a": (both, 0.05, 0.05)}, (40, 100)),
    "no gain, graded, 20% unequal": (Rules(task="a"), {"a": (graded, 0, 0.2)}, (40, 400)),
    "gain of 2 points, 2 required, graded": (Rules(task="a", min_gain=0.02), {"a": (graded, 0.02, 0.3)}, (40, 400)),
    "no gain on any of 3 tasks, one is enough": (
        Rules(task=["a", "b", "c"], need="any"), dict.fromkeys("abc", (both, 0, 0.2)), (100, 400),
    ),
    "gain, but 5 points lost on 1 of 4 other tasks": (
        Rules(task="a"),
        {"a": (both, 0.3, 0.4), "b": (both, -0.05, 0.15), **dict.fromkeys("cde", (both, 0, 0.05))},
        (400,),
    ),
    "gain, but 5 points lost on 1 other task, none better": (
        Rules(task="a"), {"a": (both, 0.3, 0.4), "b": (both, -0.05, 0.05)}, (55, 100, 400),
    ),
}  # fmt: skip


def shipped(rules: Rules, tasks: dict[str, Task], n: int, rng: Rng) -> bool:
    drawn = {task: how(n, gain, unequal, rng) for task, (how, gain, unequal) in tasks.items()}
    own, base = ({task: result(task, scores[side]) for task, scores in drawn.items()} for side in (0, 1))
    return decide(rules, own, base).ship


def gate(s: int, rng: Rng) -> Iterator[dict[str, Any]]:
    for setting, (rules, tasks, sizes) in NULLS.items():
        for n in sizes:
            yield false_ship(setting, n, np.mean([shipped(rules, tasks, n, rng) for _ in range(s)]), s)


def selection(s: int, rng: Rng) -> Iterator[dict[str, Any]]:
    """The best of five, with the error divided, and without, which is reported only."""
    yield false_ship("best of 5 checkpoints without gain, candidates: 5", 100, best_of_five(s, 5, rng), s)
    yield false_ship("best of 5 checkpoints without gain, candidates: 1", 100, best_of_five(s, 1, rng), s) | {
        "ok": None
    }


def power(s: int, rng: Rng) -> Iterator[dict[str, Any]]:
    for n in (40, 100, 400):
        gain = detectable_gain(n, baseline_rate=0.5, agreement=0.8)
        rate = float(np.mean([shipped(Rules(task="a"), {"a": (both, gain, max(0.2, gain))}, n, rng) for _ in range(s)]))
        ok = POWER_BAND[0] <= rate <= POWER_BAND[1]
        line = {"kind": "power", "of": "gate", "setting": "detectable gain, 80% agreement", "n": n, "simulations": s}
        yield line | {"gain": round(gain, 4), "shipped": round(rate, 4), "ok": ok}


def best_of_five(s: int, candidates: int, rng: Rng) -> float:
    """Share of simulations in which the best of five models that are no better than the base ships."""
    ships = 0
    for _ in range(s):
        base = (rng.random(100) < 0.5).astype(float)
        models = [np.where(rng.random(100) < 0.4, rng.random(100) < 0.5, base).astype(float) for _ in range(5)]
        best = max(models, key=lambda scores: scores.sum())
        ships += decide(Rules(task="a", candidates=candidates), {"a": result("a", best)}, {"a": result("a", base)}).ship
    return ships / s


def false_ship(setting: str, n: int, rate: float, s: int) -> dict[str, Any]:
    line = {"kind": "false ship", "of": "gate", "setting": setting, "n": n, "simulations": s}
    return line | {"shipped": round(float(rate), 4), "ok": bool(rate <= FALSE_SHIP)}


def speed(s: int, rng: Rng) -> Iterator[dict[str, Any]]:
    """Median of five calls on 1,000 graded items."""
    ours, theirs = rng.random(1000), rng.random(1000)
    for name, call in {"paired difference": paired_difference, "paired bootstrap": paired_bootstrap}.items():
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            call(ours, theirs)
            taken.append(time.perf_counter() - start)
        seconds = float(np.median(taken))
        yield {
            "kind": "speed",
            "of": name,
            "setting": "graded",
            "n": 1000,
            "seconds": round(seconds, 4),
            "ok": seconds < 0.3,
        }


PARTS = {
    "means": means,
    "pairs": pairs,
    "others": others,
    "gate": gate,
    "speed": speed,
    "selection": selection,
    "power": power,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    options = parser.parse_args()
    common = {"run_id": options.run_id, "seed": options.seed, **origin("numpy", "scipy")}
    misses = 0
    for index, name in enumerate(PARTS):
        if name not in options.only:
            continue
        s = options.simulations * (5 if name in ("means", "pairs") else 1)
        for line in PARTS[name](s, np.random.default_rng([options.seed, index])):
            misses += line["ok"] is False
            print(*(f"{key}={value}" for key, value in line.items()), flush=True)
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | common) + "\n")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
