"""Converting a fine-tuned classifier without labels: how fast it gets, how alike it answers, what its exits are worth.

MiniLM is fine-tuned plainly on movie reviews (the source), then converted on other reviews as plain texts, by default,
without texts that are made up, and with bare exits (mean pooling, no bypass), and tested on a third part. Beside it:
the time of training bare exits through the encoder, and on pooled states that are kept from one pass.

Example: python benchmarks/convert.py --output-dir bench-output
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, default_data_collator, pipeline

from plain_classifier import fine_tune_plainly
from transformers_badge import BadgeForSequenceClassification, BadgePredictor, export_onnx, make_exit_table
from transformers_badge.calibration.replay import agreement, answers, correctness
from transformers_badge.demo.sources import read_reviews
from transformers_badge.evaluation.timing import classifying, describe_machine, time_in_turns
from transformers_badge.inference.predict import predict_texts
from transformers_badge.training.convert import convert_classifier
from transformers_badge.training.fine_tune import make_trainer, tokenize
from transformers_badge.training.kept_states import kept_in_place
from transformers_badge.training.recipes import TEACHING, applied


SOURCE_ROWS, TEXTS, TEST_ROWS = 4800, 4000, 1768
EPOCHS, MAX_TOKENS = 3, 128
TIMED_ROWS, ROUNDS = {32: 512, 1: 128}, 5  # by batch size; 1: one text at a time
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "texts_alone": {"fill_up_to": 0},
    "bare": {"pooling": "mean", "bypass_size": 0},
}


def tested(folder: Path, source: Path, texts: list[str], labels: Any) -> dict[str, Any]:
    """Exits and early exit of a converted model, on rows that nobody has seen."""
    model, tokenizer = BadgeForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(source).eval()
    table, equal = make_exit_table(model, tokenizer, [texts], labels), True
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
            equal &= torch.equal(model(**batch).logits, plain(**batch).logits)
    last = answers(table)[:, -1]
    early = predict_texts(model, tokenizer, texts)
    chosen = np.array([model.config.label2id[answer["label"]] for answer in early])
    mean = float(np.mean([answer["exit_layer"] for answer in early]))
    return {
        "last_exit_equals_source": bool(equal),
        "exit_layers": model.exit_layers,
        "exit_accuracy": correctness(table).mean(axis=0).tolist(),
        "exit_agreement": agreement(table).mean(axis=0).tolist(),
        "source_accuracy": float((last == labels).mean()),
        "early_exit": {
            "agreement": float((chosen == last).mean()),
            "accuracy": float((chosen == labels).mean()),
            "mean_exit_layer": mean,
            "layer_speedup": model.exit_layers[-1] / mean,
        },
    }


def time_pipelines(folder: Path, source: Path, texts: list[str]) -> list[dict[str, Any]]:
    """How many times as fast as the source's pipeline a converted model is: its pipeline, and an export of it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BadgeForSequenceClassification.from_pretrained(folder)
    exported = BadgePredictor.from_pretrained(export_onnx(model, tokenizer, folder / "onnxruntime-fp32"))
    converted = pipeline("text-classification", model=str(folder), trust_remote_code=True, truncation=True)
    original = pipeline("text-classification", model=str(source), truncation=True)
    found = []
    for batch_size, rows in TIMED_ROWS.items():
        timed = texts[:rows]
        contenders = {
            "source": classifying(original, timed, batch_size),
            "pipeline": classifying(converted, timed, batch_size),
            "if_nobody_leaves": classifying(converted, timed, batch_size, threshold=None),
            "onnxruntime_fp32": classifying(exported, timed, batch_size),
        }
        timings = time_in_turns(contenders, ROUNDS)
        speedups = {name: timings.speedup(name, "source") for name in contenders if name != "source"}
        found.append({"batch_size": batch_size, "rows": rows, **speedups})
    return found


def time_of_keeping_states(source: Path, texts: list[str]) -> dict[str, float]:
    """Seconds to train bare exits for some epochs: through the encoder, and on states kept from one pass through it."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = BadgeForSequenceClassification.from_classifier(source, **SETTINGS["bare"])
    rows = tokenize(tokenizer, [texts], None, MAX_TOKENS)
    with tempfile.TemporaryDirectory() as folder, applied(TEACHING, model):

        def trainer_of(rows: Any, **more: Any) -> Any:
            scratch = Path(folder) / "trainer"
            return make_trainer(model, tokenizer, rows, None, scratch, stage=TEACHING, epochs=EPOCHS, **more)

        through_the_encoder = trainer_of(rows)
        start = time.perf_counter()
        through_the_encoder.train()
        middle = time.perf_counter()
        with kept_in_place(model, through_the_encoder, Path(folder) / "states.npy") as kept:
            one_pass = time.perf_counter() - middle
            trainer_of(kept, collator=default_data_collator).train()
        end = time.perf_counter()
    return {
        "epochs": EPOCHS,
        "through_the_encoder": middle - start,
        "one_pass": one_pass,
        "on_kept_states": end - middle - one_pass,
    }


def main() -> None:
    """Make the source, convert it in every way, test, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    texts, labels = read_reviews("movies")
    unlabelled = texts[SOURCE_ROWS : SOURCE_ROWS + TEXTS]

    record: dict[str, Any] = {
        "machine": describe_machine(),
        "rows": {"source": SOURCE_ROWS, "texts": TEXTS, "test": TEST_ROWS},
    }
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        fine_tune_plainly(texts[:SOURCE_ROWS], labels[:SOURCE_ROWS], EPOCHS, arguments.seed, source)
        for name, fields in SETTINGS.items():
            start = time.perf_counter()
            report = convert_classifier(source, unlabelled, Path(scratch) / name, seed=arguments.seed, **fields)
            minutes = (time.perf_counter() - start) / 60
            record[name] = {
                "minutes": round(minutes, 1),
                "taught_on": report["rows"],
                "wall_clock_speedup": report["wall_clock_speedup"],
                "over_the_sources_pipeline": time_pipelines(Path(scratch) / name, source, texts[-TEST_ROWS:]),
                "policy": report["policy"],
                **tested(Path(scratch) / name, source, texts[-TEST_ROWS:], labels[-TEST_ROWS:]),
            }
            print(name, json.dumps(record[name], indent=2))
        record["keeping_states"] = time_of_keeping_states(source, unlabelled)
    (arguments.output_dir / "convert.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["keeping_states"], indent=2))


if __name__ == "__main__":
    main()
