"""Noise processes: times, noising, targets, weights, and the samplers that undo them."""
