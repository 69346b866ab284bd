"""Texts: token rows, masks of trained tokens, and packing of short examples."""
