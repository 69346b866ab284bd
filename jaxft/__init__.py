"""jaxft: fine-tune diffusion, LLaMA-family and image-token models in JAX, back to PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxft.loading import Loaded

__version__ = "0.1.0"


def load(path_or_id: str, dtype: str = "float32") -> Loaded:
    """Return a pretrained model of any family for a notebook.

    `path_or_id` is a Hugging Face folder, a single file (.gguf, .safetensors), `pip:PACKAGE`,
    `demo:NAME` or a hub id. `dtype` is the dtype of the parameters.

    The result has `params`, `config`, `model`, and a `tokenizer` that may be None. For a language
    model, `loaded(tokens)` returns fp32 logits [B, T, V], and `loaded.generate(prompts)` returns
    texts. For Stable Diffusion and image-token models, `loaded.sample(prompts)` returns pictures,
    uint8 [N, Y, X, 3]. For an autoencoder, `loaded(images)` returns the images, encoded and
    decoded. Raises `jaxft.core.errors.UserError` for a model that is absent or not supported.
    """
    from jaxft.loading import load as load_any  # importing jaxft itself touches no device

    return load_any(path_or_id, dtype)
