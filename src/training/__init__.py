"""Training with Lightning: module, optimization, strategies, checkpoints, resumption and tracking."""
