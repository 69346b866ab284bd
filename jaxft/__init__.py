"""jaxft: fine-tune diffusion, LLaMA-family and image-token models in JAX, back to PyTorch."""

from typing import Any

__version__ = "0.1.0"


def load(path_or_id: str, dtype: str = "float32") -> Any:
    """A pretrained model for a notebook: `model(tokens)` gives fp32 logits [B, T, V].

    `path_or_id` is a Hugging Face folder, a .gguf file, `pip:PACKAGE` or a hub id; `dtype` is that
    of the parameters. Raises `jaxft.core.errors.UserError` for what is absent or not supported.
    """
    from jaxft.tasks.llm.opened import load as load_llm  # importing jaxft itself touches no device

    return load_llm(path_or_id, dtype)
