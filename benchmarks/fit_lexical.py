"""How long exit 0 takes to be fitted, and how much memory.

On real movie reviews in two and in five classes; and on many rows, each made of the first half of a review and the
second half of another of the same class. Every case runs in a process of its own.

Example: python benchmarks/fit_lexical.py --output-dir bench-output
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging

from transformers_badge import BadgeForSequenceClassification, fit_lexical_exit
from transformers_badge.demo.sources import encoder_path, read_ratings, read_reviews
from transformers_badge.evaluation.timing import describe_machine, peak_of_this_process


CASES: dict[str, dict[str, Any]] = {
    "movie reviews": {"classes": 2, "rows": None},
    "movie reviews, stars": {"classes": 5, "rows": None},
    "halves of movie reviews": {"classes": 2, "rows": 100_000},
    "more of them": {"classes": 2, "rows": 1_000_000},
}


def stitched(input_ids: list[list[int]], labels: Any, rows: int) -> tuple[list[list[int]], Any]:
    """So many rows of the first half of one text and the second half of another of the same class."""
    generator = np.random.default_rng(0)
    firsts = generator.integers(len(labels), size=rows)
    seconds = np.empty_like(firsts)
    for label in np.unique(labels):
        here = labels[firsts] == label
        seconds[here] = generator.choice(np.flatnonzero(labels == label), here.sum())
    halves = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in input_ids]
    return [halves[i][0] + halves[j][1] for i, j in zip(firsts, seconds, strict=True)], labels[firsts]


def fit(name: str) -> dict[str, Any]:
    """Fit one case in this process."""
    logging.set_verbosity_error()
    case, tokenizer = CASES[name], AutoTokenizer.from_pretrained(encoder_path())
    texts, labels = read_reviews() if case["classes"] == 2 else read_ratings()
    input_ids = tokenizer(texts)["input_ids"]
    if case["rows"]:
        input_ids, labels = stitched(input_ids, labels, case["rows"])
    rows = datasets.Dataset.from_dict({"input_ids": input_ids, "labels": labels})
    model = BadgeForSequenceClassification.from_encoder(encoder_path(), num_labels=case["classes"], lexical_exit=True)
    start = time.perf_counter()
    fit_lexical_exit(model, tokenizer, rows, show_progress=False)
    seconds = time.perf_counter() - start
    peak = peak_of_this_process()
    return {"name": name, "classes": case["classes"], "rows": len(rows), "seconds": seconds, "peak_mib": peak}


def main() -> None:
    """Fit every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    fits = []
    for name in tqdm(CASES, unit="case"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            fits.append(process.submit(fit, name).result())
    record = {"machine": describe_machine(), "fits": fits}
    (arguments.output_dir / "lexical_fit.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
