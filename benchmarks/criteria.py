"""Which criterion: all of them compared on models as `train` makes them, on the same without exit 0, and as `convert`.

MiniLM, three data sets of two classes and one of five, three seeds. Every model is trained once and leaves an exit
table of rows that it has not seen; what is there already is not made again, so it can be interrupted. The comparison
replays from the tables.

Example: python benchmarks/criteria.py --output-dir bench-output
         python benchmarks/criteria.py --recipe converted (the others stay as docs/records has them)
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from plain_classifier import fine_tune_plainly
from transformers_badge import BadgeForSequenceClassification, ExitPolicy, ExitTable, convert_classifier
from transformers_badge.calibration.fitting import Goal, deep_enough, fit_rule
from transformers_badge.calibration.replay import agreement, correctness, score_exits, take_exits
from transformers_badge.demo.sources import encoder_path, read_ratings, read_reviews
from transformers_badge.evaluation.curves import (
    LOSSES,
    area,
    compared_policies,
    cross_fitted_scores,
    curve,
    run_thresholds,
    speedup_at,
    speedup_axis,
)
from transformers_badge.evaluation.timing import describe_machine
from transformers_badge.inference.exit_logits import make_exit_table
from transformers_badge.training.fine_tune import fit, tokenize


SEEDS, SPLITS = (0, 1, 2), 5
RECIPES = ("exit_0", "taught", "converted")  # fine-tuned, with an exit 0 and without; and converted, without
# What a rule learns, with labels and without: as `calibrate` has it for the one risk and the other.
LEARNED: dict[str, Goal] = {"learned": "labelled_regret", "learned_without_labels": "disagreement"}
RATINGS = "ratings"  # the movie reviews in five classes
EPOCHS = {"movies": 2, "products": 3, "tweets": 3, RATINGS: 1}
TASKS = [*itertools.product(("movies", "products", "tweets"), RECIPES), (RATINGS, "taught")]
COMMON = 6.0  # the layer speedup up to which areas are taken: a model without exit 0 has no more
MAX_TOKENS, BATCH_SIZE, LEARNING_RATE = 128, 16, 1e-4
RECORD = Path(__file__).parents[1] / "docs" / "records" / "criteria.json"
# Shares of a data set, anew for every seed: fine-tuned models learn from the first two; the source of a converted one
# from the first, its exits from the second, without labels. The rest is for calibration and test.
SHARES = {"source": 0.4, "texts": 0.2}


def parts_of(data: str, seed: int) -> tuple[list[str], Any, list[Any]]:
    """Texts and labels of a data set, and which rows are the source's, the other texts, and held out."""
    texts, labels = read_ratings() if data == RATINGS else read_reviews(data)
    order = np.random.default_rng(seed).permutation(len(texts))
    cuts = np.cumsum([round(share * len(texts)) for share in SHARES.values()])
    return texts, labels, np.split(order, cuts)


def train(data: str, recipe: str, seed: int, all_texts: bool = False, **fields: Any) -> ExitTable:
    """Train one model, and run it over the rows that were held out.

    Args:
        all_texts: convert on the texts of the source as well.
        **fields: of `convert_classifier`, or of the model where it is fine-tuned.
    """
    texts, labels, (source, others, held_out) = parts_of(data, seed)

    def pick(rows: Any) -> list[str]:
        return [texts[row] for row in rows]

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if recipe != "converted":
            set_seed(seed)
            model = BadgeForSequenceClassification.from_encoder(
                encoder_path(), num_labels=int(labels.max()) + 1, lexical_exit=recipe == "exit_0", **fields
            )
            tokenizer = AutoTokenizer.from_pretrained(encoder_path())
            taught = np.concatenate([source, others])
            rows = tokenize(tokenizer, [pick(taught)], labels[taught].tolist(), MAX_TOKENS)
            fit(
                model,
                tokenizer,
                rows,
                None,
                folder,
                recipe="taught",
                epochs=EPOCHS[data],
                learning_rate=LEARNING_RATE,
                batch_size=BATCH_SIZE,
                seed=seed,
            )
        else:
            fine_tune_plainly(pick(source), labels[source], EPOCHS[data], seed, folder / "source")
            convert_classifier(
                folder / "source",
                pick(np.concatenate([source, others]) if all_texts else others),
                folder / "badge",
                batch_size=BATCH_SIZE,
                max_tokens=MAX_TOKENS,
                seed=seed,
                **fields,
            )
            model = BadgeForSequenceClassification.from_pretrained(folder / "badge")
            tokenizer = AutoTokenizer.from_pretrained(folder / "badge")
        return make_exit_table(model, tokenizer, [pick(held_out)], labels[held_out], max_tokens=MAX_TOKENS)


def table_path(output_dir: Path, data: str, recipe: str, seed: int) -> Path:
    """Where the exit table of one model lies."""
    return output_dir / "criteria" / f"{data}-{recipe}-{seed}.safetensors"


def axis_of(table: ExitTable) -> Any:
    """Layer speedups from 1 to the most that is of interest, finely, for what is read off the curves."""
    return np.arange(1.0, speedup_axis(table)[-1] + 1e-9, 1 / 8 if table.exit_layers[0] == 0 else 1 / 16)


def best_threshold(table: ExitTable, scores: Any, allowed: float) -> float:
    """The threshold that costs least while no more accuracy than allowed is lost on these rows; -1: nobody leaves."""
    runs, right, rows = run_thresholds(scores), correctness(table), np.arange(len(table))
    costs = np.asarray(table.costs)[runs.taken].mean(axis=1)
    lost = right[:, -1].mean() - right[rows, runs.taken].mean(axis=1)
    held = np.flatnonzero(lost <= allowed + 1e-12)
    return float(runs.thresholds[held[np.argmin(costs[held])]])


def compare(table: ExitTable) -> dict[str, Any]:
    """Every criterion on one model's table: what is learned and chosen on one half is measured on the other.

    The table is halved at random SPLITS times, and each half is measured once. Curves, of what is lost at a speedup,
    are means over these. So is the speedup at which no more than so many answers differ from full depth.
    """
    axis, costs, blocks = axis_of(table), np.asarray(table.costs), table.blocks
    policies = compared_policies(len(table.exit_layers))
    scores = {name: score_exits(table, policy) for name, policy in policies.items()}
    lost: dict[str, list[Any]] = {name: [] for name in (*policies, *LEARNED)}
    changed: dict[str, list[Any]] = {name: [] for name in lost}
    chosen: dict[str, list[Any]] = {name: [] for name in lost}
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(len(table))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        for calibrating, testing in (halves, halves[::-1]):
            learn, test = table.select(calibrating), table.select(testing)
            scored = {name: (values[calibrating], values[testing]) for name, values in scores.items()}
            for name, goal in LEARNED.items():
                # The threshold is chosen on scores of rows that the rule was not fitted to, but how deep is enough does
                # not change with the half.
                enough = deep_enough(learn) if goal == "labelled_regret" else None
                cross_fitted = cross_fitted_scores(learn, seed, goal, enough)
                rule = ExitPolicy(criterion="learned", rule=fit_rule(learn, goal=goal, enough=enough))
                scored[name] = cross_fitted, score_exits(test, rule)
            right, same = correctness(test).astype(np.float64), agreement(test).astype(np.float64)
            rows = np.arange(len(test))
            for name, (here, there) in scored.items():
                taken = run_thresholds(there).taken
                values = curve(costs[taken].mean(axis=1), right[rows, taken].mean(axis=1), blocks, axis)
                lost[name].append(right[:, -1].mean() - values)
                kept = curve(costs[taken].mean(axis=1), same[rows, taken].mean(axis=1), blocks, axis)
                changed[name].append(1 - kept)
                entries = []
                for allowed in LOSSES:
                    exits = take_exits(there, [best_threshold(learn, here, allowed)] * len(costs))
                    entries.append((costs[exits].mean(), right[:, -1].mean() - right[rows, exits].mean()))
                chosen[name].append(entries)
    compared = {}
    for name in lost:
        mean = np.mean(lost[name], axis=0)
        blocks_run, lost_then = np.mean(chosen[name], axis=0).T
        compared[name] = {
            "lost": np.round(mean, 5).tolist(),
            "area_lost": round(area(axis[axis <= COMMON], mean[axis <= COMMON]), 5),
            "speedup_at_loss": [round(speedup_at(axis, mean, allowed), 3) for allowed in LOSSES],
            "speedup_at_change": [round(speedup_at(axis, np.mean(changed[name], axis=0), a), 3) for a in LOSSES],
            "chosen": {
                "layer_speedup": np.round(blocks / blocks_run, 3).tolist(),
                "lost": np.round(lost_then, 5).tolist(),
            },
        }
    return compared


def with_others(models: list[Any], before: list[Any], tasks: list[tuple[str, str]]) -> list[Any]:
    """Entries of an earlier record with those of the same tasks renewed, in the order of the tasks."""
    renewed = {(model["data"], model["recipe"]) for model in models}
    kept = [model for model in before if (model["data"], model["recipe"]) not in renewed]
    return sorted(kept + models, key=lambda model: tasks.index((model["data"], model["recipe"])))


def main() -> None:
    """Train what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    parser.add_argument("--recipe", choices=RECIPES, help="Only these; the others stay as docs/records has them.")
    arguments = parser.parse_args()
    (arguments.output_dir / "criteria").mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    tasks = [task for task in TASKS if arguments.recipe in (None, task[1])]
    for seed, (data, recipe) in tqdm(list(itertools.product(SEEDS, tasks)), unit="model"):
        path = table_path(arguments.output_dir, data, recipe, seed)
        if not path.exists():
            train(data, recipe, seed).save(path)
    record: dict[str, Any] = {"losses": LOSSES, "splits": SPLITS, "machine": describe_machine(), "speedup_axes": {}}
    models: dict[str, list[Any]] = {"models": [], "several_classes": []}
    for (data, recipe), seed in tqdm(list(itertools.product(tasks, SEEDS)), desc="comparing", unit="model"):
        table = ExitTable.load(table_path(arguments.output_dir, data, recipe, seed))
        record["speedup_axes"][recipe] = axis_of(table).tolist()
        models["several_classes" if data == RATINGS else "models"].append(
            {
                "data": data,
                "recipe": recipe,
                "seed": seed,
                "rows": len(table),
                "exit_accuracy": np.round(correctness(table).mean(axis=0), 4).tolist(),
                "criteria": compare(table),
            }
        )
    if arguments.recipe is not None:
        before = json.loads(RECORD.read_text())
        models = {name: with_others(entries, before[name], TASKS) for name, entries in models.items()}
        record["speedup_axes"] = before["speedup_axes"] | record["speedup_axes"]
    record |= models
    (arguments.output_dir / "criteria.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
