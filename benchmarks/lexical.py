"""Exit 0: what an exit before the first block buys, in blocks and in seconds.

MiniLM, three data sets, three seeds, each model with and without it. Beside them the encoder fine-tuned plainly with
one exit, and the simplest thing to do instead: a cascade of scikit-learn's TF-IDF with logistic regression, and that
plain classifier for the rows of which it is not sure. Every model is trained once and leaves an exit table of rows that
it has not seen; what is there already is not made again, so it can be interrupted.

Example: python benchmarks/lexical.py --output-dir bench-output
         python benchmarks/lexical.py --data movies --recipe converted (all others stay as docs/records has them)
         python benchmarks/lexical.py --data products --kind filters (as do its kinds)
         python benchmarks/lexical.py --output-dir bench-output --time demo-output/checkpoint
         python benchmarks/lexical.py --output-dir bench-output --cost
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BertForSequenceClassification
from transformers.utils import logging

from criteria import EPOCHS, MAX_TOKENS, SEEDS, SPLITS, parts_of, train, with_others
from criteria import table_path as fine_tuned_path
from plain_classifier import fine_tune_plainly
from transformers_badge import BadgeForSequenceClassification, ExitPolicy, ExitTable, make_exit_table
from transformers_badge.calibration.fitting import Goal, fit_rule
from transformers_badge.calibration.replay import agreement, correctness, score_exits, take_exits
from transformers_badge.demo.job import SPLITS as DEMO_SPLITS
from transformers_badge.demo.sources import encoder_path, read_reviews
from transformers_badge.evaluation.curves import cross_fitted_scores, curve, run_thresholds, speedup_at
from transformers_badge.evaluation.timing import describe_machine, time_in_turns


TASKS = [("movies", "taught"), ("products", "taught"), ("tweets", "taught"), ("movies", "converted")]
# With n-grams and filters at exit 0, with n-grams alone, without exit 0, and with one exit.
KINDS = {"taught": ("filters", "with", "without", "plain"), "converted": ("filters", "with", "without")}
FILTERS = 64
FINE_TUNED = {"with": "exit_0", "without": "taught"}  # kinds that are models of `criteria.py`, and their recipes there
LOSSES = (0.0, 0.005, 0.01, 0.02)
AXIS = np.linspace(1.0, 30.0, 600)  # layer speedups
SPEEDUPS = (1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)  # at which the criteria are compared
RECORD = Path(__file__).parents[1] / "docs" / "records" / "lexical.json"
TIMED_ROWS, ROUNDS = {1: 200, 32: 1024}, 7


def table_path(output_dir: Path, data: str, recipe: str, seed: int, kind: str) -> Path:
    """Where the exit table of one model lies; fine-tuned models with exits are those of `criteria.py`."""
    if recipe == "taught" and kind in FINE_TUNED:
        return fine_tuned_path(output_dir, data, FINE_TUNED[kind], seed)
    return output_dir / "lexical" / f"{data}-{recipe}-{seed}-{kind}.safetensors"


def make_table(data: str, recipe: str, seed: int, kind: str) -> ExitTable:
    """Train one model; converted ones learn from the texts of their source and others."""
    filters = {"lexical_filters": FILTERS} if kind == "filters" else {}
    if recipe == "converted":
        return train(data, recipe, seed, all_texts=True, lexical_exit=kind != "without", **filters)
    if kind != "plain":
        return train(data, FINE_TUNED.get(kind, "exit_0"), seed, **filters)
    texts, labels, (source, others, held_out) = parts_of(data, seed)
    taught = np.concatenate([source, others])
    with tempfile.TemporaryDirectory() as folder:
        fine_tune_plainly([texts[row] for row in taught], labels[taught], EPOCHS[data], seed, Path(folder))
        # As a model with one exit, its own.
        layers = BadgeForSequenceClassification.from_classifier(folder).config.num_hidden_layers
        model = BadgeForSequenceClassification.from_classifier(folder, exit_layers=[layers])
        rows = [texts[row] for row in held_out]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return make_exit_table(model, tokenizer, [rows], labels[held_out], max_tokens=MAX_TOKENS)


def halves(rows: int) -> Any:
    """SPLITS random halvings, each used both ways: what is chosen on the first part is measured on the second."""
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(rows)
        yield order[: rows // 2], order[rows // 2 :], seed
        yield order[rows // 2 :], order[: rows // 2], seed


def measure(costs: Any, values: Any, full: Any, blocks: float, scored: Any) -> dict[str, Any]:
    """Layer speedup over `blocks` at which no more than so much is lost.

    Args:
        costs: (exits,), in blocks.
        values: (rows, exits), whether an exit's answer counts as right.
        full: (rows,), the same of what it is compared with.
        scored: halves to scores (rows, exits) of the first half, and of the second.

    Returns:
        `speedup_at_loss` and `lost_at_speedup`, from the curve over all thresholds, and `chosen`, with thresholds that
        were chosen on the first half: speedup and what was lost on the second.
    """
    lost, chosen = [], []
    for here, there, seed in halves(len(values)):
        scores_here, scores_there = scored(here, there, seed)
        runs, rows = run_thresholds(scores_there), np.arange(len(there))
        right = values[there].astype(float)
        mean = right[rows, runs.taken].mean(axis=1)
        lost.append(full[there].mean() - curve(costs[runs.taken].mean(axis=1), mean, blocks, AXIS))
        runs, rows = run_thresholds(scores_here), np.arange(len(here))
        spent = costs[runs.taken].mean(axis=1)
        missing = full[here].mean() - values[here].astype(float)[rows, runs.taken].mean(axis=1)
        entries = []
        for allowed in LOSSES:
            held = np.flatnonzero(missing <= allowed + 1e-12)
            best = held[np.argmin(spent[held])] if held.size else 0
            taken = take_exits(scores_there, [float(runs.thresholds[best])] * len(costs))
            entries.append((costs[taken].mean(), full[there].mean() - right[np.arange(len(there)), taken].mean()))
        chosen.append(entries)
    mean_lost = np.mean(lost, axis=0)
    spent, lost_then = np.mean(chosen, axis=0).T
    return {
        "speedup_at_loss": [round(speedup_at(AXIS, mean_lost, allowed), 3) for allowed in LOSSES],
        "lost_at_speedup": np.round(np.interp(SPEEDUPS, AXIS, mean_lost), 5).tolist(),
        "chosen": {
            "layer_speedup": np.round(blocks / spent, 3).tolist(),
            "lost": np.round(lost_then, 5).tolist(),
        },
    }


def with_criterion(table: ExitTable, criterion: str, goal: Goal = "regret") -> Any:
    """Scores of both halves: the learned criterion is fitted to the first, and scores its rows out of fold."""
    fixed = None if criterion == "learned" else score_exits(table, ExitPolicy.of({"criterion": criterion}))

    def scored(here: Any, there: Any, seed: int) -> tuple[Any, Any]:
        if fixed is not None:
            return fixed[here], fixed[there]
        learn = table.select(here)
        rule = ExitPolicy(criterion="learned", rule=fit_rule(learn, goal=goal))
        return cross_fitted_scores(learn, seed, goal), score_exits(table.select(there), rule)

    return scored


def cascade(data: str, seed: int, plain: ExitTable, full: Any) -> dict[str, Any]:
    """scikit-learn's TF-IDF with logistic regression, then the plain classifier for rows of which that is not sure."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline

    texts, labels, (source, others, held_out) = parts_of(data, seed)
    taught = np.concatenate([source, others])
    first = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegressionCV(Cs=8, cv=5, scoring="neg_log_loss", max_iter=1000),
    )
    first.fit([texts[row] for row in taught], labels[taught])
    probabilities = first.predict_proba([texts[row] for row in held_out])
    right = np.stack([probabilities.argmax(axis=1) == labels[held_out], correctness(plain)[:, -1]], axis=1)
    scores = np.stack([1 - probabilities.max(axis=1), np.zeros(len(right))], axis=1)
    # The first stage costs nothing here, which is in its favour.
    measured = measure(
        np.array([1e-9, float(plain.blocks)]),
        right,
        full,
        plain.blocks,
        lambda here, there, _: (scores[here], scores[there]),
    )
    return {"accuracy": round(float(right[:, 0].mean()), 4), **measured}


def compare(output_dir: Path, data: str, recipe: str, seed: int, kinds: Sequence[str]) -> dict[str, Any]:
    """One model with and without exit 0, against the full depth of the model without."""
    tables = {kind: ExitTable.load(table_path(output_dir, data, recipe, seed, kind)) for kind in kinds}
    full = correctness(tables["without"])[:, -1]
    entry: dict[str, Any] = {"data": data, "recipe": recipe, "seed": seed, "rows": len(full)}
    entry["exit_accuracy"] = {kind: np.round(correctness(t).mean(axis=0), 4).tolist() for kind, t in tables.items()}
    with_exits = [kind for kind in kinds if kind != "plain"]
    for kind, criterion in itertools.product(with_exits, ("learned", "entropy", "fixed_depth")):
        table = tables[kind]
        costs, scored = np.asarray(table.costs), with_criterion(table, criterion)
        entry[f"{kind}, {criterion}"] = measure(costs, correctness(table), full, table.blocks, scored)
        if recipe == "converted":
            everyone = np.ones(len(table))
            scored = with_criterion(table, criterion, "disagreement")
            agreed = measure(costs, agreement(table), everyone, table.blocks, scored)
            entry[f"{kind}, {criterion}, agreement"] = agreed
    if "plain" in tables:
        entry["cascade"] = cascade(data, seed, tables["plain"], full)
    return entry


def with_other_kinds(model: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any]:
    """An entry of the record, and what an earlier record has of the same model in other kinds."""
    same = [old for old in before if all(old[key] == model[key] for key in ("data", "recipe", "seed"))]
    old = same[0] if same else {"exit_accuracy": {}}
    return {**old, **model, "exit_accuracy": {**old["exit_accuracy"], **model["exit_accuracy"]}}


@torch.no_grad()
def time_it(checkpoint: Path) -> dict[str, Any]:
    """Seconds from texts to answers, tokenization included, and where they go."""
    model = BadgeForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    plain = BertForSequenceClassification(model.config.encoder_config).eval()
    texts = read_reviews("movies")[0][-DEMO_SPLITS["full"][2] :]

    def batches(size: int) -> list[list[str]]:
        chosen = texts[: TIMED_ROWS[size]]
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def tokens(batch: list[str]) -> Any:
        return tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")

    record: dict[str, Any] = {"batches": []}
    for size in (1, 32):
        rows = batches(size)
        contenders = {
            "early_exit": lambda rows=rows: [model.early_exit_predict(**tokens(batch)) for batch in rows],
            "full_depth": lambda rows=rows: [model(**tokens(batch)) for batch in rows],
            "transformers": lambda rows=rows: [plain(**tokens(batch)) for batch in rows],
            "tokenization": lambda rows=rows: [tokens(batch) for batch in rows],
            "exit_0": lambda rows=rows: [
                model.exits[0](inputs["input_ids"], inputs["attention_mask"]) for inputs in map(tokens, rows)
            ],
        }
        layers = torch.cat([output.exit_layer for output in contenders["early_exit"]()]).double()
        timings = time_in_turns(contenders, ROUNDS)
        record["batches"].append(
            {
                "batch_size": size,
                "rows": int(layers.numel()),
                "mean_exit_layer": float(layers.mean()),
                "left_at_exit_0": float((layers == 0).double().mean()),
                "seconds": {name: timings.median(name) for name in contenders},
                "speedup_over_full_depth": timings.speedup("early_exit", "full_depth"),
                "speedup_over_transformers": timings.speedup("early_exit", "transformers"),
            }
        )
    return record


@torch.no_grad()
def cost_of_exit_0() -> dict[str, Any]:
    """What exit 0 costs as a share of a block, on 32 rows of 64 tokens: n-grams alone, and with filters beside them."""
    models: Any = [
        BadgeForSequenceClassification.from_encoder(encoder_path(), lexical_exit=True, lexical_filters=filters)
        for filters in (0, FILTERS)
    ]
    model, (ngrams, with_filters) = models[0], [model.exits[0] for model in models]
    for weight in itertools.chain(ngrams.buffers(), with_filters.buffers()):
        weight.normal_()
    ids = torch.randint(1000, 20_000, (32, 64))
    mask = torch.ones_like(ids)
    hidden_states = model.embed(model.begin_padded(ids, None, None, None, None)).hidden_states
    needed = model.adapter.block_arguments(model.encoder, hidden_states, None, None)
    block, calls = model.adapter.run_block, 20
    timings = time_in_turns(
        {
            "exit_0": lambda: [ngrams(ids, mask) for _ in range(calls)],
            "filters": lambda: [with_filters(ids, mask) for _ in range(calls)],
            "block": lambda: [block(model.encoder, 1, hidden_states, needed) for _ in range(calls)],
        },
        15,
    )
    costs = {name: timings.speedup("block", name) for name in ("exit_0", "filters")}
    return {"machine": describe_machine(), **costs, "milliseconds_of_a_block": 1000 * timings.median("block") / calls}


def main() -> None:
    """Train what is missing, then compare; or time a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    data_sets = sorted({data for data, _ in TASKS})
    parser.add_argument("--data", choices=data_sets, help="Only these; the others stay as docs/records has them.")
    parser.add_argument("--recipe", choices=KINDS, help="As --data.")
    parser.add_argument("--kind", choices=KINDS["taught"], help="Only models of this kind, and those without exit 0.")
    parser.add_argument("--time", type=Path, help="Only time this checkpoint of `transformers-badge demo`.")
    parser.add_argument("--cost", action="store_true", help="Only time exit 0 against a block.")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    if arguments.time is not None:
        record = {"machine": describe_machine(), **time_it(arguments.time)}
        (arguments.output_dir / "lexical_time.json").write_text(json.dumps(record, indent=2) + "\n")
        return
    if arguments.cost:
        (arguments.output_dir / "lexical_cost.json").write_text(json.dumps(cost_of_exit_0(), indent=2) + "\n")
        return
    asked = arguments.data, arguments.recipe
    tasks = [task for task in TASKS if all(one in (None, other) for one, other in zip(asked, task, strict=True))]
    only = None if arguments.kind is None else (arguments.kind, "without")
    kinds = {recipe: [kind for kind in all_ if only is None or kind in only] for recipe, all_ in KINDS.items()}
    made = [(seed, task, kind) for seed in SEEDS for task in tasks for kind in kinds[task[1]]]
    for seed, (data, recipe), kind in tqdm(made, unit="model"):
        path = table_path(arguments.output_dir, data, recipe, seed, kind)
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            make_table(data, recipe, seed, kind).save(path)
    models = [
        compare(arguments.output_dir, data, recipe, seed, kinds[recipe])
        for (data, recipe), seed in tqdm(list(itertools.product(tasks, SEEDS)), desc="comparing", unit="model")
    ]
    if tasks != TASKS or only is not None:
        before = json.loads(RECORD.read_text())["models"]
        models = with_others([with_other_kinds(model, before) for model in models], before, TASKS)
    record = {"losses": LOSSES, "speedups": SPEEDUPS, "splits": SPLITS, "machine": describe_machine(), "models": models}
    (arguments.output_dir / "lexical.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
