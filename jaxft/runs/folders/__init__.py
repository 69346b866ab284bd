"""Folders of a run: its own, those that it reads, and its exports."""
