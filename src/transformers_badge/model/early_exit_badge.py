"""The loop over blocks, and compaction: dropping the rows that have left and the padding columns nobody needs any more.

The loop is written once, over stages. A stage takes the state of the rows that are still inside and hands on a new
one; what a state holds is the stages' own business. `forward` runs the loop with nobody leaving, `early_exit_predict`
with a policy.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from .criteria_badge import exit_scores, is_ready


if TYPE_CHECKING:
    from .policy_badge import ExitPolicy

State = TypeVar("State")
Array = np.ndarray[Any, np.dtype[Any]]


class Stages(Protocol[State]):
    """What the loop needs of a model, whichever engine runs it."""

    exit_layers: list[int]

    def embed(self, state: State) -> State:
        """The rows as the first block takes them."""

    def run_block(self, layer: int, state: State) -> State:
        """Block `layer` (from 1) and its bypass."""

    def read_exit(self, exit_index: int, state: State) -> Any:
        """Logits (rows, labels) of exit `exit_index` (from 0); one at depth 0 is read before the rows are embedded."""

    def compact(self, state: State, rows: Array | None, columns: slice, padded: bool) -> State:
        """Keep these rows (indices into the state's; `None`: all) and token columns; `padded`: some padding is left."""

    def to_host(self, logits: Any) -> Array:
        """Logits as a numpy array: the one point where the host waits for the device."""


def run_blocks(
    stages: Stages[State],
    state: State,
    on_exit: Callable[[int, State], State | None],
    on_block: Callable[[int, State], None] = lambda layer, state: None,
) -> None:
    """Embed the rows and run block after block.

    Args:
        stages: the model.
        state: of the rows before they are embedded.
        on_exit: called with the index of each exit reached and the state; hands back the state to go on with, or `None`
            to stop.
        on_block: called with 0 and the state after the embedding, and with its layer and the state after each block.
    """
    exits = {layer: index for index, layer in enumerate(stages.exit_layers)}
    for layer in range(stages.exit_layers[-1] + 1):
        if layer > 0:
            state = stages.run_block(layer, state)
            on_block(layer, state)
        if layer in exits:
            next_state = on_exit(exits[layer], state)
            if next_state is None:
                return
            state = next_state
        if layer == 0:  # rows that leave at an exit of depth 0 are not even embedded
            state = stages.embed(state)
            on_block(0, state)


def token_columns(mask: Array) -> slice:
    """The narrowest span of columns that holds every token of these rows; mask (rows, tokens), bool."""
    used = np.flatnonzero(mask.any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1)


def predict_with_policy(
    stages: Stages[State], state: State, mask: Array, num_labels: int, policy: "ExitPolicy", problem_type: str
) -> tuple[Array, Array]:
    """Run the rows block by block and let each leave where the policy says.

    Args:
        stages: the model.
        state: of all rows, before they are embedded.
        mask: (rows, tokens), bool: which columns of which rows hold a token.
        policy: when to leave; at the last exit everyone does.

    Returns:
        Exit logits (rows, exits, labels), float64, NaN where an exit was not reached, and the index of the exit that
        each row took, (rows,).
    """
    num_exits = len(stages.exit_layers)
    thresholds = policy.thresholds(num_exits)
    exit_logits = np.full((len(mask), num_exits, num_labels), np.nan)
    exit_taken = np.full(len(mask), num_exits - 1)
    inside = np.arange(len(mask))  # which row of the input each row of the state is

    def compact(state: State, stay: Array | None) -> State:
        nonlocal mask, inside
        if stay is not None:
            mask, inside = mask[stay], inside[stay]
        columns = token_columns(mask)
        if stay is None and columns == slice(0, mask.shape[1]):
            return state
        mask = mask[:, columns]
        return stages.compact(state, stay, columns, padded=not mask.all())

    def on_exit(index: int, state: State) -> State | None:
        exit_logits[inside, index] = stages.to_host(stages.read_exit(index, state))
        if index == num_exits - 1:
            return None
        if thresholds[index] is None:
            return state
        scores = exit_scores(exit_logits[inside, : index + 1], policy, problem_type)
        leaves = is_ready(scores, thresholds[index])
        if not leaves.any():
            return state
        exit_taken[inside[leaves]] = index
        return None if leaves.all() else compact(state, np.flatnonzero(~leaves))

    run_blocks(stages, compact(state, None), on_exit)
    return exit_logits, exit_taken
