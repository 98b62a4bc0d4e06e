"""Data, objectives and measures for training."""
