"""Choosing thresholds from stored exit logits: numpy, no model."""
