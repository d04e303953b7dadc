"""What a policy has to meet, what it does to rows in whole numbers, and the p-value of the one given the other."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from transformers_badge.calibration.bounds import binomial_p_value, paired_p_value, rows_needed
from transformers_badge.calibration.replay import agreement, at_exits, correctness
from transformers_badge.exit_table import ExitTable


Array = np.ndarray[Any, np.dtype[Any]]
Risk = Literal["disagreement", "error_increase"]

RISKS: dict[str, str] = {
    "disagreement": "the share of rows answered otherwise than at full depth",
    "error_increase": "the increase in the share of wrong answers over full depth",
}

# Calibrating again and again, or at thresholds that differ little, meets the same counts many times.
_paired_p_value = lru_cache(maxsize=4096)(paired_p_value)


@dataclass(frozen=True)
class Counts:
    """What a policy does to the certifying rows, in whole numbers."""

    rows: int
    changed: int
    lost: int
    gained: int
    wrong: tuple[int, ...]  # by class, where there are labels
    right: tuple[int, ...]


@dataclass(frozen=True)
class Demand:
    """What has to hold, and how sure it has to be."""

    risk: Risk
    max_risk: float | None
    min_class_accuracy: float | None
    confidence: float

    @property
    def level(self) -> float:
        """How often what is shown may be wrong."""
        return 1 - self.confidence

    @property
    def needs_labels(self) -> bool:
        """Whether it is about right answers."""
        return self.risk == "error_increase" or self.min_class_accuracy is not None

    def check_labels(self, labels: Any) -> None:
        """See that there are labels where they are needed.

        Raises:
            ValueError: they are `None`.
        """
        if labels is None and self.needs_labels:
            what = "risk='error_increase'" if self.risk == "error_increase" else "min_class_accuracy"
            raise ValueError(f"{what} needs labels, and the rows have none; risk='disagreement' needs none.")

    def p_value(self, counts: Counts) -> float:
        """The largest of the p-values of the single demands: all have to hold, so each is tested at the full level."""
        values = [0.0]
        if self.max_risk is not None:
            values.append(self.risk_p_value(counts.changed, counts.lost, counts.gained, counts.rows))
        if self.min_class_accuracy is not None:
            values += self.class_p_values(counts)
        return max(values)

    def class_p_values(self, counts: Counts) -> list[float]:
        """For every class the p-value of "its accuracy is lower than asked for"; 1 where it has no rows."""
        assert self.min_class_accuracy is not None
        return [
            binomial_p_value(wrong, wrong + right, 1 - self.min_class_accuracy)
            for wrong, right in zip(counts.wrong, counts.right, strict=True)
        ]

    def risk_p_value(self, changed: int, lost: int, gained: int, rows: int) -> float:
        """The p-value of "the risk is larger than allowed"."""
        assert self.max_risk is not None
        if self.risk == "disagreement":
            return binomial_p_value(changed, rows, self.max_risk)
        return _paired_p_value(lost, gained, rows, self.max_risk, self.level)

    def rows_needed(self, counts: Counts) -> int | None:
        """Certifying rows with which counts in these proportions would do. `None`: no number of rows would."""

        def p_value(rows: int) -> float:
            scale = rows / counts.rows

            def scaled(count: int) -> int:
                return int(count * scale)

            return self.p_value(
                Counts(
                    rows,
                    scaled(counts.changed),
                    scaled(counts.lost),
                    scaled(counts.gained),
                    tuple(map(scaled, counts.wrong)),
                    tuple(map(scaled, counts.right)),
                )
            )

        return rows_needed(p_value, self.level)


def losses_at_exits(table: ExitTable, risk: Risk) -> Array:
    """What it adds to a risk if a row leaves at an exit: (rows, exits)."""
    if risk == "disagreement":
        return (~agreement(table)).astype(np.float64)
    right = correctness(table).astype(np.float64)
    return np.asarray(right[:, -1:] - right)


def counting(table: ExitTable) -> Callable[[Array], Counts]:
    """A function from the exits that the rows of a table take, (rows,), to what they find there.

    What every exit answers is worked out once, since calibrating counts at hundreds of thresholds.
    """
    agrees = agreement(table)
    right = None if table.labels is None else correctness(table)
    classes = len(table.label_names)

    def count(taken: Array) -> Counts:
        changed = int((~at_exits(agrees, taken)).sum())
        if right is None:
            return Counts(len(taken), changed, 0, 0, (), ())
        early, full = at_exits(right, taken), right[:, -1]
        wrong_by_class: tuple[int, ...] = ()
        right_by_class: tuple[int, ...] = ()
        if table.labels is not None and table.labels.ndim == 1:
            wrong_by_class = tuple(int(n) for n in np.bincount(table.labels[~early], minlength=classes))
            right_by_class = tuple(int(n) for n in np.bincount(table.labels[early], minlength=classes))
        lost, gained = int((full & ~early).sum()), int((~full & early).sum())
        return Counts(len(taken), changed, lost, gained, wrong_by_class, right_by_class)

    return count
