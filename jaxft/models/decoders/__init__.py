"""Decoders: causal language models, their configs, weight tables and generation."""
