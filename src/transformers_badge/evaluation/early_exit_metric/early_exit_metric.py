"""Layer speedup and agreement with full depth, as a module of the `evaluate` library. It needs nothing of this package,
so that it also works from a copy of this file.
"""

from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = "What early exit saves, in layers, and how many of its answers are those at full depth."
_INPUTS = """
Args:
    predictions: class indices answered with early exit.
    references: class indices answered at full depth.
    exit_layers: how many blocks ran for every row.
    blocks: how many blocks the encoder has.
Returns:
    layer_speedup: blocks / mean exit layer.
    mean_exit_layer: mean of exit_layers.
    agreement: share of rows answered as at full depth.
Example:
    >>> metric = evaluate.load(transformers_badge.evaluation.METRIC)
    >>> metric.compute(predictions=[0, 1], references=[0, 0], exit_layers=[1, 3], blocks=6)
    {'layer_speedup': 3.0, 'mean_exit_layer': 2.0, 'agreement': 0.5}
"""
_CITATION = "doi 10.18653/v1/2023.acl-industry.48"


class EarlyExitMetric(evaluate.Metric):
    """Layer speedup, mean exit layer, agreement."""

    def _info(self) -> Any:
        columns = {name: datasets.Value("int64") for name in ("predictions", "references", "exit_layers")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(columns),
        )

    def _compute(self, predictions: Any, references: Any, exit_layers: Any, blocks: int) -> dict[str, float]:
        layers = np.asarray(exit_layers)
        if layers.min() < 0 or layers.max() > blocks:
            raise ValueError(
                f"exit_layers must be between 0 and blocks={blocks}, got {layers.min()} to {layers.max()}."
            )
        mean = float(layers.mean())
        return {
            "layer_speedup": blocks / mean if mean else float("inf"),
            "mean_exit_layer": mean,
            "agreement": float((np.asarray(predictions) == np.asarray(references)).mean()),
        }
