"""Why a row left at exit 0: the n-grams that weighed most."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def explain_lexical_exit(
    model: Any, tokenizer: Any, texts: Sequence[str] | Sequence[tuple[str, str]], top: int = 3
) -> list[list[tuple[str, float]]]:
    """The n-grams of texts that speak most for what the lexical exit answers.

    Args:
        model: a `BadgeForSequenceClassification` whose lexical exit has been fitted.
        tokenizer: the tokenizer of its encoder.
        texts: texts, or pairs of texts.
        top: how many n-grams, at most.

    Returns:
        For every text (n-gram, weight), the largest first. The weight is what the n-gram, wherever it stands in the
        text, adds to the logit of the answer, less what it adds to the others' mean. Only those above 0.

    Raises:
        ValueError: the model has no lexical exit.
    """
    import torch

    from transformers_badge.inference.predict import token_limit

    config = model.config
    if not config.lexical_exit:
        raise ValueError("The model has no lexical exit: make it with lexical_exit=True.")
    lexical, limit, found = model.exits[0], token_limit(model, tokenizer), []
    for text in texts:
        columns = [[text]] if isinstance(text, str) else [[part] for part in text]
        ids = tokenizer(*columns, truncation=True, max_length=limit, return_tensors="pt")["input_ids"].to(model.device)
        with torch.no_grad():
            buckets = lexical.buckets(ids, None)[0]
            logits = lexical(ids, None)[0]
            answer, labels = int(logits.argmax()), len(logits)
            weights = lexical.weight[torch.from_numpy(buckets).to(model.device)].float().cpu().numpy()
        others = (weights.sum(axis=1) - weights[:, answer]) / max(labels - 1, 1)
        says = (weights[:, answer] - others) / np.sqrt(max((buckets > 0).sum(), 1))
        total: dict[str, float] = {}
        for index in np.flatnonzero(buckets):
            start, n = _place(int(index), ids.shape[1])
            words = tokenizer.decode(ids[0, start : start + n]).strip()
            total[words] = total.get(words, 0.0) + float(says[index])
        ranked = sorted(total.items(), key=lambda entry: -entry[1])
        found.append([entry for entry in ranked[:top] if entry[1] > 0])
    return found


def _place(column: int, tokens: int) -> tuple[int, int]:
    """Which n-gram stands in a column of `ngram_buckets`: its first token, and n."""
    n = 1
    while column >= tokens - n + 1:
        column -= tokens - n + 1
        n += 1
    return column, n
