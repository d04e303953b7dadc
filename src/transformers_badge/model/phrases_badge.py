"""Phrases: filters over the vectors of seven tokens in a row. Numpy only: small batches are what it is for.

    a_f(t) = relu(w_f [v(t-3); ...; v(t+3)])              what filter f finds around place t
    z      = sum over f of  u_f max_t a_f(t) + m_f sum_t a_f(t) / sqrt(number of words)

Filters over word vectors, and the largest value of each, are from Kim, EMNLP 2014. The last component of a word's
vector is 1, for a constant. Padding, special tokens and what lies before and behind a text have the vector 0: what a
filter finds where there are no words is 0 too, so that a text is answered alike however it is padded.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .ngrams_badge import find_words


Array = np.ndarray[Any, np.dtype[Any]]

WINDOW = 7  # tokens that a filter sees
VECTOR_SHARE = 4  # times as many filters as a vector has components: wide windows of short vectors cost least


def with_phrases(said: Any, labels: int) -> Any:
    """What exit 0 answers, (rows, labels), of what its parts say side by side (`BadgeConfig.lexical_columns`)."""
    return said if said.shape[1] == labels else said[:, :labels] + said[:, labels:]


@dataclass(frozen=True)
class PhraseWeights:
    """What `lexical_badge.Phrases` holds, in numpy.

    Args:
        vectors: of the tokens, and last of what is no word, (vocabulary + 1, size).
        filters: (WINDOW * size, filters).
        weight: u and below it m, (2 * filters, labels).
    """

    vectors: Array
    filters: Array
    weight: Array

    def logits(self, input_ids: Array, attention_mask: Array, ignored_ids: list[int]) -> Array:
        """(rows, labels) of token ids (rows, tokens)."""
        if not self.weight.any():
            return np.zeros((len(input_ids), self.weight.shape[1]), self.weight.dtype)
        words = find_words(input_ids, attention_mask, ignored_ids)
        rows, tokens = input_ids.shape
        places = tokens + WINDOW - 1  # every place around which there can be a word
        ids = np.full((rows, places + WINDOW - 1), len(self.vectors) - 1)
        np.copyto(ids[:, WINDOW - 1 : places], input_ids, where=words)
        vectors = self.vectors.take(ids, axis=0)
        # A window is so many numbers in a row, and the next begins one vector later.
        windows = as_strided(vectors, (rows, places, len(self.filters)), vectors.strides)
        found = windows.reshape(rows * places, -1) @ self.filters
        found = np.maximum(found, 0, out=found).reshape(rows, places, -1)
        count = np.maximum(words.sum(axis=1, keepdims=True), 1)
        pooled = [found.max(axis=1), found.sum(axis=1) / np.sqrt(count).astype(found.dtype)]
        return np.asarray(np.concatenate(pooled, axis=1) @ self.weight)
