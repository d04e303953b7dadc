"""The loop over blocks, and compaction: dropping the rows that have left and the padding columns nobody needs any more,
and parting rows that are unlike in length.

The loop is written once, over stages. A stage takes the state of the rows that are still inside and hands on a new
one; what a state holds is the stages' own business. `forward` runs the loop with nobody leaving, `early_exit_predict`
with a policy, and `early_exit_stream` piece by piece, from one exit where rows can leave to the next.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from .criteria_badge import exit_scores, is_ready


if TYPE_CHECKING:
    from .policy_badge import ExitPolicy

State = TypeVar("State")
Array = np.ndarray[Any, np.dtype[Any]]


class Stages(Protocol[State]):
    """What the loop needs of a model, whichever engine runs it."""

    exit_layers: list[int]

    @property
    def run_cost(self) -> float:
        """What a run costs however many rows there are: so many positions of padding have to be saved by one more.

        Infinite: batches stay together.
        """

    def begin(self, rows: list[dict[str, list[int]]]) -> tuple[State, Array]:
        """The state of rows of tokens before they are embedded, padded on the right; and the mask (rows, tokens), bool.

        A row has `input_ids`, and may have `token_type_ids` and `attention_mask` of the same length.
        """

    def embed(self, state: State) -> State:
        """The rows as the first block takes them."""

    def run_block(self, layer: int, state: State) -> State:
        """Block `layer` (from 1) and its bypass."""

    def read_exit(self, exit_index: int, state: State) -> Any:
        """Logits (rows, labels) of exit `exit_index` (from 0); one at depth 0 is read before the rows are embedded."""

    def compact(self, state: State, rows: Array | None, columns: slice, padded: bool) -> State:
        """Keep these rows (indices into the state's; `None`: all) and token columns; `padded`: some padding is left."""

    def merge(self, states: list[State], masks: list[Array]) -> tuple[State, Array]:
        """One state of several at the same depth that `begin` began, padded on the right to the widest; its mask."""

    def to_host(self, logits: Any) -> Array:
        """Logits as a numpy array: the one point where the host waits for the device."""


def run_blocks(
    stages: Stages[State],
    state: State,
    on_exit: Callable[[int, State], State | None],
    on_block: Callable[[int, State], None] = lambda layer, state: None,
    after: int | None = None,
) -> None:
    """Embed the rows and run block after block.

    Args:
        stages: the model.
        state: of the rows before they are embedded; or where `after` says.
        on_exit: called with the index of each exit reached and the state; hands back the state to go on with, or `None`
            to stop.
        on_block: called with 0 and the state after the embedding, and with its layer and the state after each block.
        after: go on behind the exit at this depth, which these rows have read. Default: begin at the beginning.
    """
    exits = {layer: index for index, layer in enumerate(stages.exit_layers)}
    for layer in range(after or 0, stages.exit_layers[-1] + 1):
        if layer > 0 and layer != after:
            state = stages.run_block(layer, state)
            on_block(layer, state)
        if layer in exits and layer != after:
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


@dataclass(frozen=True, eq=False)
class Batch(Generic[State]):
    """Rows at one depth, which go on together.

    Args:
        state: what the stages know of them.
        mask: (rows, tokens), bool: which columns of which rows hold a token.
        rows: (rows,), which row of the input each of them is.
        exit_logits: (rows, exits read so far, labels), float64.
    """

    state: State
    mask: Array
    rows: Array
    exit_logits: Array

    @classmethod
    def fresh(cls, state: State, mask: Array, rows: Array, num_labels: int) -> "Batch[State]":
        """Rows that have read no exit yet."""
        return cls(state, mask, rows, np.empty((len(rows), 0, num_labels)))

    def __len__(self) -> int:
        return len(self.rows)


def keep_rows(stages: Stages[State], batch: Batch[State], rows: Array | None) -> Batch[State]:
    """Compaction: these rows (indices into the batch's; `None`: all), in columns that one of them needs."""
    mask = batch.mask if rows is None else batch.mask[rows]
    columns = token_columns(mask)
    if rows is None and columns == slice(0, mask.shape[1]):
        return batch
    mask = mask[:, columns]
    state = stages.compact(batch.state, rows, columns, padded=not mask.all())
    if rows is None:
        return replace(batch, state=state, mask=mask)
    return Batch(state, mask, batch.rows[rows], batch.exit_logits[rows])


def run_to_exit(
    stages: Stages[State],
    batch: Batch[State],
    policy: "ExitPolicy",
    thresholds: Sequence[float | None],
    problem_type: str,
) -> tuple[Batch[State], Array]:
    """Run the rows on to the next exit where rows can leave: one that has a threshold, or the last.

    Returns:
        The same rows behind that exit, and which of them leave there, (rows,), bool; at the last exit everyone does.
    """
    last = len(stages.exit_layers) - 1
    exit_logits = batch.exit_logits
    reached = batch.state

    def on_exit(index: int, state: State) -> State | None:
        nonlocal exit_logits, reached
        logits = stages.to_host(stages.read_exit(index, state))
        exit_logits = np.concatenate([exit_logits, logits[:, None]], axis=1)
        if index < last and thresholds[index] is None:
            return state
        reached = state
        return None

    seen = exit_logits.shape[1]
    run_blocks(stages, batch.state, on_exit, after=stages.exit_layers[seen - 1] if seen else None)
    index = exit_logits.shape[1] - 1
    if index == last:
        leaves = np.ones(len(batch), dtype=bool)
    else:
        leaves = is_ready(exit_scores(exit_logits, policy, problem_type), thresholds[index])
    return Batch(reached, batch.mask, batch.rows, exit_logits), leaves


def predict_with_policy(
    stages: Stages[State],
    state: State,
    mask: Array,
    num_labels: int,
    policy: "ExitPolicy",
    problem_type: str,
    executor: Executor | None = None,
) -> tuple[Array, Array]:
    """Run the rows block by block, those that are alike in length together, and let each leave where the policy says.

    Args:
        stages: the model.
        state: of all rows, before they are embedded.
        mask: (rows, tokens), bool: which columns of which rows hold a token.
        policy: when to leave; at the last exit everyone does.
        executor: runs rows that are unlike in length side by side. Default: they run one after the other.

    Returns:
        Exit logits (rows, exits, labels), float64, NaN where an exit was not reached, and the index of the exit that
        each row took, (rows,).
    """
    num_exits = len(stages.exit_layers)
    thresholds = policy.thresholds(num_exits)
    exit_logits = np.full((len(mask), num_exits, num_labels), np.nan)
    exit_taken = np.full(len(mask), num_exits - 1)

    def run(batch: Batch[State]) -> list[Batch[State]]:
        """To the next exit where rows can leave, and what goes on from there."""
        batch, leaves = run_to_exit(stages, batch, policy, thresholds, problem_type)
        seen, nobody, everybody = batch.exit_logits.shape[1], not leaves.any(), leaves.all()
        if not nobody:
            leaving = batch.rows[leaves]
            exit_logits[leaving, :seen] = batch.exit_logits[leaves]
            exit_taken[leaving] = seen - 1
        if everybody:
            return []
        if nobody and seen > 1:
            return [batch]  # these have been parted already
        return split_by_length(stages, batch, None if nobody else np.flatnonzero(~leaves))

    def finish(batch: Batch[State]) -> None:
        batches = [batch]
        while batches:
            batches += run(batches.pop())

    batch = Batch.fresh(state, mask, np.arange(len(mask)), num_labels)
    if stops_before_blocks(stages, thresholds):
        batches = run(keep_rows(stages, batch, None))
    else:
        batches = split_by_length(stages, batch, None)
    run_all = map if executor is None or len(batches) < 2 else executor.map
    for _ in run_all(finish, reversed(batches)):  # the longest first
        pass
    return exit_logits, exit_taken


def stops_before_blocks(stages: Stages[State], thresholds: Sequence[float | None]) -> bool:
    """Whether rows can leave at an exit of depth 0: their first run ends before the blocks."""
    return stages.exit_layers[0] == 0 and thresholds[0] is not None


def split_by_length(stages: Stages[State], batch: Batch[State], rows: Array | None) -> list[Batch[State]]:
    """Compaction, into several batches where rows are so unlike in length that it saves more than a run costs.

    Args:
        rows: that stay, indices into the batch's; `None`: all.
    """
    groups = length_groups(batch.mask if rows is None else batch.mask[rows], stages.run_cost)
    if len(groups) == 1:
        return [keep_rows(stages, batch, rows)]
    return [keep_rows(stages, batch, group if rows is None else rows[group]) for group in groups]


def length_groups(mask: Array, run_cost: float) -> list[Array]:
    """Rows in groups of similar length, as indices, ascending in each; the groups from short to long.

    Args:
        mask: (rows, tokens), bool: which columns of which rows hold a token.
        run_cost: positions of padding that each group more has to save.
    """
    if len(mask) == 1 or run_cost == np.inf:
        return [np.arange(len(mask))]
    lengths = mask.shape[1] - mask.argmax(axis=1) - mask[:, ::-1].argmax(axis=1)
    order = np.argsort(lengths, kind="stable")
    groups, spans = [], [(0, len(mask))]
    while spans:
        start, end = spans.pop()
        here = lengths[order[start:end]]
        saved = np.arange(1, end - start + 1) * (here[-1] - here)  # were the first 1, 2, ... by themselves
        first = 1 + int(saved.argmax())
        if saved[first - 1] > run_cost:
            spans += [(start + first, end), (start, start + first)]
        else:
            groups.append(np.sort(order[start:end]))
    return groups
