"""Measuring: curves from exit tables, timings side by side, records, pictures, and a metric for `evaluate`."""

from pathlib import Path


METRIC = str(Path(__file__).with_name("early_exit_metric"))  # evaluate.load(METRIC)
