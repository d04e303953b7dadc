"""Exit 0, which reads the token ids before any block runs: hashed n-grams, and filters over word vectors.

    words  = bias + sum of the weights of a row's n-grams / sqrt(number of them)
    z_0    = words + phrases                                   see `phrases_badge`

Both enter the later exits too; but the last one, which teaches the phrases, has the words alone. All weights are
buffers: they are fitted in one go (`training.lexical`, `training.phrases`), and the fine-tuning leaves them alone.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_badge import BadgeConfig
from .ngrams_badge import find_words, ngram_buckets
from .phrases_badge import VECTOR_SHARE, WINDOW


class Phrases(nn.Module):
    """Filters over the vectors of tokens in a row; fresh ones say nothing. See `phrases_badge.PhraseWeights`."""

    vectors: Tensor
    filters: Tensor
    weight: Tensor

    def __init__(self, config: BadgeConfig) -> None:
        super().__init__()
        size, filters = config.lexical_filters // VECTOR_SHARE, config.lexical_filters
        self.register_buffer("vectors", torch.zeros(config.get_text_config().vocab_size + 1, size))
        self.register_buffer("filters", torch.zeros(WINDOW * size, filters))
        self.register_buffer("weight", torch.zeros(2 * filters, config.num_labels))

    def forward(self, input_ids: Tensor, words: Tensor) -> Tensor:
        """Logits (rows, labels) of token ids; `words`, (rows, tokens), bool: what is neither padding nor special."""
        return pool_phrases(self.look_up(input_ids, words), words, self.filters) @ self.weight

    def look_up(self, input_ids: Tensor, words: Tensor) -> Tensor:
        """Vectors, (rows, tokens + 2 * (WINDOW - 1), size): on both sides as far as windows with a word reach."""
        nothing = len(self.vectors) - 1
        ids = F.pad(input_ids.where(words, nothing), (WINDOW - 1, WINDOW - 1), value=nothing)
        return F.embedding(ids, self.vectors)


def pool_phrases(vectors: Tensor, words: Tensor, filters: Tensor) -> Tensor:
    """The largest value of what each filter finds, and the sum, (rows, 2 * filters), of what `look_up` returns."""
    # A window is so many numbers in a row, and the next begins one vector later.
    windows = vectors.flatten(1).unfold(1, len(filters), vectors.shape[2])
    found = torch.relu(windows.reshape(-1, len(filters)) @ filters)  # as one product it takes half the time
    found = found.view(len(vectors), -1, filters.shape[1])
    count = words.sum(dim=1, keepdim=True).clamp(min=1).to(found.dtype)
    return torch.cat([found.amax(dim=1), found.sum(dim=1) / count.sqrt()], dim=1)


class LexicalExit(nn.Module):
    """The weights of the n-grams, (buckets, labels), a constant, (labels,), and the phrases."""

    weight: Tensor
    bias: Tensor

    def __init__(self, config: BadgeConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("weight", torch.zeros(config.lexical_buckets, config.num_labels))
        self.register_buffer("bias", torch.zeros(config.num_labels))
        self.phrases = Phrases(config) if config.lexical_filters else None

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
        """What n-grams and phrases say of token ids (rows, tokens), side by side: (rows, `lexical_columns`)."""
        buckets = self.buckets(input_ids, attention_mask)
        ngrams = torch.from_numpy(buckets).to(self.weight.device)
        total = F.embedding_bag(ngrams, self.weight, mode="sum", padding_idx=0)
        count = np.maximum((buckets > 0).sum(axis=1, keepdims=True), 1)
        said: Tensor = self.bias + total / torch.from_numpy(np.sqrt(count)).to(total)
        if self.phrases is not None:
            said = torch.cat([said, self.phrases(input_ids, self.words(input_ids, attention_mask))], dim=1)
        return said

    def words(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Where there is neither padding nor a special token, (rows, tokens), bool."""
        words: Tensor = find_words(input_ids, attention_mask, self.config.ignored_ids)
        return words
