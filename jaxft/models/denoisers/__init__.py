"""Denoisers: networks that predict noise, velocity or data from a noisy latent."""
