"""What the last exit of a model answers, for others to learn it."""

from typing import Any

import numpy as np
from scipy.special import expit, softmax

from transformers_badge.inference.exit_logits import run_every_exit


Array = np.ndarray[Any, np.dtype[Any]]


def last_logits(model: Any, tokenizer: Any, rows: Any, show_progress: bool = True) -> Array:
    """Logits (rows, labels), float32, of tokenized rows; with their `lexical_logits`, where they have these."""
    from tqdm.auto import tqdm

    names = [name for name in tokenizer.model_input_names if name in rows.column_names]
    lexical = np.asarray(rows["lexical_logits"], np.float32) if "lexical_logits" in rows.column_names else None
    columns = {name: list(rows[name]) for name in names}
    with tqdm(total=len(rows), desc="answers of the last exit", unit="row", disable=not show_progress) as bar:
        exit_logits: Array = run_every_exit(model, tokenizer, columns, lexical, on_batch=bar.update)
    return exit_logits[:, -1].astype(np.float32)


def as_answers(logits: Array, problem_type: str) -> Array:
    """What logits (rows, labels) say, float64: probabilities, or the values of a regression."""
    logits = logits.astype(np.float64)
    if problem_type == "single_label_classification":
        return np.asarray(softmax(logits, axis=-1))
    return np.asarray(expit(logits)) if problem_type == "multi_label_classification" else logits
