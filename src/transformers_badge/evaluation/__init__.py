"""Measuring: timings side by side, and pictures."""
