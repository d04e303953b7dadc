"""Whether the bypass earns its place: exits with bypasses of several widths that read several things, and without.

Two recipes. Joint: an encoder and all its exits, fine-tuned together on labels. Frozen: the exits of a converted
classifier, taught by its last exit on other texts without labels. MiniLM, two data sets, three seeds. To fit two cores
the data are subsets and joint training is one epoch. For the frozen recipe the encoder's states are computed once per
source and kept in half precision, so that a run costs its exits alone.

Every run is one entry of `bypass_<recipe>.json`; what is there already is not run again, so it can be interrupted.

Example: python benchmarks/bypass.py --recipe joint --output-dir bench-output
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging

from plain_classifier import fine_tune_plainly
from transformers_badge import BadgeForSequenceClassification, ExitTable, calibrate
from transformers_badge.calibration.replay import agreement, at_exits, correctness, layer_speedup, replay
from transformers_badge.demo.sources import encoder_path, read_reviews
from transformers_badge.evaluation.timing import describe_machine
from transformers_badge.model.encoders_badge import BertAdapter
from transformers_badge.training.fine_tune import make_trainer, tokenize
from transformers_badge.training.recipes import TEACHING, applied


SEEDS = (0, 1, 2)
SIZES = (32, 64, 128)
READS = ("block_input", "block_output", "pooled")
# Rows of the shuffled sets: labelled ones to train on, others as texts without labels, the last to test.
ROWS = {
    "movies": {"joint": 1600, "source": 2400, "texts": 4000, "test": 1768},
    "products": {"joint": 1600, "source": 1600, "texts": 1100, "test": 700},
}
MAX_TOKENS, BATCH_SIZE, LEARNING_RATE = 128, 16, 1e-4
SOURCE_EPOCHS = 2


def variants(recipe: str) -> list[dict[str, Any]]:
    """The exits that are compared, as fields of BadgeConfig."""
    none = {"bypass_size": 0, "bypass_reads": "pooled", "pooling": "attention"}
    grid = [
        {"bypass_size": size, "bypass_reads": reads, "pooling": "attention"}
        for size, reads in itertools.product(SIZES, READS)
    ]
    chosen = [none, *grid]
    if recipe == "frozen":
        return chosen + [{**fields, "pooling": "mean"} for fields in chosen if fields["bypass_size"] in (0, 64)]
    # Joint runs are long: of mean pooling only our first design, and the counterpart of what became the default.
    first_design = {"bypass_size": 64, "bypass_reads": "block_input", "pooling": "mean"}
    return [*chosen, first_design, {"bypass_size": 128, "bypass_reads": "pooled", "pooling": "mean"}]


def joint(data: str, seed: int, variant: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune encoder and exits on labels; accuracy of every exit."""
    texts, labels = read_reviews(data)
    count, tested = ROWS[data]["joint"], np.arange(len(texts))[-ROWS[data]["test"] :]
    set_seed(seed)
    model = BadgeForSequenceClassification.from_encoder(encoder_path(), **variant)
    tokenizer = AutoTokenizer.from_pretrained(encoder_path())
    rows = tokenize(tokenizer, [texts], labels.tolist(), MAX_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model,
            tokenizer,
            rows.select(range(count)),
            None,
            Path(folder),
            epochs=1,
            learning_rate=LEARNING_RATE,
            batch_size=BATCH_SIZE,
            seed=seed,
        )
        trainer.train()
        prediction = trainer.predict(rows.select(tested))
    right = prediction.predictions[1].argmax(-1) == prediction.label_ids[:, None]
    return {"exit_accuracy": right.mean(axis=0).tolist()}


class StoredStates(BertAdapter):
    """An encoder that has run already: blocks hand out stored states. The first id of a row is its number."""

    def __init__(self, rows: list[Tensor], logits: Tensor) -> None:
        self.rows, self.logits = rows, logits

    def embed(self, encoder: Any, inputs: dict[str, Any], attention_mask: Tensor | None) -> Tensor:
        """Look up the rows of a batch: each (blocks + 1, tokens, hidden)."""
        self.numbers = inputs["input_ids"][:, 0]
        padded = torch.nn.utils.rnn.pad_sequence([self.rows[n].transpose(0, 1) for n in self.numbers], batch_first=True)
        self.batch = padded.float().permute(2, 0, 1, 3)
        return self.batch[0]

    def block_arguments(self, *unused: Any) -> dict[str, Any]:
        """Nothing runs that needs any."""
        return {}

    def run_block(self, encoder: Any, layer: int, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The stored state behind a block."""
        return self.batch[layer]

    def classify(self, *unused: Any) -> Tensor:
        """The source's answers."""
        return self.logits[self.numbers]

    def collate(self, numbers: list[int]) -> dict[str, Tensor]:
        """Numbers of rows as a batch of the model."""
        lengths = torch.tensor([self.rows[number].shape[1] for number in numbers])
        ids = torch.zeros(len(numbers), int(lengths.max()), dtype=torch.long)
        ids[:, 0] = torch.tensor(numbers)
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


@lru_cache(maxsize=1)
def stored_source(data: str, seed: int) -> tuple[str, StoredStates]:
    """A fine-tuned source, and its states on the texts to convert it with and on the test rows (in that order)."""
    folder = tempfile.mkdtemp()
    texts, labels = read_reviews(data)
    first, counts = ROWS[data]["source"], ROWS[data]
    fine_tune_plainly(texts[:first], labels[:first], SOURCE_EPOCHS, seed, Path(folder))
    source = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder_path())
    used = [*texts[first : first + counts["texts"]], *texts[-counts["test"] :]]
    encoded = tokenizer(used, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    rows: list[Any] = [None] * len(used)
    logits = torch.empty(len(used), 2)
    order = sorted(range(len(used)), key=lambda number: len(encoded[number]))
    with torch.no_grad():
        for start in tqdm(range(0, len(order), 64), desc="states", unit="batch"):
            numbers = order[start : start + 64]
            batch = tokenizer.pad({"input_ids": [encoded[number] for number in numbers]}, return_tensors="pt")
            output = source(**batch, output_hidden_states=True)
            states = torch.stack(output.hidden_states).half()
            logits[numbers] = output.logits
            for index, number in enumerate(numbers):
                rows[number] = states[:, index, : len(encoded[number])].clone()
    return folder, StoredStates(rows, logits)


def frozen(data: str, seed: int, variant: dict[str, Any]) -> dict[str, Any]:
    """Teach the exits of a converted source; accuracy and agreement of every exit, and what a threshold buys."""
    folder, stored = stored_source(data, seed)
    set_seed(seed)
    model = BadgeForSequenceClassification.from_classifier(folder, **variant)
    model.adapter = stored
    texts = ROWS[data]["texts"]
    with tempfile.TemporaryDirectory() as scratch, applied(TEACHING, model):
        trainer = make_trainer(
            model,
            None,
            range(texts),
            None,
            Path(scratch),
            stage=TEACHING,
            collator=stored.collate,
            seed=seed,
        )
        trainer.train()
        exit_logits = trainer.predict(range(texts, texts + ROWS[data]["test"])).predictions[1]
    labels = read_reviews(data)[1][-len(exit_logits) :]
    table = ExitTable(exit_logits=exit_logits, exit_layers=tuple(model.exit_layers), labels=labels)
    choosing, testing = table.select(slice(len(table) // 2)), table.select(slice(len(table) // 2, None))
    taken = replay(testing, calibrate(choosing, "entropy", max_risk=0.01))
    return {
        "exit_accuracy": correctness(table).mean(axis=0).tolist(),
        "exit_agreement": agreement(table).mean(axis=0).tolist(),
        # The threshold is chosen on one half of the test rows, for at most 1 % of changed answers; used on the other.
        "layer_speedup": layer_speedup(testing, taken),
        "disagreement": float(1 - at_exits(agreement(testing), taken).mean()),
    }


def main() -> None:
    """Run what is missing of one recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=["joint", "frozen"], required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / f"bypass_{arguments.recipe}.json"
    record = json.loads(path.read_text()) if path.exists() else {"rows": ROWS, "runs": []}
    record["machine"] = describe_machine()
    logging.set_verbosity_error()

    wanted = list(itertools.product(SEEDS, ROWS, variants(arguments.recipe)))
    done = [{name: entry[name] for name in ("seed", "data", "variant")} for entry in record["runs"]]
    run = {"joint": joint, "frozen": frozen}[arguments.recipe]
    for seed, data, variant in tqdm(wanted, unit="run"):
        key = {"seed": seed, "data": data, "variant": variant}
        if key in done:
            continue
        start = time.perf_counter()
        result = run(data, seed, variant)
        record["runs"].append({**key, **result, "seconds": round(time.perf_counter() - start, 1)})
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(unfinished, path)


if __name__ == "__main__":
    main()
