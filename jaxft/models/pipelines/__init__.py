"""Pipelines: several networks as one model, opened from one folder or file."""
