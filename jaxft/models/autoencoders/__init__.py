"""Autoencoders: networks between pictures and latents or codes."""
