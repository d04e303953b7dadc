"""Answers for many texts: full batches of similar length, results in the order of the input."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from transformers_badge.model.rows_badge import check_stream, checked_texts


CHUNK = 2**16  # texts that are tokenized and sorted by length at a time: what bounds the memory for their tokens


def predict_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda rows: None,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """Classify texts with early exit.

    Args:
        model: a `BadgeForSequenceClassification` or a `BadgePredictor`.
        tokenizer: the tokenizer of its encoder.
        texts: texts, or pairs of texts.
        batch_size: rows per batch; texts of similar length share one. No answer depends on it.
        on_batch: called with the number of rows that were answered, as they finish.
        **overrides: fields of the exit policy.

    Returns:
        One `{"label": ..., "score": ..., "exit_layer": ...}` per text, in the order of the texts. For multi-label
        models label and score are lists of the labels whose probability is at least 0.5; for regression score is the
        value itself.

    Raises:
        TypeError: one text, or something else than texts.
        ValueError: texts and pairs in one, a batch size below 1, or a bad policy.
    """
    check_stream(texts, batch_size)
    rows, answers = list(checked_texts(texts)), []
    for start in range(0, len(rows), CHUNK):
        answers += _predict_chunk(model, tokenizer, rows[start : start + CHUNK], batch_size, on_batch, overrides)
    return answers


def _predict_chunk(
    model: Any,
    tokenizer: Any,
    texts: list[tuple[str, ...]],
    batch_size: int,
    on_batch: Callable[[int], None],
    overrides: dict[str, Any],
) -> list[dict[str, Any]]:
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=token_limit(model, tokenizer))
    order = sorted(range(len(texts)), key=lambda row: len(encoded["input_ids"][row]))
    # Sorted as a whole, rows are padded least; the stream by itself sorts only as far as it reads ahead.
    rows = ({name: encoded[name][row] for name in encoded} for row in order)
    streamed: list[Any] = [None for _ in texts]
    for answer in model.early_exit_stream(rows, batch_size, in_order=False, **overrides):
        streamed[order[answer.index]] = answer
        on_batch(1)
    return answer_rows([row.logits.tolist() for row in streamed], [row.exit_layer for row in streamed], model.config)


def token_limit(model: Any, tokenizer: Any, max_tokens: int | None = None) -> int:
    """How many tokens a row may have: what model and tokenizer take, or less if asked for."""
    limits = [model.max_tokens, tokenizer.model_max_length]
    return int(min(limits if max_tokens is None else [*limits, max_tokens]))


def answer_rows(logits: Any, exit_layers: Iterable[int], config: Any) -> list[dict[str, Any]]:
    """Answers in words, one dict per row: of logits (rows, labels) and of the layers (rows,) that the rows left at."""
    answers = _labels_and_scores(logits, config)
    return [{**answer, "exit_layer": int(layer)} for answer, layer in zip(answers, exit_layers, strict=True)]


def _labels_and_scores(logits: Any, config: Any) -> list[dict[str, Any]]:
    logits, names = np.asarray(logits, np.float64), config.id2label
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return [{"label": names[0], "score": value} for value in logits[:, 0].tolist()]
    if config.problem_type == "multi_label_classification":
        likely = [[(names[i], p) for i, p in enumerate(row) if p >= 0.5] for row in expit(logits).tolist()]
        return [{"label": [name for name, _ in row], "score": [p for _, p in row]} for row in likely]
    probabilities = softmax(logits, axis=-1)
    labels = probabilities.argmax(axis=-1)
    scores = probabilities.max(axis=-1)
    return [{"label": names[i], "score": p} for i, p in zip(labels.tolist(), scores.tolist(), strict=True)]
