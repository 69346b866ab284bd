"""Directions of updates that optax lacks or computes otherwise."""
