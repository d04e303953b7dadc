"""The exit table: every exit's logits for a data set, with labels and costs, in one file; numpy only.

A file is a safetensors file, so that it can be read without this package: its tensors are the arrays below, its
metadata holds the version and a JSON header.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


Array = np.ndarray[Any, np.dtype[Any]]

FORMAT, VERSION = "transformers-badge exit table", 1
MAPPED_FROM = 1 << 26  # bytes of logits from which a file is memory-mapped instead of read
_NUMPY_TYPES = {f"{kind.upper()}{8 * size}": f"<{kind}{size}" for kind in "fiu" for size in (1, 2, 4, 8)}
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors format


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitTable:
    """What every exit of a model says about every row of a data set.

    Args:
        exit_logits: (rows, exits, labels), floating point; may be memory-mapped.
        exit_layers: depth of every exit, ascending; the last is full depth.
        costs: (exits,), what a row costs that leaves at this exit, ascending, in any one unit. Default: its depth,
            in blocks.
        problem_type: `"single_label_classification"` or `"multi_label_classification"`.
        labels: (rows,) class indices, or (rows, labels) of 0 and 1 for multi-label. `None`: there are none.
        lengths: (rows,), tokens of every row. `None`: not known.
        row_digests: (rows,) uint64, a digest of every row's text (`digest_rows`). `None`: not known.
        label_names: names of the labels, in order.
        model: digest of the model's weights. Empty: not known.

    Raises:
        ValueError: arrays whose shapes, types or values do not fit; the message names the field.
    """

    exit_logits: Array
    exit_layers: tuple[int, ...]
    costs: Array | None = None
    problem_type: str = "single_label_classification"
    labels: Array | None = None
    lengths: Array | None = None
    row_digests: Array | None = None
    label_names: tuple[str, ...] = ()
    model: str = ""

    def __post_init__(self) -> None:
        logits = self.exit_logits
        if not isinstance(logits, np.ndarray) or logits.ndim != 3 or logits.dtype.kind != "f":
            raise ValueError(
                "exit_logits must be a floating-point array (rows, exits, labels), got "
                f"{getattr(logits, 'dtype', type(logits).__name__)} {np.shape(logits)}."
            )
        rows, exits, labels = logits.shape
        if 0 in logits.shape:
            raise ValueError(f"An exit table needs at least one row, exit and label, got {logits.shape}.")
        layers = tuple(int(layer) for layer in self.exit_layers)
        if list(layers) != sorted(set(layers)) or len(layers) != exits or layers[0] < 0:
            raise ValueError(f"exit_layers must be {exits} ascending depths, one per exit, got {list(layers)}.")
        if self.problem_type not in ("single_label_classification", "multi_label_classification"):
            raise ValueError(
                "An exit table needs problem_type='single_label_classification' or 'multi_label_classification', got "
                f"{self.problem_type!r}."
            )
        object.__setattr__(self, "exit_layers", layers)
        object.__setattr__(self, "label_names", tuple(self.label_names) or tuple(map(str, range(labels))))
        costs = np.asarray(layers if self.costs is None else self.costs, dtype=np.float64)
        object.__setattr__(self, "costs", costs)
        if (
            costs.shape != (exits,)
            or not np.isfinite(costs).all()
            or (np.diff(costs, prepend=0) < 0).any()
            or not costs[-1]
        ):
            raise ValueError(
                f"costs must be {exits} finite ascending numbers >= 0, one per exit, got {costs.tolist()}."
            )
        if len(self.label_names) != labels:
            raise ValueError(f"label_names lists {len(self.label_names)} names for {labels} labels.")
        for name in ("labels", "lengths", "row_digests"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asanyarray(getattr(self, name)))
        for name in ("lengths", "row_digests"):
            value = getattr(self, name)
            if value is not None and value.shape != (rows,):
                raise ValueError(f"{name} must have the shape ({rows},), one per row, got {value.shape}.")
        self._check_labels()

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        rows, _, count = self.exit_logits.shape
        several = self.problem_type == "multi_label_classification"
        shape, top = ((rows, count), 2) if several else ((rows,), count)
        if self.labels.shape != shape or self.labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels must be whole numbers of the shape {shape}, got {self.labels.dtype} {self.labels.shape}."
            )
        if self.labels.min() < 0 or self.labels.max() >= top:
            raise ValueError(f"labels must be in [0, {top}), got {self.labels.min()} to {self.labels.max()}.")
        object.__setattr__(self, "labels", self.labels.astype(np.int64, copy=False))  # numpy 1 counts no unsigned ones

    def __len__(self) -> int:
        return len(self.exit_logits)

    @property
    def blocks(self) -> int:
        """Full depth."""
        return self.exit_layers[-1]

    @property
    def data(self) -> str:
        """Digest of the rows, whatever their order; empty where their texts are not known."""
        if self.row_digests is None:
            return ""
        return hashlib.sha256(np.sort(self.row_digests).astype("<u8").tobytes()).hexdigest()[:16]

    def select(self, rows: Any) -> "ExitTable":
        """The table of some rows: indices, a slice or a mask.

        Raises:
            ValueError: no row is left.
        """
        names = ("exit_logits", "labels", "lengths", "row_digests")
        arrays = {name: getattr(self, name) for name in names}
        kept: dict[str, Any] = {name: None if value is None else value[rows] for name, value in arrays.items()}
        return replace(self, **kept)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        from safetensors.numpy import save_file

        path = Path(path)
        arrays = {name: getattr(self, name) for name in ("exit_logits", "costs", "labels", "lengths", "row_digests")}
        tensors = {name: np.ascontiguousarray(value) for name, value in arrays.items() if value is not None}
        header = {
            "exit_layers": self.exit_layers,
            "problem_type": self.problem_type,
            "label_names": self.label_names,
            "model": self.model,
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(header)}
        unfinished = path.with_name(path.name + ".unfinished")
        try:
            save_file(tensors, unfinished, metadata)
            os.replace(unfinished, path)
        except OSError:
            raise
        except Exception as error:  # safetensors has its own class for a folder that is not there
            raise OSError(f"The exit table {path} could not be written ({error}).") from error
        finally:
            with suppress(OSError):  # an error of the clean-up must not hide the one before it
                unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExitTable":
        """Read a table; a large one is memory-mapped.

        Raises:
            OSError: there is no such file, or it is cut short.
            ValueError: the file is no exit table, or of a newer version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no exit table {path}: make one with transformers-badge evaluate.")
        entries, start = _read_header(path)
        metadata = entries.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not an exit table: make one with transformers-badge evaluate.")
        version = str(metadata.get("version"))
        if not version.isdigit() or int(version) > VERSION:
            raise ValueError(
                f"{path} is an exit table of version {version}, and this release reads up to {VERSION}: install a "
                "newer transformers-badge, or make the table anew."
            )
        try:
            arrays: dict[str, Any] = {name: _map(path, start, entry) for name, entry in entries.items()}
            return cls(**arrays, **json.loads(metadata["header"]))
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise OSError(
                f"The exit table {path} is cut short or damaged ({error}): copy it again, or make it anew."
            ) from error


def _map(path: Path, start: int, entry: dict[str, Any]) -> Array:
    """One array of a safetensors file; a large one stays on disk."""
    low, high = entry["data_offsets"]
    kind, shape = _NUMPY_TYPES[entry["dtype"]], tuple(entry["shape"])
    if high - low != math.prod(shape) * np.dtype(kind).itemsize or start + high > path.stat().st_size:
        raise ValueError("its data end too early")
    mapped = np.memmap(path, dtype=kind, mode="r", offset=start + low, shape=shape)
    return mapped if high - low >= MAPPED_FROM else np.array(mapped)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON at the start of a safetensors file, and where its data begins."""
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        text = file.read(length) if 0 < length <= _LONGEST_HEADER else b""
    try:
        entries = json.loads(text) if len(text) == length else None
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise OSError(f"{path} is not an exit table, or is cut short: copy it again, or make it anew.")
    return entries, 8 + length


def digest_rows(columns: Sequence[Sequence[str]]) -> Array:
    """A digest of every row's text, or pair of texts: columns of texts to (rows,) uint64."""
    digests = [
        hashlib.blake2b(json.dumps(row).encode(), digest_size=8).digest()  # as JSON a pair is no longer text
        for row in zip(*columns, strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8").copy()
