"""Noise processes: times, noise, targets and weights of training, and samplers."""
