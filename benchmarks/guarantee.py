"""Whether the guarantee holds, what it costs, and how fast a replay is.

An exit table of real rows is taken as the whole population, so that the true risk of a policy is known. From it 1,000
rows are drawn, with replacement, as the rows to calibrate on; a violation is a policy whose true risk is larger than
asked for. Beside it the choice without a guarantee: the fastest threshold whose risk on the same rows is as asked for.

Needs the exit tables of `criteria.py` in the same output directory.

Example: python benchmarks/guarantee.py --output-dir bench-output
"""

import argparse
import itertools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from criteria import RECIPES, table_path, with_others
from transformers_badge import ExitPolicy, ExitTable, calibrate
from transformers_badge.calibration.demand import losses_at_exits
from transformers_badge.calibration.replay import layer_speedup, replay, score_exits
from transformers_badge.evaluation.curves import compared_policies, run_thresholds
from transformers_badge.evaluation.timing import describe_machine


RISKS, CRITERIA = ("disagreement", "error_increase"), ("entropy", "learned")
ROWS, SIMULATIONS, MAX_RISK, CONFIDENCE = 1000, 1000, 0.01, 0.95
RECORD = Path(__file__).parents[1] / "docs" / "records" / "guarantee.json"
REPLAYED = {"rows": 10_000, "exits": 12, "labels": 2, "thresholds": 100, "criteria": 10}


def uncertified(sample: ExitTable, policy: ExitPolicy, risk: Any) -> float | None:
    """The fastest threshold whose risk on the rows themselves is as asked for."""
    runs, losses = run_thresholds(score_exits(sample, policy)), losses_at_exits(sample, risk)
    costs, rows = np.asarray(sample.costs)[runs.taken].mean(axis=1), np.arange(len(sample))
    held = np.flatnonzero(losses[rows, runs.taken].mean(axis=1) <= MAX_RISK)
    threshold = float(runs.thresholds[held[np.argmin(costs[held])]])
    return None if threshold < 0 else threshold


def simulate(population: ExitTable, risk: Any, criterion: str) -> dict[str, Any]:
    """Calibrate again and again; how often the guarantee fails, and what it buys."""
    losses, everyone = losses_at_exits(population, risk), np.arange(len(population))
    found: dict[str, list[tuple[float, float]]] = {"certified": [], "uncertified": []}
    for seed in tqdm(range(SIMULATIONS), desc=f"{risk}, {criterion}", unit="calibration"):
        drawn = np.random.default_rng(seed).integers(0, len(population), ROWS)
        sample = population.select(drawn)
        policy = calibrate(sample, criterion, risk=risk, max_risk=MAX_RISK, confidence=CONFIDENCE, seed=seed)
        boldly = ExitPolicy.of(policy, threshold=uncertified(sample, policy, risk))
        for name, chosen in (("certified", policy), ("uncertified", boldly)):
            taken = replay(population, chosen)
            found[name].append((float(losses[everyone, taken].mean()), layer_speedup(population, taken)))
    record: dict[str, Any] = {"risk": risk, "criterion": criterion}
    for name, entries in found.items():
        risks, speedups = np.array(entries).T
        record[name] = {"violations": float((risks > MAX_RISK).mean()), "layer_speedup": float(speedups.mean())}
    return record


def time_replay() -> dict[str, Any]:
    """Seconds to score a table with ten criteria and to take the exits at a hundred thresholds of each."""
    shape = (REPLAYED["rows"], REPLAYED["exits"], REPLAYED["labels"])
    logits = np.random.default_rng(0).normal(scale=2, size=shape).astype(np.float32)
    table = ExitTable(exit_logits=logits, exit_layers=tuple(range(1, REPLAYED["exits"] + 1)))
    policies = list(compared_policies(REPLAYED["exits"]).values())[: REPLAYED["criteria"]]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for policy in policies:
            run_thresholds(score_exits(table, policy), REPLAYED["thresholds"])
        seconds.append(time.perf_counter() - start)
    return {**REPLAYED, "seconds": float(np.median(seconds)), "slowest": max(seconds)}


def main() -> None:
    """Simulate on a model of every kind, time the replay, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    parser.add_argument("--recipe", choices=RECIPES, help="Only this one; the others stay as docs/records has them.")
    arguments = parser.parse_args()
    before = None if arguments.recipe is None else json.loads(RECORD.read_text())
    warnings.simplefilter("ignore")  # a calibration that ends at full depth is counted, not reported
    record: dict[str, Any] = {
        "rows": ROWS,
        "simulations": SIMULATIONS,
        "max_risk": MAX_RISK,
        "confidence": CONFIDENCE,
        "replay": time_replay() if before is None else before["replay"],
        "runs": [],
    }
    recipes = [recipe for recipe in RECIPES if arguments.recipe in (None, recipe)]
    for recipe, risk, criterion in itertools.product(recipes, RISKS, CRITERIA):
        population = ExitTable.load(table_path(arguments.output_dir, "movies", recipe, 0))
        record["runs"].append({"data": "movies", "recipe": recipe, **simulate(population, risk, criterion)})
        print(json.dumps(record["runs"][-1]))
    if before is not None:
        record["runs"] = with_others(record["runs"], before["runs"], [("movies", recipe) for recipe in RECIPES])
    record["machine"] = describe_machine()
    (arguments.output_dir / "guarantee.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
