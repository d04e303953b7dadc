"""Metrics for Trainer."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def compute_exit_metrics(prediction: Any, exit_layers: Sequence[int] | None = None) -> dict[str, float]:
    """Accuracy of every exit, usable as it stands as Trainer's `compute_metrics`.

    Single-label: share of rows whose class is right. Multi-label (float labels): share of single answers that are
    right, at probability 0.5. Regression (one label): mean squared error, under names that say so.

    Args:
        prediction: Trainer's `EvalPrediction`; its predictions are (logits, exit_logits), with exit_logits of the shape
            (rows, exits, labels).
        exit_layers: depths of the exits, to name the metrics by. Default: 1, 2, 3, ..., which is wrong of a model that
            has exit 0 or leaves out depths.

    Returns:
        `accuracy` (or `mse`) of the last exit, and `accuracy_exit_<layer>` of each.

    Raises:
        ValueError: the predictions hold no exit logits, or as many exits as there are layers.
    """
    predictions, labels = prediction.predictions, np.asarray(prediction.label_ids)
    exit_logits = predictions[1] if isinstance(predictions, tuple) and len(predictions) > 1 else predictions
    exit_logits = np.asarray(exit_logits)
    if exit_logits.ndim != 3:
        raise ValueError(
            f"compute_exit_metrics needs the exit logits (rows, exits, labels) among the predictions, got the shape "
            f"{exit_logits.shape}: do not list 'exit_logits' in ignore_keys."
        )
    layers = range(1, exit_logits.shape[1] + 1) if exit_layers is None else exit_layers
    if len(layers) != exit_logits.shape[1]:
        raise ValueError(f"exit_layers names {len(layers)} exits, but the predictions hold {exit_logits.shape[1]}.")
    name, values = "accuracy", exit_accuracy(exit_logits, labels)
    if exit_logits.shape[2] == 1:
        targets = labels.reshape(len(labels), 1, 1)
        name, values = "mse", np.square(exit_logits - targets).mean(axis=(0, 2))
    metrics = {f"{name}_exit_{layer}": float(value) for layer, value in zip(layers, values, strict=True)}
    return {name: float(values[-1]), **metrics}


def exit_accuracy(exit_logits: Any, labels: Any) -> Any:
    """Accuracy of every exit: logits (rows, exits, labels) and labels (rows,) or (rows, labels) to (exits,)."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == np.shape(exit_logits)[2]:
        return ((np.asarray(exit_logits) > 0) == (labels[:, None] > 0.5)).mean(axis=(0, 2))
    return (np.asarray(exit_logits).argmax(axis=-1) == labels.reshape(-1, 1)).mean(axis=0)
