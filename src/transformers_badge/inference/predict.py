"""Answers for many texts: full batches of similar length, results in the order of the input."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


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
        model: a `BadgeForSequenceClassification`.
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
        ValueError: a batch size below 1, or a bad policy.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if len(texts) == 0:
        return []
    columns = [list(column) for column in zip(*texts, strict=True)] if not isinstance(texts[0], str) else [texts]
    encoded = tokenizer(*columns, truncation=True, max_length=token_limit(model, tokenizer))
    order = sorted(range(len(texts)), key=lambda row: len(encoded["input_ids"][row]))
    # Sorted as a whole, rows are padded least; the stream by itself sorts only as far as it reads ahead.
    rows = ({name: encoded[name][row] for name in encoded} for row in order)
    streamed: list[Any] = [None for _ in texts]
    for answer in model.early_exit_stream(rows, batch_size, in_order=False, **overrides):
        streamed[order[answer.index]] = answer
        on_batch(1)
    answers = answer_rows(torch.stack([row.logits for row in streamed]), model.config)
    return [{**answer, "exit_layer": row.exit_layer} for answer, row in zip(answers, streamed, strict=True)]


def token_limit(model: Any, tokenizer: Any, max_tokens: int | None = None) -> int:
    """How many tokens a row may have: what encoder and tokenizer take, or less if asked for."""
    limits = (model.adapter.max_tokens(model.config.encoder_config), tokenizer.model_max_length, max_tokens)
    return int(min(limit for limit in limits if limit is not None))


def answer_rows(logits: Any, config: Any) -> list[dict[str, Any]]:
    """Labels and scores in words: logits (rows, labels) to one dict per row."""
    logits, names = logits.float(), config.id2label
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return [{"label": names[0], "score": value} for value in logits[:, 0].tolist()]
    if config.problem_type == "multi_label_classification":
        likely = [[(names[i], p) for i, p in enumerate(row) if p >= 0.5] for row in torch.sigmoid(logits).tolist()]
        return [{"label": [name for name, _ in row], "score": [p for _, p in row]} for row in likely]
    scores, labels = torch.softmax(logits, dim=-1).max(dim=-1)
    return [{"label": names[i], "score": p} for i, p in zip(labels.tolist(), scores.tolist(), strict=True)]
