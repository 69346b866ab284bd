"""The Stable Diffusion task."""
