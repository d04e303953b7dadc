"""A digest of the rows that a checkpoint was trained on, to warn before it is calibrated or evaluated on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformers_badge.exit_table import ExitTable, digest_rows


FILE = "training_rows.json"
KEPT = 1024  # of the digests the smallest are kept: a fair sample of the rows, and the same of any copy of them


def save_training_rows(folder: Path, columns: Sequence[Sequence[str]]) -> None:
    """Write the digests of a sample of the rows, columns of texts, into a checkpoint."""
    digests = np.unique(digest_rows(columns))
    sample = [f"{digest:016x}" for digest in digests[:KEPT]]
    (folder / FILE).write_text(json.dumps({"distinct_rows": len(digests), "smallest_digests": sample}) + "\n")


def share_trained_on(folder: Path, table: ExitTable) -> float | None:
    """The share of a table's rows that a checkpoint was trained on, as estimated; `None`: there is no telling."""
    path = Path(folder) / FILE
    if not path.exists() or table.row_digests is None:
        return None
    try:
        stored: dict[str, Any] = json.loads(path.read_text())
        sample = np.array([int(digest, 16) for digest in stored["smallest_digests"]], dtype=np.uint64)
        complete = stored["distinct_rows"] <= len(sample)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: remove it, and nothing will be known of the training rows.") from error
    if sample.size == 0:
        return None
    comparable = table.row_digests if complete else table.row_digests[table.row_digests <= sample.max()]
    return float(np.isin(comparable, sample).mean()) if comparable.size else None
