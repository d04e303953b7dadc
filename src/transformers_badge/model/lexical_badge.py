"""Exit 0: a linear classifier over hashed n-grams of the token ids, read before any block runs.

    z_0 = bias + sum of the weights of a row's n-grams / sqrt(number of them)

It needs nothing but input_ids. Its weights are buffers: they are fitted in one go, by a convex solver
(`training.lexical`), and the fine-tuning that follows leaves them as they are.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_badge import BadgeConfig


# The hash of the n-gram t_1 ... t_n of a text's segment s is
#     1 + ((n * A_0 + s * A_1 + t_1 * A_2 + t_2 * A_3 + ...) mod P) mod (buckets - 1)
# after Carter and Wegman, "Universal classes of hash functions", 1979. Bucket 0 is what is no n-gram. With ids below
# 2^28 no sum leaves 63 bits, so that it is the same on every platform and device.
PRIME = 2**31 - 1
MULTIPLIERS = (1_103_515_245, 1_664_525_021, 1_540_483_477, 1_812_433_253, 1_013_904_223, 1_566_083_941)


def ngram_buckets(
    input_ids: Tensor, attention_mask: Tensor | None, ignored_ids: list[int], ngrams: int, buckets: int
) -> Tensor:
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
    words = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask > 0
    for ignored in ignored_ids:
        words = words & (input_ids != ignored)
    starts = words.clone()
    starts[:, 1:] &= ~words[:, :-1]
    segments = (starts.cumsum(dim=1) - 1) * MULTIPLIERS[1]
    found = []
    hashed, whole = segments, words
    for n in range(1, ngrams + 1):
        if n > input_ids.shape[1]:
            break
        # One more token at the end: column i is the n-gram that starts with token i.
        hashed = hashed[:, : input_ids.shape[1] - n + 1] + input_ids[:, n - 1 :] * MULTIPLIERS[n + 1]
        whole = whole[:, : input_ids.shape[1] - n + 1] & words[:, n - 1 :]
        bucket = 1 + (hashed + n * MULTIPLIERS[0]) % PRIME % (buckets - 1)
        found.append(bucket * whole)
    return torch.cat(found, dim=1)


class LexicalExit(nn.Module):
    """The weights of the n-grams, (buckets, labels), and a constant, (labels,)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, config: BadgeConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("weight", torch.zeros(config.lexical_buckets, config.num_labels))
        self.register_buffer("bias", torch.zeros(config.num_labels))

    def buckets(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The buckets of every row's n-grams, (rows, n-grams), 0 where there is none."""
        config = self.config
        return ngram_buckets(
            input_ids, attention_mask, config.ignored_ids, config.lexical_ngrams, config.lexical_buckets
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits (rows, labels) from token ids (rows, tokens)."""
        buckets = self.buckets(input_ids, attention_mask)
        total = F.embedding_bag(buckets, self.weight, mode="sum", padding_idx=0)
        count = (buckets > 0).sum(dim=1, keepdim=True).clamp(min=1)
        return self.bias + total / count.sqrt().to(total.dtype)
