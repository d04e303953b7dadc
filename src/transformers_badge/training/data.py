"""Rows from a file or a data set of the hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class LabelledRows:
    """Texts and labels, ready to tokenize.

    Args:
        columns: one list of texts per text column (two for pairs).
        labels: one per row: a class index, or a float for regression.
        names: the names of the classes; `None` for regression.
    """

    columns: list[list[str]]
    labels: list[Any]
    names: list[str] | None


def load_table(source: str, split: str = "train", skip_blank_lines: bool = False) -> Any:
    """A `datasets.Dataset` from a CSV, TSV, JSON, JSONL, Parquet or text file, or from the hub by name.

    Args:
        skip_blank_lines: of a text file, leave out lines with nothing on them.

    Raises:
        OSError: there is no such file and no such data set within reach.
        ValueError: the file cannot be read as what its ending says, or has no rows.
    """
    import datasets

    readers = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() not in readers:
            raise ValueError(f"{source} must end in one of {', '.join(readers)}, got {path.suffix!r}.")
        if path.stat().st_size == 0:
            raise ValueError(f"{source} is empty: give a file with at least one row.")
        options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        try:
            table = datasets.load_dataset(readers[path.suffix.lower()], data_files=str(path), split="train", **options)
        except Exception as error:  # datasets wraps what its readers raise in classes of its own
            if "no data" in str(error):  # what it says where there is nothing but names of columns
                raise ValueError(f"{source} has no rows.") from error
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(f"{source} could not be read as {path.suffix[1:]}, in UTF-8 ({reason}).") from error
        if skip_blank_lines and path.suffix.lower() == ".txt":
            table = table.select([row for row, text in enumerate(table["text"]) if text.strip()])
    elif path.suffix or path.is_absolute():
        raise FileNotFoundError(f"There is no file {source}: check the path.")
    else:
        try:
            table = datasets.load_dataset(source, split=split)
        except Exception as error:
            raise OSError(
                f"There is no file {source}, and no data set of that name could be loaded "
                f"({str(error).splitlines()[0]})."
            ) from error
    if len(table) == 0:
        raise ValueError(f"{source} has no rows.")
    return table


def text_columns(table: Any, names: list[str], source: str) -> list[list[str]]:
    """The named columns as lists of texts, one list per column.

    Raises:
        ValueError: a column is missing, or holds something else than texts; the message names the row.
    """
    columns = []
    for name in names:
        _check_column(table, name, source)
        column = list(table[name])
        for row, text in enumerate(column):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"Row {row + 1} of {source} has no text in column {name!r}: got {text!r}.")
        columns.append(column)
    return columns


def labelled_rows(
    table: Any, text_names: list[str], label_name: str, source: str, known: list[str] | None = None
) -> LabelledRows:
    """Texts with labels. Texts and whole numbers are classes; fractions are values to predict.

    Args:
        known: the class names of another part of the data; a class outside them is an error.

    Raises:
        ValueError: a column is missing, a label is missing, only one class, or a class not among the known.
    """
    columns = text_columns(table, text_names, source)
    _check_column(table, label_name, source)
    labels = list(table[label_name])
    for row, label in enumerate(labels):
        if label is None:
            raise ValueError(f"Row {row + 1} of {source} has no label in column {label_name!r}.")
        if not isinstance(label, (str, int, float)):
            raise ValueError(
                f"Row {row + 1} of {source} has the label {label!r}, but a class must be a text or a whole number, and "
                "a value to predict a fraction. Train a model that gives a row several labels in Python, with Trainer."
            )
    if known is None and all(isinstance(label, float) for label in labels):
        return LabelledRows(columns, labels, None)
    texts = _label_texts(table, label_name, labels)
    whole = all(isinstance(label, int) for label in labels)
    names = (
        known
        or getattr(table.features[label_name], "names", None)
        or sorted(set(texts), key=(lambda text: int(text) if whole and text.lstrip("-").isdigit() else text))
    )
    if len(names) < 2:
        raise ValueError(f"Column {label_name!r} of {source} holds one class only ({names[0]!r}): two are needed.")
    index = {name: i for i, name in enumerate(names)}
    for row, text in enumerate(texts):
        if text not in index:
            raise ValueError(
                f"Row {row + 1} of {source} has the class {text!r}, which is not among {', '.join(names)}."
            )
    return LabelledRows(columns, [index[text] for text in texts], names)


def class_indices(table: Any, label_name: str, names: Sequence[str], source: str) -> list[int]:
    """Labels of a column as indices into class names that are given.

    Labels go by name; whole numbers that are not all names themselves (as 1 to 5 are of classes "1" to "5") are
    indices.

    Raises:
        ValueError: the column is missing, or holds a class that is not among the names.
    """
    _check_column(table, label_name, source)
    labels = list(table[label_name])
    keys: list[Any] = _label_texts(table, label_name, labels)
    index: dict[Any, int] = {name: i for i, name in enumerate(names)}
    if all(isinstance(label, int) for label in labels) and not index.keys() >= set(keys):
        keys, index = labels, {i: i for i in range(len(names))}
    for row, key in enumerate(keys):
        if key not in index:
            raise ValueError(
                f"Row {row + 1} of {source} has the class {labels[row]!r}, which is not among the model's: "
                f"{', '.join(names)}."
            )
    return [index[key] for key in keys]


def _label_texts(table: Any, label_name: str, labels: list[Any]) -> list[str]:
    """Labels as texts: the names that the data set has for them, if any."""
    names = getattr(table.features[label_name], "names", None)
    if names is None:
        return [str(label) for label in labels]
    return [names[label] if isinstance(label, int) and 0 <= label < len(names) else str(label) for label in labels]


def _check_column(table: Any, name: str, source: str) -> None:
    if name not in table.column_names:
        raise ValueError(f"{source} has no column {name!r}; it has {', '.join(map(repr, table.column_names))}.")
