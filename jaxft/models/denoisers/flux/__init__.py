"""The transformer of FLUX.1."""
