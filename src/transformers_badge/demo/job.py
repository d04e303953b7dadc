"""The demo: fine-tune, choose a threshold, measure, save, and load the checkpoint anew in a fresh process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


# Rows of the shuffled movie reviews: training, then certifying the threshold, then test.
SPLITS = {"default": (6000, 2800, 1768), "full": (6800, 2000, 1768)}
EPOCHS = {"default": 1, "full": 3}
BATCH_SIZE, LEARNING_RATE, MAX_TOKENS = 16, 1e-4, 128
TIMED_ROWS = {32: 512, 1: 100}  # of the test rows, by batch size

EXAMPLES = [
    "A wonderful, moving film.",
    "Dull, lifeless and far too long.",
    "It is not without charm, but the jokes wear thin and the ending never comes together.",
    "I expected to hate it, and for the first half hour I did; then it won me over.",
    "A tedious, clumsy mess.",
]

_FRESH_PROCESS = """
import json, sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
output = model.early_exit_predict(**tokenizer(texts, padding=True, return_tensors="pt"))
classify = pipeline("text-classification", model=folder, trust_remote_code=True)
print(json.dumps({"layers": output.exit_layer.tolist(), "answers": classify(texts, batch_size=len(texts))}))
"""


def run_demo(output_dir: Path, full: bool = False, max_accuracy_drop: float = 0.01, seed: int = 0) -> dict[str, Any]:
    """Run the whole job and write `checkpoint/`, `report.json` and `tradeoff.png` into a directory.

    Args:
        output_dir: where everything goes; made if it is missing.
        full: all rows and 3 epochs instead of a part of them and 1.
        max_accuracy_drop: how much accuracy early exit may cost, as a share.
        seed: of everything random.

    Returns:
        The report, as stored.

    Raises:
        OSError: the directory cannot be written to, or encoder and data cannot be fetched.
        ValueError: `max_accuracy_drop` is no share.
    """
    from rich.console import Console

    from transformers_badge.demo.sources import encoder_path, read_reviews
    from transformers_badge.evaluation.plots import plot_tradeoff
    from transformers_badge.evaluation.timing import describe_machine
    from transformers_badge.hub.checkpoint import save_checkpoint
    from transformers_badge.inference.explain import explain_lexical_exit
    from transformers_badge.training.fine_tune import check_output_directory, check_share

    check_share(max_accuracy_drop=max_accuracy_drop)
    console, started = Console(), time.perf_counter()
    check_output_directory(output_dir)
    console.rule("1. A pretrained encoder and movie reviews")
    with console.status("fetching them, once"):
        encoder, (texts, labels) = encoder_path(), read_reviews("movies")
    mode = "full" if full else "default"
    train, calibration, test = np.split(np.arange(sum(SPLITS[mode])), np.cumsum(SPLITS[mode])[:-1])
    console.print(f"{len(train)} rows to train on, {len(calibration)} to choose a threshold, {len(test)} to test.")

    console.rule("2. Fine-tuning")
    model, tokenizer = _fine_tune(encoder, texts, labels, train, output_dir, EPOCHS[mode], seed)

    console.rule("3. Choosing the threshold, and testing")
    calibrating, on_test = (
        _exit_table(name, model, tokenizer, texts, labels, rows)
        for name, rows in (("to choose by", calibration), ("to test", test))
    )
    report = _evaluate(model, calibrating, on_test, max_accuracy_drop)
    tested = [texts[i] for i in test]
    report["early_exit"] |= _leave_early(model, tokenizer, tested, labels[test].tolist())
    report["max_accuracy_drop"] = max_accuracy_drop
    report["rows"] = {"train": len(train), "calibration": len(calibration), "test": len(test)}
    checkpoint = output_dir / "checkpoint"
    save_checkpoint(checkpoint, model, tokenizer, [[texts[row] for row in train]])
    report["checkpoint"] = str(checkpoint)

    console.rule("4. Timing it")
    _measure(model, tokenizer, tested, report)

    console.rule("5. Loading the checkpoint in a fresh process")
    report["examples"] = _load_anew(checkpoint)
    for entry, words in zip(report["examples"], explain_lexical_exit(model, tokenizer, EXAMPLES), strict=True):
        if entry["exit_layer"] == 0:
            entry["words"] = [[ngram, round(weight, 2)] for ngram, weight in words]
    report["machine"] = describe_machine()
    report["minutes"] = round((time.perf_counter() - started) / 60, 1)

    plot_tradeoff(report, output_dir / "tradeoff.png")
    unfinished = output_dir / "report.json.unfinished"
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(unfinished, output_dir / "report.json")
    _print_report(console, report, output_dir)
    return report


def _fine_tune(
    encoder: Path, texts: list[str], labels: Any, train: Any, output_dir: Path, epochs: int, seed: int
) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoTokenizer, set_seed
    from transformers.utils import logging

    from transformers_badge import BadgeForSequenceClassification
    from transformers_badge.training.fine_tune import fit, tokenize

    set_seed(seed)
    logging.set_verbosity_error()  # what MiniLM brings and a classifier does not need is no news
    model = BadgeForSequenceClassification.from_encoder(
        encoder, lexical_exit=True, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1}
    )
    logging.set_verbosity_warning()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = tokenize(tokenizer, [texts], labels.tolist(), max_tokens=MAX_TOKENS)
    fit(
        model,
        tokenizer,
        rows.select(train),
        None,
        output_dir / "trainer",
        epochs=epochs,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        seed=seed,
    )
    return model.eval(), tokenizer


def _exit_table(name: str, model: Any, tokenizer: Any, texts: list[str], labels: Any, rows: Any) -> Any:
    from tqdm.auto import tqdm

    from transformers_badge.inference.exit_logits import make_exit_table

    with tqdm(total=len(rows), desc=f"every exit's answers, {name}", unit="row") as bar:
        chosen = [texts[row] for row in rows]
        return make_exit_table(
            model,
            tokenizer,
            [chosen],
            labels[rows],
            max_tokens=MAX_TOKENS,
            on_batch=bar.update,
        )


def _evaluate(model: Any, calibrating: Any, tested: Any, max_accuracy_drop: float) -> dict[str, Any]:
    """Certify a policy on the calibration rows; what every exit and every threshold does on the test rows.

    All of it comes from exit tables, by replay; `_leave_early` then runs the policy for real.
    """
    from transformers_badge.calibration.bounds import paired_upper_bound
    from transformers_badge.calibration.calibrate import calibrate
    from transformers_badge.calibration.replay import at_exits, correctness, layer_speedup, replay
    from transformers_badge.evaluation.curves import tradeoff_curve

    policy = calibrate(calibrating, risk="error_increase", max_risk=max_accuracy_drop)
    model.config.exit_policy = policy
    right, taken = correctness(tested), replay(tested, policy)
    accuracy, full, early = right.mean(axis=0), right[:, -1], at_exits(right, taken)
    lost, gained = int((full & ~early).sum()), int((early & ~full).sum())
    return {
        "exit_layers": list(tested.exit_layers),
        "exit_accuracy": accuracy.tolist(),
        "full_depth": {"accuracy": float(accuracy[-1])},
        "policy": policy.to_dict(),
        "curve": tradeoff_curve(tested, policy),
        "early_exit": {
            "layer_speedup": layer_speedup(tested, taken),
            # Both ends are bounds of their own at 97.5 %.
            "accuracy_lost": {
                "observed": (lost - gained) / len(tested),
                "low": -paired_upper_bound(gained, lost, len(tested), 0.975),
                "high": paired_upper_bound(lost, gained, len(tested), 0.975),
            },
        },
    }


def _leave_early(model: Any, tokenizer: Any, texts: list[str], labels: Any) -> dict[str, float]:
    """Accuracy and layers of a real run of early exit over texts with labels."""
    from tqdm.auto import tqdm

    from transformers_badge.inference.predict import predict_texts

    with tqdm(total=len(texts), desc="leaving early", unit="row") as bar:
        answers = predict_texts(model, tokenizer, texts, on_batch=bar.update)
    right = [answer["label"] == model.config.id2label[label] for answer, label in zip(answers, labels, strict=True)]
    return {
        "accuracy": float(np.mean(right)),
        "mean_exit_layer": float(np.mean([answer["exit_layer"] for answer in answers])),
    }


def _measure(model: Any, tokenizer: Any, texts: list[str], report: dict[str, Any]) -> None:
    """Wall-clock time of early exit against full depth, and against transformers' own classifier with the same encoder:
    the models, and the pipelines over them.

    All contenders take turns. Models get the rows in the order of the data, tokenized, padded to the longest of their
    batch; pipelines get a list of texts or, at batch size 1, one text at a time. Ours sorts a list by length, which is
    worth something by itself: hence its time with nobody leaving. A contender's speedup has to be read beside the layer
    speedup of the rows that were timed.
    """
    import torch
    from tqdm.auto import tqdm
    from transformers import BertForSequenceClassification, TextClassificationPipeline

    from transformers_badge.evaluation.timing import classifying, time_in_turns
    from transformers_badge.inference.exit_logits import lexical_cost
    from transformers_badge.model.pipeline_badge import BadgeTextClassificationPipeline

    plain = BertForSequenceClassification(model.config.encoder_config).eval()
    # All but the pooler, which costs the same untrained.
    plain.bert.load_state_dict(model.encoder.state_dict(), strict=False)
    cut = {"truncation": True, "max_length": MAX_TOKENS}
    ours = BadgeTextClassificationPipeline(model=model, tokenizer=tokenizer, **cut)
    theirs = TextClassificationPipeline(model=plain, tokenizer=tokenizer, **cut)
    report["timing"] = []
    for batch_size, rounds in ((32, 3), (1, 5)):
        timed = texts[: TIMED_ROWS[batch_size]]
        batches = [
            tokenizer(timed[i : i + batch_size], padding=True, return_tensors="pt", **cut)
            for i in range(0, len(timed), batch_size)
        ]
        with torch.no_grad(), tqdm(total=rounds, desc=f"batch size {batch_size}", unit="round") as bar:
            contenders: dict[str, Callable[[], Any]] = {
                "early_exit": partial(_predict, model.early_exit_predict, batches),
                "full_depth": partial(_predict, model, batches),
                "transformers": partial(_predict, plain, batches),
                "pipeline": classifying(ours, timed, batch_size),
                "pipeline_nobody_leaves": classifying(ours, timed, batch_size, threshold=None),
                "transformers_pipeline": classifying(theirs, timed, batch_size),
            }
            # One pass over everything warms all of it up, and tells the layers of the rows that are timed.
            layers = torch.cat([model.early_exit_predict(**batch).exit_layer for batch in batches]).double()
            plain(**batches[0])
            ours(timed[0])
            theirs(timed[0])
            timings = time_in_turns(contenders, rounds, warmups=0, on_round=bar.update)
        report["timing"].append(
            {
                "batch_size": batch_size,
                "rows": len(timed),
                "layer_speedup": float(model.exit_layers[-1] / (layers.mean() + lexical_cost(model.config))),
                "seconds": {name: timings.median(name) for name in contenders},
                "speedup_over_full_depth": timings.speedup("early_exit", "full_depth"),
                "speedup_over_transformers": timings.speedup("early_exit", "transformers"),
                "speedup_of_pipeline": timings.speedup("pipeline", "transformers_pipeline"),
                "speedup_if_nobody_leaves": timings.speedup("pipeline_nobody_leaves", "transformers_pipeline"),
            }
        )
    in_batches = report["timing"][0]
    report["full_depth"]["seconds"] = in_batches["seconds"]["full_depth"]
    report["early_exit"]["seconds"] = in_batches["seconds"]["early_exit"]
    report["early_exit"]["wall_clock_speedup"] = in_batches["speedup_over_full_depth"]["median"]


def _predict(predict: Any, batches: list[Any]) -> list[Any]:
    return [predict(**batch) for batch in batches]


def _load_anew(checkpoint: Path) -> list[dict[str, Any]]:
    """The examples as answered by a fresh process, through AutoModel and pipeline."""
    done = subprocess.run(
        [sys.executable, "-c", _FRESH_PROCESS, str(checkpoint), json.dumps(EXAMPLES)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"The checkpoint did not load in a fresh process:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if answer["layers"] != [entry["exit_layer"] for entry in answer["answers"]]:
        raise RuntimeError(f"AutoModel and pipeline left at different layers: {answer}")
    return [{"text": text, **entry} for text, entry in zip(EXAMPLES, answer["answers"], strict=True)]


def _print_report(console: Any, report: dict[str, Any], output_dir: Path) -> None:
    from rich.table import Table

    from transformers_badge.evaluation.timing import with_spread

    full, early, blocks = report["full_depth"], report["early_exit"], report["exit_layers"][-1]
    console.rule("Result")
    table = Table("exit", *[str(layer) for layer in report["exit_layers"]])
    table.add_row("test accuracy", *[f"{100 * accuracy:.1f} %" for accuracy in report["exit_accuracy"]])
    console.print(table)
    console.print(
        f"Full depth: {100 * full['accuracy']:.2f} %. Early exit: {100 * early['accuracy']:.2f} % at mean exit layer "
        f"{early['mean_exit_layer']:.2f} of {blocks}, a layer speedup of {early['layer_speedup']:.2f}x."
    )
    lost = early["accuracy_lost"]
    console.print(
        f"Lost on the test rows: {100 * lost['observed']:.2f} points; what is lost on rows like these is, with 95 % "
        f"confidence, between {100 * lost['low']:z.2f} and {100 * lost['high']:z.2f}."
    )
    timing = report["timing"]
    table = Table("in seconds", *[f"batch size {entry['batch_size']}, {entry['rows']} rows" for entry in timing])
    for title, name in (
        ("early exit over full depth", "speedup_over_full_depth"),
        ("early exit over transformers' own BERT", "speedup_over_transformers"),
        ("pipeline over transformers' pipeline", "speedup_of_pipeline"),
        ("the same, if nobody leaves", "speedup_if_nobody_leaves"),
    ):
        table.add_row(title, *[with_spread(entry[name]) for entry in timing])
    table.add_row("layer speedup of these rows", *[f"{entry['layer_speedup']:.2f}x" for entry in timing])
    console.print(table)
    table = Table("text", "label", "score", "left after block", "words that decided it")
    for entry in report["examples"]:
        words = ", ".join(f"{ngram} ({weight:+.1f})" for ngram, weight in entry.get("words", []))
        table.add_row(entry["text"], entry["label"], f"{entry['score']:.2f}", str(entry["exit_layer"]), words)
    console.print(table)
    console.print(f"Criterion {report['policy']['criterion']}. {report['policy']['certificate']['summary']}")
    console.print(f"{report['minutes']} minutes. Wrote checkpoint/, report.json and tradeoff.png to {output_dir}.")
