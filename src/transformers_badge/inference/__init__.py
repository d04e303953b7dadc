"""Running a trained model over data."""
