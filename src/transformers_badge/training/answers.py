"""What the last exit of a model answers, for others to learn it."""

from typing import Any

import numpy as np
from scipy.special import expit, softmax


Array = np.ndarray[Any, np.dtype[Any]]

_BATCH_SIZE = 64


def last_logits(model: Any, tokenizer: Any, rows: Any, show_progress: bool = True) -> Array:
    """Logits (rows, labels), float32, of tokenized rows; with their `lexical_logits`, where they have these."""
    import torch
    from tqdm.auto import tqdm

    names = [name for name in tokenizer.model_input_names if name in rows.column_names]
    columns = {name: list(rows[name]) for name in names}
    lexical = np.asarray(rows["lexical_logits"], np.float32) if "lexical_logits" in rows.column_names else None
    order = np.argsort([len(row) for row in columns["input_ids"]], kind="stable")
    logits, training = np.empty((len(rows), model.num_labels), np.float32), model.training
    model.eval()
    with torch.no_grad(), tqdm(total=len(rows), desc="answers of the last exit", disable=not show_progress) as bar:
        for start in range(0, len(rows), _BATCH_SIZE):
            chosen = order[start : start + _BATCH_SIZE]
            batch = {name: [column[row] for row in chosen] for name, column in columns.items()}
            inputs = tokenizer.pad(batch, return_tensors="pt").to(model.device)
            if lexical is not None:
                inputs["lexical_logits"] = torch.from_numpy(lexical[chosen]).to(model.device)
            logits[chosen] = model(**inputs).logits.float().cpu().numpy()
            bar.update(len(chosen))
    model.train(training)
    return logits


def as_answers(logits: Array, problem_type: str) -> Array:
    """What logits (rows, labels) say, float64: probabilities, or the values of a regression."""
    logits = logits.astype(np.float64)
    if problem_type == "single_label_classification":
        return np.asarray(softmax(logits, axis=-1))
    return np.asarray(expit(logits)) if problem_type == "multi_label_classification" else logits
