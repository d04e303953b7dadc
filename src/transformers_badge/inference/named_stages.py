"""Stages that an engine runs by name: one per exit with the blocks up to it.

The embedding belongs to the stage of the first exit. Exit 0, which needs no block, is none of these: it is read in
numpy, in which rows stay until they are embedded.

What an engine has to bring is how it runs a stage, and a few operations on its kind of arrays. Needs no torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from transformers_badge.model.ngrams_badge import ngram_buckets, ngram_logits
from transformers_badge.model.phrases_badge import PhraseWeights, with_phrases
from transformers_badge.model.rows_badge import join_rows, pad_rows


Array = np.ndarray[Any, np.dtype[Any]]
# Arrays of the rows that are inside, by the names that the stages give them: input_ids and token_type_ids until they
# are embedded, attention_mask, position_ids, hidden_states, bypass_state, lexical_logits, logits of the exit before.
NamedState = dict[str, Any]

_PER_TOKEN = ("input_ids", "token_type_ids", "attention_mask", "position_ids")  # and whatever has three axes


def exit_stage(layer: int) -> str:
    """The blocks since the exit before, or the embedding and the first blocks, and the exit of this depth."""
    return f"exit_{layer}"


def stage_names(exit_layers: Sequence[int]) -> list[str]:
    """All the stages, in their order."""
    return [exit_stage(layer) for layer in exit_layers if layer > 0]


@dataclass(frozen=True)
class LexicalWeights:
    """Exit 0 in numpy, where its many small steps take a quarter of the time that they take in a graph.

    Args:
        hashing: what `ngram_buckets` needs to know: ignored_ids, ngrams, buckets.
        weight: of the n-grams, (buckets, labels); that of bucket 0, which is none, is 0.
        bias: (labels,).
        phrases: the filters, if there are any.
    """

    hashing: Mapping[str, Any]
    weight: Array
    bias: Array
    phrases: PhraseWeights | None = None

    @classmethod
    def of(cls, model: Any) -> "LexicalWeights | None":
        """Those of a `BadgeForSequenceClassification`, if it has a lexical exit."""
        if not model.config.lexical_exit:
            return None
        stored = {name: tensor.float().cpu().numpy().copy() for name, tensor in model.exits[0].state_dict().items()}
        stored["weight"][0] = 0.0
        return cls.from_arrays(model.exits[0].hashing, stored)

    @classmethod
    def from_arrays(cls, hashing: Mapping[str, Any], stored: Mapping[str, Array]) -> "LexicalWeights":
        """Of what `arrays` returned.

        Raises:
            KeyError: something is missing.
        """
        phrases = None
        if "phrases.weight" in stored:
            phrases = PhraseWeights(**{field.name: stored[f"phrases.{field.name}"] for field in fields(PhraseWeights)})
        return cls(hashing, stored["weight"], stored["bias"], phrases)

    def arrays(self) -> dict[str, Array]:
        """All weights by name, as they can be stored."""
        phrases = {} if self.phrases is None else vars(self.phrases)
        return {"weight": self.weight, "bias": self.bias, **{f"phrases.{name}": a for name, a in phrases.items()}}

    def logits(self, input_ids: Array, attention_mask: Array) -> Array:
        """What n-grams and phrases say of token ids (rows, tokens), side by side."""
        said = ngram_logits(ngram_buckets(input_ids, attention_mask, **self.hashing), self.weight, self.bias)
        if self.phrases is None:
            return said
        phrases = self.phrases.logits(input_ids, attention_mask, self.hashing["ignored_ids"])
        return np.concatenate([said, phrases], axis=1)


class NamedStages(ABC):
    """A model that an engine runs; see `early_exit_badge.Stages`.

    Args:
        exit_layers: depths that have an exit.
        padding_id: the token id for padding.
        lexical: exit 0, if there is one.
        run_cost: what a run costs however many rows there are, see `early_exit_badge.Stages`.
    """

    def __init__(
        self, exit_layers: Sequence[int], padding_id: int, lexical: LexicalWeights | None, run_cost: float
    ) -> None:
        self.exit_layers, self.run_cost = list(exit_layers), run_cost
        self._padding_id, self._lexical = padding_id, lexical

    @abstractmethod
    def run(self, stage: str, state: NamedState) -> NamedState:
        """The state with what the stage made in it."""

    @abstractmethod
    def from_host(self, array: Array) -> Any:
        """The engine's array of one in numpy."""

    @abstractmethod
    def to_host(self, logits: Any) -> Array:
        """Logits in numpy, float64: the one wait for the device at each exit."""

    @abstractmethod
    def keep_rows(self, arrays: list[Any], rows: Array | None) -> list[Any]:
        """These rows (`None`: all) of arrays, side by side in memory."""

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
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": np.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        }
        if self._lexical is not None:
            state["lexical_logits"] = self._lexical.logits(input_ids, attention_mask)
        return state

    def embed(self, state: NamedState) -> NamedState:
        """The rows where the engine has them: one run takes them through the embedding and the first blocks."""
        return {name: self.from_host(array) for name, array in state.items()}

    def run_block(self, layer: int, state: NamedState) -> NamedState:
        """Blocks run in one go up to the next exit."""
        if layer not in self.exit_layers:
            return state
        state = self.run(exit_stage(layer), state)
        return {name: array for name, array in state.items() if name not in ("input_ids", "token_type_ids")}

    def read_exit(self, exit_index: int, state: NamedState) -> Any:
        """Logits (rows, labels); those of later exits came with the blocks."""
        if self.exit_layers[exit_index]:
            return state["logits"]
        assert self._lexical is not None
        return with_phrases(state["lexical_logits"], len(self._lexical.bias))

    def compact(self, state: NamedState, rows: Array | None, columns: slice, padded: bool) -> NamedState:
        """Keep these rows (`None`: all) and token columns."""
        keep = self.keep_rows if "hidden_states" in state else keep_host_rows
        kept = keep([array[:, columns] if is_per_token(name, array) else array for name, array in state.items()], rows)
        return dict(zip(state, kept, strict=True))

    def merge(self, states: list[NamedState], masks: list[Array]) -> tuple[NamedState, Array]:
        """One state of several at the same depth, padded on the right, and its mask."""
        width = max(mask.shape[1] for mask in masks)
        join = self.join if "hidden_states" in states[0] else join_rows
        merged = {}
        for name, array in states[0].items():
            padding = self._padding_id if name == "input_ids" else 0
            merged[name] = join([state[name] for state in states], width if is_per_token(name, array) else 0, padding)
        return merged, join_rows(masks, width)


def keep_host_rows(arrays: list[Array], rows: Array | None) -> list[Array]:
    """`NamedStages.keep_rows` in numpy."""
    return [np.ascontiguousarray(array if rows is None else array[rows]) for array in arrays]


def is_per_token(name: str, array: Any) -> bool:
    """Whether the second axis of an array is that of the tokens."""
    return name in _PER_TOKEN or array.ndim == 3
