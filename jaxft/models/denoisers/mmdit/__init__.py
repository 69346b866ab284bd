"""The transformer of Stable Diffusion 3."""
