"""What BADGE adds to an encoder: bypasses and exits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_badge import BadgeConfig


class ZeroInitLinear(nn.Linear):
    """A linear layer whose weights start at zero. A class of its own, so that `_init_weights` can tell it apart."""


class BadgeBypass(nn.Module):
    """The bottleneck beside a block."""

    def __init__(self, hidden_size: int, bypass_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, bypass_size)
        self.up = ZeroInitLinear(bypass_size, hidden_size, bias=False)

    def forward(self, reading: Tensor, bypass_state: Tensor | None) -> Tensor:
        """The next bypass state, from the reading and the present one: (rows, tokens, hidden)."""
        inner = F.gelu(self.down(self.norm(reading)))
        if bypass_state is None:
            return self.up(inner)  # type: ignore[no-any-return]
        # Product and sum in one pass over memory, which is most of what a bypass costs.
        added = torch.addmm(bypass_state.flatten(0, 1), inner.flatten(0, 1), self.up.weight.t())
        return added.view_as(bypass_state)


class BadgeExit(nn.Module):
    """The classifier after a block: norm (where the stream is not normalised), pool, classify."""

    def __init__(self, config: BadgeConfig, with_norm: bool) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.norm = nn.LayerNorm(config.hidden_size) if with_norm else nn.Identity()
        self.dropout = nn.Dropout(config.exit_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, reading: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits (rows, labels) from a reading (rows, tokens, hidden)."""
        if self.pooling == "cls":
            # The first token of the row, which padding on the left can move from column 0.
            first = 0 if attention_mask is None else attention_mask.long().argmax(dim=1)
            pooled = self.norm(reading[torch.arange(len(reading), device=reading.device), first])
        elif attention_mask is None:
            pooled = self.norm(reading).mean(dim=1)
        else:
            weights = attention_mask.to(reading.dtype)
            weights = weights / weights.sum(dim=1, keepdim=True)
            pooled = torch.bmm(weights[:, None], self.norm(reading))[:, 0]
        return self.classifier(self.dropout(pooled))  # type: ignore[no-any-return]
