"""jaxft: fine-tune diffusion, LLaMA-family and image-token models in JAX, back to PyTorch."""

__version__ = "0.1.0"
