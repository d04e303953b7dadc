"""Why a row left at exit 0: the words that weighed most."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from transformers_badge.model.phrases_badge import WINDOW, with_phrases


def explain_lexical_exit(
    model: Any, tokenizer: Any, texts: Sequence[str] | Sequence[tuple[str, str]], top: int = 3
) -> list[list[tuple[str, float]]]:
    """The words of texts that speak most for what the lexical exit answers.

    Args:
        model: a `BadgeForSequenceClassification` whose lexical exit has been fitted.
        tokenizer: the tokenizer of its encoder.
        texts: texts, or pairs of texts.
        top: how many of them, at most.

    Returns:
        For every text (words, weight), the largest first: n-grams, and with single tokens what these add by the
        filters. The weight is what they, wherever they stand in the text, add to the logit of the answer, less what
        they add to the others' mean. Only those above 0. All weights, those below 0 too, and the constant add up to
        what the exit says.

    Raises:
        ValueError: the model has no lexical exit.
    """
    import torch

    from transformers_badge.inference.predict import token_limit

    if not model.config.lexical_exit:
        raise ValueError("The model has no lexical exit: make it with lexical_exit=True.")
    lexical, limit, found = model.exits[0], token_limit(model, tokenizer), []
    for text in texts:
        columns = [[text]] if isinstance(text, str) else [[part] for part in text]
        ids = tokenizer(*columns, truncation=True, max_length=limit, return_tensors="pt")["input_ids"].to(model.device)
        with torch.no_grad():
            logits = with_phrases(lexical(ids, None), model.num_labels)[0]
            parts = [*_ngrams(lexical, ids), *_phrases(lexical, ids)]
        answer, labels = int(logits.argmax()), len(logits)
        total: dict[str, float] = {}
        for tokens, weights in parts:
            words = tokenizer.decode(tokens).strip()
            others = (weights.sum() - weights[answer]) / max(labels - 1, 1)
            total[words] = total.get(words, 0.0) + float(weights[answer] - others)
        ranked = sorted(total.items(), key=lambda entry: -entry[1])
        found.append([entry for entry in ranked[:top] if entry[1] > 0])
    return found


def _ngrams(lexical: Any, ids: Any) -> Iterator[tuple[Any, Any]]:
    """The n-grams of a row, (1, tokens): their tokens, and what each adds to the logits, (labels,)."""
    buckets = lexical.buckets(ids, None)[0]
    says = lexical.weight.float().cpu().numpy()[buckets] / np.sqrt(max((buckets > 0).sum(), 1))
    for index in np.flatnonzero(buckets):
        start, n = _place(int(index), ids.shape[1])
        yield ids[0, start : start + n], says[index]


def _phrases(lexical: Any, ids: Any) -> Iterator[tuple[Any, Any]]:
    """The words of a row, and what each adds by the filters: without constants, z = sum over words of v dz/dv."""
    import torch

    from transformers_badge.model.lexical_badge import pool_phrases

    if lexical.phrases is None:
        return
    words = lexical.words(ids, None)
    vectors = lexical.phrases.look_up(ids, words).float()

    def says(vectors: Any) -> Any:
        return (pool_phrases(vectors, words, lexical.phrases.filters.float()) @ lexical.phrases.weight.float())[0]

    slopes = torch.autograd.functional.jacobian(says, vectors)[:, 0]  # (labels, places, size)
    weights = (slopes * vectors).sum(dim=-1)[:, WINDOW - 1 :].cpu().numpy()
    for place in np.flatnonzero(words[0].cpu().numpy()):
        yield ids[0, place : place + 1], weights[:, place]


def _place(column: int, tokens: int) -> tuple[int, int]:
    """Which n-gram stands in a column of `ngram_buckets`: its first token, and n."""
    n = 1
    while column >= tokens - n + 1:
        column -= tokens - n + 1
        n += 1
    return column, n
