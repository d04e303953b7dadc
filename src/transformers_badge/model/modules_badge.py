"""What BADGE adds to an encoder: bypasses and exits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_badge import BadgeConfig
from .encoders_badge import first_token
from .loss_badge import infer_problem_type
from .phrases_badge import with_phrases


class ZeroInitLinear(nn.Linear):
    """A linear layer whose weights start at zero. A class of its own, so that `_init_weights` can tell it apart."""


class LexicalGate(nn.Module):
    """Adds the lexical exit's logits to those of a later exit, times one number that is learnt.

    It starts at 1: what two say who learnt from labels apart from each other adds up, in log-odds (Hinton, ICANN 1999).
    Values do not, so that it starts at 0 in a regression. Phrases have learnt from the last exit, to which they add
    nothing: there the n-grams count alone.
    """

    def __init__(self, start: float = 1.0, ngrams_alone: bool = False) -> None:
        super().__init__()
        self.start, self.ngrams_alone = start, ngrams_alone
        self.weight = nn.Parameter(torch.full((1,), start))

    def forward(self, logits: Tensor, lexical_logits: Tensor) -> Tensor:
        """Logits (rows, labels), and what the lexical exit says, (rows, `lexical_columns`)."""
        labels = logits.shape[1]
        lexical = lexical_logits[:, :labels] if self.ngrams_alone else with_phrases(lexical_logits, labels)
        return logits + self.weight * lexical


class BadgeBypass(nn.Module):
    """The bottleneck beside a block; on pooled rows (rows, hidden) or on tokens (rows, tokens, hidden)."""

    def __init__(self, hidden_size: int, bypass_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, bypass_size)
        self.up = ZeroInitLinear(bypass_size, hidden_size, bias=False)

    def forward(self, reading: Tensor, bypass_state: Tensor | None) -> Tensor:
        """The next bypass state, from what the bypass reads and the present one; all of one shape."""
        inner = F.gelu(self.down(self.norm(reading)))
        if bypass_state is None:
            return self.up(inner)  # type: ignore[no-any-return]
        # Product and sum in one pass over memory, which is most of what a bypass on tokens costs.
        added = torch.addmm(bypass_state.flatten(0, -2), inner.flatten(0, -2), self.up.weight.t())
        return added.view_as(bypass_state)


class BadgeExit(nn.Module):
    """The classifier after a block: norm (where the stream is not normalised), pool, classify."""

    def __init__(self, config: BadgeConfig, with_norm: bool, last: bool = False) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.norm = nn.LayerNorm(config.hidden_size) if with_norm else nn.Identity()
        if self.pooling == "attention":
            self.query = ZeroInitLinear(config.hidden_size, 1, bias=False)
        regression = infer_problem_type(config.problem_type, config.num_labels, None) == "regression"
        self.lexical_gate = LexicalGate(0.0 if regression else 1.0, last) if config.lexical_exit else None
        self.dropout = nn.Dropout(config.exit_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def pool(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """One vector per row, (rows, hidden), of its tokens (rows, tokens, hidden)."""
        tokens = self.norm(tokens)
        if self.pooling == "cls":
            return first_token(tokens, attention_mask)[:, 0]
        if self.pooling == "mean" and attention_mask is None:
            return tokens.mean(dim=1)
        if self.pooling == "mean":
            weights = attention_mask.to(tokens.dtype)  # type: ignore[union-attr]
            weights = (weights / weights.sum(dim=1, keepdim=True))[:, None]
        else:
            scores = self.query(tokens).transpose(1, 2)  # (rows, 1, tokens); all 0 at the start: the mean
            if attention_mask is not None:
                scores = scores.masked_fill(attention_mask[:, None] == 0, float("-inf"))
            weights = scores.softmax(dim=-1)
        return torch.bmm(weights, tokens)[:, 0]

    def forward(self, pooled: Tensor, lexical_logits: Tensor | None = None) -> Tensor:
        """Logits (rows, labels) from pooled rows (rows, hidden), and from what the lexical exit says."""
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits if self.lexical_gate is None else self.lexical_gate(logits, lexical_logits)


def scale_gradient(tensor: Tensor, scale: float) -> Tensor:
    """The tensor as it is; the gradient that goes back through this use of it is scaled."""
    if scale == 1 or not tensor.requires_grad:
        return tensor
    if scale == 0:
        return tensor.detach()
    tensor = tensor.view_as(tensor)  # the hook must not see gradients of other uses
    tensor.register_hook(lambda gradient: gradient * scale)
    return tensor
