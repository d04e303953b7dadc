"""The other thing to compare the demo with: the same encoder fine-tuned plainly, with one exit, on the same rows.

Same splits, epochs, batch size and learning rate as `transformers-badge demo --full`; the class is transformers' own.

Example: python benchmarks/plain_classifier.py --output-dir bench-output
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from transformers_badge.demo.job import BATCH_SIZE, EPOCHS, LEARNING_RATE, MAX_TOKENS, SPLITS
from transformers_badge.demo.sources import encoder_path, read_reviews
from transformers_badge.evaluation.timing import describe_machine
from transformers_badge.training.fine_tune import tokenize


def fine_tune_plainly(texts: list[str], labels: Any, epochs: float, seed: int, folder: Path) -> Trainer:
    """transformers' own classifier on the encoder; it and its tokenizer are saved in the folder."""
    set_seed(seed)
    names = {0: "negative", 1: "positive"}
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder_path(), id2label=names, label2id={name: index for index, name in names.items()}
    )
    tokenizer = AutoTokenizer.from_pretrained(encoder_path())
    settings = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=LEARNING_RATE,
        warmup_steps=0.1,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to=[],
        seed=seed,
    )
    rows = tokenize(tokenizer, [texts], labels.tolist(), MAX_TOKENS)
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return trainer


def main() -> None:
    """Train, test, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    texts, labels = read_reviews("movies")
    train, _, test = SPLITS["full"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = fine_tune_plainly(texts[:train], labels[:train], EPOCHS["full"], arguments.seed, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        first = len(texts) - test
        prediction = trainer.predict(tokenize(tokenizer, [texts[first:]], labels[first:].tolist(), MAX_TOKENS))
    accuracy = float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
    record = {"accuracy": accuracy, "rows": {"train": train, "test": test}, "machine": describe_machine()}
    (arguments.output_dir / "plain_classifier.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"test accuracy of the plainly fine-tuned classifier: {accuracy:.4f}")


if __name__ == "__main__":
    main()
