"""What a stream reads: rows of tokens or texts, one by one, checked; and how rows become a padded batch. Numpy only."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from .early_exit_badge import Array, token_columns
from .policy_badge import check_count


Item = TypeVar("Item")


def check_stream(rows: Any, batch_size: Any) -> None:
    """Check what can be checked before a row is read.

    Raises:
        TypeError: rows are not an iterable of rows.
        ValueError: batch_size is not a whole number of at least 1.
    """
    check_count("batch_size", batch_size)
    if isinstance(rows, (str, Mapping)) or not hasattr(rows, "__iter__"):
        raise TypeError(
            f"rows must be an iterable with one entry per row (a text, or a dict with input_ids), got "
            f"{type(rows).__name__}."
        )


def read_tokens(
    rows: Iterable[Any], tokenizer: Any, chunk_size: int, vocab_size: int, max_tokens: int
) -> Iterator[dict[str, list[int]]]:
    """Rows as `Stages.begin` takes them, checked, and without padding at either end.

    Args:
        rows: dicts of tokens, whose other columns are left alone; or, with a tokenizer, texts or pairs of texts.
        chunk_size: how many texts are tokenized at a time.

    Raises:
        TypeError, ValueError: a row is bad; the message says which one, and what to do.
    """
    encoded = rows if tokenizer is None else _tokenized(rows, tokenizer, chunk_size, max_tokens)
    for index, row in enumerate(encoded):
        yield _checked_tokens(index, row, vocab_size, max_tokens)


def _tokenized(rows: Iterable[Any], tokenizer: Any, chunk_size: int, max_tokens: int) -> Iterator[dict[str, Any]]:
    """Tokens of texts, a chunk of them at a time; longer texts are cut."""
    texts, error = checked_texts(rows), None
    max_length = min(max_tokens, tokenizer.model_max_length)
    while error is None:
        chunk, error = take(texts, chunk_size)
        if not chunk and error is None:
            return
        if chunk:
            columns = [list(column) for column in zip(*chunk, strict=True)]
            encoded = tokenizer(*columns, truncation=True, max_length=max_length)
            for place in range(len(chunk)):
                yield {name: encoded[name][place] for name in encoded}
    raise error


def checked_texts(rows: Iterable[Any]) -> Iterator[tuple[str, ...]]:
    """Texts as tuples of one, pairs as tuples of two.

    Raises:
        TypeError: a row is neither.
        ValueError: there are both.
    """
    size = 0
    for index, row in enumerate(rows):
        texts = (row,) if isinstance(row, str) else tuple(row) if isinstance(row, (list, tuple)) else ()
        if not (len(texts) in (1, 2) and all(isinstance(text, str) for text in texts)):
            hint = "; leave the tokenizer out for rows of tokens" if isinstance(row, Mapping) else ""
            raise TypeError(f"Row {index} must be a text or a pair of texts, got {type(row).__name__}{hint}.")
        if len(texts) != (size or len(texts)):
            raise ValueError(f"Row {index} has {len(texts)} text(s), but those before it have {size}: give one kind.")
        size = len(texts)
        yield texts


def _checked_tokens(index: int, row: Any, vocab_size: int, max_tokens: int) -> dict[str, list[int]]:
    if not isinstance(row, Mapping):
        hint = "; texts need a tokenizer" if isinstance(row, (str, tuple)) else ""
        raise TypeError(f"Row {index} must be a dict with input_ids, got {type(row).__name__}{hint}.")
    for name in ("inputs_embeds", "position_ids"):
        if row.get(name) is not None:
            raise ValueError(f"Row {index} has {name}, which a stream does not take: give input_ids alone.")
    if row.get("input_ids") is None:
        raise ValueError(f"Row {index} has no input_ids.")
    names = ("input_ids", "token_type_ids", "attention_mask")
    columns = {name: _whole_numbers(index, name, row[name]) for name in names if row.get(name) is not None}
    length = len(columns["input_ids"])
    for name, column in columns.items():
        if len(column) != length:
            raise ValueError(f"Row {index} has {length} input_ids, but {len(column)} {name}.")
    mask = columns.pop("attention_mask", np.ones(length, dtype=np.int64))
    tokens = mask > 0
    if not (mask == tokens).all():
        raise ValueError(f"attention_mask of row {index} must hold only 0 (padding) and 1 (token).")
    if not tokens.any():
        raise ValueError(f"Row {index} has no tokens: a text needs at least one, its special tokens included.")
    if not tokens.all():
        used = token_columns(tokens[None])
        columns = {name: column[used] for name, column in columns.items()}
        mask = mask[used]
    ids = columns["input_ids"]
    if len(ids) > max_tokens:
        raise ValueError(
            f"Row {index} has {len(ids)} tokens, but this encoder takes at most {max_tokens}: "
            f"tokenize with truncation=True, max_length={max_tokens}."
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"input_ids of row {index} must be in [0, {vocab_size}), the encoder's vocabulary, got "
            f"{ids.min() if ids.min() < 0 else ids.max()}: use the tokenizer that belongs to this encoder."
        )
    if not mask.all():  # there are gaps
        columns["attention_mask"] = mask
    return {name: column.tolist() for name, column in columns.items()}


def check_values(ids: Array | None, mask: Array | None, vocab_size: int) -> None:
    """See that a padded batch holds what it may hold.

    Args:
        ids: (rows, tokens), whole numbers.
        mask: (rows, tokens).

    Raises:
        ValueError: an id outside the vocabulary; a mask that holds something else than 0 and 1, or no 1 in a row.
    """
    if ids is not None:
        low, high = ids.min(), ids.max()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"input_ids must be in [0, {vocab_size}), the encoder's vocabulary, got {low if low < 0 else high}: "
                "use the tokenizer that belongs to this encoder."
            )
    if mask is not None:
        tokens = mask > 0
        if not (mask == tokens).all():
            raise ValueError("attention_mask must hold only 0 (padding) and 1 (token).")
        filled = tokens.any(axis=1)
        if not filled.all():
            raise ValueError(
                f"attention_mask is all zero in row {filled.argmin()}: every row needs at least one token."
            )


def _whole_numbers(index: int, name: str, value: Any) -> Array:
    try:
        numbers = np.asarray(value)
    except (TypeError, ValueError):  # lists of several lengths in one
        numbers = np.empty((0, 0))
    if numbers.shape == (0,):
        return numbers.astype(np.int64)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise TypeError(f"{name} of row {index} must be one list of whole numbers, without padding for other rows.")
    return numbers


def pad_rows(rows: list[dict[str, list[int]]], padding_id: int) -> tuple[dict[str, Array], Array]:
    """Rows of tokens, padded on the right.

    Returns:
        input_ids and, if any row has them, token_type_ids (0 for the other rows), each (rows, tokens), int64; and the
        mask, (rows, tokens), bool.
    """
    mask = np.zeros((len(rows), max(len(row["input_ids"]) for row in rows)), dtype=bool)
    fills = {"input_ids": padding_id, "token_type_ids": 0}
    inputs = {name: np.full(mask.shape, fill) for name, fill in fills.items() if any(name in row for row in rows)}
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        mask[place, :length] = row.get("attention_mask", True)
        for name in inputs:
            inputs[name][place, :length] = row.get(name, 0)
    return inputs, mask


def pad_columns(array: Array, width: int, padding: int = 0) -> Array:
    """An array padded behind to so many columns. (np.pad takes ten times as long for single rows.)"""
    columns = array.shape[1]
    if columns == width:
        return array
    padded = np.full((len(array), width, *array.shape[2:]), padding, array.dtype)
    padded[:, :columns] = array
    return padded


def join_rows(arrays: list[Array], width: int, padding: int = 0) -> Array:
    """Arrays below one another, each padded behind to so many columns; `width` 0: as wide as they are."""
    return np.concatenate([pad_columns(array, width, padding) for array in arrays] if width else arrays)


def take(items: Iterator[Item], count: int) -> tuple[list[Item], Exception | None]:
    """Up to `count` items, and the error that ended them."""
    taken: list[Item] = []
    try:
        while len(taken) < count:
            taken.append(next(items))
    except StopIteration:
        pass
    except Exception as error:
        return taken, error
    return taken, None
