"""Stages that an engine runs by name: one per exit with the blocks up to it, and "arguments".

The embedding belongs to the stage of the first exit. Exit 0, which needs no block, is none of these.

What an engine has to bring is how it runs a stage, and a few operations on its kind of arrays. Needs no torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from transformers_badge.model.rows_badge import pad_rows


Array = np.ndarray[Any, np.dtype[Any]]
# Arrays of the rows that are inside, by the names that the stages give them: input_ids and token_type_ids until they
# are embedded, attention_mask, position_ids, hidden_states, bypass_state, lexical_logits, logits of the exit before.
NamedState = dict[str, Any]

_PER_TOKEN = ("input_ids", "token_type_ids", "attention_mask", "position_ids")  # and whatever has three axes
ARGUMENTS = "arguments"


def argument(index: int) -> str:
    """What blocks need besides, masks for example; made anew when rows or columns are dropped."""
    return f"argument_{index}"


def exit_stage(layer: int) -> str:
    """The blocks since the exit before, or the embedding and the first blocks, and the exit of this depth."""
    return f"exit_{layer}"


def stage_names(exit_layers: Sequence[int]) -> list[str]:
    """All the stages, in the order in which they are first of use."""
    first, *others = [exit_stage(layer) for layer in exit_layers if layer > 0]
    return [first, ARGUMENTS, *others] if others else [first]


class NamedStages(ABC):
    """A model that an engine runs; see `early_exit_badge.Stages`.

    Args:
        exit_layers: depths that have an exit.
        padding_id: the token id for padding.
    """

    def __init__(self, exit_layers: Sequence[int], padding_id: int) -> None:
        self.exit_layers, self._padding_id = list(exit_layers), padding_id

    @abstractmethod
    def run(self, stage: str, state: NamedState) -> NamedState:
        """The state with what the stage made in it."""

    @abstractmethod
    def lexical_logits(self, input_ids: Any, attention_mask: Any) -> Any:
        """What exit 0 says, (rows, labels), of the engine's arrays (rows, tokens)."""

    @abstractmethod
    def from_host(self, array: Array) -> Any:
        """The engine's array of one in numpy."""

    @abstractmethod
    def to_host(self, logits: Any) -> Array:
        """Logits in numpy, float64: the one wait for the device at each exit."""

    @abstractmethod
    def keep_rows(self, array: Any, rows: Array | None) -> Any:
        """These rows (`None`: all) of an array, side by side in memory."""

    @abstractmethod
    def join(self, arrays: list[Any], width: int, padding: int) -> Any:
        """Arrays below one another, each padded behind to this many columns; `width` 0: as wide as they are."""

    def begin(self, rows: list[dict[str, list[int]]]) -> tuple[NamedState, Array]:
        """Unpadded token rows, padded on the right: the state before they are embedded, and the mask (rows, tokens)."""
        inputs, mask = pad_rows(rows, self._padding_id)
        return self.begin_padded(**inputs, attention_mask=mask.astype(np.int64)), mask

    def begin_padded(self, input_ids: Array, attention_mask: Array, token_type_ids: Array | None = None) -> NamedState:
        """The state of padded rows before they are embedded; each array (rows, tokens), int64."""
        state = {
            "input_ids": self.from_host(input_ids),
            "attention_mask": self.from_host(attention_mask),
            "token_type_ids": self.from_host(np.zeros_like(input_ids) if token_type_ids is None else token_type_ids),
        }
        if self.exit_layers[0] == 0:
            state["lexical_logits"] = self.lexical_logits(state["input_ids"], state["attention_mask"])
        return state

    def embed(self, state: NamedState) -> NamedState:
        """The rows as they are: one run fewer takes them through the embedding together with the first blocks."""
        return state

    def run_block(self, layer: int, state: NamedState) -> NamedState:
        """Blocks run in one go up to the next exit."""
        if layer not in self.exit_layers:
            return state
        state = self.run(exit_stage(layer), state)
        return {name: array for name, array in state.items() if name not in ("input_ids", "token_type_ids")}

    def read_exit(self, exit_index: int, state: NamedState) -> Any:
        """Logits (rows, labels), which came with the blocks."""
        return state["logits" if self.exit_layers[exit_index] else "lexical_logits"]

    def compact(self, state: NamedState, rows: Array | None, columns: slice, padded: bool) -> NamedState:
        """Keep these rows (`None`: all) and token columns."""
        return self._renew_arguments(
            {
                name: self.keep_rows(array[:, columns] if _is_per_token(name, array) else array, rows)
                for name, array in _without_arguments(state).items()
            }
        )

    def merge(self, states: list[NamedState], masks: list[Array]) -> tuple[NamedState, Array]:
        """One state of several at the same depth, padded on the right, and its mask."""
        width = max(mask.shape[1] for mask in masks)
        merged = {}
        for name, array in _without_arguments(states[0]).items():
            padding = self._padding_id if name == "input_ids" else 0
            merged[name] = self.join(
                [state[name] for state in states], width if _is_per_token(name, array) else 0, padding
            )
        mask = np.concatenate([np.pad(mask, ((0, 0), (0, width - mask.shape[1]))) for mask in masks])
        return self._renew_arguments(merged), mask

    def _renew_arguments(self, state: NamedState) -> NamedState:
        return self.run(ARGUMENTS, state) if "hidden_states" in state else state


def _is_per_token(name: str, array: Any) -> bool:
    return name in _PER_TOKEN or array.ndim == 3


def _without_arguments(state: NamedState) -> NamedState:
    return {name: array for name, array in state.items() if not name.startswith("argument_")}
