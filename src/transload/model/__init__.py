"""The model itself. torch is imported by worker processes only."""
