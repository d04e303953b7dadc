"""The stages of a model on a GPU, as CUDA graphs; see `cuda_graphs`. They are not compiled, which takes minutes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from transformers_badge.inference.cuda_graphs import CudaGraphs, bucket_rows, bucket_tokens, most_positions
from transformers_badge.inference.named_stages import NamedState
from transformers_badge.inference.torch_stages import TorchStages
from transformers_badge.model.rows_badge import pad_columns


Array = np.ndarray[Any, np.dtype[Any]]

INSIDE = "inside"  # in a state: which of its rows are still there, in numpy; not in it: all


class GraphedStages(TorchStages):
    """A model in CUDA graphs.

    Rows that have left are dropped only when that makes a smaller graph: what is left in one costs less than to take it
    out, and is a third of its rows at most.

    Args:
        model: a `BadgeForSequenceClassification`, in eval mode, on a GPU. Its weights are not copied.
        graphs: what runs the stages.
    """

    def __init__(self, model: Any, graphs: Callable[..., CudaGraphs] = CudaGraphs) -> None:
        super().__init__(model)
        self.run_cost = float("inf")  # no padding is worth another graph
        self._graphs = graphs(self._modules, model.device, model.max_tokens, most_positions(model.encoder))

    def run_module(self, stage: str, given: NamedState) -> NamedState:
        """What a stage makes of what it is given."""
        return self._graphs.run(stage, given)

    def embed(self, state: NamedState) -> NamedState:
        """The rows on the host, whence a graph fetches them, padded at once to the tokens of a bucket."""
        width = bucket_tokens(state["input_ids"].shape[1], self._model.max_tokens)
        paddings = {"input_ids": self._padding_id, "attention_mask": 0, "token_type_ids": 0}
        padded = {name: pad_columns(state[name], width, padding) for name, padding in paddings.items()}
        return {name: torch.from_numpy(array) for name, array in {**state, **padded}.items()}

    def read_exit(self, exit_index: int, state: NamedState) -> Any:
        """Logits (rows, labels), of the rows that are still there."""
        logits = super().read_exit(exit_index, state)
        return logits[state[INSIDE]] if INSIDE in state else logits

    def compact(self, state: NamedState, rows: Array | None, columns: slice, padded: bool) -> NamedState:
        """Keep these rows (`None`: all) and token columns, or only note them where the graph is the same."""
        if "hidden_states" not in state:
            return super().compact(state, rows, columns, padded)
        size, width = state["attention_mask"].shape
        inside = state.get(INSIDE, np.arange(size))
        inside = inside if rows is None else inside[rows]
        most = self._model.max_tokens
        if (
            bucket_rows(len(inside)) == bucket_rows(size)
            and bucket_tokens(columns.stop, most) == bucket_tokens(width, most)
            and columns.start == 0
        ):
            return {**state, INSIDE: inside}
        return self._drop(state, inside, columns)

    def merge(self, states: list[NamedState], masks: list[Array]) -> tuple[NamedState, Array]:
        """One state of several at the same depth, padded on the right, and its mask."""
        dropped = [
            self._drop(state, state[INSIDE], slice(0, mask.shape[1])) if INSIDE in state else state
            for state, mask in zip(states, masks, strict=True)
        ]
        return super().merge(dropped, masks)

    def _drop(self, state: NamedState, inside: Array, columns: slice) -> NamedState:
        """Keep these of all rows, and token columns."""
        whole = {name: array for name, array in state.items() if name != INSIDE}
        return super().compact(whole, inside, columns, padded=True)
