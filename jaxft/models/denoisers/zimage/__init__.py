"""The transformer of Z-Image."""
