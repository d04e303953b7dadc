"""Hashed n-grams of token ids, and the linear classifier over them. Numpy only: small batches are what it is for."""

from typing import Any

import numpy as np


Array = np.ndarray[Any, np.dtype[Any]]

# The hash of the n-gram t_1 ... t_n of a text's segment s is
#     1 + ((n * A_0 + s * A_1 + t_1 * A_2 + t_2 * A_3 + ...) mod P) mod (buckets - 1)
# after Carter and Wegman, "Universal classes of hash functions", 1979. Bucket 0 is what is no n-gram. With ids below
# 2^28 no sum leaves 63 bits, so that it is the same on every platform.
PRIME = 2**31 - 1
MULTIPLIERS = (1_103_515_245, 1_664_525_021, 1_540_483_477, 1_812_433_253, 1_013_904_223, 1_566_083_941)


def find_words(input_ids: Any, attention_mask: Any, ignored_ids: list[int]) -> Any:
    """Where there is neither padding nor a special token, bool, of the shape of the ids; of arrays as of tensors."""
    words = input_ids >= 0 if attention_mask is None else attention_mask > 0  # no id is below 0: all of them
    for ignored in ignored_ids:
        words &= input_ids != ignored
    return words


def ngram_buckets(
    input_ids: Array, attention_mask: Array | None, ignored_ids: list[int], ngrams: int, buckets: int
) -> Array:
    """The buckets of a row's n-grams, of 1 to `ngrams` tokens that stand side by side.

    Padding and special tokens are in no n-gram. A special token ends a segment, so that the words of the second text of
    a pair are told from those of the first, whether or not there are token types.

    Args:
        input_ids: (rows, tokens), int64.
        attention_mask: (rows, tokens), 1 for a token, 0 for padding; `None`: no padding.
        ignored_ids: the special tokens.

    Returns:
        (rows, n-grams), int64; 0 where there is none.
    """
    words: Array = find_words(input_ids, attention_mask, ignored_ids)
    starts = words.copy()
    np.greater(words[:, 1:], words[:, :-1], out=starts[:, 1:])
    width = input_ids.shape[1]
    # The number of a token's segment, from 1; s in the hash is from 0.
    hashed, whole = starts.cumsum(axis=1, dtype=np.int64) * MULTIPLIERS[1], words
    sums, found = [], []
    for n in range(1, min(ngrams, width) + 1):
        # One more token at the end: column i is the n-gram that starts with token i.
        hashed = hashed[:, : width - n + 1] + input_ids[:, n - 1 :] * MULTIPLIERS[n + 1]
        whole = whole[:, : width - n + 1] & words[:, n - 1 :] if n > 1 else words
        sums.append(hashed + (n * MULTIPLIERS[0] - MULTIPLIERS[1]))
        found.append(whole)
    return np.asarray((1 + np.concatenate(sums, axis=1) % PRIME % (buckets - 1)) * np.concatenate(found, axis=1))


def ngram_logits(buckets: Array, weight: Array, bias: Array) -> Array:
    """Logits (rows, labels) from buckets (rows, n-grams), the weights (buckets, labels) and a constant (labels,).

    Bucket 0, which is no n-gram, must weigh 0.
    """
    count = np.maximum((buckets > 0).sum(axis=1, keepdims=True), 1)
    return np.asarray(bias + weight[buckets].sum(axis=1) / np.sqrt(count).astype(weight.dtype))
