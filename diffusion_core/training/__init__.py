"""Training: loss, optimiser, EMA, loop, checkpoints."""
