"""Weights in and out: safetensors, GGUF, Hugging Face folders, the rule engine, adapters."""
