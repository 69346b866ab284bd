"""Texts: token rows, their masks and how they share rows."""
