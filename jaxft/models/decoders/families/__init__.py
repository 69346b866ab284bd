"""Families of causal language models: config.json, weight table and registration of each."""
