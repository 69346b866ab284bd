"""The base of every task: config, parameters, sharding, optimiser, step, checkpoint, metrics."""
