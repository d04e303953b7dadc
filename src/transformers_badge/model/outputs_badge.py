"""What the model returns, and the state that it carries from block to block."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class BadgeClassifierOutput(ModelOutput):
    """What `forward` returns.

    Args:
        loss: (), the weighted mean of the exits' losses, if labels were given.
        logits: (rows, labels), of the last exit.
        exit_logits: (rows, exits, labels), of every exit.
        hidden_states: h_0 to h_L, each (rows, tokens, hidden), as the encoder itself returns them, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class EarlyExitOutput(ModelOutput):
    """What `early_exit_predict` returns, in the order of the input.

    Args:
        logits: (rows, labels), of the exit that each row took.
        exit_layer: (rows,), int64: how many blocks ran for the row; 0 for the lexical exit.
        exit_logits: (rows, exits, labels), NaN where an exit was not reached, if asked for.
    """

    logits: Tensor | None = None
    exit_layer: Tensor | None = None
    exit_logits: Tensor | None = None


@dataclass
class BlockState:
    """The rows that are inside, before they are embedded or after some block."""

    inputs: dict[str, Tensor | None]  # input_ids or inputs_embeds, token_type_ids; empty once the rows are embedded
    attention_mask: Tensor | None  # (rows, tokens); None: no padding
    position_ids: Tensor | None  # (rows or 1, tokens)
    lexical_logits: Tensor | None = None  # (rows, `lexical_columns`), what the lexical exit says, if there is one
    hidden_states: Tensor | None = None  # (rows, tokens, hidden), h: the encoder's stream; None before the embedding
    bypass_state: Tensor | None = None  # b, (rows, hidden), or of the shape of h; None stands for zeros
    pooled: Tensor | None = None  # (rows, hidden), what the exit here classifies; None where there is none
    # What the blocks need besides, made by the adapter for these rows and columns; None until they meet a block.
    block_arguments: dict[str, Any] | None = None
