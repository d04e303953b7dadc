"""The metric module of the `evaluate` library, loaded by its path and without a hub."""

import numpy as np
import pytest

from transformers_badge.evaluation import METRIC


@pytest.fixture(scope="module")
def metric():
    import evaluate

    return evaluate.load(METRIC)


def test_layer_speedup_and_agreement_by_hand(metric):
    result = metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0], exit_layers=[1, 3, 2, 6], blocks=6)
    assert result == {"layer_speedup": 2.0, "mean_exit_layer": 3.0, "agreement": 0.75}


def test_it_adds_batches_as_any_metric_does(metric):
    for start in (0, 2):
        columns = {"predictions": [0, 1, 1, 0], "references": [0, 1, 0, 0], "exit_layers": [1, 3, 2, 6]}
        metric.add_batch(**{name: np.array(values[start : start + 2]) for name, values in columns.items()})
    assert metric.compute(blocks=6)["agreement"] == 0.75


def test_more_layers_than_blocks_are_named(metric):
    with pytest.raises(ValueError, match="exit_layers must be between 0 and blocks=4, got 6 to 6"):
        metric.compute(predictions=[0], references=[0], exit_layers=[6], blocks=4)
