"""Runs: from a config to a compiled step on a mesh, and back from a checkpoint."""
