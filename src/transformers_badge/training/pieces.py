"""More texts to learn from where there are few: put together of pieces of those that there are."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def fill_up(rows: Any, folds: Any, special_ids: Sequence[int], count: int, seed: int) -> tuple[Any, Any]:
    """Rows, and behind them as many made-up ones as `count` takes.

    A made-up row is as long as one of the rows, or shorter. Between its special tokens stands a piece of that row, a
    random share of 20 to 80 % of it, and then a piece of another row of the same fold. Nobody would write such a text,
    but what a classifier answers to it tells much of what it makes of words and phrases: with a teacher at hand, such
    texts are worth nearly as much as real ones (for a BERT taught to an LSTM: Tang et al., 2019, arXiv 1903.12136).

    Args:
        rows: a `datasets.Dataset` as `fine_tune.tokenize` makes them.
        folds: (rows,), whole numbers; pieces of different folds do not come together.
        special_ids: token ids that stay where they are.
        count: of rows in the end. With as many rows as that, none is made.
        seed: of what is cut, and where.

    Returns:
        The rows, a `datasets.Dataset`; and folds, one for each of them.
    """
    import datasets

    folds = np.asarray(folds)
    made = count - len(rows)
    if made <= 0:
        return rows, folds
    rng, special = np.random.default_rng(seed), list(special_ids)
    columns = {name: list(rows[name]) for name in rows.column_names}
    spans = [_runs(np.isin(ids, special)) for ids in columns["input_ids"]]
    members = {fold: np.flatnonzero(folds == fold) for fold in np.unique(folds)}
    first = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-made // len(rows)))])[:made]
    for row in first.tolist():
        other = int(rng.choice(members[folds[row]]))
        ids, places = _joined(columns["input_ids"], spans, row, other, rng)
        for name, column in columns.items():
            column.append(ids if name == "input_ids" else [column[row][place] for place in places])
    made_up = datasets.Dataset.from_dict(columns, features=rows.features)
    return made_up, np.concatenate([folds, folds[first]])


def _runs(special: Any) -> list[tuple[int, int]]:
    """Start and end of every run of tokens without a special one between them, one per text of the row."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], special, [True]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _joined(ids: Any, spans: Any, row: int, other: int, rng: Any) -> tuple[list[int], list[int]]:
    """Token ids of a row with pieces of itself and of another in its runs; and the place in the row each stands for."""
    joined: list[int] = []
    places: list[int] = []
    done = 0
    for number, (start, end) in enumerate(spans[row]):
        room = end - start
        cut = max(1, round(room * rng.uniform(0.2, 0.8)))
        begin, stop = spans[other][number] if number < len(spans[other]) else (0, 0)
        pieces = _piece(ids[row][start:end], cut, rng) + _piece(ids[other][begin:stop], room - cut, rng)
        joined += [*ids[row][done:start], *pieces]
        places += range(done, start + len(pieces))
        done = end
    return [*joined, *ids[row][done:]], [*places, *range(done, len(ids[row]))]


def _piece(tokens: list[int], length: int, rng: Any) -> list[int]:
    """A random piece of so many tokens, or all where there are fewer."""
    start = int(rng.integers(0, max(0, len(tokens) - length) + 1))
    return tokens[start : start + length]
