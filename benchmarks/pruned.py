"""Early exit on a structurally pruned encoder: do the gains multiply?

Half of the neurons of every feed-forward layer of MiniLM are taken out, those with the smallest weights; the narrower
encoder is then fine-tuned as `transformers-badge demo --full` fine-tunes the whole one. Both full models and both with
early exit, at thresholds that save as many layers, take turns in ONNX Runtime, from texts to logits. (MiniLM is a
distilled encoder to begin with.)

Example: python benchmarks/pruned.py demo-output/checkpoint --output-dir bench-output
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, set_seed
from transformers.utils import logging

from engines import MOST_LOST
from transformers_badge import BadgeForSequenceClassification, ExitPolicy, ExitTable
from transformers_badge.calibration.fitting import fit_rule
from transformers_badge.calibration.replay import score_exits
from transformers_badge.demo.job import BATCH_SIZE, EPOCHS, LEARNING_RATE, MAX_TOKENS, SPLITS
from transformers_badge.demo.sources import encoder_path, read_reviews
from transformers_badge.evaluation.benchmark import choose_policy, measure_policy
from transformers_badge.evaluation.contenders import Contenders
from transformers_badge.evaluation.curves import run_thresholds
from transformers_badge.evaluation.timing import describe_machine, time_in_turns
from transformers_badge.inference.exit_logits import make_exit_table
from transformers_badge.training.fine_tune import fit, tokenize


KEEP = 0.5  # of the neurons
RULE_ROWS = 300  # of those held out
ENGINES, TIMED_ROWS = ("fp32", "int8"), {1: 64, 32: 256}


@torch.no_grad()
def prune(source: Path, target: Path) -> None:
    """Write the encoder with feed-forward layers that are KEEP as wide."""
    encoder = AutoModel.from_pretrained(source)
    width = round(KEEP * encoder.config.intermediate_size)
    for block in encoder.encoder.layer:
        inner, outer = block.intermediate.dense, block.output.dense
        weight = inner.weight.norm(dim=1) * outer.weight.norm(dim=0)
        kept = weight.topk(width).indices.sort().values
        inner.weight.data, inner.bias.data = inner.weight[kept].clone(), inner.bias[kept].clone()
        outer.weight.data = outer.weight[:, kept].clone()
    encoder.config.intermediate_size = width
    encoder.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def fine_tune(encoder: Path, folder: Path, texts: list[str], labels: Any) -> None:
    """A checkpoint whose policy has a learned rule."""
    set_seed(0)
    count = SPLITS["full"][0]
    names = {0: "negative", 1: "positive"}
    model = BadgeForSequenceClassification.from_encoder(
        encoder, lexical_exit=True, id2label=names, label2id={name: index for index, name in names.items()}
    )
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = tokenize(tokenizer, [texts[:count]], labels[:count].tolist(), MAX_TOKENS)
    fit(
        model,
        tokenizer,
        rows,
        None,
        folder / "trainer",
        epochs=EPOCHS["full"],
        learning_rate=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        seed=0,
    )
    learn = slice(count, count + RULE_ROWS)  # held out, as the rule of the demo's model is learned
    table = make_exit_table(model.eval(), tokenizer, [texts[learn]], labels[learn])
    model.config.exit_policy = ExitPolicy(criterion="learned", rule=fit_rule(table, goal="labelled_regret"))
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")


def saving_as_much(table: ExitTable, policy: ExitPolicy, layer_speedup: float) -> ExitPolicy:
    """The policy with the threshold whose layer speedup on these rows is nearest."""
    runs, costs = run_thresholds(score_exits(table, policy)), np.asarray(table.costs)
    nearest = np.abs(costs[-1] / costs[runs.taken[:-1]].mean(axis=1) - layer_speedup).argmin()
    return replace(policy, threshold=float(runs.thresholds[nearest]))


def main() -> None:
    """Prune, fine-tune, choose thresholds, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what demo --full left behind")
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    folder = arguments.output_dir / "pruned"
    folder.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    texts, labels = read_reviews("movies")
    if not (folder / "checkpoint").exists():
        prune(encoder_path(), folder / "encoder")
        fine_tune(folder / "encoder", folder, texts, labels)
    _, held_out, test = SPLITS["full"]
    parts = {"held out": slice(-test - held_out, -test), "test": slice(-test, None)}

    models: dict[str, Contenders] = {}
    saved: dict[str, float] = {}  # by engine, on the held-out rows
    record: dict[str, Any] = {
        "machine": describe_machine(),
        "keep": KEEP,
        "max_lost": MOST_LOST,
        "rounds": arguments.rounds,
        "models": {},
    }
    for name, checkpoint in (("whole", arguments.checkpoint), ("pruned", folder / "checkpoint")):
        graphs = folder / f"graphs-{name}"
        graphs.mkdir(exist_ok=True)
        models[name] = contenders = Contenders(checkpoint, graphs, torch.get_num_threads())
        record["models"][name] = {}
        for engine in ENGINES:
            tables = {
                part: make_exit_table(contenders.engine(engine), contenders.tokenizer, [texts[rows]], labels[rows])
                for part, rows in parts.items()
            }
            policy = contenders.config.exit_policy
            if name == "whole":
                policy = choose_policy(tables["held out"], policy, MOST_LOST)
                saved[engine] = measure_policy(tables["held out"], policy)["layer_speedup"]
            else:
                policy = saving_as_much(tables["held out"], policy, saved[engine])
            contenders.policies[engine] = policy
            record["models"][name][engine] = measure_policy(tables["test"], policy)
    runs = {
        f"{kind}, {name}, {engine}": models[name].run(kind, engine)
        for engine in ENGINES
        for name in models
        for kind in ("full", "early exit")
    }
    record["batch_sizes"] = {}
    for size, rows in TIMED_ROWS.items():
        timed = texts[-test:][:rows]
        timings = time_in_turns({name: partial(run, timed, size) for name, run in runs.items()}, arguments.rounds)
        record["batch_sizes"][size] = {
            "milliseconds_per_row": {name: 1000 * timings.median(name) / rows for name in runs},
            "over_full_whole": {
                name: timings.speedup(name, f"full, whole, {name.rsplit(', ', 1)[1]}") for name in runs
            },
        }
    (arguments.output_dir / "pruned.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["models"], indent=1), json.dumps(record["batch_sizes"], indent=1))


if __name__ == "__main__":
    main()
