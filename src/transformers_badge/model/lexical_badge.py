"""Exit 0: a linear classifier over hashed n-grams of the token ids, read before any block runs.

    z_0 = bias + sum of the weights of a row's n-grams / sqrt(number of them)

It needs nothing but input_ids. Its weights are buffers: they are fitted in one go, by a convex solver
(`training.lexical`), and the fine-tuning that follows leaves them as they are.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_badge import BadgeConfig
from .ngrams_badge import ngram_buckets


class LexicalExit(nn.Module):
    """The weights of the n-grams, (buckets, labels), and a constant, (labels,)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, config: BadgeConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("weight", torch.zeros(config.lexical_buckets, config.num_labels))
        self.register_buffer("bias", torch.zeros(config.num_labels))

    @property
    def fitted(self) -> bool:
        """Whether it has anything to say: a fresh one answers all rows alike."""
        return bool(self.weight.any() or self.bias.any())

    @property
    def hashing(self) -> dict[str, Any]:
        """What `ngram_buckets` needs to know."""
        config = self.config
        return {"ignored_ids": config.ignored_ids, "ngrams": config.lexical_ngrams, "buckets": config.lexical_buckets}

    def buckets(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        """The buckets of every row's n-grams, (rows, n-grams), 0 where there is none; in numpy."""
        ids = input_ids.cpu().numpy()  # in numpy these many small steps take a fifth of the time
        mask = None if attention_mask is None else attention_mask.cpu().numpy()
        return ngram_buckets(ids, mask, **self.hashing)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits (rows, labels) from token ids (rows, tokens)."""
        buckets = self.buckets(input_ids, attention_mask)
        ngrams = torch.from_numpy(buckets).to(self.weight.device)
        total = F.embedding_bag(ngrams, self.weight, mode="sum", padding_idx=0)
        count = np.maximum((buckets > 0).sum(axis=1, keepdims=True), 1)
        return self.bias + total / torch.from_numpy(np.sqrt(count)).to(total)
