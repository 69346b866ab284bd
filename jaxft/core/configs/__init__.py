"""Configs: the keys of all tasks, their files and values, and the names that others use."""
