"""The other thing to compare the demo with: the same encoder fine-tuned plainly, with one exit, on the same rows.

Same splits, epochs, batch size and learning rate as `transformers-badge demo --full`; the class is transformers' own.

Example: python benchmarks/plain_classifier.py --output-dir bench-output
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
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


def main() -> None:
    """Train, test, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    set_seed(arguments.seed)
    model = AutoModelForSequenceClassification.from_pretrained(encoder_path(), num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(encoder_path())
    texts, labels = read_reviews("movies")
    rows = tokenize(tokenizer, [texts], labels.tolist(), MAX_TOKENS)
    train, _, test = np.split(np.arange(sum(SPLITS["full"])), np.cumsum(SPLITS["full"])[:-1])
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=EPOCHS["full"],
            learning_rate=LEARNING_RATE,
            warmup_steps=0.1,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to=[],
            seed=arguments.seed,
        )
        trainer = Trainer(
            model, settings, train_dataset=rows.select(train), data_collator=DataCollatorWithPadding(tokenizer)
        )
        trainer.train()
        prediction = trainer.predict(rows.select(test))
    accuracy = float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
    record = {"accuracy": accuracy, "rows": {"train": len(train), "test": len(test)}, "machine": describe_machine()}
    (arguments.output_dir / "plain_classifier.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"test accuracy of the plainly fine-tuned classifier: {accuracy:.4f}")


if __name__ == "__main__":
    main()
