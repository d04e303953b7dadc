"""The exit policy: when a row leaves. Plain, typed data that validates itself; `criteria_badge` gives it meaning."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .criteria_badge import COMBINATORS, CRITERIA, DIVERGENCES
from .exit_rule_badge import FEATURES


def check_keys(name: str, given: Any, known: Any) -> None:
    """See that all keys are known.

    Raises:
        ValueError: some are not; the message lists them and those that are.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{name} does not know {', '.join(map(repr, unknown))}; it takes {', '.join(sorted(known))}.")


def check_count(name: str, value: Any, meaning: str = "a whole number") -> None:
    """See that a value is a whole number of at least 1.

    Raises:
        ValueError: it is not; the message names it, and says what it means.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be {meaning}, at least 1, got {value!r}.")


def _is_number(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__float__") or getattr(value, "ndim", 0) != 0:
        return False
    try:
        float(value)
    except (OverflowError, TypeError, ValueError):
        return False
    return True


def _listed(value: Any) -> list[Any] | None:
    """The entries of a list, a tuple or an array; `None` where the value is none of these."""
    return None if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__") else list(value)


@dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """When a row leaves: a criterion, its dials and its thresholds.

    Args:
        criterion: `"entropy"`, `"max_probability"`, `"margin"`, `"dge"`, `"patience"`, `"pcee"`, `"f_pabee"`,
            `"f_pabee_averaged"`, `"beem"`, `"voting"`, `"fixed_depth"`, `"learned"`; or `"all_of"`, `"any_of"` several
            others. `criteria_badge` describes them.
        threshold: leave at an exit whose score is at most this. One number >= 0 for all exits, or one per exit, where
            `None` closes an exit (the last exit always answers, whatever stands for it). `None`: never leave early.
        window: dge only: how many exits, this one included, have to agree.
        confidence_weight: dge only: weight of the mean entropy over the window. 0 is divergence alone.
        divergence: dge and f_pabee: `"jensen_shannon"`, or `"kl"`, `"reverse_kl"`, `"symmetric_kl"` between neighbours.
        patience: how many exits in a row have to be ready, or for `"patience"` to confirm the prediction. Default: 1;
            for pcee and f_pabee, which are about patience, 2.
        temperature: what the criterion divides the logits by: a number > 0, or one per exit. `None`: 1. Returned
            logits are not changed.
        rule: learned only: (exits - 1, features + 1), for every inner exit the weights of the features and a
            constant, as `calibration` fits them.
        parts: all_of and any_of only: two or more policies, each with its own threshold. The combination is then left
            at a threshold of 1; a smaller one is stricter with every part alike.
        certificate: what was shown about this policy, and from what; written by `calibrate`. A policy that is changed
            in any other field loses it.

    Raises:
        ValueError: a value outside what is written above; the message names the field.
    """

    criterion: str = "max_probability"
    threshold: float | tuple[float | None, ...] | None = None
    window: int = 2
    confidence_weight: float = 1.0
    divergence: str = "jensen_shannon"
    patience: int | None = None
    temperature: float | tuple[float, ...] | None = None
    rule: tuple[tuple[float, ...], ...] | None = None
    parts: "tuple[ExitPolicy, ...] | None" = None
    certificate: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        known = [*CRITERIA, *COMBINATORS]
        for name, choices in (("criterion", known), ("divergence", list(DIVERGENCES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}.")
        # A frozen dataclass can be normalised only this way; JSON brings lists and numpy its own scalars.
        if self.patience is None:
            object.__setattr__(self, "patience", 2 if self.criterion in ("pcee", "f_pabee", "f_pabee_averaged") else 1)
        for name in ("window", "patience"):
            value = getattr(self, name)
            check_count(name, value, "a whole number of exits")
            object.__setattr__(self, name, int(value))
        weight = self.confidence_weight
        if not (_is_number(weight) and math.isfinite(weight) and weight >= 0):
            raise ValueError(f"confidence_weight must be a finite number >= 0, got {weight!r}.")
        if self.criterion == "dge" and self.window == 1 and weight == 0:
            raise ValueError(
                "window=1 with confidence_weight=0 leaves nothing to score: give a window of at least 2, "
                "or a confidence_weight above 0."
            )
        if self.certificate is not None and not isinstance(self.certificate, Mapping):
            raise ValueError(f"certificate must be a dict, got {self.certificate!r}.")
        object.__setattr__(self, "confidence_weight", float(weight))
        object.__setattr__(self, "threshold", self._normalised_threshold())
        object.__setattr__(self, "temperature", self._normalised_temperature())
        object.__setattr__(self, "rule", self._normalised_rule())
        object.__setattr__(self, "parts", self._normalised_parts())

    def _normalised_threshold(self) -> float | tuple[float | None, ...] | None:
        value: Any = self.threshold
        if value is None:
            return None
        if _is_number(value):
            return self._checked_threshold(value)
        entries = _listed(value)
        if entries is None:
            raise ValueError(f"threshold must be a number, a list with one per exit, or None, got {value!r}.")
        return tuple(None if item is None else self._checked_threshold(item) for item in entries)

    @staticmethod
    def _checked_threshold(value: Any) -> float:
        if not _is_number(value) or math.isnan(value) or value < 0:
            raise ValueError(
                f"threshold must be a number >= 0 (scores are never negative), got {value!r}; use None to never leave."
            )
        return float(value)

    def _normalised_temperature(self) -> float | tuple[float, ...] | None:
        value: Any = self.temperature
        if value is None:
            return None
        if self.criterion in COMBINATORS:
            raise ValueError(f"temperature has no meaning for criterion={self.criterion!r}: give it to the parts.")
        entries = [value] if _is_number(value) else _listed(value)
        if not entries or not all(_is_number(t) and math.isfinite(t) and t > 0 for t in entries):
            raise ValueError(
                f"temperature must be a finite number > 0, a list with one per exit, or None, got {value!r}."
            )
        return float(value) if _is_number(value) else tuple(float(t) for t in entries)

    def _normalised_rule(self) -> tuple[tuple[float, ...], ...] | None:
        if self.criterion != "learned":
            return None
        if self.rule is None:
            raise ValueError(
                "criterion='learned' needs a rule, which has to be fitted to the model: call "
                "transformers_badge.calibrate, or the command transformers-badge calibrate."
            )
        rows = [_listed(row) for row in _listed(self.rule) or []]
        expected = len(FEATURES) + 1
        if not rows or not all(
            row is not None and len(row) == expected and all(_is_number(w) and math.isfinite(w) for w in row)
            for row in rows
        ):
            raise ValueError(
                f"rule must list {expected} finite numbers for every exit but the last, got {self.rule!r}."
            )
        return tuple(tuple(float(weight) for weight in row or []) for row in rows)

    def _normalised_parts(self) -> "tuple[ExitPolicy, ...] | None":
        if self.criterion not in COMBINATORS:
            return None
        entries = _listed(self.parts)
        if entries is None or len(entries) < 2:
            raise ValueError(f"criterion={self.criterion!r} needs parts, two or more policies, got {self.parts!r}.")
        return tuple(type(self).of(part) for part in entries)

    @classmethod
    def of(cls, value: "ExitPolicy | Mapping[str, Any] | None", **overrides: Any) -> "ExitPolicy":
        """A policy from a policy, a dict or nothing (the default), with some fields overridden.

        Raises:
            ValueError: an unknown field, a bad value, or another criterion with the thresholds of the first.
        """
        if type(value) is cls and not overrides:
            return value  # frozen, and checked when it was made
        # Not isinstance: code loaded from a checkpoint can hold a second copy of this class.
        names = [field.name for field in fields(cls)]
        data = dict(value) if isinstance(value, Mapping) else {} if value is None else getattr(value, "__dict__", {})
        if value is not None and not isinstance(value, Mapping) and not set(names) <= set(data):
            raise ValueError(f"An exit policy must be an ExitPolicy or a dict, got {value!r}.")
        check_keys("An exit policy", {**data, **overrides}, names)
        stored = data.get("criterion", cls.criterion)
        criterion = overrides.get("criterion", stored)
        if criterion != stored and criterion in (*CRITERIA, *COMBINATORS):
            if data.get("threshold") is not None and "threshold" not in overrides:
                raise ValueError(
                    f"The policy's threshold was chosen for criterion={stored!r}: "
                    f"pass a threshold together with criterion={criterion!r}."
                )
            data = {name: data[name] for name in data if name != "patience"}  # its default depends on the criterion
        if overrides:
            data = {**data, "certificate": None}  # what was shown was shown of another policy
        return cls(**{**data, **overrides})

    def thresholds(self, num_exits: int) -> list[float | None]:
        """One threshold per exit; `None` where nobody leaves.

        Raises:
            ValueError: the policy (threshold, temperature, rule, a part) was made for another number of exits.
        """
        for name in ("threshold", "temperature"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != num_exits:
                raise ValueError(
                    f"{name} lists {len(value)} numbers, but the model has {num_exits} exits: give one per "
                    "exit (that of the last never counts), or a single number."
                )
        if self.rule is not None and len(self.rule) != num_exits - 1:
            raise ValueError(
                f"rule was fitted to a model with {len(self.rule) + 1} exits, but this one has {num_exits}: calibrate "
                "this model."
            )
        for part in self.parts or ():
            part.thresholds(num_exits)
        return list(self.threshold) if isinstance(self.threshold, tuple) else [self.threshold] * num_exits

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON can hold it; what is not set is left out."""
        data = {name: _as_json(getattr(self, name)) for name in (field.name for field in fields(self))}
        return {name: value for name, value in data.items() if value is not None or name == "threshold"}


def _as_json(value: Any) -> Any:
    if isinstance(value, ExitPolicy):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _as_json(item) for name, item in value.items()}
    return value
