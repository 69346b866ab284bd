"""What every task stands on: config, parameters, sharding, optimiser, step, checkpoint, metrics."""
