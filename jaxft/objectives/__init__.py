"""Objectives: from a batch to an unreduced sum, its weight and metrics."""
