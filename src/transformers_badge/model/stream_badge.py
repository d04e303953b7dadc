"""Regrouping across batches: rows that stay behind an exit wait there for others, and every block runs full batches.

    rows, read ahead and sorted by length  ->  pool behind exit 1  ->  pool behind exit 2  ->  ...  ->  answers

The deepest pool that holds a full batch runs first; new rows begin when none does, and at the end of the input the
shallowest pool runs first, whose rows fill the next one. An exit of depth 0 reads tokens alone, and its batches are not
smaller than LEXICAL_BATCH. With several workers that many batches run side by side, and as many are in line for them.

Memory is bounded. At most batch_size x exits rows are inside the model, and READ_AHEAD x batch_size are read ahead.
Results that wait for an earlier row are at most (WINDOW + exits) x batch_size, since a row that holds up more than
WINDOW batches is run in whatever company it has. With several workers batch_size rows more are inside for each batch
that runs or is in line (before the first block LEXICAL_BATCH), and as many results wait at each exit.

It is written over `Stages` and in numpy, so that every engine can be streamed.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from .early_exit_badge import Array, Batch, Stages, State, keep_rows, run_to_exit, stops_before_blocks
from .rows_badge import take


if TYPE_CHECKING:
    from .policy_badge import ExitPolicy

READ_AHEAD = 64  # batches that are read, tokenized and sorted by length at a time
LEXICAL_BATCH = 32  # rows that read exit 0 together, at least: its calls cost more than its rows
WINDOW = 128  # batches whose results may wait for an earlier row; not less than READ_AHEAD, or it could not help


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """The answer to one row.

    Args:
        index: which row of the input it is, from 0.
        logits: (labels,), of the exit that the row took.
        exit_layer: how many blocks ran for the row; 0 for the lexical exit.
    """

    index: int
    logits: Any
    exit_layer: int


# What a run leaves: the answers of rows that left, the index of the exit, and the batches that stay behind it.
_Ran = tuple[list[StreamedRow], int, list[Batch[State]]]


class _InThisThread(Executor):
    """Runs what it is given at once."""

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*given, **named))
        return future


def stream_with_policy(
    stages: Stages[State],
    rows: Iterable[dict[str, list[int]]],
    batch_size: int,
    num_labels: int,
    policy: "ExitPolicy",
    problem_type: str,
    in_order: bool = True,
    running: Callable[[], AbstractContextManager[Any]] = nullcontext,
    workers: int = 1,
) -> Generator[StreamedRow, None, None]:
    """Answer rows as they come, each as `predict_with_policy` answers it by itself.

    Args:
        stages: the model.
        rows: tokens, as `Stages.begin` takes them. What it raises is raised after the rows before it are answered.
        policy: when to leave; at the last exit everyone does.
        in_order: answer in the order of the rows; or else as they finish.
        running: a context around every use of the stages; in the consumer's thread it is never open while rows are read
            or an answer is out.
        workers: how many batches run side by side, each in a thread of its own; 1: in the consumer's.
    """
    thresholds = policy.thresholds(len(stages.exit_layers))
    first_size = max(batch_size, LEXICAL_BATCH) if stops_before_blocks(stages, thresholds) else batch_size
    pools: list[list[Batch[State]]] = [[] for _ in stages.exit_layers]  # behind each exit the rows that stay
    source, ended, error = iter(rows), False, None
    fresh: deque[tuple[int, dict[str, list[int]]]] = deque()
    read = delivered = last_length = 0
    finished: dict[int, StreamedRow] = {}
    at_work, done = 0, SimpleQueue[Future[_Ran[State]]]()  # batches in hand, and those that have run
    # A batch in line for every worker, so that none waits while this thread reads, tokenizes and hands out answers.
    most_at_work = 2 * workers if workers > 1 else 1

    def length(row: tuple[int, dict[str, list[int]]]) -> int:
        return len(row[1]["input_ids"])

    def read_ahead() -> None:
        nonlocal ended, error, read, last_length
        chunk, error = take(source, READ_AHEAD * batch_size)
        ended = len(chunk) < READ_AHEAD * batch_size
        fresh.extend(sorted(enumerate(chunk, read), key=length))
        read += len(chunk)
        # From the end nearer to what ran last: then rows of two chunks that meet in a pool are alike in length.
        if fresh and abs(length(fresh[-1]) - last_length) < abs(length(fresh[0]) - last_length):
            fresh.reverse()
        if fresh:
            last_length = length(fresh[-1])

    def next_batch() -> Callable[[], Batch[State]] | None:
        """What makes the batch that is to run next; `None`: no rows wait."""
        while True:
            overdue = delivered if in_order and len(finished) > WINDOW * batch_size else None
            choice = _choose(pools, batch_size, overdue, drain=ended and not fresh)
            if choice is not None:
                with running():
                    return partial(_join, stages, _take_batches(stages, *choice, batch_size))
            if fresh:
                return partial(begin, [fresh.popleft() for _ in range(min(first_size, len(fresh)))])
            if ended:
                return None
            read_ahead()

    def begin(numbered: list[tuple[int, dict[str, list[int]]]]) -> Batch[State]:
        """A batch of rows that have not begun."""
        numbers, tokens = zip(*numbered, strict=True)
        return Batch.fresh(*stages.begin(list(tokens)), np.array(numbers), num_labels)

    def run(make: Callable[[], Batch[State]]) -> _Ran[State]:
        """Run a batch to the next exit; if it is full, until somebody leaves: it would be the next to run anyway."""
        with running():
            batch, leaves = run_to_exit(stages, make(), policy, thresholds, problem_type)
            while not leaves.any() and len(batch) == batch_size:
                batch, leaves = run_to_exit(stages, batch, policy, thresholds, problem_type)
            exit_index = batch.exit_logits.shape[1] - 1
            staying = np.flatnonzero(~leaves)
            parts = np.split(staying, range(batch_size, len(staying), batch_size)) if len(staying) else []
            kept = [keep_rows(stages, batch, part) if len(part) < len(batch) else batch for part in parts]
        answers = [
            StreamedRow(int(batch.rows[place]), batch.exit_logits[place, -1].copy(), stages.exit_layers[exit_index])
            for place in np.flatnonzero(leaves)
        ]
        return answers, exit_index, kept

    executor = ThreadPoolExecutor(workers) if workers > 1 else _InThisThread()
    try:
        while True:
            while at_work < most_at_work:
                make = next_batch()
                if make is None:
                    break
                executor.submit(run, make).add_done_callback(done.put)
                at_work += 1
            if not at_work:
                break
            answers, exit_index, kept = done.get().result()
            at_work -= 1
            pools[exit_index].extend(kept)
            finished.update({answer.index: answer for answer in answers})
            while finished and (delivered in finished or not in_order):
                yield finished.pop(delivered if in_order else next(iter(finished)))
                delivered += 1
    finally:
        executor.shutdown(cancel_futures=True)  # a batch in line does not begin when the consumer stops
        while not done.empty():  # these would hold on to the queue, and it to them
            done.get()
    if error is not None:
        raise error


def _choose(
    pools: list[list[Batch[State]]], batch_size: int, overdue: int | None, drain: bool
) -> tuple[list[Batch[State]], int] | None:
    """The pool to run and the place in it of the rows to begin with; `None`: none is due.

    Args:
        overdue: a row of the input that has to go on, if it is in a pool.
        drain: no rows are left to begin.
    """
    for pool in reversed(pools):
        if sum(map(len, pool)) >= batch_size:
            return pool, 0
    if drain or overdue is not None:
        for pool in pools:
            for place, waiting in enumerate(pool):
                if drain or overdue in waiting.rows:
                    return pool, place
    return None


def _take_batches(stages: Stages[State], pool: list[Batch[State]], place: int, batch_size: int) -> list[Batch[State]]:
    """Take up to `batch_size` rows out of a pool: those at `place`, and those nearest to them in length."""
    first = pool.pop(place)
    width, room, taken = first.mask.shape[1], batch_size - len(first), [first]
    if not room:  # as ever at batch size 1
        return taken
    for waiting in sorted(pool, key=lambda batch: abs(batch.mask.shape[1] - width)):
        if not room:
            break
        if len(waiting) <= room:
            pool.remove(waiting)
        else:
            nearest = np.argsort(np.abs(_lengths(waiting.mask) - width), kind="stable")
            pool[pool.index(waiting)] = keep_rows(stages, waiting, np.sort(nearest[room:]))
            waiting = keep_rows(stages, waiting, np.sort(nearest[:room]))
        taken.append(waiting)
        room -= len(waiting)
    return taken


def _join(stages: Stages[State], batches: list[Batch[State]]) -> Batch[State]:
    """One batch of several at the same depth."""
    if len(batches) == 1:
        return batches[0]
    state, mask = stages.merge([batch.state for batch in batches], [batch.mask for batch in batches])
    return Batch(
        state,
        mask,
        np.concatenate([batch.rows for batch in batches]),
        np.concatenate([batch.exit_logits for batch in batches]),
    )


def _lengths(mask: Array) -> Array:
    """Columns up to a row's last token, (rows,)."""
    return np.asarray(mask.shape[1] - mask[:, ::-1].argmax(axis=1))
