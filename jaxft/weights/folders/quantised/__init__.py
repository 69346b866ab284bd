"""Checkpoints in fewer bits: those that are read, as they are or decoded, and those refused."""
